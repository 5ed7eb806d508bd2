"""Factors without their scale: reading what loralib's and LoRA-Torch's files have in common.

``torch.save(lora_state_dict(model))``: {module path + factor: tensor}, and biases as new values. Neither s nor r is in
the file, nor which blocks of a ``MergedLinear`` are on, so the reader is told ``alpha`` (s = alpha / r) and
``enable_lora``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..errors import FormatError, listed, nearest
from ..layouts import Layout
from ..methods import LoRA
from ..methods.base import is_number
from .bases import Base
from .content import Item, Prefix, relocate
from .files import PICKLES, open_safetensors, unpickled
from .portable import at_most_full_rank

HINTS = ("alpha", "enable_lora", "prefix")

# A factor's key: the module's path, what the factor's name starts with, A or B.
_KEY = re.compile(r"(?:(?P<path>.+)\.)?(?P<stem>[a-z]*_)?lora_(?P<side>[AB])")


@dataclass(frozen=True)
class FilePair:
    """Two factors of a file.

    Attributes:
        path: of their module, in the model.
        stem: what their names start with: "", or LoRA-Torch's "w_", "qkv_", …
    """

    path: str
    stem: str
    A: Tensor
    B: Tensor

    def at(self, *names: str) -> list[str]:
        """The paths of parameters of its module."""
        return [f"{self.path}.{name}" if self.path else name for name in names]


def recognised(path: Path, stems: Sequence[str]) -> bool:
    """Whether this is a safetensors file of such factors. A pickle is opened only when its format is named."""
    if not path.is_file() or path.suffix in PICKLES:
        return False
    with open_safetensors(path) as file:
        found = [_KEY.fullmatch(key) for key in file.keys()]  # noqa: SIM118 - a handle, not a dict
    return any(match is not None and (match["stem"] or "") in stems for match in found)


def parsed(
    path: Path, stems: Sequence[str], prefix: Prefix, alpha: Any, base: Base | None
) -> tuple[Base, list[FilePair], dict[str, Tensor]]:
    """The base, the pairs of a file, and the biases it replaces, under the model's paths.

    Raises:
        FormatError: the file holds anything else, half a pair, or nothing that ``prefix`` selects; or ``alpha`` or the
            base is missing.
    """
    source = str(path)
    if base is None:
        raise FormatError(f"{source!r}: the base is needed: the file does not say what its layers are")
    if alpha is None or not is_number(alpha):
        raise FormatError(
            f"{source!r} holds no scale, and alpha={alpha!r}; give alpha=, the lora_alpha it was trained with, or "
            "format='diffusers' for a file with B scaled already"
        )
    halves: dict[tuple[str, str], dict[str, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    state = _tensors(path)
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        owner, _, leaf = key.rpartition(".") if match is None else (match["path"] or "", "", "")
        if match is None and not leaf.endswith("bias"):
            raise FormatError(
                f"{source!r}, {key!r}: neither a factor nor a bias; allowed: what lora_state_dict returns"
            )
        if match is not None and (match["stem"] or "") not in stems:
            raise FormatError(f"{source!r}, {key!r}: no factor of this format; allowed: {listed(_names(stems), 12)}")
        place = relocate(owner, prefix)
        if place is not None and match is None:
            biases[_bias(place, leaf, base)] = tensor
        elif place is not None and match is not None:
            halves.setdefault((place, match["stem"] or ""), {})[match["side"]] = tensor
    if not halves and not biases:
        raise FormatError(f"{source!r}: prefix={prefix!r} selects none of {listed(state)}")
    for (place, stem), sides in halves.items():
        if len(sides) < 2:
            raise FormatError(f"{source!r}: {place + '.' if place else ''}{stem}lora_{'AB'['A' in sides]} is missing")
        if any(tensor.dim() != 2 for tensor in sides.values()):
            raise FormatError(f"{source!r}: the factors {stem}lora_A and B of {place!r} are no matrices")
    return base, [FilePair(place, stem, sides["A"], sides["B"]) for (place, stem), sides in halves.items()], biases


def _names(stems: Sequence[str]) -> list[str]:
    return [f"{stem}lora_{side}" for stem in stems for side in "AB"]


def _bias(place: str, leaf: str, base: Base) -> str:
    """The bias of that name; loralib keeps a convolution one module further down."""
    path = f"{place}.{leaf}" if place else leaf
    above = ".".join([*place.split(".")[:-1], leaf])
    return above if path not in base.names and place.endswith("conv") and above in base.names else path


def _tensors(path: Path) -> dict[str, Tensor]:
    """A file's tensors, with no code of the file's executed."""
    # By its first bytes, too: ``write`` has no name of its own for what ``torch.save`` makes.
    if path.suffix in PICKLES or (path.is_file() and _first_bytes(path, 4) == b"PK\3\4"):
        return unpickled(path)
    with open_safetensors(path):
        return load_file(path)


def _first_bytes(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


def locate(pair: FilePair, names: Sequence[str], base: Base, source: str) -> str:
    """The first of a module's parameters that the model has.

    Raises:
        FormatError: it has none of them.
    """
    for path in pair.at(*names):
        if path in base.names:
            return path
    wanted = pair.at(names[0])[0]
    raise FormatError(
        f"{source!r} is for {wanted!r}, which the model has not{nearest(wanted, base.names)}; prefix= selects a part "
        "of a file, or says where its parts go"
    )


def layout_at(parameter: str, pair: FilePair, base: Base, source: str, square: bool) -> Layout:
    """How a parameter reads such that B·A fits it; ``square``: of a square one it needs no more than the shape."""
    shape = base.shape(parameter)
    if len(shape) > 2:
        return Layout(rows=pair.B.shape[0]) if math.prod(shape) % max(1, pair.B.shape[0]) == 0 else Layout()
    known = base.layout(parameter)
    if getattr(base.module(parameter.rpartition(".")[0]), "fan_in_fan_out", False):
        known = Layout(out=1)
    if known is not None:
        return known
    fits = (pair.B.shape[0], pair.A.shape[1])
    if len(set(shape)) == 1 and not square:
        raise FormatError(
            f"{source!r}, {parameter!r}: shape {shape} does not tell an embedding from a linear layer; load into "
            "the model itself"
        )
    return Layout(out=1, lookup=True) if fits == shape[::-1] != shape else Layout()


def items(
    parameter: str, pair: FilePair, alpha: Any, enable_lora: Any, base: Base, source: str, *, square: bool = False
) -> list[Item]:
    """What a pair is on a parameter: one item, or one for each block of a ``MergedLinear``.

    Raises:
        FormatError: the shapes do not fit, or ``enable_lora`` is missing or does not.
    """
    shape, layout, (A, B) = base.shape(parameter), layout_at(parameter, pair, base, source, square), (pair.A, pair.B)
    _, out, in_ = layout.sizes(shape)
    if (A.shape[0], B.shape[0], A.shape[1]) == (B.shape[1], out, in_):
        k = shape[-1] if layout.rows is not None else 1
        if A.shape[0] % k:
            raise FormatError(
                f"{source!r}, {parameter!r}: {A.shape[0]} rows of A; allowed: a multiple of the kernel's {k}"
            )
        return [_item(parameter, A, B, alpha * k, layout, shape)]
    r = max(1, B.shape[1])
    merged = layout.rows is None and A.shape[1] == in_ and A.shape[0] % r == 0 and B.shape[0] <= out
    if not merged:
        raise FormatError(
            f"{source!r}: A {tuple(A.shape)} and B {tuple(B.shape)} do not fit {parameter!r} of shape {shape}, read as "
            f"{layout}"
        )
    on = _flags(enable_lora, f"{source!r}, {parameter!r}: a MergedLinear")
    n, rows = sum(on), out // len(on)
    if out % len(on) or (tuple(A.shape), tuple(B.shape)) != ((n * r, in_), (n * rows, r)):
        raise FormatError(
            f"{source!r}: A {tuple(A.shape)} and B {tuple(B.shape)} do not fit {parameter!r} of shape {shape} with "
            f"enable_lora={list(on)}"
        )
    blocks = [i for i, flag in enumerate(on) if flag]
    return [
        _item(f"{parameter}[{i + 1}/{len(on)}]", A_i, B_i, alpha, layout, shape)
        for i, A_i, B_i in zip(blocks, A.split(r), B.split(rows), strict=True)
    ]


def _item(path: str, A: Tensor, B: Tensor, alpha: float, layout: Layout, shape: tuple[int, ...]) -> Item:
    """A pair with s = alpha / its rank, which may be above LoRA's largest."""
    r = max(1, A.shape[0])
    A, B = at_most_full_rank(A, B)
    method = LoRA(r=max(1, A.shape[0]), alpha=alpha * A.shape[0] / r)
    return Item(path, method, {"lora_A": A, "lora_B": B}, layout, shape)


def _flags(enable_lora: Any, what: str) -> tuple[bool, ...]:
    listed_ = isinstance(enable_lora, (list, tuple)) and all(isinstance(on, bool) for on in enable_lora)
    if not listed_ or not any(enable_lora):
        raise FormatError(
            f"{what}, which does not say which blocks are on, and enable_lora={enable_lora!r}; give it as it was "
            "trained, such as enable_lora=[True, False, True]"
        )
    return tuple(enable_lora)
