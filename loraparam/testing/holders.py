"""Modules that hold weights unlike a layer: containers, bare parameters, tied weights, stacks of experts."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from .layer_cases import N_BATCH, SIZE, LayerCase


class ConvThenLinear(nn.Sequential):
    """A convolution in groups and a Linear, on inputs (n, 4, 3): weights that are read as matrices in two ways."""

    def __init__(self) -> None:
        super().__init__(nn.Conv1d(4, 6, 2, groups=2, bias=False), nn.Flatten(), nn.Linear(12, 5, bias=False))


class Listed(nn.Module):
    """Parameters in a ParameterList and a ParameterDict, one of them read by this parent, and a 0-dim one."""

    def __init__(self, size: int, count: int = 2) -> None:
        super().__init__()
        self.several = nn.ParameterList([torch.randn(size, size) for _ in range(count)])
        self.named = nn.ParameterDict({"gate": torch.randn(size, size)})
        self.inner = nn.Linear(size, size, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        """Chain them all; ``inner`` is never called, only its weight is read."""
        for weight in self.several:
            x = torch.tanh(x @ weight)
        return self.scale * torch.nn.functional.linear(x * torch.sigmoid(x @ self.named["gate"]), self.inner.weight)


@st.composite
def listed(draw: st.DrawFn) -> LayerCase:
    """Parameters in containers, and weights read by a parent instead of their layer."""
    size, count, n = draw(SIZE), draw(st.integers(1, 3)), draw(N_BATCH)
    return LayerCase("listed", lambda: Listed(size, count), lambda: (torch.randn(n, size),))


class Shared(nn.Module):
    """A layer used twice, and an embedding tied with an output projection."""

    def __init__(self, num: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num, dim)
        self.once = nn.Linear(dim, dim)
        self.again = self.once
        self.head = nn.Linear(dim, num, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        """Look up, transform twice, project back."""
        x = torch.tanh(self.once(self.embed(index)))
        return self.head(torch.tanh(self.again(x)))  # type: ignore[no-any-return]


@st.composite
def shared(draw: st.DrawFn) -> LayerCase:
    """Modules used twice and tied weights."""
    num, dim, n = draw(SIZE), draw(SIZE), draw(N_BATCH)
    return LayerCase("shared", lambda: Shared(num, dim), lambda: (torch.arange(num).repeat(n),))


class Experts(nn.Module):
    """A stack of expert matrices, (E, out, in) or (E, in, out), each input routed to one."""

    def __init__(self, experts: int, in_: int, out: int, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        shape = (experts, in_, out) if transposed else (experts, out, in_)
        self.up_proj = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        """One expert for each input, x is (E, n, in); half by a batched product, half by a loop."""
        weight = self.up_proj if self.is_transposed else self.up_proj.transpose(1, 2)
        looped = torch.stack([row @ w for row, w in zip(x, weight, strict=True)])
        return torch.bmm(x, weight) + looped


@st.composite
def experts(draw: st.DrawFn) -> LayerCase:
    """Expert stacks in both orientations."""
    in_, out, count, transposed = draw(SIZE), draw(SIZE), draw(st.integers(1, 3)), draw(st.booleans())
    return LayerCase("experts", lambda: Experts(count, in_, out, transposed), lambda: (torch.randn(count, 2, in_),))
