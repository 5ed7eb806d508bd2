"""The target language: which parameters, or parts of them, a pattern means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import slices
from .catalogue import Catalogue, Leaf, Place
from .errors import TargetError, listed, nearest
from .layouts import is_transformers_conv1d

# One pattern: a string, a compiled regex, a module type, or a predicate on (path, module, parameter name).
Pattern = Any
Targets = Any  # a pattern, or a list, tuple or set of them

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Match:
    """One parameter a pattern means, at the name it was found under, with the slices asked for."""

    leaf: Leaf
    place: Place
    items: tuple[str, ...] = ()


def patterns(targets: Targets) -> list[Pattern]:
    """A target specification as a list of single patterns."""
    return list(targets) if isinstance(targets, (list, tuple, set, frozenset)) else [targets]


def describe(pattern: Pattern) -> str:
    """A pattern as plans and errors print it."""
    if isinstance(pattern, re.Pattern):
        return f"re.compile({pattern.pattern!r})"
    if callable(pattern):
        return getattr(pattern, "__name__", repr(pattern))
    return str(pattern)


def find(pattern: Pattern, known: Catalogue) -> list[Match]:
    """The parameters one pattern means, each once.

    Raises:
        TargetError: nothing matches.
    """
    matches: dict[int, Match] = {}
    for match in _find(pattern, known):
        matches.setdefault(id(match.leaf), match)
    if not matches:
        raise TargetError(_nothing_matches(pattern, known))
    return list(matches.values())


def find_inside(pattern: Pattern, known: Catalogue) -> list[Leaf]:
    """As ``find``, but a module stands for every parameter in it: what ``exclude`` and ``train`` mean."""
    if isinstance(pattern, str) and slices.split_pattern(pattern)[1]:
        raise TargetError(f"{pattern!r}: exclude and train take whole parameters; leave out the [slice]")
    modules = {path for path, _ in _matching_modules(pattern, known)}
    leaves = {id(leaf): leaf for path, leaf in known.leaves.items() if not modules.isdisjoint(_above(path))}
    leaves.update({id(match.leaf): match.leaf for match in _find(pattern, known)})
    if not leaves and not modules:
        raise TargetError(_nothing_matches(pattern, known))
    return list(leaves.values())


def _above(path: str) -> Iterator[str]:
    """The paths of the modules a parameter is in."""
    yield ""
    parts = path.split(".")[:-1]
    yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def _find(pattern: Pattern, known: Catalogue) -> Iterator[Match]:
    if isinstance(pattern, str) and pattern == ALL_LINEAR:
        yield from _all_linear(known)
        return
    path, items = slices.split_pattern(pattern) if isinstance(pattern, str) else (pattern, ())
    for module_path, module in _matching_modules(path, known):
        yield from _weights(module_path, module, items, known)
    names = _parameter_test(path)
    for leaf in known.unique():
        yield from (Match(leaf, place, items) for place in leaf.places if names(place))


def _matching_modules(pattern: Pattern, known: Catalogue) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(pattern, type):
        yield from ((path, module) for path, module in known.modules.items() if isinstance(module, pattern))
    elif isinstance(pattern, str) and pattern != ALL_LINEAR:
        regex = path_regex(pattern)
        yield from ((path, module) for path, module in known.modules.items() if path and regex.fullmatch(path))


def _parameter_test(pattern: Pattern) -> Callable[[Place], bool]:
    if isinstance(pattern, str):
        regex = path_regex(pattern)
        return lambda place: regex.fullmatch(place.path) is not None
    if isinstance(pattern, re.Pattern):
        return lambda place: pattern.fullmatch(place.path) is not None
    if isinstance(pattern, type):
        return lambda place: False
    if callable(pattern):
        return lambda place: bool(pattern(place.path, place.module, place.name))
    raise TargetError(
        f"target {pattern!r} of type {type(pattern).__name__}; allowed: a path such as 'q_proj' or "
        "'layers.*.self_attn.in_proj_weight[q,v]', 'all-linear', re.compile(...), a module type, "
        "a callable (path, module, parameter_name) -> bool, or a list of these"
    )


def path_regex(pattern: str) -> re.Pattern[str]:
    """A dotted path, or its last components, as a regex; ``*`` is one component, ``**`` any number.

    Example:
        >>> bool(path_regex("layers.*.q").fullmatch("model.layers.3.q"))
        True
        >>> bool(path_regex("proj").fullmatch("layers.3.q_proj"))
        False
    """
    any_number = r"(?:[^.]+(?:\.|$))*"
    regex, previous = any_number, "**"
    for component in pattern.split("."):
        if component != "**":
            name = re.escape(component).replace(r"\*", "[^.]*") if component != "*" else "[^.]+"
            regex += name + r"(?:\.|$)"
        elif previous != "**":  # two in a row mean no more than one, and cost a search
            regex += any_number
        previous = component
    return re.compile(regex)


def _all_linear(known: Catalogue) -> Iterator[Match]:
    for path, module in known.modules.items():
        linear = isinstance(module, (nn.Linear, nn.Bilinear, nn.MultiheadAttention))
        if linear or is_transformers_conv1d(module):
            for match in _weights(path, module, (), known):
                tied_to = (place.module for place in match.leaf.places)
                if not any(isinstance(other, (nn.Embedding, nn.EmbeddingBag)) for other in tied_to):
                    yield match


def _weights(path: str, module: nn.Module, items: tuple[str, ...], known: Catalogue) -> Iterator[Match]:
    """The weights a module stands for; a container stands for those of what it holds."""
    prefix = f"{path}." if path else ""
    names = _weight_names(module, prefix, known)
    for name in names:
        own_items = _share(items, module, name)
        if own_items is not None:
            yield Match(known.leaves[prefix + name], known.place(prefix + name), own_items)
    if not names:
        for name, child in module._modules.items():
            if child is not None and prefix + name in known.modules:
                inside = _weights(prefix + name, child, items, known)
                yield from (match for match in inside if len(match.leaf.shape) >= 2)


def _weight_names(module: nn.Module, prefix: str, known: Catalogue) -> list[str]:
    """The names, relative to the module, of the weights it stands for."""
    own = known.names[prefix.removesuffix(".")]
    if isinstance(module, nn.MultiheadAttention):
        packed = ["in_proj_weight"] if "in_proj_weight" in own else list(_SEPARATE)[:3]
        return [*packed, "out_proj.weight"]
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return [name for name in own if name.startswith("weight_")]
    if "weight" in own:
        return ["weight"]
    return [name for name in own if "bias" not in name and len(known.leaves[prefix + name].shape) >= 2]


# The letters of attention weights that are parameters of their own.
_SEPARATE = {"q_proj_weight": "q", "k_proj_weight": "k", "v_proj_weight": "v", "out_proj.weight": "o"}


def _share(items: tuple[str, ...], module: nn.Module, name: str) -> tuple[str, ...] | None:
    """What of a module's slices falls on one of its weights; None where nothing does."""
    if not items:
        return ()
    if isinstance(module, nn.MultiheadAttention) and set(items) <= set(_SEPARATE.values()):
        if name in _SEPARATE:
            return () if _SEPARATE[name] in items else None
        return tuple(item for item in items if item != "o") or None
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and all(item.isalpha() for item in items):
        return items if slices.letters_of(module, name) else None
    return items


def _nothing_matches(pattern: Pattern, known: Catalogue) -> str:
    shown = f"target {describe(pattern)!r} matches nothing"
    if pattern == ALL_LINEAR:
        return f"{shown}: the model has no Linear-like layer; name parameters, such as {_some(known)}"
    if not isinstance(pattern, str):
        return f"{shown}; the model's parameters are {_some(known)}"
    path = slices.split_pattern(pattern)[0]
    return f"{shown}{nearest(path, _suffixes(known, path.count('.') + 1)) or f'; the parameters are {_some(known)}'}"


def _some(known: Catalogue) -> str:
    return listed(known.leaves)


def _suffixes(known: Catalogue, components: int) -> Iterable[str]:
    for path in [*known.modules, *known.leaves]:
        if path:
            yield ".".join(path.split(".")[-components:])
            yield path
