"""Products with an effective weight: linear, matmul and their kin, and grouped products of expert stacks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import fused
from ..effective import EffectiveWeight
from ..forms import Form
from ..functional import autocasts
from ..refusals import can_dequantize
from ..sharding import is_spread
from .registry import form_of, implements, ran, same_kind, seen


def product(x: Tensor, form: Form, *, out_to_in: bool, bias: Tensor | None = None) -> Tensor:
    """x·Mᵀ + bias, from inputs to outputs; with ``out_to_in`` x·M.

    x is (*tokens, in) for one matrix M, (*batch, tokens, in) for a stack of them.
    """
    plain = form.weight.dim() == 2 and x.dim() >= 2 and same_kind(x, form.weight)
    if (not form.terms or form.drops_input or not plain) and _runs_token_by_token(x, form):
        y = product(x.reshape(-1, x.shape[-1]), form, out_to_in=out_to_in, bias=bias)
        return y.view(*x.shape[:-1], y.shape[-1])
    pre, post = (form.row, form.col) if out_to_in else (form.col, form.row)
    if pre is not None or post is not None:
        pre, post = _as(pre, x, form), _as(post, x, form)
    scaled = x if pre is None else x * pre
    pair = form.stacked_factors(x.dtype)
    if pair is None or form.drops_input:
        y = _post(_base(scaled, form, out_to_in), post)
        for own, factors in seen(x, form, x.dtype):
            y = y + _low_rank(own, *factors, out_to_in)
        return y if bias is None else y + bias.to(y.dtype)
    A, B, scale = pair
    down, up = (B.mT, A.mT) if out_to_in else (A, B)
    if not plain or not isinstance(scale, float):
        y = _base(scaled, form, out_to_in)
        y = scale * _thin(x, down, up, form.index) + _post(y, post)
        # Under autocast the product has a narrower dtype than the bias.
        return y if bias is None else y + bias.to(y.dtype)
    matrix = form.weight if form.is_transposed == out_to_in else form.weight.t()
    if pre is None and _worth_fusing(x, form):
        return fused.linear(x, matrix, bias, post, down, up, scale)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    scaled = flat if pre is None else scaled.reshape(flat.shape)
    if x.dtype.itemsize >= 4:
        y = fused.base_first(scaled, flat, matrix, bias, post, down, up, scale)
    else:
        y = fused.small_first(scaled, F.linear(flat, down), matrix, bias, post, up, scale)[0]
    if x.dim() == 2:
        return y
    # As torch's own product: a view where there is a bias.
    shape = (*x.shape[:-1], y.shape[-1])
    return fused.reshaped(y, shape) if bias is None else y.view(shape)


def _runs_token_by_token(x: Tensor, form: Form) -> bool:
    """Whether torch would not multiply all tokens at once: where they are strided, as in attention, and no bias is."""
    if form.layout.batch or x.dim() < 3 or is_spread(form.weight) or is_spread(x):
        return False
    return any(x.stride(i) != x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2))


def _thin(x: Tensor, down: Tensor, up: Tensor, index: Tensor | None) -> Tensor:
    """x·downᵀ·upᵀ, of the matrices of a stack that ``index`` takes."""
    if index is None:
        return (x @ down.mT) @ up.mT
    if autocasts(x):
        return (x @ down[index].mT) @ up[index].mT
    return fused.gathered(x, down, up, index)


def _as(scale: Tensor | None, x: Tensor, form: Form) -> Tensor | None:
    """Row or column scales, ready to multiply x or what becomes of it."""
    if scale is None:
        return None
    return scale.to(x.dtype).unsqueeze(-2) if form.layout.batch else scale.to(x.dtype)


def _post(y: Tensor, scale: Tensor | None) -> Tensor:
    """The base's product with its scales, in the dtype that the base's has: under autocast a narrower one."""
    return y if scale is None else (y * scale).to(y.dtype)


def _base(x: Tensor, form: Form, out_to_in: bool) -> Tensor:
    """The base's own product."""
    if form.layout.batch:
        return torch.matmul(x, form.matrix.to(x.dtype) if out_to_in else form.matrix.mT.to(x.dtype))
    # A quantized weight runs in its own kernel, which takes it as it is stored.
    if can_dequantize(form.weight) and form.is_transposed == out_to_in:
        return F.linear(x, form.weight)
    return F.linear(x, _matrix(form, out_to_in))


def _matrix(form: Form, out_to_in: bool) -> Tensor:
    """The base such that F.linear(x, it) is the product."""
    if form.weight.dim() == 2 and not can_dequantize(form.weight):
        return form.weight if form.is_transposed == out_to_in else form.weight.t()
    return form.matrix.mT if out_to_in else form.matrix


def _low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor, out_to_in: bool) -> Tensor:
    """s·x·Aᵀ·Bᵀ; with ``out_to_in`` s·x·B·A."""
    down, up = (B.mT, A.mT) if out_to_in else (A, B)
    return scale * ((x @ down.mT) @ up.mT)


def _worth_fusing(x: Tensor, form: Form) -> bool:
    """Whether the hand-written backward saves more than its calls from Python cost.

    Measured on one core and on two, hidden 256 to 1024: even at 256 tokens, as it saves passes over activations.
    """
    if not torch.is_grad_enabled() or x.numel() < 256 * x.shape[-1]:
        return False
    return x.numel() * form.weight.shape[form.layout.out] >= 1 << 25


@implements(F.linear, torch._C._nn.linear)
def linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """input·Tᵀ + bias, with T the weight as it is stored."""
    form = form_of(weight, drops=True)
    if form is None or isinstance(input, EffectiveWeight) or form.weight.dim() != 2:
        return NotImplemented
    ran(weight)
    bias = bias.dense() if isinstance(bias, EffectiveWeight) else bias
    return product(input, form, out_to_in=form.is_transposed, bias=bias)


@implements(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm, torch.mv)
@implements(torch.bmm, torch.Tensor.bmm, torch.Tensor.mv)
def matmul(a: Any, b: Any, *, out: Any = None) -> Any:
    """a @ b with one of the two an effective weight."""
    if out is not None or (isinstance(a, EffectiveWeight) and isinstance(b, EffectiveWeight)):
        return NotImplemented
    if isinstance(a, EffectiveWeight):
        # T·x = (xᵀ·Tᵀ)ᵀ
        form = form_of(a)
        if form is None or not _matches(b, form) or b.dim() == 0:
            return NotImplemented
        ran(a)
        if b.dim() == 1:
            return product(b, form, out_to_in=form.is_transposed)
        return product(b.mT, form, out_to_in=form.is_transposed).mT
    form = form_of(b, drops=True)
    if form is None or not _matches(a, form):
        return NotImplemented
    ran(b)
    return product(a, form, out_to_in=not form.is_transposed)


def _matches(x: Tensor, form: Form) -> bool:
    """Whether x and the matrices multiply without broadcasting over a batch."""
    if not form.layout.batch:
        return form.weight.dim() == 2
    return form.layout.batch == (0,) and form.weight.dim() == x.dim() == 3 and x.shape[0] == form.weight.shape[0]


@implements(torch.Tensor.__rmatmul__)
def rmatmul(b: Any, a: Any) -> Any:
    """a @ b."""
    return matmul(a, b)


@implements(torch.addmm, torch.Tensor.addmm, torch.baddbmm, torch.Tensor.baddbmm)
def addmm(input: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1, out: Any = None) -> Any:
    """beta·input + alpha·(a @ b)."""
    if isinstance(input, EffectiveWeight) or out is not None:
        return NotImplemented
    if (
        beta == alpha == 1
        and isinstance(b, EffectiveWeight)
        and input.dim() == 1
        and not isinstance(a, EffectiveWeight)
    ):
        form = form_of(b, drops=True)
        if form is None or not _matches(a, form):
            return NotImplemented
        ran(b)
        return product(a, form, out_to_in=not form.is_transposed, bias=input)
    result = matmul(a, b)
    if result is NotImplemented:
        return result
    # With beta = 0 torch does not look at the input, which then may hold anything.
    return alpha * result if beta == 0 else (beta * input + alpha * result).to(result.dtype)


# torch >= 2.10 has it under its public name as well.
_GROUPED = [f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None]


@implements(*_GROUPED)
def grouped_mm(mat_a: Any, mat_b: Any, *, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows of ``mat_a``, in groups that end at ``offs``, each times the matrix of its group."""
    form = form_of(mat_b)
    if form is None or isinstance(mat_a, EffectiveWeight) or mat_a.dim() != 2 or form.layout.batch != (0,):
        return NotImplemented
    if offs is None or bias is not None or out_dtype is not None or can_dequantize(form.weight):
        return NotImplemented
    ran(mat_b)
    out_to_in = not form.is_transposed
    pre, post = (form.row, form.col) if out_to_in else (form.col, form.row)
    if pre is not None or post is not None:
        # The group of each row; rows past the last group are the kernel's to ignore, and take the last one's scale.
        group = torch.bucketize(torch.arange(mat_a.shape[0], device=offs.device), offs, right=True)
        group = group.clamp_(max=len(offs) - 1)
    x = mat_a if pre is None else mat_a * pre[group].to(mat_a.dtype)
    y = _GROUPED[0](x, form.weight, offs=offs)
    y = y if post is None else y * post[group].to(y.dtype)
    pair = form.factors(mat_a.dtype)
    if pair is None:
        return y
    A, B, scale = pair
    down, up = (B, A) if out_to_in else (A.mT, B.mT)
    return y + scale * _thin_grouped(mat_a, down, up, offs)


def _thin_grouped(x: Tensor, down: Tensor, up: Tensor, offs: Tensor) -> Tensor:
    """(x·down)·up by groups; the rank is padded to the kernels' alignment of 16 bytes."""
    spare = -down.shape[-1] % (16 // x.element_size())
    if spare:
        down, up = F.pad(down, (0, spare)), F.pad(up, (0, 0, 0, spare))
    thin = _GROUPED[0](x, down.contiguous(), offs=offs)
    y: Tensor = _GROUPED[0](thin, up.contiguous(), offs=offs)
    return y
