"""Full: W' = W + D, a full-rank delta of the weight's own shape.

What training a bias, a norm or a whole head becomes when the base must stay untouched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from ..functional import full
from ..layouts import Layout
from .base import Factors, Method, factor_dtype


@dataclass(frozen=True, kw_only=True, repr=False)
class Full(Method):
    """A trained difference from the base, for a tensor of any shape.

    Shapes: ``diff``, shaped as the weight.

    Example:
        >>> bias = torch.tensor([1.0, 2.0])
        >>> Full().apply(bias, {"diff": torch.tensor([0.5, 0.0])}, Layout())
        tensor([1.5000, 2.0000])
    """

    additive: ClassVar[bool] = True

    def init(self, weight: Tensor, layout: Layout, *, generator: Generator | None = None) -> Factors:
        """D = 0."""
        return {"diff": torch.zeros(weight.shape, dtype=factor_dtype(weight), device=weight.device)}

    def apply(self, weight: Tensor, factors: Factors, layout: Layout) -> Tensor:
        """W + D."""
        return full(weight, factors["diff"])
