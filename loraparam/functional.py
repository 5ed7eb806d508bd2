"""Every method as a pure function of tensors.

Weights are matrices (*batch, out, in). The functions hold for ``torch.func`` (grad, vmap, functional_call).
Low-precision weights (bfloat16, float16) are updated in float32 and rounded once, at the end.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Axis = Literal["out", "in"]


def lora(W: Tensor, A: Tensor, B: Tensor, scale: float | Tensor) -> Tensor:
    """W + scale·B·A.

    Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3.

    Args:
        W: (*batch, out, in).
        A: (*batch, r, in).
        B: (*batch, out, r).
        scale: a number or a 0-dim tensor.

    Returns:
        (*batch, out, in), in W's dtype.

    Example:
        >>> W, A, B = torch.zeros(2, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [2.0]])
        >>> lora(W, A, B, 2.0)
        tensor([[2., 0.],
                [4., 0.]])
    """
    wide = compute_dtype(W.dtype)
    return (W.to(wide) + (scale * B.to(wide)) @ A.to(wide)).to(W.dtype)


def dora(
    W: Tensor,
    A: Tensor,
    B: Tensor,
    m: Tensor,
    scale: float | Tensor,
    *,
    axis: Axis = "out",
    detach_norm: bool = True,
    eps: float = 0.0,
) -> Tensor:
    """m·V/(‖V‖ + eps) with V = W + scale·B·A.

    Liu et al. 2024, https://arxiv.org/abs/2402.09353, eq. 5; ``detach_norm`` is its section 4.3: the norm
    is a constant in the backward pass.

    Args:
        W: (*batch, out, in).
        A: (*batch, r, in).
        B: (*batch, out, r).
        m: (*batch, out) with ``axis="out"``, one magnitude per output row; (*batch, in) with
            ``axis="in"``, one per input column.
        scale: a number or a 0-dim tensor.
        axis: what the norm belongs to.
        detach_norm: treat ‖V‖ as a constant when differentiating.
        eps: added to the norm, as LyCORIS does.

    Returns:
        (*batch, out, in), in W's dtype. A zero row (or column) stays zero.

    Example:
        >>> W, A, B = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), torch.zeros(1, 1)
        >>> dora(W, A, B, torch.tensor([10.0]), 1.0)
        tensor([[6., 8.]])
    """
    wide = compute_dtype(W.dtype)
    V = lora(W.to(wide), A, B, scale)
    norm = row_norm(V.detach() if detach_norm else V, axis)
    return _rescale(V, m.to(wide), norm, axis, eps).to(W.dtype)


def magnitude(W: Tensor, m: Tensor, *, axis: Axis = "out") -> Tensor:
    """m·W/‖W‖: the direction of each row (or column) is kept, its length is m.

    The magnitude half of DoRA (https://arxiv.org/abs/2402.09353, eq. 5) with no low-rank part.

    Args:
        W: (*batch, out, in).
        m: (*batch, out), or (*batch, in) with ``axis="in"``.
        axis: what the norm belongs to.

    Returns:
        (*batch, out, in), in W's dtype.

    Example:
        >>> magnitude(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([5.0, 1.0]))
        tensor([[3., 4.],
                [0., 0.]])
    """
    wide = compute_dtype(W.dtype)
    W_wide = W.to(wide)
    return _rescale(W_wide, m.to(wide), row_norm(W_wide, axis), axis, 0.0).to(W.dtype)


def ia3(W: Tensor, l: Tensor, *, axis: Axis = "out") -> Tensor:
    """l·W: each row (or column) multiplied by one number.

    (IA)³, Liu et al. 2022, https://arxiv.org/abs/2205.05638.

    Args:
        W: (*batch, out, in).
        l: (*batch, out), or (*batch, in) with ``axis="in"``.
        axis: what a factor belongs to.

    Returns:
        (*batch, out, in), in W's dtype.

    Example:
        >>> ia3(torch.ones(2, 2), torch.tensor([2.0, 10.0]))
        tensor([[ 2.,  2.],
                [10., 10.]])
    """
    wide = compute_dtype(W.dtype)
    return (W.to(wide) * l.to(wide).unsqueeze(-1 if axis == "out" else -2)).to(W.dtype)


def full(W: Tensor, D: Tensor) -> Tensor:
    """W + D, for tensors of any one shape.

    Example:
        >>> full(torch.ones(2), torch.tensor([0.0, 1.0]))
        tensor([1., 2.])
    """
    wide = compute_dtype(W.dtype)
    return (W.to(wide) + D.to(wide)).to(W.dtype)


def row_norm(W: Tensor, axis: Axis = "out") -> Tensor:
    """‖W‖ per output row, (*batch, out); with ``axis="in"`` per input column, (*batch, in)."""
    W, dim = W.to(compute_dtype(W.dtype)), -1 if axis == "out" else -2
    if W.is_meta:  # a plan asks for the shape alone, and any reduction there first imports sympy, or torch._dynamo
        return W.new_empty((*W.shape[:-2], W.shape[-2 if axis == "out" else -1]))
    norm: Tensor = torch.linalg.vector_norm(W, dim=dim)
    return norm


def _rescale(V: Tensor, m: Tensor, norm: Tensor, axis: Axis, eps: float) -> Tensor:
    """V·(m / (norm + eps)). The ratio comes first: where m equals the norm, V is returned bit for bit."""
    return V * length_ratio(m, norm, eps).unsqueeze(-1 if axis == "out" else -2)


def length_ratio(m: Tensor, norm: Tensor, eps: float = 0.0) -> Tensor:
    """m / (norm + eps), what a row is multiplied with to have length m; m itself for a zero row, which stays zero."""
    norm = norm + eps if eps else norm
    # 0/0 would be NaN in the value and in every gradient.
    return m / norm.masked_fill(norm == 0, 1)


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; some devices, such as meta, have none."""
    if not torch._C._is_any_autocast_enabled():
        return False
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype updates are computed in: float32 for anything narrower, else the weight's own.

    Rounding W + Δ in bfloat16 loses most of a small Δ (80 % of it at |Δ|/|W| = 1e-3), so a delta is never
    rounded on its own.
    """
    return torch.float32 if dtype.itemsize < 4 else dtype
