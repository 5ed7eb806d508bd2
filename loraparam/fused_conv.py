"""A hand-written backward for the factored convolution: one full convolution for its input, none for its kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """What a convolution takes besides its tensors: one number for each dim of space, or for all. In one group."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool


def convolution(
    x: Tensor,  # (n, in, *space)
    W: Tensor,  # (out, in, *kernel), of a transposed convolution as well
    bias: Tensor | None,  # (out,)
    row: Tensor | None,  # (out,)
    A: Tensor,  # (r, in, *kernel)
    B: Tensor,  # (out, r)
    scale: float,
    options: Options,
) -> Tensor:
    """row·conv(x, W) + s·B·conv(x, A) + bias, (n, out, *space).

    Saves x and conv(x, A), and with ``row`` conv(x, W). The gradient of a thin convolution's input takes a quarter of a
    full one's time for an eighth of its operations; the backward sends it through the kernel row·W + s·B·A instead,
    which is made for that moment: next to an activation a kernel is small.
    """
    y: Tensor = _Convolution.apply(x, W, bias, row, A, B, scale, options)  # type: ignore[no-untyped-call]
    return y


def add_up(y: Tensor, thin: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + s·B·thin at each place, in y's memory; y (n, out, *space), thin (n, r, *space), B (out, r)."""
    n, out = y.shape[:2]
    y.view(n, out, y.shape[2:].numel()).baddbmm_(B.expand(n, *B.shape), thin.flatten(2), alpha=scale)
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Any, row: Any, A: Tensor, B: Tensor, scale: float, options: Options
    ) -> Tensor:
        thin = _convolve(x, A, None, options)
        y = _convolve(x, W, bias if row is None else None, options)
        ctx.save_for_backward(x, W, row, A, B, thin, y if row is not None and row.requires_grad else None)
        ctx.scale, ctx.options = scale, options
        if row is not None:
            y = y * _along(row, y) if bias is None else torch.addcmul(_along(bias, y), y, _along(row, y))
        return add_up(y, thin, B, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, W, row, A, B, thin, base = ctx.saved_tensors
        scale, options, needs = ctx.scale, ctx.options, ctx.needs_input_grad
        if torch.is_grad_enabled():
            # Differentiated again: intermediates have to be functions of the inputs.
            thin = _convolve(x, A, None, options)
            base = None if base is None else _convolve(x, W, None, options)
        grad_x = grad_W = grad_bias = grad_row = grad_A = grad_B = None
        g = grad.flatten(2)
        if needs[0]:
            kernel = W.flatten(1) if row is None else W.flatten(1) * row.unsqueeze(-1)
            kernel = torch.addmm(kernel, B, A.flatten(1), alpha=scale).view(W.shape)
            grad_x = _grad_input(grad, x, kernel, options)
        if needs[1]:
            grad_W = _grad_kernel(grad if row is None else grad * _along(row, grad), x, W, options)
        if needs[2]:
            grad_bias = g.sum((0, 2))
        if needs[3]:
            grad_row = (g * base.flatten(2)).sum((0, 2))
        if needs[4]:
            grad_A = _grad_kernel(torch.matmul(B.t() * scale, g).view_as(thin), x, A, options)
        if needs[5]:
            grad_B = torch.bmm(g, thin.flatten(2).mT).sum(0) * scale
        return grad_x, grad_W, grad_bias, grad_row, grad_A, grad_B, None, None


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, options: Options) -> Tensor:
    return torch.convolution(x, _stored(kernel, options), bias, *_arguments(options))


def _grad_input(grad: Tensor, x: Tensor, kernel: Tensor, options: Options) -> Tensor:
    grad_x: Tensor = _backward(grad, x, kernel, options, (True, False, False))[0]
    return grad_x


def _grad_kernel(grad: Tensor, x: Tensor, kernel: Tensor, options: Options) -> Tensor:
    return _stored(_backward(grad, x, kernel, options, (False, True, False))[1], options)


def _backward(grad: Tensor, x: Tensor, kernel: Tensor, options: Options, which: tuple[bool, ...]) -> Any:
    stored = _stored(kernel, options)
    return torch.ops.aten.convolution_backward.default(grad, x, stored, None, *_arguments(options), which)


def _arguments(options: Options) -> tuple[Any, ...]:
    """As torch's own functions take them, with the one group last."""
    return (*options[:3], options.transposed, options.output_padding, 1)


def _stored(kernel: Tensor, options: Options) -> Tensor:
    """A kernel (out, in, …) as a convolution takes it, or back: a transposed one has (in, out, …)."""
    return kernel.transpose(0, 1) if options.transposed else kernel


def _along(scales: Tensor, y: Tensor) -> Tensor:
    """One number for each channel, ready to meet (n, channels, *space)."""
    return scales.view(-1, *(1,) * (y.dim() - 2))
