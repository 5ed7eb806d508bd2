"""Convolutions whose kernel is an effective weight: a thin convolution, then one with kernel 1."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..effective import EffectiveWeight, whole
from ..forms import Form
from ..refusals import can_dequantize
from .registry import form_of, implements, ran


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
    """conv(x, W)·row + s·B·conv(x, A), the second with kernel 1 and B's rows in their groups."""
    form = form_of(weight, drops=True, flat=True)
    if form is not None and form.layout.rows is not None:
        return _flat_conv(function, input, weight, form, bias, stride, padding, dilation, groups)
    if form is None or form.col is not None or form.layout.out != 0 or form.layout.batch:
        return NotImplemented
    several_drops = form.drops_input and len(form.terms) > 1
    if isinstance(input, EffectiveWeight) or can_dequantize(form.weight) or several_drops:
        return NotImplemented
    ran(weight)
    tail = (1,) * (form.weight.dim() - 2)
    bias = whole(bias)
    y = function(input, form.weight, bias if form.row is None else None, stride, padding, dilation, groups)
    if form.row is not None:
        y = y * form.row.to(y.dtype).view(-1, *tail)
        y = y if bias is None else y + bias.view(-1, *tail)
    pair = form.factors(y.dtype)
    if pair is None:
        return y
    A, B, scale = pair
    x = F.dropout(input, form.terms[0].dropout) if form.drops_input else input
    kernel = A.view(-1, *form.weight.shape[1:])
    kernel = kernel if groups == 1 else kernel.repeat(groups, *(1 for _ in kernel.shape[1:]))
    # The thin output is scaled, which saves nothing for the backward pass, and the sum is taken in place.
    thin = function(x, kernel, None, stride, padding, dilation, groups).mul_(scale)
    return y.add_(function(thin, B.view(*B.shape, *tail), None, 1, 0, 1, groups))


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
    """convT(x, W)·row + s·B·convT(x, A), with one row of scales and one B for every group."""
    form = form_of(weight)
    if form is None or form.col is not None or form.layout.out != 1 or form.layout.batch:
        return NotImplemented
    if isinstance(input, EffectiveWeight) or can_dequantize(form.weight):
        return NotImplemented
    ran(weight)
    tail = (1,) * (form.weight.dim() - 2)
    bias = whole(bias)
    options = (stride, padding, output_padding, groups, dilation)
    y = function(input, form.weight, bias if form.row is None else None, *options)
    if form.row is not None:
        y = y * form.row.to(y.dtype).repeat(groups).view(-1, *tail)
        y = y if bias is None else y + bias.view(-1, *tail)
    pair = form.factors(y.dtype)
    if pair is None:
        return y
    A, B, scale = pair
    kernel = A.view(-1, form.weight.shape[0], *form.weight.shape[2:]).transpose(0, 1)
    thin = function(input, kernel, None, *options).mul_(scale)
    up = B.repeat(groups, 1).view(-1, B.shape[1], *tail)
    return y.add_(pointwise(thin, up, None, 1, 0, 1, groups))
