"""LoRA: W' = W + s·B·A, with s = alpha / r.

Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3. As in loralib, and unlike the paper's Gaussian,
A ~ U(±1/√in). B = 0, so W' = W until the first optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..forms import Form
from ..functional import lora
from ..layouts import Layout
from .base import Factors
from .lowrank import DropoutOn, Init, LowRank


@dataclass(frozen=True, kw_only=True, repr=False)
class LoRA(LowRank):
    """Low-rank additive update of one weight.

    Shapes: the weight is read as the matrix (*batch, out, in) by its layout; ``lora_A`` (*batch, r, in),
    ``lora_B`` (*batch, out, r).

    Args:
        r: rank, 1 <= r <= min(out, in).
        alpha: scale numerator, s = alpha / r. Default: ``r``, so s = 1.
        rslora: s = alpha / √r.
        dropout: probability, in [0, 1), of dropping an input feature of the low-rank path.
        dropout_on: "weight" drops columns of A; "input" drops elements of the layer's input.
        init: "kaiming", A ~ U(±1/√in), or "gaussian", A ~ N(0, std 1/r).

    Raises:
        RankError: ``r`` is below 1, or out of range for the weight it is attached to.

    Example:
        >>> import torch
        >>> W, lora = torch.eye(3), LoRA(r=1, alpha=2)
        >>> factors = lora.init(W, Layout())
        >>> torch.equal(lora.apply(W, factors, Layout()), W)
        True
        >>> factors = {"lora_A": torch.tensor([[1.0, 0, 0]]), "lora_B": torch.tensor([[1.0], [0], [0]])}
        >>> lora.apply(W, factors, Layout())[0]
        tensor([3., 0., 0.])
    """

    additive: ClassVar[bool] = True

    if TYPE_CHECKING:  # ``init`` is the constructor's argument and a method: see LowRank

        def __init__(
            self,
            *,
            r: int = ...,
            alpha: float | None = ...,
            rslora: bool = ...,
            dropout: float = ...,
            dropout_on: DropoutOn = ...,
            init: Init = ...,
        ) -> None: ...

    def apply(self, weight: Tensor, factors: Factors, layout: Layout) -> Tensor:
        """W + s·B·A."""
        W = layout.matrix(weight)
        return layout.tensor(lora(W, factors["lora_A"], factors["lora_B"], self.scale), weight.shape)

    def factored(self, form: Form, factors: Factors) -> Form:
        """One more term."""
        return self.term(form, factors)
