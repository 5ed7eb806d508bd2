"""Matrices of an expert stack by a vector of indices: the merged weight's values and gradients, and nothing kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import loraparam as lp
from loraparam import fused

E, OUT, IN = 3, 5, 4
ROUTES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bmm": lambda x, w, index: torch.bmm(x, w[index].mT),
    "matmul": lambda x, w, index: x @ w[index].transpose(-1, -2),
    "baddbmm": lambda x, w, index: torch.baddbmm(torch.ones(len(index), 1, OUT).to(x), x, w[index].mT),
    "the other way": lambda x, w, index: (x @ w[index].mT) @ w[index],
    "one of several": lambda x, w, index: x @ w[index][0].mT,
    "several of several": lambda x, w, index: x @ w[index][torch.arange(len(index)).flip(0)].mT,
    "iterated": lambda x, w, index: torch.stack([row @ part.mT for row, part in zip(x, w[index], strict=True)]),
    "merged": lambda x, w, index: (x.unsqueeze(-2) * w[index].unsqueeze(1)).sum(-1),
}
METHODS = [
    lp.LoRA(r=2, alpha=3),
    lp.LoRA(r=2, alpha=3, dropout=0.5, dropout_on="input"),
    lp.DoRA(r=1),
    lp.DoRA(r=2, axis="in"),
    lp.Magnitude(),
]


class Experts(nn.Module):
    """A stack of matrices and a use of some of them."""

    def __init__(self, route: str, transposed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn((E, IN, OUT) if transposed else (E, OUT, IN), dtype=torch.float64))
        self.route, self.transposed = ROUTES[route], transposed

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.route(x, self.weight.mT if self.transposed else self.weight, index)


def adapted(route: str, methods: list[lp.Method], transposed: bool, train_base: bool) -> Experts:
    torch.manual_seed(0)
    module = Experts(route, transposed)
    layout = lp.Layout(batch=(0,), out=2 if transposed else 1)
    for i, method in enumerate(methods):
        lp.attach(module, method, "weight", layout=layout, freeze=not train_base, name=f"a{i}")
    with torch.no_grad():
        for factor in lp.parameters(module):
            factor.add_(0.3 * torch.randn_like(factor))
    return module.eval()


def results(module: nn.Module, index: Tensor) -> list[Tensor]:
    """The output, and gradients of the input and of all that is trained."""
    x = torch.randn(len(index), 2, IN, dtype=torch.float64, requires_grad=True)
    y = module(x, index)
    trained = [p for p in module.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *trained])]


@given(
    route=st.sampled_from(sorted(ROUTES)),
    methods=st.lists(st.sampled_from(METHODS), min_size=1, max_size=2),
    index=st.lists(st.integers(-E, E - 1), min_size=1, max_size=2 * E),
    transposed=st.booleans(),
    train_base=st.booleans(),
)
def test_it_is_the_merged_weight_s(
    route: str, methods: list[lp.Method], index: list[int], transposed: bool, train_base: bool
) -> None:
    module, found = adapted(route, methods, transposed, train_base), []
    for kind in ("factored", "merged"):
        torch.manual_seed(1)
        with lp.execution(kind):
            found.append(results(module, torch.tensor(index)))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)


@dataclass(frozen=True, kw_only=True)
class SharedGain(lp.Method):
    """One number for all matrices, and no structured form."""

    def init(self, weight: Tensor, layout: lp.Layout, *, generator: Any = None) -> dict[str, Tensor]:
        return {"gain": torch.ones((), dtype=weight.dtype, device=weight.device)}

    def apply(self, weight: Tensor, factors: dict[str, Tensor], layout: lp.Layout) -> Tensor:
        return weight * factors["gain"]


@dataclass(frozen=True, kw_only=True)
class SharedRows(lp.Method):
    """One number for each row, the same for all matrices."""

    def init(self, weight: Tensor, layout: lp.Layout, *, generator: Any = None) -> dict[str, Tensor]:
        return {"rows": torch.ones(layout.sizes(weight.shape)[1], dtype=weight.dtype, device=weight.device)}

    def apply(self, weight: Tensor, factors: dict[str, Tensor], layout: lp.Layout) -> Tensor:
        return layout.tensor(layout.matrix(weight) * factors["rows"].unsqueeze(-1), weight.shape)

    def factored(self, form: Any, factors: dict[str, Tensor]) -> Any:
        return form.scale_rows(factors["rows"].expand(*form.sizes[0], -1))


@pytest.mark.parametrize("method", [SharedGain(), SharedRows()])
@pytest.mark.parametrize("index", [1, torch.tensor([2, 0]), torch.tensor([0, 1, 1, 2])], ids=str)
def test_a_factor_without_the_stack_s_dim_is_shared_by_its_matrices(method: lp.Method, index: Any) -> None:
    weight = lp.effective_weight(module := adapted("bmm", [method], False, False), "weight")
    x = torch.randn(1, 2, IN, dtype=torch.float64)
    assert_close(x @ module.weight[index].mT, x @ weight[index].mT)


@pytest.mark.parametrize("count", [2, 7])
@pytest.mark.parametrize("method", [lp.LoRA(r=2), lp.DoRA(r=2)])
def test_it_runs_on_the_parts(method: lp.Method, count: int) -> None:
    """With fewer matrices than the stack has, and with more."""
    module = adapted("bmm", [method], False, False)
    x = torch.randn(count, 2, IN, dtype=torch.float64)
    report = lp.check(module, x, torch.arange(count) % E)
    assert [(row.factored, row.merged) for row in report] == [(1, 0)]


@pytest.mark.parametrize("train", ["input", "factors", "both"])
def test_its_backward(train: str) -> None:
    """gradcheck and gradgradcheck, whatever needs a gradient."""
    shapes = [(4, 2, IN), (E, 2, IN), (E, OUT, 2)]
    needs = [train != "factors", train != "input", train != "input"]
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=n) for s, n in zip(shapes, needs, strict=True)]
    index = torch.tensor([2, 0, 2, 2])
    assert torch.autograd.gradcheck(lambda *t: fused.gathered(*t, index), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: fused.gathered(*t, index), tensors)


def test_no_copy_of_the_factors_is_kept() -> None:
    module = adapted("bmm", [lp.LoRA(r=2)], False, False)
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Any:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(torch.randn(7, 1, IN, dtype=torch.float64, requires_grad=True), torch.arange(7) % E)
    assert (E, 2, IN) in kept
    assert (7, 2, IN) not in kept
    assert (7, IN, 2) not in kept
