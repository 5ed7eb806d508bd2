"""Hypothesis strategies for methods, layouts and weights. They shrink to small, plain, contiguous cases."""

from __future__ import annotations

from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..layouts import Layout
from ..methods import IA3, BlockLoRA, DoRA, Full, LoRA, Magnitude, Method

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Which dims of a weight are what, and how many dims it has; the first is the simplest.
_LAYOUTS = (
    (Layout(), 2),  # Linear (out, in)
    (Layout(out=1), 2),  # transformers' Conv1D (in, out)
    (Layout(out=1, lookup=True), 2),  # Embedding (num, dim)
    (Layout(), 4),  # Conv2d (out, in, k, k)
    (Layout(out=1), 4),  # ConvTranspose2d (in, out, k, k)
    (Layout(out=1, batch=(0,)), 3),  # experts (E, out, in)
    (Layout(out=2, batch=(0,)), 3),  # experts (E, in, out)
)


def layouts() -> st.SearchStrategy[Layout]:
    """Every way of reading a weight as matrices; shrinks towards Linear's."""
    return st.sampled_from([layout for layout, _ in _LAYOUTS])


@st.composite
def weights(draw: st.DrawFn, *, layout: Layout | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A weight that fits a layout, of awkward sizes; some are not contiguous, a part of a buffer, or have a zero row.

    Args:
        layout: of the weight; default: (out, in).
        dtype: default: drawn from float32, float64, bfloat16 and float16.
    """
    layout = layout or Layout()
    ndim = draw(st.sampled_from([n for known, n in _LAYOUTS if known == layout] or [2 + len(layout.batch)]))
    # As many draws whatever ndim, and the last ones count: Hypothesis lowers the first, then tries fewer dims.
    shape = [draw(st.integers(1, 5)) for _ in range(4)][-ndim:]
    dtype = dtype or draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        # A row without a direction: a padding row, a zero-initialised convolution.
        weight.select(layout.out, 0).zero_()
    weight = weight.to(dtype)
    return _stored(weight, draw(st.sampled_from(["contiguous", "transposed", "part of a buffer"])))


def _stored(weight: Tensor, how: str) -> Tensor:
    """The same values, stored in another way."""
    if how == "transposed":
        return weight.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "part of a buffer":
        # As a packed or a sharded weight is: strides and an offset that are not its own.
        buffer = weight.new_full([size + 2 for size in weight.shape], float("nan"))
        part = buffer[tuple(slice(1, size + 1) for size in weight.shape)]
        return part.copy_(weight)
    return weight


def methods(*, max_r: int = 1) -> st.SearchStrategy[Method]:
    """The library's methods with all their settings but dropout; shrinks towards ``LoRA(r=1)``.

    Args:
        max_r: the largest rank drawn; 1 fits every weight.
    """
    low_rank: list[dict[str, Any]] = [
        {"r": r, "alpha": alpha, "rslora": rslora, "init": init}
        for r in range(1, max_r + 1)
        for alpha in (None, 1, 0.5, 3)
        for rslora in (False, True)
        for init in ("kaiming", "gaussian")
    ]
    axes: tuple[Literal["out", "in"], ...] = ("out", "in")
    dora: list[dict[str, Any]] = [
        {"axis": axis, "detach_norm": detach, "eps": eps}
        for axis in axes
        for detach in (True, False)
        for eps in (0.0, 1e-10)
    ]
    # One choice each, as Hypothesis takes the case of the fewest choices for the smallest.
    return st.one_of(
        st.sampled_from([LoRA(**options) for options in low_rank]),
        st.sampled_from([BlockLoRA(**options, shared=shared) for options in low_rank for shared in (False, True)]),
        st.sampled_from([DoRA(**options, **more) for options in low_rank for more in dora]),
        st.sampled_from([Magnitude(axis=axis) for axis in axes]),
        st.sampled_from([IA3(axis=axis) for axis in axes]),
        st.sampled_from([Full()] * 2),  # a choice, if only between equals
    )
