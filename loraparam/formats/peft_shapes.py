"""PEFT's shapes for the factors of convolutions and expert stacks, and ours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def from_experts(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A (E·r, in), expert-major, and B (out, r·E), expert-minor, as (E, r, in) and (E, out, r)."""
    A = A.reshape(experts, -1, A.shape[1])
    return A, B.reshape(B.shape[0], -1, experts).permute(2, 0, 1).contiguous()


def to_experts(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of ``from_experts``.

    Example:
        >>> A, B = torch.tensor([[1.0], [2], [3], [4]]), torch.tensor([[5.0, 6, 7, 8]])
        >>> A3, B3 = from_experts(A, B, 2)
        >>> (B3 @ A3).flatten()
        tensor([19., 50.])
        >>> all(map(torch.equal, to_experts(A3, B3), (A, B)))
        True
    """
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def from_groups(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor] | None:
    """The pair of a grouped convolution as one for its weight (out, in/g, *k); None where there is none.

    PEFT puts a dense convolution A (r, in, *k) before a grouped one B (out, r/g, 1, …): output channels of group j see
    the j-th block of A's rows. The delta is the weight's only where each block is zero outside the group's channels.
    """
    groups = A.shape[0] // B.shape[1]
    blocks = A.reshape(groups, -1, groups, A.shape[1] // groups, *A.shape[2:])  # (g, r/g, g, in/g, *k)
    own = torch.stack([blocks[j, :, j] for j in range(groups)]).flatten(2)
    if int(blocks.count_nonzero()) != int(own.count_nonzero()):
        return None
    B = B.flatten(1)
    if all(torch.equal(block, own[0]) for block in own):
        return own[0], B
    return own.flatten(0, 1), torch.block_diag(*B.chunk(groups))


def to_groups(A: Tensor, B: Tensor, shape: Sequence[int], groups: int) -> tuple[Tensor, Tensor]:
    """A pair for a convolution's weight (out, in/g, *k) in PEFT's shapes: A once per group, on its channels."""
    r, ones = A.shape[0], [1] * (len(shape) - 2)
    A, B = A.reshape(r, *shape[1:]), B.reshape(shape[0], r, *ones)
    if groups == 1:
        return A, B
    spread = A.new_zeros(groups, r, groups, *shape[1:])
    for j in range(groups):
        spread[j, :, j] = A
    return spread.reshape(groups * r, groups * shape[1], *shape[2:]), B


def rescaled_groups(weight: Tensor, l: Tensor, groups: int) -> Tensor:
    """A grouped convolution's weight (out, in/g, *k) with each of its ``in`` input channels multiplied by l (in,)."""
    blocks = weight.unflatten(0, (groups, -1))
    rows = l.to(torch.promote_types(weight.dtype, l.dtype)).reshape(groups, 1, -1)
    return torch.mul(blocks, rows[(..., *[None] * (weight.dim() - 2))]).flatten(0, 1)
