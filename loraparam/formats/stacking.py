"""Factors without their scale: writing an adapter in the terms of loralib's and LoRA-Torch's files.

The factors go as they were trained, so each needs its own lora_alpha at the reader, who gives one for all.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..errors import FormatError
from ..methods import BlockLoRA, Full, LoRA
from ..methods.base import is_number
from ..methods.lowrank import LowRank
from .bases import Base
from .content import Content, Item
from .files import write_whole
from .portable import joined, part_of

OPTIONS = ("alpha",)


@dataclass(frozen=True)
class Stacked:
    """One parameter's factors as a file has them.

    Attributes:
        item: the whole parameter; its factors are the file's.
        alpha: the lora_alpha that these factors need.
        trained: the lora_alpha of the training.
        blocks: which of the equal blocks of rows act.
    """

    item: Item
    alpha: float
    trained: float
    blocks: tuple[bool, ...] = (True,)


def warn_of_alpha(stacked: Iterable[Stacked], alpha: Any, format: str) -> None:
    """Say so where a reader has to give another alpha than that of the training, as for slices joined into one pair."""
    other = next((one for one in stacked if not math.isclose(one.alpha, one.trained)), None)
    if alpha is None and other is not None:
        warnings.warn(
            f"{other.item.parameter!r}: files of {format} hold no alpha, and this one is right when it is read with "
            f"alpha={other.alpha:g}, where it was trained with {other.trained:g}; give alpha= to choose another",
            stacklevel=2,
        )


def written(content: Content, base: Base | None, format: str) -> tuple[list[Stacked], dict[str, Tensor]]:
    """An adapter in the files' terms: the factors as they were trained, and the biases.

    Raises:
        FormatError: it holds what such a file cannot.
    """
    groups: dict[str, list[Item]] = {}
    biases = {}
    for path, value in content.replaced.items():
        biases[_only_bias(path, format)] = value
    for item in content.items:
        if isinstance(item.method, Full):
            if base is None:
                raise FormatError(f"{item.path!r}: {format} stores biases whole; the base is needed to write one")
            value = base.tensor(_only_bias(item.path, format))
            biases[item.path] = (value.double() + item.factors["diff"].double()).to(value.dtype)
        else:
            groups.setdefault(item.parameter, []).append(item)
    return [_stacked(group, base, format) for group in groups.values()], biases


def _only_bias(path: str, format: str) -> str:
    if not path.endswith("bias"):
        raise FormatError(
            f"{path!r}: {format} stores low-rank factors and biases, not whole parameters or parts of them"
        )
    return path


def _stacked(group: list[Item], base: Base | None, format: str) -> Stacked:
    first = group[0]
    for item in group:
        if not isinstance(item.method, (LoRA, BlockLoRA)) or item.layout.batch:
            kind = type(item.method).__name__ + (" on a stack of matrices" if item.layout.batch else "")
            raise FormatError(
                f"{item.path!r}: {kind}; {format} holds LoRA of linear layers, embeddings and convolutions"
            )
    k = first.shape[-1] if first.layout.rows is not None and first.shape is not None else 1
    linear = first.parameter.rpartition(".")[2] == "weight"
    method = first.method
    assert isinstance(method, LowRank)
    trained = (method.r if method.alpha is None else method.alpha) / k
    if isinstance(method, BlockLoRA) and first.part is None:
        if linear and not method.shared:
            return Stacked(first, method.scale * method.r / k, trained, method.blocks)
        factors = method.plain(first.factors)
        alpha = method.scale * factors["lora_A"].shape[0]
        return Stacked(replace(first, factors=factors), alpha, trained, method.blocks)
    blocks = _equal_blocks(group, base) if linear else None
    if blocks is not None:
        factors = {name: torch.cat([item.factors[name] for item in group], 0) for name in ("lora_A", "lora_B")}
        return Stacked(replace(first, path=first.parameter, factors=factors), method.scale * method.r, trained, blocks)
    item = first if first.part is None else joined(Content("", tuple(group)), base)[0]
    assert isinstance(item.method, LoRA)
    kernel = item.shape is not None and len(item.shape) > 2
    if (kernel and item.layout.rows is None) or item.method.r % k:
        raise FormatError(
            f"{item.path!r}: {format} has a kernel's factors in another form; attach with layout=lp.Layout(rows=out // "
            "groups * k), or rows=out // groups for Conv1d, and a rank that k divides"
        )
    return Stacked(item, item.method.scale * item.method.r / k, trained)


def _equal_blocks(group: list[Item], base: Base | None) -> tuple[bool, ...] | None:
    """Which blocks these slices are, in order, if they are equal ones with one rank and scale; sorts ``group``."""
    parts = [part_of(item, base) for item in group]
    if any(part is None for part in parts) or len({item.method for item in group}) > 1:
        return None
    if not all(type(item.method) is LoRA and re.fullmatch(r"\d+/\d+", item.part or "") for item in group):
        return None
    positions = {item.path: [int(n) for n in str(item.part).split("/")] for item in group}
    if len({m for _, m in positions.values()}) > 1:
        return None
    group.sort(key=lambda item: positions[item.path][0])
    on = {k for k, _ in positions.values()}
    return tuple(k + 1 in on for k in range(next(iter(positions.values()))[1]))


def tensors_to_write(
    entries: Mapping[str, tuple[Tensor, Tensor, float]], biases: Mapping[str, Tensor], alpha: Any, format: str
) -> dict[str, Tensor]:
    """{key: tensor} of the file, where ``entries`` is {key before "lora_A": (A, B, its alpha)}.

    Raises:
        FormatError: the entries need different alphas, of which a file has none and a reader takes one.
    """
    alphas = {name: own for name, (_, _, own) in entries.items()}
    if alpha is None and len({round(own, 9) for own in alphas.values()}) > 1:
        first, other = min(alphas, key=alphas.__getitem__), max(alphas, key=alphas.__getitem__)
        raise FormatError(
            f"'{first}lora_A' needs alpha={alphas[first]:g} and '{other}lora_A' alpha={alphas[other]:g}, while readers "
            f"of {format} files give one; give alpha= here, and B is rescaled to it"
        )
    if alpha is not None and (not is_number(alpha) or alpha == 0):
        raise FormatError(f"alpha={alpha!r}; allowed: a number other than 0")
    state = {}
    for name, (A, B, own) in entries.items():
        state[f"{name}lora_A"] = A.detach().clone().contiguous()
        state[f"{name}lora_B"] = (B if alpha is None else B * (own / alpha)).detach().clone().contiguous()
    return {**state, **{path: value.detach().clone() for path, value in biases.items()}}


def write_state(path: Path, state: dict[str, Tensor]) -> None:
    """As ``torch.save`` writes it, or safetensors where the name says so."""
    if path.suffix == ".safetensors":
        write_whole(path, to_bytes(state))
        return
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())
