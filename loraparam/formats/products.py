"""LoHa's and LoKr's differences: two products, joined element by element or by Kronecker, as one pair or whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Side:
    """P·Q of one side, as (out, r) and (r, in·∏k).

    Attributes:
        rank: r, where the file holds a pair; None for a whole matrix.
        kernel: the sizes of the kernel, where the tensors show them.
    """

    P: Tensor
    Q: Tensor
    rank: int | None
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True)
class Product:
    """Both sides of one module.

    Attributes:
        kronecker: whether the product is Kronecker's; else it is that of elements.
        scale_rank: what alpha is divided by; None where alpha is without effect.
    """

    left: Side
    right: Side
    kronecker: bool
    scale_rank: int | None

    def sizes(self) -> tuple[int, int]:
        """(out, in·∏k)."""
        out, in_ = self.left.P.shape[0], self.left.Q.shape[1]
        return (out * self.right.P.shape[0], in_ * self.right.Q.shape[1]) if self.kronecker else (out, in_)

    def rank(self) -> int:
        """Of the one pair it makes."""
        return self.left.P.shape[1] * self.right.P.shape[1]

    def shape(self) -> tuple[int, ...]:
        """(out, in, *k), as far as the tensors show a kernel."""
        out, in_ = self.sizes()
        kernel = self.left.kernel or self.right.kernel
        return (out, in_ // math.prod(kernel), *kernel)

    def is_pair(self, out: int, in_: int) -> bool:
        """Whether it is smaller as a pair than as a whole difference."""
        r = self.rank()
        return r <= min(out, in_) and r * (out + in_) < out * in_

    def made(self, out: int, in_: int) -> int:
        """How many numbers are made of it."""
        return self.rank() * (out + in_) if self.is_pair(out, in_) else out * in_

    def pair(self) -> tuple[Tensor, Tensor]:  # (r₁·r₂, in), (out, r₁·r₂)
        """The same product as one pair, in float64."""
        P1, Q1, P2, Q2 = (tensor.double() for side in (self.left, self.right) for tensor in (side.P, side.Q))
        if self.kronecker:
            return kron(Q1, Q2), kron(P1, P2)
        return (Q1[:, None] * Q2[None]).flatten(0, 1), (P1[:, :, None] * P2[:, None]).flatten(1)

    def dense(self) -> Tensor:  # (out, in)
        """The product itself, in float64."""
        left, right = (side.P.double() @ side.Q.double() for side in (self.left, self.right))
        return kron(left, right) if self.kronecker else left * right


def kron(X: Tensor, Y: Tensor) -> Tensor:
    """X ⊗ Y, of Y's dims; ``torch.kron`` fails on some strides, as a transposed column has them (PEFT's merge too)."""
    X = X.reshape([1] * (Y.dim() - X.dim()) + list(X.shape))
    outer = X.reshape([n for size in X.shape for n in (size, 1)])
    inner = Y.reshape([n for size in Y.shape for n in (1, size)])
    return (outer * inner).reshape([m * n for m, n in zip(X.shape, Y.shape, strict=True)])


def whole_side(matrix: Tensor) -> Side:
    """A matrix (out, in, *k) beside the identity, on the side that makes the smaller rank."""
    flat = matrix.flatten(1)
    eye = torch.eye(min(flat.shape), dtype=matrix.dtype)
    P, Q = (eye, flat) if flat.shape[0] <= flat.shape[1] else (flat, eye)
    return Side(P, Q, None, tuple(matrix.shape[2:]))
