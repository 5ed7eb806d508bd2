"""A hand-written backward for the factored linear: no full-size gradient, sums in place, little saved."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Scale = float | Tensor


def linear(
    x: Tensor,  # (*tokens, in)
    W: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    row: Tensor | None,  # (out,)
    A: Tensor,  # (r, in)
    B: Tensor,  # (out, r)
    scale: float,
) -> Tensor:
    """row·(x·Wᵀ) + s·(x·Aᵀ)·Bᵀ + bias, (*tokens, out).

    Saves x and s·x·Aᵀ, and with ``row`` x·Wᵀ; its backward is four thin products beside g·W.
    """
    y: Tensor = _Linear.apply(x, W, bias, row, A, B, scale)  # type: ignore[no-untyped-call]
    return y


def add_base(y: Tensor, x: Tensor, W: Tensor, row: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """y + row·(x·Wᵀ), in y's memory, and x·Wᵀ where it had to be formed.

    The small part comes first and the large one is accumulated onto it: the other way round, in bfloat16, the
    large part is rounded to its grid before the small one is added, which then vanishes below half a step.
    """
    if row is None:
        return y.addmm_(x, W.t()), None
    base = F.linear(x, W)
    return y.addcmul_(base, row), base


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Any, row: Any, A: Tensor, B: Tensor, scale: float) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        thin = torch.mm(x2, A.t())
        if scale != 1.0:
            thin.mul_(scale)
        y, base = add_base(torch.mm(thin, B.t()), x2, W, row)
        if bias is not None:
            y.add_(bias)
        ctx.save_for_backward(x, W, row, A, B, thin, base if row is not None and row.requires_grad else None)
        ctx.scale = scale
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, W, row, A, B, thin, base = ctx.saved_tensors
        scale, needs = ctx.scale, ctx.needs_input_grad
        x2, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if torch.is_grad_enabled():
            # Differentiated again: intermediates have to be functions of the inputs.
            thin, base = (x2 @ A.t()) * scale, None if base is None else F.linear(x2, W)
        grad_x = grad_W = grad_bias = grad_row = grad_A = grad_B = None
        g_base = g if row is None else g * row
        if needs[0] or needs[4]:
            g_thin = torch.mm(g, B)
            g_thin = g_thin if scale == 1.0 else g_thin * scale
        if needs[0]:
            grad_x = torch.mm(g_thin, A).addmm_(g_base, W).view(x.shape)
        if needs[1]:
            grad_W = g_base.t() @ x2
        if needs[2]:
            grad_bias = g.sum(0)
        if needs[3]:
            grad_row = (g * base).sum(0)
        if needs[4]:
            grad_A = torch.mm(g_thin.t(), x2)
        if needs[5]:
            # The thin matrix first: faster than gᵀ·thin by a third.
            grad_B = torch.mm(thin.t(), g).t()
        return grad_x, grad_W, grad_bias, grad_row, grad_A, grad_B, None
