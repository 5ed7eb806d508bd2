"""Magnitude: W' = m·W/‖W‖, the length of each row trained, its direction kept.

The magnitude half of DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353, eq. 5) with no low-rank part;
NVlabs' ``Wdecompose``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from ..forms import Form
from ..functional import Axis, length_ratio, magnitude, row_norm
from ..layouts import Layout
from .base import Factors, Method, check_choice, need_matrix


@dataclass(frozen=True, kw_only=True, repr=False)
class Magnitude(Method):
    """One trained length per output row (or input column) of a weight.

    Shapes: ``magnitude`` (*batch, out), or (*batch, in) with ``axis="in"``.

    Args:
        axis: "out" or "in".

    Example:
        >>> import torch
        >>> W = torch.tensor([[3.0, 4.0]])
        >>> Magnitude().apply(W, {"magnitude": torch.tensor([10.0])}, Layout())
        tensor([[6., 8.]])
    """

    axis: Axis = "out"

    def __post_init__(self) -> None:
        check_choice("Magnitude", "axis", self.axis, ("out", "in"))

    def init(self, weight: Tensor, layout: Layout, *, generator: Generator | None = None) -> Factors:
        """m = ‖W‖."""
        need_matrix(self, weight, layout)
        return {"magnitude": row_norm(layout.matrix(weight.detach()), self.axis)}

    def apply(self, weight: Tensor, factors: Factors, layout: Layout) -> Tensor:
        """m·W/‖W‖; a zero row stays zero."""
        W = magnitude(layout.matrix(weight), factors["magnitude"], axis=self.axis)
        return layout.tensor(W, weight.shape)

    def dims(self) -> dict[str, tuple[str, ...]]:
        """One magnitude per output or input."""
        return {"magnitude": (self.axis,)}

    def factored(self, form: Form, factors: Factors) -> Form | None:
        """Rows (or columns) scaled."""
        norm = form.norm(self.axis)
        ratio = length_ratio(factors["magnitude"].to(norm.dtype), norm)
        return form.scale_rows(ratio) if self.axis == "out" else form.scale_cols(ratio)
