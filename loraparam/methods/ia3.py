"""(IA)³: W' = l·W, each output row (or input column) multiplied by one trained number.

Liu et al. 2022, https://arxiv.org/abs/2205.05638, section 3.3: keys and values are rescaled by l_k and l_v (rows of
their projections), the inner activations of a feed-forward block by l_ff (columns of the next weight). l starts at
1, so W' = W at first. As in PEFT a layer whose rows are rescaled needs the same l on its bias: put it there as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..forms import Form
from ..functional import Axis, ia3
from ..layouts import Layout
from .base import Factors, Method, check_choice, factor_dtype, need_matrix


@dataclass(frozen=True, kw_only=True, repr=False)
class IA3(Method):
    """One trained factor per output row (or input column) of a weight.

    Shapes: ``scale`` (*batch, out), or (*batch, in) with ``axis="in"``. With ``axis="out"`` it also goes on a bias,
    whose elements are rows.

    Args:
        axis: "out" or "in".

    Example:
        >>> W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> IA3(axis="in").apply(W, {"scale": torch.tensor([2.0, 10.0])}, Layout())
        tensor([[ 2., 20.],
                [ 6., 40.]])
    """

    axis: Axis = "out"

    def __post_init__(self) -> None:
        check_choice("IA3", "axis", self.axis, ("out", "in"))

    def init(self, weight: Tensor, layout: Layout, *, generator: Generator | None = None) -> Factors:
        """l = 1."""
        if self.axis == "in":
            need_matrix(self, weight, layout)
        batch, out, in_ = layout.sizes(weight.shape)
        size = out if self.axis == "out" else in_
        return {"scale": torch.ones(*batch, size, dtype=factor_dtype(weight), device=weight.device)}

    def apply(self, weight: Tensor, factors: Factors, layout: Layout) -> Tensor:
        """l·W."""
        return layout.tensor(ia3(layout.matrix(weight), factors["scale"], axis=self.axis), weight.shape)

    def dims(self) -> dict[str, tuple[str, ...]]:
        """One number per output or input."""
        return {"scale": (self.axis,)}

    def factored(self, form: Form, factors: Factors) -> Form | None:
        """Rows (or columns) scaled."""
        scale = factors["scale"]
        return form.scale_rows(scale) if self.axis == "out" else form.scale_cols(scale)
