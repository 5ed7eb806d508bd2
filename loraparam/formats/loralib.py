"""loralib's files: ``torch.save(lora.lora_state_dict(model), path)`` (https://github.com/microsoft/LoRA).

``<module>.lora_A`` and ``lora_B``: W + s·B·A for a linear layer, W + s·(B·A)ᵀ for an embedding, the blocks stacked for
a ``MergedLinear``; a convolution's B·A, read row by row, is the kernel's update. Its bias is ``<module>.conv.bias``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FormatError
from .bases import Base
from .content import Content, Prefix
from .stacking import OPTIONS as OPTIONS
from .stacking import Stacked, tensors_to_write, warn_of_alpha, write_state, written
from .unscaled import HINTS as HINTS
from .unscaled import items, locate, parsed, recognised

NAME = "loralib"
STEMS = ("",)


def recognises(path: Path) -> bool:
    """Whether this is a safetensors file of loralib's factors."""
    return recognised(path, STEMS)


def read(
    path: Path, base: Base | None, *, alpha: float | None = None, enable_lora: Any = None, prefix: Prefix = None
) -> Content:
    """The adapter in a file."""
    source = str(path)
    known, pairs, biases = parsed(path, STEMS, prefix, alpha, base)
    found = []
    for pair in pairs:
        parameter = locate(pair, ("weight", "conv.weight"), known, source)
        found += items(parameter, pair, alpha, enable_lora, known, source)
    return Content(source, tuple(found), biases)


def write(path: Path, content: Content, base: Base | None, *, alpha: float | None = None) -> None:
    """Write one adapter, B as it was trained."""
    stacked, biases = written(content, base, NAME)
    warn_of_alpha(stacked, alpha, NAME)
    entries: dict[str, tuple[Tensor, Tensor, float]] = {}
    for one in stacked:
        A, B = one.item.factors["lora_A"], one.item.factors["lora_B"]
        if one.item.layout.lookup and one.item.layout.out == 0:
            A, B = B.mT, A.mT
        owner = _owner(one, base)
        entries[f"{owner}." if owner else ""] = (A, B, one.alpha)
    named = {_bias(key, base): value for key, value in biases.items()}
    write_state(path, tensors_to_write(entries, named, alpha, NAME))


def _owner(one: Stacked, base: Base | None) -> str:
    """The module that loralib would have the factors on."""
    owner, _, name = one.item.parameter.rpartition(".")
    if name != "weight":
        raise FormatError(f"{one.item.parameter!r}: {NAME} has factors for the weight of a layer only")
    return owner.rpartition(".")[0] if _is_inner(owner, base) else owner


def _bias(path: str, base: Base | None) -> str:
    """A convolution's bias is one module further down, where loralib's layers have it."""
    owner, dot, name = path.rpartition(".")
    weight = f"{owner}{dot}weight"
    if base is None or weight not in base.names or len(base.shape(weight)) < 3:
        return path
    return path if _is_inner(owner, base) else f"{owner}{dot}conv.{name}"


def _is_inner(owner: str, base: Base | None) -> bool:
    """Whether a module is the convolution inside of a layer like loralib's, which holds nothing else."""
    above, dot, last = owner.rpartition(".")
    if base is None or last != "conv":
        return False
    module = base.module(above)
    children = 1 if module is None else sum(1 for name, _ in module.named_children() if name != "parametrizations")
    return children == 1 and all(name.startswith(f"{owner}.") for name in base.names if name.startswith(above + dot))
