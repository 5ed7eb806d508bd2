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

    Saves x and x·Aᵀ, and with ``row`` x·Wᵀ; its backward is four thin products beside g·W.
    """
    y: Tensor = _Linear.apply(x, W, bias, row, A, B, scale)  # type: ignore[no-untyped-call]
    return y


def base_first(
    scaled: Tensor,  # (tokens, in), what W sees
    x: Tensor,  # (tokens, in), what A sees
    W: Tensor,
    bias: Tensor | None,
    row: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
) -> Tensor:
    """row·(scaled·Wᵀ) + s·(x·Aᵀ)·Bᵀ + bias, in the fewest operations: for small products in a wide dtype."""
    thin = F.linear(x, A)
    if row is None:
        y = F.linear(scaled, W, bias)
    else:
        base = F.linear(scaled, W)
        y = base * row if bias is None else torch.addcmul(bias, base, row)
    return y.addmm_(thin, B.t(), alpha=scale)


def small_first(
    scaled: Tensor, thin: Tensor, W: Tensor, bias: Tensor | None, row: Tensor | None, B: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """(y, x·Wᵀ where it had to be formed), with the large product accumulated onto the small one.

    In bfloat16 the other way round rounds the large part to its grid before the small one is added, which then vanishes
    below half a step; for the same reason the bias comes last there. And a large product hides the traffic of
    accumulating, which a thin one does not: 1 % of the time at hidden 1024.
    """
    early = bias if thin.dtype.itemsize >= 4 and row is None else None
    y = F.linear(thin if scale == 1.0 else thin * scale, B, early)
    base = None if row is None else F.linear(scaled, W)
    y = y.addmm_(scaled, W.t()) if base is None or row is None else y.addcmul_(base, row)
    return y if bias is early else y.add_(bias), base  # type: ignore[arg-type]


def gathered(
    x: Tensor,  # (n, *tokens, in)
    down: Tensor,  # (E, r, in)
    up: Tensor,  # (E, out, r)
    index: Tensor,  # (n,), which of the E
) -> Tensor:
    """x·downᵀ·upᵀ by the matrices that index takes, (n, *tokens, out).

    Saves x and the stacks; gathers again in its backward, where torch would keep a copy of the factors for each of n.
    """
    y: Tensor = _Gathered.apply(x, down, up, index)  # type: ignore[no-untyped-call]
    return y


def reshaped(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A fresh tensor in another shape, and no view, as torch's own products return it.

    Writing into a view fails where a custom function returned it, and takes FSDP's hooks off.
    """
    result: Tensor = torch.ops.aten._unsafe_view.default(y, shape)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Any, row: Any, A: Tensor, B: Tensor, scale: float) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])
        thin = torch.mm(x2, A.t())
        y, base = small_first(x2, thin, W, bias, row, B, scale)
        ctx.save_for_backward(x, W, row, A, B, thin, base if row is not None and row.requires_grad else None)
        ctx.scale = scale
        return y if x.dim() == 2 else reshaped(y, (*x.shape[:-1], W.shape[0]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, W, row, A, B, thin, base = ctx.saved_tensors
        scale, needs = ctx.scale, ctx.needs_input_grad
        x2, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if torch.is_grad_enabled():
            # Differentiated again: intermediates have to be functions of the inputs.
            thin, base = x2 @ A.t(), None if base is None else F.linear(x2, W)
        grad_x = grad_W = grad_bias = grad_row = grad_A = grad_B = None
        room = None
        if needs[3]:
            room = g * base
            grad_row = room.sum(0)
        # In memory that is there: to get it costs as much as to multiply.
        g_base = g if row is None else torch.mul(g, row, out=None if torch.is_grad_enabled() else room)
        # What reads g comes together, while it is in the cache; x comes last.
        if needs[0] or needs[4]:
            g_thin = torch.mm(g, B)
            g_thin = g_thin if scale == 1.0 else g_thin * scale
        if needs[5]:
            # The thin matrix first: faster than gᵀ·thin by a third.
            grad_B = torch.mm(thin.t(), g).t()
            grad_B = grad_B if scale == 1.0 else grad_B * scale
        if needs[0]:
            grad_x = torch.mm(g_thin, A).addmm_(g_base, W).view(x.shape)
        if needs[4]:
            grad_A = torch.mm(g_thin.t(), x2)
        if needs[1]:
            grad_W = g_base.t() @ x2
        if needs[2]:
            grad_bias = g.sum(0)
        return grad_x, grad_W, grad_bias, grad_row, grad_A, grad_B, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, down, up, index)
        return (x @ down[index].mT) @ up[index].mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, down, up, index = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_x = grad_down = grad_up = None
        own = down[index]
        if needs[2]:
            grad_up = _onto(up, index, grad.mT @ (x @ own.mT))
        if needs[0] or needs[1]:
            g_thin = grad @ up[index]
            grad_x = g_thin @ own if needs[0] else None
            grad_down = _onto(down, index, g_thin.mT @ x) if needs[1] else None
        return grad_x, grad_down, grad_up, None


def _onto(stack: Tensor, index: Tensor, parts: Tensor) -> Tensor:
    """The sum of parts by the matrix of the stack that each is for."""
    return torch.zeros_like(stack).index_add(0, index.remainder(len(stack)), parts)  # which takes no negative one
