"""Convolutions whose kernel is an effective weight: a thin convolution, then one with kernel 1."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import fused_conv
from ..effective import EffectiveWeight, whole
from ..forms import Form
from ..refusals import can_dequantize
from .registry import form_of, implements, ran, same_kind, seen


@implements(torch.conv1d, F.conv1d)
def conv1d(input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Conv1d."""
    return _conv(torch.conv1d, input, weight, *args, **kwargs)


@implements(torch.conv2d, F.conv2d)
def conv2d(input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Conv2d."""
    return _conv(torch.conv2d, input, weight, *args, **kwargs)


@implements(torch.conv3d, F.conv3d)
def conv3d(input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Conv3d."""
    return _conv(torch.conv3d, input, weight, *args, **kwargs)


def _conv(
    function: Any,
    input: Tensor,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """row·conv(x, W) + s·B·conv(x, A), with B's rows in their groups."""
    form = form_of(weight, drops=True, flat=True)
    if form is not None and form.layout.rows is not None:
        return _flat_conv(function, input, weight, form, bias, stride, padding, dilation, groups)
    if not _is_kernel(form, 0) or isinstance(input, EffectiveWeight):
        return NotImplemented
    ran(weight)
    bias = whole(bias)
    if groups == 1 and not isinstance(padding, str) and _worth_fusing(input, form) and _can_fuse(input, form):
        return _fused(input, form, bias, stride, padding, dilation)
    tail = (1,) * (form.weight.dim() - 2)
    y = function(input, form.weight, bias if form.row is None else None, stride, padding, dilation, groups)
    y = y if form.row is None else _scaled(y, form.row, bias, tail)
    for x, (A, B, scale) in seen(input, form, y.dtype):
        kernel = A.view(-1, *form.weight.shape[1:])
        kernel = kernel if groups == 1 else kernel.repeat(groups, *(1 for _ in kernel.shape[1:]))
        thin = function(x, kernel, None, stride, padding, dilation, groups)
        y = _plus_up(y, thin, B.view(*B.shape, *tail), scale, function, groups)
    return y


def _flat_conv(function: Any, input: Any, weight: Any, form: Form, bias: Any, *options: Any) -> Any:
    """conv(x, W) + conv(dropped x, s·B·A), where the kernel s·B·A does not factor; two only for dropout."""
    scaled = form.row is not None or form.col is not None
    if not form.drops_input or scaled or isinstance(input, EffectiveWeight) or can_dequantize(form.weight):
        return NotImplemented
    ran(weight)
    y = function(input, form.weight, whole(bias), *options)
    for term in form.terms:
        kernel = form.layout.tensor(term.scale * (term.B @ term.A), form.weight.shape).to(y.dtype)
        y = y + function(F.dropout(input, term.dropout), kernel, None, *options)
    return y


@implements(torch.conv_transpose1d, F.conv_transpose1d)
def conv_transpose1d(input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """ConvTranspose1d."""
    return _conv_transpose(torch.conv_transpose1d, torch.conv1d, input, weight, *args, **kwargs)


@implements(torch.conv_transpose2d, F.conv_transpose2d)
def conv_transpose2d(input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """ConvTranspose2d."""
    return _conv_transpose(torch.conv_transpose2d, torch.conv2d, input, weight, *args, **kwargs)


@implements(torch.conv_transpose3d, F.conv_transpose3d)
def conv_transpose3d(input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """ConvTranspose3d."""
    return _conv_transpose(torch.conv_transpose3d, torch.conv3d, input, weight, *args, **kwargs)


def _conv_transpose(
    function: Any,
    pointwise: Any,
    input: Tensor,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    """row·convT(x, W) + s·B·convT(x, A), with one row of scales and one B for every group."""
    form = form_of(weight, drops=True)
    if not _is_kernel(form, 1) or isinstance(input, EffectiveWeight):
        return NotImplemented
    ran(weight)
    bias = whole(bias)
    if groups == 1 and _worth_fusing(input, form) and _can_fuse(input, form):
        return _fused(input, form, bias, stride, padding, dilation, output_padding)
    tail = (1,) * (form.weight.dim() - 2)
    options = (stride, padding, output_padding, groups, dilation)
    y = function(input, form.weight, bias if form.row is None else None, *options)
    y = y if form.row is None else _scaled(y, form.row.repeat(groups), bias, tail)
    for x, (A, B, scale) in seen(input, form, y.dtype):
        kernel = A.view(-1, form.weight.shape[0], *form.weight.shape[2:]).transpose(0, 1)
        thin = function(x, kernel, None, *options)
        y = _plus_up(y, thin, B.repeat(groups, 1).view(-1, B.shape[1], *tail), scale, pointwise, groups)
    return y


# --- what both are made of ----------------------------------------------------------------------------------


def _is_kernel(form: Form | None, out: int) -> TypeGuard[Form]:
    """Whether a form is that of one kernel as torch's convolutions take it, with its outputs along a dim."""
    if form is None or form.col is not None or form.layout.batch:
        return False
    return form.layout.out == out and not can_dequantize(form.weight)


def _scaled(y: Tensor, row: Tensor, bias: Tensor | None, tail: tuple[int, ...]) -> Tensor:
    """row·y + bias."""
    y = y * row.to(y.dtype).view(-1, *tail)
    # Under autocast y has a narrower dtype than the bias.
    return y if bias is None else y + bias.to(y.dtype).view(-1, *tail)


def _plus_up(y: Tensor, thin: Tensor, up: Tensor, scale: Any, pointwise: Any, groups: int) -> Tensor:
    """y + s·B·thin at each place, in y's memory."""
    if groups == 1 and not torch.is_grad_enabled() and y.dim() == up.dim() and type(y) is Tensor:
        return fused_conv.add_up(y, thin, up.flatten(1), float(scale))
    # The thin output is scaled, which saves nothing for the backward pass, and the sum is taken in place.
    result: Tensor = y.add_(pointwise(thin.mul_(scale), up, None, 1, 0, 1, groups))
    return result


def _can_fuse(x: Tensor, form: Form) -> bool:
    """Whether the hand-written backward knows this case, in one group."""
    return (
        len(form.terms) > 0
        and all(isinstance(term.scale, float) for term in form.terms)
        and not form.drops_input
        and x.dim() == form.weight.dim()
        and x.dtype.itemsize >= 4
        and same_kind(x, form.weight)
    )


def _worth_fusing(x: Tensor, form: Form) -> bool:
    """Whether the hand-written backward saves more than its calls from Python, and its kernel, cost.

    Measured on one core and on two: even at 1,024 positions and 2²⁶ multiplications, a tenth faster at 4,096.
    """
    positions = x.numel() // max(x.shape[1], 1)
    return torch.is_grad_enabled() and positions >= 1024 and positions * form.weight.numel() >= 1 << 26


def _fused(
    x: Tensor, form: Form, bias: Any, stride: Any, padding: Any, dilation: Any, output_padding: Any = None
) -> Tensor:
    """By the hand-written backward; a transposed convolution has ``output_padding``."""
    pair = form.factors(x.dtype)
    assert pair is not None
    A, B, scale = pair
    transposed = output_padding is not None
    W = form.weight.transpose(0, 1) if transposed else form.weight
    stride, padding, dilation, output = map(_numbers, (stride, padding, dilation, output_padding or 0))
    options = fused_conv.Options(stride, padding, dilation, output, transposed)
    assert isinstance(scale, float)
    return fused_conv.convolution(x, W, bias, form.row, A.view(-1, *W.shape[1:]), B, scale, options)


def _numbers(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
