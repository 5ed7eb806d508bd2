"""DoRA: W' = m·V/‖V‖, with V = W + s·B·A.

Liu et al. 2024, https://arxiv.org/abs/2402.09353, eq. 5. m starts as ‖W‖, so W' = W at first. The norm belongs
to each output row, as in NVlabs' code and PEFT ("always applied on the out_feature dimension", its author);
``axis="in"`` is the reading of LyCORIS before 3.2 and of several tutorials. As in PEFT the gradient takes the
norm as a constant (section 4.3 of the paper); LyCORIS does not. Unlike them all a zero row stays zero, not NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from ..errors import LoraparamError
from ..forms import Form
from ..functional import Axis, dora, length_ratio, row_norm
from ..layouts import Layout
from .base import Factors, check_choice, check_number
from .lowrank import DropoutOn, Init, LowRank


@dataclass(frozen=True, kw_only=True, repr=False)
class DoRA(LowRank):
    """Low-rank update of a weight's direction, with its length trained apart.

    Shapes: ``lora_A`` (*batch, r, in), ``lora_B`` (*batch, out, r), ``magnitude`` (*batch, out), or
    (*batch, in) with ``axis="in"``.

    Args:
        r, alpha, rslora, dropout, dropout_on, init: as for ``LoRA``.
        axis: "out", one magnitude per output row, or "in", one per input column.
        detach_norm: take ‖V‖ as a constant in the backward pass.
        eps: added to the norm; a fresh DoRA is then neutral to eps / ‖W‖.

    Raises:
        RankError: ``r`` is below 1, or out of range for the weight it is attached to.

    Example:
        >>> import torch
        >>> W, dora = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), DoRA(r=1)
        >>> factors = dora.init(W, Layout())
        >>> factors["magnitude"]
        tensor([5., 0.])
        >>> torch.equal(dora.apply(W, factors, Layout()), W)
        True
    """

    axis: Axis = "out"
    detach_norm: bool = True
    eps: float = 0.0

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
            axis: Axis = ...,
            detach_norm: bool = ...,
            eps: float = ...,
        ) -> None: ...

    def __post_init__(self, init: str) -> None:  # type: ignore[override]
        super().__post_init__(init)
        check_choice("DoRA", "axis", self.axis, ("out", "in"))
        check_choice("DoRA", "detach_norm", self.detach_norm, (True, False))
        check_number("DoRA", "eps", self.eps)
        if self.eps < 0:
            raise LoraparamError(f"DoRA: eps={self.eps!r}; allowed: eps >= 0")

    @property
    def exact_gradient(self) -> bool:
        """Only where the norm is differentiated as well."""
        return not self.detach_norm

    def init(self, weight: Tensor, layout: Layout, *, generator: Generator | None = None) -> Factors:
        """LoRA's pair, and m = ‖W‖."""
        factors = super().init(weight, layout, generator=generator)
        return {**factors, "magnitude": row_norm(layout.matrix(weight.detach()), self.axis)}

    def apply(self, weight: Tensor, factors: Factors, layout: Layout) -> Tensor:
        """m·V/(‖V‖ + eps)."""
        W = dora(
            layout.matrix(weight),
            factors["lora_A"],
            factors["lora_B"],
            factors["magnitude"],
            self.scale,
            axis=self.axis,
            detach_norm=self.detach_norm,
            eps=self.eps,
        )
        return layout.tensor(W, weight.shape)

    def dims(self) -> dict[str, tuple[str, ...]]:
        """A (r, in), B (out, r), one magnitude per output or input."""
        return {**super().dims(), "magnitude": (self.axis,)}

    def factored(self, form: Form, factors: Factors) -> Form | None:
        """One more term, then rows (or columns) scaled."""
        form = self.term(form, factors)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            norm = form.norm(self.axis)
        ratio = length_ratio(factors["magnitude"].to(norm.dtype), norm, self.eps)
        return form.scale_rows(ratio) if self.axis == "out" else form.scale_cols(ratio)
