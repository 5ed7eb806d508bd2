"""Which module of a model a name in a file of the diffusion tools means.

Such a file holds the parts of a pipeline side by side, each under a prefix: ``lora_unet_``, ``unet.``. A part is a
child of the model with the part's name, the model itself, or what the caller's ``prefix`` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import FormatError, listed, nearest
from .bases import Base
from .content import Prefix, as_mapping

# Of a writer: one for all, or {module path: prefix}.
WritePrefix = str | Mapping[str, str] | None

_UNET = ("unet", "transformer", "model.diffusion_model", "diffusion_model")
_TEXT = ("text_encoder", "cond_stage_model.transformer", "conditioner.embedders.0.transformer")
# {prefix: what the part is called in models, the likeliest first}. After "_" the rest of a name is underscored,
# after "." it is dotted.
COMPONENTS: dict[str, tuple[str, ...]] = {
    "lora_unet_": _UNET,
    "lora_prior_unet_": ("prior",),
    "lora_transformer_": ("transformer",),
    "lora_te_": _TEXT,
    "lora_te1_": _TEXT,
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3",),
    "lora_prior_te_": _TEXT,
    "lycoris_": ("", "transformer", "unet"),
    "diffusion_model.": _UNET,
    "text_encoders.clip_l.transformer.": _TEXT,
    "text_encoders.clip_g.transformer.": ("text_encoder_2",),
    "text_encoders.": ("text_encoders",),
    "unet.": ("unet",),
    "transformer.": ("transformer",),
    "transformer_2.": ("transformer_2",),
    "text_encoder.": ("text_encoder",),
    "text_encoder_2.": ("text_encoder_2",),
    "text_encoder_3.": ("text_encoder_3",),
    "prior.": ("prior",),
    "controlnet.": ("controlnet",),
}
_CLIP = "text_model"  # a level that CLIP's text encoder had before transformers 5, and files still have


def component_of(head: str) -> str:
    """The prefix a name begins with; empty where it is none of the known."""
    return max((prefix for prefix in COMPONENTS if _begins(head, prefix)), key=len, default="")


def _begins(head: str, prefix: str) -> bool:
    """Whether a name has a prefix. Names in which "." is written "_" hold no dot: "a_" does not begin "a_2.b"."""
    if prefix.endswith("."):
        return f"{head}.".startswith(prefix)
    return head.startswith(prefix) and (not prefix or "." not in head)


# A part's name in a model, by the name of its class; of "Transformer" torch's own classes are none.
_CLASSES = (("UNet2DConditionModel", "unet"), ("CLIPText", "text_encoder"), ("Transformer", "transformer"))
_PARTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "prior",
    "controlnet",
)


def parts_of(owners: Iterable[str], base: Base | None) -> dict[str, str]:
    """{module path: the part's name} of a model that is a part, or whose children are; empty where neither shows.

    Args:
        owners: the adapted modules, all of which have to be in a part.
        base: the model.
    """
    children = {owner.partition(".")[0] for owner in owners}
    if children and children <= set(_PARTS):
        return {child: child for child in children}
    model = base.module("") if base is not None else None
    for kind in type(model).__mro__:
        for text, part in _CLASSES:
            if text in kind.__name__ and not kind.__module__.startswith("torch."):
                return {"": part}
    return {}


def prefixes_below(prefix: str | Mapping[str, str]) -> dict[str, str]:
    """{module path: prefix} of what a caller gives a writer."""
    given = as_mapping({"": prefix} if isinstance(prefix, str) else prefix, "module paths to prefixes")
    return {path.rstrip("."): text for path, text in given.items()}


def place_below(owner: str, prefixes: Mapping[str, str]) -> tuple[str, str] | None:
    """(the prefix of the deepest path above a module, the module's path below that); None without one."""
    paths = [path for path in prefixes if not path or f"{owner}.".startswith(f"{path}.")]
    path = max(paths, key=len, default=None)
    return None if path is None else (prefixes[path], owner[len(path) :].lstrip("."))


@dataclass(frozen=True)
class _Part:
    """The names of one part, and the modules it may be."""

    prefix: str
    roots: tuple[str, ...]
    rest: dict[str, str]  # {name in the file: what follows the prefix}


class Modules:
    """A base's modules that own parameters, by dotted and by underscored name."""

    def __init__(self, base: Base) -> None:
        self.parameters = set(base.names)
        self.owners = dict.fromkeys(name.rpartition(".")[0] for name in base.names)
        self._below: dict[str, dict[str, list[str]]] = {}

    def has(self, root: str) -> bool:
        """Whether there is such a module, with parameters somewhere below."""
        return not root or any(owner == root or owner.startswith(f"{root}.") for owner in self.owners)

    def below(self, root: str) -> dict[str, list[str]]:
        """{underscored name: dotted paths} of the modules below a root."""
        if root not in self._below:
            names = self._below[root] = {}
            start = f"{root}." if root else ""
            for owner in self.owners:
                if f"{owner}.".startswith(start):
                    names.setdefault(owner[len(start) :].replace(".", "_"), []).append(owner)
        return self._below[root]

    def find(self, root: str, rest: str, *, underscored: bool) -> list[str]:
        """The modules or parameters a name may mean below a root; more than one where "_" hides a ".".

        CLIP's ``text_model`` level is tried both ways.
        """
        for name in _with_and_without(rest, "_" if underscored else "."):
            path = ".".join(part for part in (root, name) if part)
            if underscored and name in self.below(root):
                return self.below(root)[name]
            if not underscored and (path in self.owners or path in self.parameters):
                return [path]
        return []


def _with_and_without(name: str, separator: str) -> list[str]:
    level = _CLIP + separator
    return [name, name[len(level) :] if name.startswith(level) else level + name]


def locate(heads: Iterable[str], base: Base, prefix: Prefix, file: str, *, dotted: bool = False) -> dict[str, str]:
    """{name in the file: the module's or parameter's path}, for the part of the file that ``prefix`` selects.

    Args:
        heads: the names of the file's modules.
        base: the model.
        prefix: the prefix to load, whose names then are the model's; or {prefix: module path}.
        file: the file's name, for messages.
        dotted: no name in the file stands for one with dots.

    Raises:
        FormatError: a part or a name that is not in the model, a name that fits two modules, two names that mean
            one module, or a ``prefix`` that selects nothing.
    """
    modules = Modules(base)
    parts = _parts(list(heads), modules, prefix, file)
    located: dict[str, str] = {}
    absent: list[_Part] = []
    for part in parts:
        best = max((_located(part, root, modules, dotted) for root in part.roots), key=len)
        if not best:
            absent.append(part)
        elif len(best) < len(part.rest):
            _refuse_unknown(part, best, modules, file)
        for head, paths in best.items():
            if len(paths) > 1:
                raise FormatError(
                    f"{file!r}: {head!r} may be any of {listed(paths)}, which are one name once '.' is '_'; use a "
                    "format with dotted names, such as 'loraparam' or 'peft'"
                )
            located[head] = paths[0]
    if absent:
        _refuse_absent(absent, parts, modules, file)
    _refuse_twice(located, file)
    return located


def _located(part: _Part, root: str, modules: Modules, dotted: bool) -> dict[str, list[str]]:
    found = {}
    for head, rest in part.rest.items():
        underscored = not dotted and "." not in head
        found[head] = modules.find(root, rest, underscored=underscored)
    return {head: paths for head, paths in found.items() if paths}


def _parts(heads: list[str], modules: Modules, prefix: Prefix, file: str) -> list[_Part]:
    """The file's parts that are asked for, by prefix."""
    chosen = _chosen(heads, modules, prefix, file) if prefix is not None else None
    by_prefix: dict[str, dict[str, str]] = {}
    for head in heads:
        if chosen is None:
            starts = [component_of(head)]
        else:
            starts = sorted((known for known in chosen if _begins(head, known)), key=len)
        if starts:
            by_prefix.setdefault(starts[-1], {})[head] = head[len(starts[-1]) :]
    if not by_prefix:
        raise FormatError(f"{file!r}: prefix={prefix!r} selects nothing; in the file: {listed(_shown(heads))}")
    if chosen is not None:
        return [_Part(start, (chosen[start],), rest) for start, rest in by_prefix.items()]
    return [_Part(start, _roots(start, modules), rest) for start, rest in by_prefix.items()]


def _roots(prefix: str, modules: Modules) -> tuple[str, ...]:
    """Where a part may be: a child of its name, else the model itself."""
    named = [name for name in COMPONENTS.get(prefix, ()) if modules.has(name)]
    # As it stands: "transformer." may begin a model's own names, as GPT-2's.
    literal = [prefix.rstrip(".")] if prefix.endswith(".") and modules.has(prefix.rstrip(".")) else []
    return tuple(dict.fromkeys([*literal, *named, ""]))


def _chosen(heads: list[str], modules: Modules, prefix: Prefix, file: str) -> dict[str, str]:
    """{prefix in the file, with its separator: module path} of what the caller asks for."""
    given = {prefix: ""} if isinstance(prefix, str) else prefix
    chosen: dict[str, str] = {}
    for name, place in as_mapping(given, "the file's prefixes to module paths").items():
        root = place.rstrip(".")
        if not modules.has(root):
            raise FormatError(
                f"prefix={prefix!r}: the model has no module {root!r}{nearest(root, modules.owners)}; the second of "
                "each pair is a module path"
            )
        for start in _spelled(name, heads):
            chosen[start] = root
    return chosen


def _spelled(name: str, heads: list[str]) -> list[str]:
    """The prefixes in the file that a caller's name means: the very one, or all of a part of this name."""
    bare = name.rstrip("._")
    if not bare:
        return [""]
    literal = [start for start in (f"{bare}.", f"{bare}_") if any(_begins(head, start) for head in heads)]
    return literal or [start for start in dict.fromkeys(map(component_of, heads)) if bare in COMPONENTS.get(start, ())]


def _shown(heads: Iterable[str]) -> list[str]:
    """The prefixes of a file, or the names that have none."""
    return list(dict.fromkeys(component_of(head) or head for head in heads))


def _refuse_unknown(part: _Part, best: Mapping[str, object], modules: Modules, file: str) -> None:
    unknown = [head for head in part.rest if head not in best]
    known = {name for root in part.roots for name in modules.below(root)}
    near = nearest(part.rest[unknown[0]].replace(".", "_"), known)
    raise FormatError(
        f"{file!r}: {len(unknown)} of {len(part.rest)} modules of {part.prefix!r} are not in the model: "
        f"{listed(unknown)}{near}"
    )


def _refuse_absent(absent: list[_Part], parts: list[_Part], modules: Modules, file: str) -> None:
    first = absent[0]
    names = ", ".join(f"{part.prefix!r} ({len(part.rest)} modules)" for part in absent)
    others = [part.prefix for part in parts if part not in absent]
    head, rest = next(iter(first.rest.items()))
    near = nearest(rest.replace(".", "_"), {name for root in first.roots for name in modules.below(root)})
    way = f"; prefix={others[0]!r} loads that part alone" if others else "; prefix= says which module a part is for"
    raise FormatError(f"{file!r}: parts that are not in the model: {names}, such as {head!r}{near}{way}")


def _refuse_twice(located: Mapping[str, str], file: str) -> None:
    first: dict[str, str] = {}
    for head, path in located.items():
        if path in first:
            raise FormatError(
                f"{file!r}: {first[path]!r} and {head!r} both are {path!r} of the model; prefix= selects one part"
            )
        first[path] = head
