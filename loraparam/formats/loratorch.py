"""LoRA-Torch's files: ``torch.save(lora.lora_state_dict(model), path)`` (https://github.com/Baijiong-Lin/LoRA-Torch).

``<module>.w_lora_A`` and ``w_lora_B`` as loralib's, but W + s·B·A for an embedding too. Attention has ``o_lora_*`` on
its output, and on q, k and v one pair named by the letters that were enabled (``qv_lora_*``), which LoRA-Torch adds to
all three; with ``kdim`` or ``vdim`` a pair each.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FormatError
from ..methods import BlockLoRA
from .bases import Base
from .content import Content, Item, Prefix
from .stacking import OPTIONS as OPTIONS
from .stacking import Stacked, tensors_to_write, warn_of_alpha, write_state, written
from .unscaled import HINTS as HINTS
from .unscaled import items, locate, parsed, recognised

NAME = "loratorch"
_TAGS = tuple("".join(letters) for n in (1, 2, 3) for letters in combinations("qkv", n))
STEMS = ("w_", "o_", *(f"{tag}_" for tag in _TAGS), "_")


def recognises(path: Path) -> bool:
    """Whether this is a safetensors file of LoRA-Torch's factors."""
    return recognised(path, STEMS)


def read(
    path: Path, base: Base | None, *, alpha: float | None = None, enable_lora: Any = None, prefix: Prefix = None
) -> Content:
    """The adapter in a file."""
    source = str(path)
    known, pairs, biases = parsed(path, STEMS, prefix, alpha, base)
    found: list[Item] = []
    for pair in pairs:
        if pair.stem == "_":  # for q, k and v where only o was enabled: it never acts
            if bool(pair.A.any()) and bool(pair.B.any()):
                raise FormatError(f"{source!r}: '_lora_A' and B of {pair.path!r} are not zero, and name no projection")
            continue
        parameter = locate(pair, _parameters(pair.stem), known, source)
        layout = known.layout(parameter)
        if layout is not None and layout.lookup:
            pair = replace(pair, A=pair.B.mT.contiguous(), B=pair.A.mT.contiguous())
        found += items(parameter, pair, alpha, enable_lora, known, source, square=True)
        if parameter.endswith("in_proj_weight"):
            found[-1] = _restricted(found[-1], pair.stem)
    return Content(source, tuple(found), biases)


def _parameters(stem: str) -> tuple[str, ...]:
    """The parameters that a pair may be for."""
    if stem in ("w_", "o_"):
        return ("weight",) if stem == "w_" else ("out_proj.weight",)
    return ("in_proj_weight", f"{stem}proj_weight") if len(stem) == 2 else ("in_proj_weight",)


def _restricted(item: Item, stem: str) -> Item:
    """A pair for some of q, k and v, where it acts on no other: it then trains on no other."""
    on = tuple(letter in stem for letter in "qkv")
    blocks = item.factors["lora_B"].chunk(3)
    if all(on) or any(bool(block.any()) for block, flag in zip(blocks, on, strict=True) if not flag):
        return item
    method: Any = item.method
    return replace(item, method=BlockLoRA(r=method.r, alpha=method.alpha, blocks=on, shared=True))


def write(path: Path, content: Content, base: Base | None, *, alpha: float | None = None) -> None:
    """Write one adapter, B as it was trained."""
    stacked, biases = written(content, base, NAME)
    warn_of_alpha(stacked, alpha, NAME)
    entries: dict[str, tuple[Tensor, Tensor, float]] = {}
    for one in stacked:
        A, B = one.item.factors["lora_A"], one.item.factors["lora_B"]
        if one.item.layout.lookup and one.item.layout.out == 1:
            A, B = B.mT, A.mT
        entries[_key(one, base)] = (A, B, one.alpha)
    write_state(path, tensors_to_write(entries, biases, alpha, NAME))


def _key(one: Stacked, base: Base | None) -> str:
    """What stands before ``lora_A``."""
    parameter = one.item.parameter
    owner, dot, name = parameter.rpartition(".")
    if name == "weight":
        above, _, last = owner.rpartition(".")
        attention = [f"{above}.{name}".removeprefix(".") for name in ("in_proj_weight", "q_proj_weight")]
        if last == "out_proj" and base is not None and any(path in base.names for path in attention):
            return f"{above}.o_" if above else "o_"
        return f"{owner}{dot}w_"
    if name == "in_proj_weight":
        rows = [bool(block.any()) for block in one.item.factors["lora_B"].chunk(3)]
        on = one.blocks if len(one.blocks) == 3 else rows if any(rows) else [True] * 3
        return f"{owner}{dot}{''.join(letter for letter, flag in zip('qkv', on, strict=True) if flag)}_"
    if name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return f"{owner}{dot}{name[0]}_"
    raise FormatError(f"{parameter!r}: {NAME} has factors for the weight of a layer, and for attention's projections")
