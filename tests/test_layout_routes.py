"""A weight may be read by another layout than the one its operations would suggest: values and gradients stay."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import loraparam as lp
from loraparam.testing.subjects import shake


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


SIDE = 4
X2, X3 = draw(SIDE, SIDE), draw(SIDE, SIDE, SIDE)
SOME = torch.tensor([1, 3])

# Weights are cubes, so that no operation fails for a dim taken for another.
CUBES: dict[str, Callable[[Tensor], Tensor]] = {
    "bmm": lambda w: torch.bmm(X3, w),
    "bmm, weight first": lambda w: torch.bmm(w, X3),
    "matmul, broadcast": lambda w: X2 @ w,
    "baddbmm": lambda w: torch.baddbmm(X3, X3, w),
    "mT": lambda w: X3 @ w.mT,
    "permute": lambda w: X3 @ w.permute(2, 0, 1),
    "int": lambda w: F.linear(X2, w[1]),
    "indices": lambda w: torch.bmm(X3[:2], w[SOME]),
    "slice": lambda w: torch.bmm(X3[:2], w[1:3]),
    "iterate": lambda w: torch.stack([X2 @ matrix for matrix in w]),
    "chunk 0": lambda w: torch.bmm(X3[:2], w.chunk(2)[1]),
    "chunk 1": lambda w: torch.bmm(X3, w.chunk(2, 1)[1].mT),
    "narrow 2": lambda w: torch.bmm(X3, w.narrow(2, 1, 2)),
    "einsum": lambda w: torch.einsum("ti,eio->eto", X2, w),
    "einsum by heads": lambda w: torch.einsum("ibh,hnd->ibnd", X3, w),
    "einsum over heads": lambda w: torch.einsum("bnd,hnd->bh", X3, w),
    "conv1d": lambda w: F.conv1d(X3, w),
}
STACKS: dict[str, Callable[[Tensor], Tensor]] = {
    "matmul": lambda w: X3 @ w,
    "mT": lambda w: X3 @ w.mT,
    "int": lambda w: torch.bmm(X3, w[1]),
    "einsum": lambda w: torch.einsum("ti,efio->efto", X2, w),
    "conv2d": lambda w: F.conv2d(draw(2, SIDE, SIDE, SIDE), w),
}


def layouts(dims: int) -> list[lp.Layout]:
    """Every layout of so many dims that leaves one to the input."""
    found = []
    for out, count in itertools.product(range(dims), range(dims - 1)):
        others = [dim for dim in range(dims) if dim != out]
        found += [lp.Layout(out=out, batch=batch) for batch in itertools.permutations(others, count)]
    return found


class Use(nn.Module):
    def __init__(self, use: Callable[[Tensor], Tensor], dims: int) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(draw(*[SIDE] * dims)), use

    def forward(self) -> Tensor:
        return self.use(self.weight)


def results(use: Callable[[Tensor], Tensor], dims: int, method: lp.Method, layout: lp.Layout) -> list[Tensor]:
    """The output, and the gradients of the factors."""
    module = Use(use, dims)
    lp.attach(module, method, "weight", layout=layout, generator=torch.Generator().manual_seed(0))
    shake(module)
    output = module()
    return [output.detach(), *torch.autograd.grad(output.pow(2).sum(), list(lp.parameters(module)))]


@pytest.mark.parametrize("method", [lp.LoRA(r=2, alpha=3), lp.DoRA(r=2), lp.IA3()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(
    ("dims", "name"), [*itertools.product([3], CUBES), *itertools.product([4], STACKS)], ids=lambda part: str(part)
)
def test_operations_under_every_layout(dims: int, name: str, method: lp.Method) -> None:
    use = {3: CUBES, 4: STACKS}[dims][name]
    for layout in layouts(dims):
        with lp.execution("merged"):
            expected = results(use, dims, method, layout)
        for actual, want in zip(results(use, dims, method, layout), expected, strict=True):
            # float64, another order of sums
            assert_close(actual, want, rtol=1e-9, atol=1e-9, msg=lambda text, where=layout: f"{where!r}: {text}")
