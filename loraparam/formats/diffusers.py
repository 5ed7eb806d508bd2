"""diffusers: one safetensors file, ``pytorch_lora_weights.safetensors``.

Keys are ``<part>.<module path>.<leaf>``, or without the part where a single model was saved. A module's pair is
spelled as in PEFT (``lora_A.weight``), as in diffusers (``lora.down.weight``, ``lora_linear_layer.down.weight``), or
as before its release 0.22 (``attn1.processor.to_q_lora.down.weight``), mixed in one file.

s = alpha / r, with alpha from PEFT's config in the header; without the header alpha = r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError, nearest
from ..layouts import Layout
from ..methods import Full, LoRA
from ..methods.base import is_number
from .bases import Base
from .components import WritePrefix, locate
from .content import Content, Item, Prefix, relocate
from .diffusers_write import Module, heads
from .files import open_safetensors, parse_json, safetensors_bytes, write_whole
from .leaves import PAIRS, Group, Leaves, layout_for, matrices, read_groups, squeezed
from .pairs import Implied, Pair
from .peft_config import Config, parse
from .peft_shapes import from_groups
from .portable import joined, replacements, trained

NAME = "diffusers"
HINTS = ("prefix", "alpha")
OPTIONS = ("prefix",)
FILE = "pytorch_lora_weights.safetensors"
HEADER = "lora_adapter_metadata"

Alpha = float | str | Mapping[str, float] | None

# The attention's projections in the oldest spelling, by the attention they belong to.
_UNET = {"to_out": "to_out.0"}
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def _modern(head: str, end: str) -> str:
    """A module's path, from the name it had when processors held the pairs."""
    parent, _, last = head.rpartition(".")
    if not end.startswith("_lora.") and not parent.endswith(".processor"):
        return head
    parent = parent.removesuffix(".processor")
    names = _TEXT if parent.endswith("self_attn") else _UNET
    return f"{parent}.{names.get(last, last)}"


_LOKR = "LoKr (a Kronecker product) is not read; merge it with diffusers, and extract a LoRA from the merged weights"
REFUSED = dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"), _LOKR)
REFUSED["dora_scale"] = "diffusers drops it; format='kohya' reads it as LyCORIS does"
MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
LEAVES = Leaves(("alpha", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", *MAGNITUDES), REFUSED, _modern)
LEAVES.leaf_of |= {f".{leaf}": "magnitude" for leaf in MAGNITUDES}
_ENDS = (
    # Without ".weight" a key may be loralib's, which has no scale.
    *(half for pair in PAIRS[1:] for half in pair if half.endswith(".weight")),
    *(f".{leaf}" for leaf in (*MAGNITUDES, "lora_embedding_A", "lora_embedding_B")),
)


def recognises(path: Path) -> bool:
    """Whether this is such a file, or a folder that holds one under its usual name: told from the keys' ends."""
    path = _file(path)
    if not path.is_file():
        return False
    with open_safetensors(path) as file:
        found = [key for key in file.keys() if key.endswith(_ENDS)]  # noqa: SIM118 - a handle, not a dict
        peft = path.name == "adapter_model.safetensors" and HEADER not in (file.metadata() or {})
    if found and (peft or found[0].startswith("base_model.")):
        raise FormatError(
            f"{str(path)!r} holds PEFT's tensors, whose scale is in 'adapter_config.json'; give the directory with both"
        )
    return bool(found)


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def read(path: Path, base: Base | None, *, prefix: Prefix = None, alpha: Alpha = None) -> Content:
    """The adapter in a file.

    Args:
        path: the file, or a folder that holds one under its usual name.
        base: the model or checkpoint it is for; without it, shapes are those of the file's own Linear layers and
            convolutions.
        prefix: the part to load, whose name is dropped; or {part: module path}.
        alpha: what the file does not say: one number for all, or {module or key: number} as diffusers'
            ``network_alphas``; "rank" passes over alphas that stand beside the pairs.
    """
    path = _file(path)
    groups, metadata = read_groups(path, LEAVES)
    file = str(path)
    configs = _configs(metadata, file)
    alphas = _alphas(groups, alpha, configs, file)
    if base is None:
        located = {group.head: place for group in groups if (place := relocate(group.head, prefix)) is not None}
        base = Implied(groups, located)
    else:
        located = locate((group.head for group in groups), base, prefix, file, dotted=True)
    items: list[Item] = []
    for group in groups:
        if group.head in located:
            part, _, rest = group.head.partition(".")
            config, name = (configs[part], rest) if part in configs else (configs.get(""), group.head)
            module = _Module(group, located[group.head], base, config, alphas.get(group.head))
            items += module.items(name)
    return Content(file, tuple(items), metadata=metadata)


def _configs(metadata: Mapping[str, str], file: str) -> dict[str, Config]:
    """{part: config} of the header; "" is the part of a file without parts."""
    if HEADER not in metadata:
        return {}
    place = f"{file}, header {HEADER}"
    fields = parse_json(metadata[HEADER], repr(place))
    if not isinstance(fields, dict) or not fields:
        raise FormatError(f"{place!r}: allowed: an object with fields of PEFT's LoraConfig")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        part, _, field = key.rpartition(".")
        parts.setdefault(part, {})[field] = value
    return {part: _config(values, f"{place}, {part}" if part else place) for part, values in parts.items()}


def _config(values: dict[str, Any], place: str) -> Config:
    config = parse({"peft_type": "LORA", **values}, place)
    if config.start:
        raise FormatError(
            f"{place!r}: init_lora_weights={config.start!r} also changed the base; save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    return config


def _alphas(groups: list[Group], alpha: Alpha, configs: Mapping[str, Config], file: str) -> dict[str, float]:
    """{module's name: alpha} that the caller says."""
    if alpha != "rank":
        for group in groups:
            if "alpha" in group.tensors:
                raise group.error(
                    "alpha",
                    "diffusers passes over it for Stable Diffusion and uses it for Flux, ComfyUI uses it always; "
                    "alpha='rank' reads with s = 1, format='kohya' with s = alpha / r",
                )
    if alpha is None or alpha == "rank":
        return {}
    if configs:
        raise FormatError(f"{file!r} says its alphas in its header; leave out alpha={alpha!r}")
    if not isinstance(alpha, Mapping):
        if not is_number(alpha):
            raise FormatError(f"alpha={alpha!r}; allowed: a finite number, a mapping of names to such, or 'rank'")
        return {group.head: float(alpha) for group in groups}
    return _named_alphas(groups, alpha, file)


def _named_alphas(groups: list[Group], alpha: Mapping[str, float], file: str) -> dict[str, float]:
    heads = {group.head for group in groups}
    found = {}
    for key, value in alpha.items():
        name = str(key).removesuffix(".alpha")
        split = LEAVES.split(name)
        head = name if name in heads or split is None else split[0]
        if head not in heads or not is_number(value):
            what = f"no module {head!r} in {file!r}{nearest(head, heads)}" if head not in heads else "a finite number"
            raise FormatError(f"alpha: {key!r}: {value!r}; {what}")
        found[head] = float(value)
    return found


class _Module:
    """What a file says about one module."""

    def __init__(self, group: Group, place: str, base: Base, config: Config | None, alpha: float | None) -> None:
        self.group, self.base, self.config, self.alpha = group, base, config, alpha
        self.weight, self.bias = (f"{place}.{name}" if place else name for name in ("weight", "bias"))
        if self.weight not in base.names:
            raise self.error(f"{place!r} has no parameter 'weight', as the layers of this format have")
        self.shape = base.shape(self.weight)

    def error(self, text: str) -> FormatError:
        """An error at the module's first key."""
        return self.group.error(next(iter(self.group.keys)), text)

    def items(self, name: str) -> list[Item]:
        """Its weight's item, and its bias' where that is trained.

        Args:
            name: the module's, without the part.
        """
        A, B, layout, r = self._matrices()
        m = self.group.tensors.get("magnitude")
        if m is not None and squeezed(m.squeeze(0).shape if m.dim() > 1 else m.shape) != (B.shape[0],):
            raise self.group.error("magnitude", f"shape {tuple(m.shape)}; allowed: {(B.shape[0],)}, one per output")
        pair = Pair(A=A, B=B, alpha=self.alpha, magnitude=m)
        if self.config is not None:
            self._check_flags(self.config)
            pair = replace(pair, alpha=self.config.alpha_for(name, r), rslora=self.config.rslora)
        if r != A.shape[0]:
            scale = LoRA(r=r, alpha=pair.alpha, rslora=pair.rslora).scale
            pair = replace(pair, alpha=scale * A.shape[0], rslora=False)
        items = [pair.checked(self.group).item(self.weight, layout, self.shape)]
        return [*items, self._bias(pair)] if "lora_B.bias" in self.group.keys else items

    def _matrices(self) -> tuple[Tensor, Tensor, Layout, int]:
        """The pair as matrices, their layout, and the rank that the file gives it."""
        group = self.group
        if "down" in group.keys:
            r, in_ = group.tensors["down"].shape[:2]
            layout = layout_for(group, self.weight, self.base, group.tensors["up"].shape[0], in_)
            return *(self._grouped() or matrices(group, self.shape, layout)), layout, r
        if not {"lora_embedding_A", "lora_embedding_B"} <= set(group.keys):
            raise self.error("there is no pair of factors for it")
        A, B = group.tensors["lora_embedding_A"], group.tensors["lora_embedding_B"]
        layout, known = Layout(out=1, lookup=True), self.base.layout(self.weight)
        if known not in (layout, None):
            raise self.error(f"{self.weight!r} is no embedding")
        if A.dim() != 2 or B.dim() != 2 or (A.shape[1], B.shape[0]) != self.shape or A.shape[0] != B.shape[1]:
            raise self.error(f"shapes {tuple(A.shape)} and {tuple(B.shape)}; {self.weight!r} has {self.shape}")
        return A, B, layout, A.shape[0]

    def _grouped(self) -> tuple[Tensor, Tensor] | None:
        """The pair of a grouped convolution, which PEFT keeps as a dense one before a grouped one."""
        A, B = self.group.tensors["down"], self.group.tensors["up"]
        groups = A.shape[1] // self.shape[1] if A.dim() == len(self.shape) > 2 else 1
        fits = A.shape[1:] == (groups * self.shape[1], *self.shape[2:]) and A.shape[0] == groups * B.shape[1]
        if groups < 2 or not fits or B.shape != (self.shape[0], B.shape[1], *[1] * (A.dim() - 2)):
            return None
        pair = from_groups(A, B)
        if pair is None:
            raise self.error("the pair mixes the groups of its convolution, which no change of the weight can do")
        return pair

    def _check_flags(self, config: Config) -> None:
        """What the header switches off, or on, PEFT does not load, or starts anew."""
        for flag, said, leaf in (
            ("use_dora", config.dora, "magnitude"),
            ("lora_bias", config.lora_bias, "lora_B.bias"),
        ):
            if said != (leaf in self.group.keys):
                raise self.error(f"the header says {flag}={said}; the module has {'no ' * said}{leaf}")

    def _bias(self, pair: Pair) -> Item:
        """What the pair's own bias adds: b' = b + s·bias."""
        bias = self.group.tensors["lora_B.bias"]
        if pair.magnitude is not None or self.bias not in self.base.names:
            why = "a DoRA has none" if pair.magnitude is not None else f"the model has no {self.bias!r} to add it to"
            raise self.group.error("lora_B.bias", why)
        shape = self.base.shape(self.bias)
        if tuple(bias.shape) != shape:
            raise self.group.error("lora_B.bias", f"shape {tuple(bias.shape)}; {self.bias!r} has {shape}")
        diff = (bias.double() * pair.scale).to(torch.promote_types(bias.dtype, torch.float32))
        return Item(self.bias, Full(), {"diff": diff}, Layout(), shape)


# --- writing ----------------------------------------------------------------------------------------------------


def write(path: Path, content: Content, base: Base | None, *, prefix: WritePrefix = None) -> None:
    """Write one adapter, with s folded into B and no config, which diffusers reads as s = 1.

    Args:
        path: the file.
        content: the adapter.
        base: the model or checkpoint it is for.
        prefix: the part's name, such as "unet", or {module path: part}; by default told from the class of the model
            or the names of its children, else none.
    """
    modules: dict[str, Module] = {}
    for item in [*joined(content, base), *replacements(content, base)]:
        owner = item.path.rpartition(".")[0]
        modules.setdefault(owner, Module(owner, base)).add(item)
    names = heads(modules, base, prefix)
    parts: dict[str, list[Module]] = {}
    for module in modules.values():
        parts.setdefault(names[module.owner][0], []).append(module)
    tensors = {}
    for members in parts.values():
        r = max(module.rank() for module in members)
        dora, biased = any(m.is_dora for m in members), any(m.bias is not None for m in members)
        if dora and biased:
            named = next(m.owner for m in members if m.bias is not None)
            raise FormatError(f"{named!r}: diffusers has no DoRA beside a trained bias; use format='kohya'")
        for module in members:
            part, head = names[module.owner]
            for leaf, tensor in module.tensors(r=r, dora=dora, biased=biased).items():
                # Text encoders load through transformers, which passes over a magnitude without ".weight".
                full = leaf.startswith("lora_magnitude") and part.startswith("text_encoder")
                tensors[f"{head}.{leaf}{'.weight' if full else ''}"] = tensor
    write_whole(path, safetensors_bytes(tensors, {"format": "pt", "loraparam.trained": trained(content)}))
