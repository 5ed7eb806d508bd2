"""Adding differences entry by entry: TIES and DARE, on tensors of any shape."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor


def trimmed(delta: Tensor, density: float) -> Tensor:
    """The share ``density`` of entries that are largest in size, at least one; the others zero.

    Example:
        >>> trimmed(torch.tensor([3.0, -1.0, 2.0, -4.0]), 0.5)
        tensor([ 3.,  0.,  0., -4.])
    """
    flat = delta.reshape(-1)
    if not flat.numel():
        return delta
    kept = flat.abs().topk(max(1, round(density * flat.numel())), sorted=False).indices
    return torch.zeros_like(flat).index_put((kept,), flat[kept]).reshape(delta.shape)


def ties(deltas: Sequence[Tensor], density: float) -> Tensor:
    """Trim, elect a sign, and take the mean of the entries that have it.

    Yadav et al. 2023, https://arxiv.org/abs/2306.01708, algorithm 1. The sign elected for an entry is that of the
    sum over the trimmed differences; the mean is over those that agree, zeros left out.

    Example:
        >>> ties([torch.tensor([3.0, 1.0]), torch.tensor([1.0, -2.0])], density=1.0)
        tensor([ 2., -2.])
    """
    stack = torch.stack([trimmed(delta, density) for delta in deltas])
    agree = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
    return (stack * agree).sum(0) / agree.sum(0).clamp(min=1)


def dare(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry dropped with probability 1 − density, and divided by density otherwise: the same on average.

    Yu et al. 2023, https://arxiv.org/abs/2311.03099, equation 1, with density = 1 − p.
    """
    keep = torch.rand(delta.shape, generator=generator, dtype=torch.float64) < density
    return delta * keep / density


def generator_for(*labels: object) -> torch.Generator:
    """A random generator that depends on its labels only, so that no target's draw depends on another's."""
    digest = blake2b(repr(labels).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
