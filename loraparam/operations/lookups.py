"""Embeddings whose table is an effective weight: only the rows looked up are formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..effective import EffectiveWeight
from ..forms import Form
from ..refusals import can_dequantize
from .registry import form_of, implements, ran


@implements(F.embedding)
def embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Rows of the weight; only those looked up are formed."""
    form = form_of(weight)
    if form is None or form.weight.dim() != 2 or max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    if isinstance(input, EffectiveWeight) or can_dequantize(form.weight):
        return NotImplemented
    ran(weight)
    padding = padding_idx if padding_idx is None or padding_idx >= 0 else form.weight.shape[0] + padding_idx
    rows = _rows(lambda table: F.embedding(input, table, padding), form)
    if padding is None or not rows.requires_grad:
        return rows
    # The padding row sends no gradient, neither to its own factor nor to the shared one.
    return torch.where((input == padding).unsqueeze(-1), rows.detach(), rows)


def _rows(look_up: Callable[[Tensor], Tensor], form: Form) -> Tensor:
    """Rows (or sums of rows) of T = diag(left)·W·diag(right) + s·L·R, looked up in W and in L."""
    left, right = (form.col, form.row) if form.is_transposed else (form.row, form.col)
    rows = look_up(form.weight)
    if left is not None:
        rows = rows * look_up(left.unsqueeze(-1)).to(rows.dtype)
    if right is not None:
        rows = rows * right.to(rows.dtype)
    pair = form.factors(rows.dtype)
    if pair is None:
        return rows
    A, B, scale = pair
    L, R = (A.mT, B.mT) if form.is_transposed else (B, A)
    return rows + scale * (look_up(L) @ R)


@implements(F.embedding_bag)
def embedding_bag(
    input: Any,
    weight: Any,
    offsets: Any = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Sums or means of rows; a maximum, and rows scaled one by one, need the whole."""
    form = form_of(weight)
    if form is None or form.weight.dim() != 2 or can_dequantize(form.weight) or mode == "max":
        return NotImplemented
    left = form.col if form.is_transposed else form.row
    if max_norm is not None or scale_grad_by_freq or sparse or left is not None:
        return NotImplemented
    ran(weight)

    def look_up(table: Tensor) -> Tensor:
        options: dict[str, Any] = {"include_last_offset": include_last_offset, "padding_idx": padding_idx}
        return F.embedding_bag(input, table, offsets, mode=mode, per_sample_weights=per_sample_weights, **options)

    return _rows(look_up, form)
