"""Every parameter of a model under every name it has, whether or not adapters are on it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .marks import RECORD

# Modules that hold another one and stand for it: {class of torch's: the attribute}. They do not change a path, so that
# an adapter saved from a wrapped model fits the plain one.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OptimizedModule": "_orig_mod",
}


@dataclass(frozen=True)
class Place:
    """One name of a parameter: ``path`` is ``<module path>.<name>``."""

    path: str
    module: nn.Module
    name: str


@dataclass
class Leaf:
    """One parameter, with all its names: more than one when it is tied or its module is used twice.

    Attributes:
        places: its names, in the model's order; ``places[0]`` is the one shown by default.
        base: the tensor itself; None where an older parametrization (weight_norm) holds several.
        outdated: the reason it cannot be adapted, where a pre-parametrize hook recomputes it.
    """

    places: list[Place] = field(default_factory=list)
    base: Tensor | None = None
    outdated: str = ""

    @property
    def shape(self) -> torch.Size:
        """The shape the layer sees."""
        place = self.places[0]
        return self.base.shape if self.base is not None else shown_value(place.module, place.name).shape


@dataclass
class Catalogue:
    """The modules and parameters of a model, by path."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    leaves: dict[str, Leaf] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)  # of each module's own parameters

    def place(self, path: str) -> Place:
        """The place at a parameter's path."""
        return next(place for place in self.leaves[path].places if place.path == path)

    def unique(self) -> list[Leaf]:
        """Each parameter once."""
        return list({id(leaf): leaf for leaf in self.leaves.values()}.values())


def catalogue(model: nn.Module) -> Catalogue:
    """All parameters of ``model``, grouped by identity."""
    known = Catalogue()
    by_identity: dict[object, Leaf] = {}
    for module_path, module in walk(model):
        known.modules[module_path] = module
        names = known.names[module_path] = []
        for name, base, outdated in _own(module):
            identity = (id(module), name) if base is None else id(base)
            leaf = by_identity.setdefault(identity, Leaf(base=base, outdated=outdated))
            path = f"{module_path}.{name}" if module_path else name
            leaf.places.append(Place(path, module, name))
            known.leaves[path] = leaf
            names.append(name)
    return known


def walk(module: nn.Module, path: str = "", above: frozenset[int] = frozenset()) -> Iterator[tuple[str, nn.Module]]:
    """Every (path, module), under each of its names, without wrappers and the insides of parametrizations."""
    # A stack of its own: recursive generators hand each module up through all the levels above it.
    waiting = [(path, module, above)]
    while waiting:
        path, module, above = waiting.pop()
        if id(module) in above:
            continue
        wrapped = _wrapped(type(module))
        if wrapped is None:
            yield path, module
        if module._modules:
            inside = above | {id(module)}
            waiting += [
                (path if name == wrapped else f"{path}.{name}" if path else name, child, inside)
                for name, child in reversed(list(module._modules.items()))
                if child is not None and not (name == "parametrizations" and isinstance(child, nn.ModuleDict))
            ]


# {class: what ``_wrapped`` says of it}; a walk asks at every module.
_wrapping: weakref.WeakKeyDictionary[type, str | None] = weakref.WeakKeyDictionary()


def _wrapped(cls: type) -> str | None:
    """The attribute with the module that a module of this class stands for."""
    if cls not in _wrapping:
        own = (base.__name__ for base in cls.__mro__ if base.__module__.startswith("torch."))
        _wrapping[cls] = next((_WRAPPERS[name] for name in own if name in _WRAPPERS), None)
    return _wrapping[cls]


def parametrized(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """The parametrization lists on a module's own tensors, by name."""
    # A script module's container has no get().
    if "parametrizations" not in module._modules:
        return {}
    lists = module._modules["parametrizations"]
    if not isinstance(lists, nn.ModuleDict):
        return {}
    return {name: plist for name, plist in lists._modules.items() if isinstance(plist, parametrize.ParametrizationList)}


def shown_value(module: nn.Module, name: str) -> Tensor:
    """What reading the parameter yields, with nothing drawn or updated on the way (spectral_norm's vectors)."""
    plist = parametrized(module).get(name)
    with at_rest([] if plist is None else [plist]):
        value: Tensor = getattr(module, name)
        return value


@contextlib.contextmanager
def at_rest(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside: these parametrizations are in eval mode, in which they update nothing of their own."""
    inside = [part for module in modules for part in module.modules()]
    modes = [part.training for part in inside]
    try:
        for part in inside:
            part.training = False
        yield
    finally:
        for part, mode in zip(inside, modes, strict=True):
            part.training = mode


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor | None, str]]:
    """(name, base tensor, reason it cannot be adapted) of a module's own parameters."""
    outdated = _recomputed_by_hook(module)
    lists = parametrized(module)
    names = list(module._parameters.keys())
    for name in _original_order(module, names, list(lists)):
        if name in lists:
            original = lists[name]._parameters.get("original")
            # A parametrized buffer is no parameter.
            if original is not None or "original" not in lists[name]._buffers:
                yield name, original, ""
        elif (parameter := module._parameters[name]) is not None:
            yield name, parameter, next((why for n, why in outdated.items() if name in _hook_tensors(n)), "")
    for name, why in outdated.items():
        if name not in names:
            yield name, None, why


def _original_order(module: nn.Module, plain: list[str], parametrized_names: list[str]) -> list[str]:
    """A module's parameter names as they ran before any of them was parametrized, as far as known."""
    record = module.__dict__.get(RECORD)
    before = list(record.order) if record is not None else []
    known = [name for name in before if name in plain or name in parametrized_names]
    return known + [name for name in [*plain, *parametrized_names] if name not in known]


def _hook_tensors(name: str) -> tuple[str, ...]:
    return (name, *(f"{name}_{suffix}" for suffix in ("g", "v", "orig", "mask")))


def _recomputed_by_hook(module: nn.Module) -> dict[str, str]:
    """{attribute: reason} for weights that an old-style hook rewrites before each forward."""
    found = {}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            found[hook.name] = "nn.utils.weight_norm; use nn.utils.parametrizations.weight_norm instead"
        elif isinstance(hook, SpectralNorm):
            found[hook.name] = "nn.utils.spectral_norm; use nn.utils.parametrizations.spectral_norm instead"
        elif isinstance(hook, prune.BasePruningMethod):
            found[hook._tensor_name] = "nn.utils.prune; call prune.remove(module, name) first"
    return found
