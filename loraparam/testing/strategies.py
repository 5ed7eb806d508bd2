"""Hypothesis strategies for methods, layouts and weights. They shrink to small, plain, contiguous cases."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..layouts import Layout
from ..methods import IA3, DoRA, Full, LoRA, Magnitude, Method

DTYPES = (torch.float64, torch.float32, torch.bfloat16)

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
    """A weight that fits a layout: awkward sizes, sometimes non-contiguous, sometimes with a zero row.

    Args:
        layout: of the weight; default: (out, in).
        dtype: default: drawn from float64, float32 and bfloat16.
    """
    layout = layout or Layout()
    ndim = draw(st.sampled_from([n for known, n in _LAYOUTS if known == layout] or [2 + len(layout.batch)]))
    shape = [draw(st.integers(1, 5)) for _ in range(ndim)]
    dtype = dtype or draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        # A row without a direction: a padding row, a zero-initialised convolution.
        weight.select(layout.out, 0).zero_()
    weight = weight.to(dtype)
    if draw(st.booleans()):
        weight = weight.transpose(0, -1).contiguous().transpose(0, -1)
    return weight


def methods(*, max_r: int = 1) -> st.SearchStrategy[Method]:
    """The library's methods with all their settings but dropout; shrinks towards ``LoRA(r=1)``.

    Args:
        max_r: the largest rank drawn; 1 fits every weight.
    """
    low_rank: dict[str, Any] = {
        "r": st.integers(1, max_r),
        "alpha": st.none() | st.sampled_from([1, 0.5, 3]),
        "rslora": st.booleans(),
        "init": st.sampled_from(["kaiming", "gaussian"]),
    }
    axis = st.sampled_from(["out", "in"])
    dora = {"axis": axis, "detach_norm": st.booleans(), "eps": st.sampled_from([0.0, 1e-10])}
    return st.one_of(
        st.builds(LoRA, **low_rank),
        st.builds(DoRA, **low_rank, **dora),
        st.builds(Magnitude, axis=axis),
        st.builds(IA3, axis=axis),
        st.just(Full()),
    )
