"""Layers that people copy from tutorials: what to write instead, and ``from_layer``, which turns them into adapters."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dropins import train
from torch import Tensor, nn
from torch.testing import assert_close

import loraparam as lp

R, ALPHA = 2, 3


class LoRALayer(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(in_dim, rank) / rank**0.5)
        self.B = nn.Parameter(torch.zeros(rank, out_dim))
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * (x @ self.A @ self.B)


class LinearWithLoRA(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)


class LinearWithLoRAMerged(LinearWithLoRA):
    def forward(self, x: Tensor) -> Tensor:
        lora = self.lora.A @ self.lora.B
        return F.linear(x, self.linear.weight + self.lora.alpha * lora.T, self.linear.bias)


class LinearWithDoRAMerged(LinearWithLoRA):
    """The norm runs over dim 0 of the weight: one length per input column."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(linear, rank, alpha)
        self.m = nn.Parameter(linear.weight.detach().norm(p=2, dim=0, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        numerator = self.linear.weight + self.lora.alpha * (self.lora.A @ self.lora.B).T
        return F.linear(x, self.m * numerator / numerator.norm(p=2, dim=0, keepdim=True), self.linear.bias)


class DividedByRank(LinearWithLoRA):
    """Later editions of the same tutorials scale by alpha / rank."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (self.lora.alpha / R) * (x @ self.lora.A @ self.lora.B)


class LinearWithDoRA(LinearWithLoRA):
    """It normalises the activations of the LoRA branch."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(linear, rank, alpha)
        self.m = nn.Parameter(torch.ones(1, linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        output = self.lora(x)
        return self.linear(x) + self.m * (output / (output.norm(p=2, dim=1, keepdim=True) + 1e-9))


class WithEverything(LinearWithLoRA):
    """It has the attributes, and does something else with them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.lora(x)


RECIPES = {
    LinearWithLoRA: lp.LoRA(r=R, alpha=ALPHA * R),
    LinearWithLoRAMerged: lp.LoRA(r=R, alpha=ALPHA * R),
    LinearWithDoRAMerged: lp.DoRA(r=R, alpha=ALPHA * R, axis="in", detach_norm=False),
}


def made(cls: type[LinearWithLoRA], in_: int = 5, out: int = 4) -> LinearWithLoRA:
    """A layer whose factors are away from their start, in float64, its linear frozen, as the tutorials do."""
    layer = cls(nn.Linear(in_, out), R, ALPHA).double()
    nn.init.normal_(layer.lora.B)
    layer.linear.requires_grad_(False)
    return layer


@pytest.mark.parametrize("cls", RECIPES)
def test_recipes(cls: type[LinearWithLoRA]) -> None:
    """The method that README names trains as the layer does: the same losses over 20 steps."""
    layer = made(cls)
    plain = copy.deepcopy(layer.linear)
    lp.attach(plain, RECIPES[cls], "weight")
    state = {"weight.lora_A": layer.lora.A.T, "weight.lora_B": layer.lora.B.T}
    if hasattr(layer, "m"):
        state["weight.magnitude"] = layer.m[0]
    lp.load_state_dict(plain, {key: value.detach() for key, value in state.items()})
    batches = [torch.randn(3, 5, dtype=torch.float64) for _ in range(20)]
    assert_close(train(plain, batches), train(layer, batches))


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("cls", [*RECIPES, DividedByRank])
def test_from_layer(cls: type[LinearWithLoRA], fresh: bool) -> None:
    """The wrapped layer itself, adapted; it goes on training as the wrapper would have, from a B of zeros as well."""
    layer = made(cls)
    if fresh:
        nn.init.zeros_(layer.lora.B)
    twin, x = copy.deepcopy(layer), torch.randn(3, 5, dtype=torch.float64)
    linear = layer.linear
    adapted = lp.from_layer(layer, name="task")
    assert adapted is linear
    assert lp.adapters(adapted) == {"task": {"weight": RECIPES.get(cls, lp.LoRA(r=R, alpha=ALPHA))}}
    assert_close(adapted(x), twin(x))
    batches = [torch.randn(3, 5, dtype=torch.float64) for _ in range(5)]
    assert_close(train(adapted, batches), train(twin, batches))


def test_a_layer_that_normalises_activations_is_no_function_of_a_weight() -> None:
    """Less its value at 0 it would be linear: f(2x) = 2 f(x). It is not, so no weight gives it, and it is refused."""
    x = torch.randn(3, 4, dtype=torch.float64)
    for cls, linear in ((LinearWithLoRAMerged, True), (LinearWithDoRAMerged, True), (LinearWithDoRA, False)):
        layer = made(cls, 4, 4)
        at_zero = layer(torch.zeros_like(x))
        assert torch.allclose(layer(2 * x) - at_zero, 2 * (layer(x) - at_zero)) == linear
    # m is (1, out), which a square layer does not tell from (1, in).
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(
        lp.AttachError, match=r"LinearWithDoRA does not compute .* no function of a weight: use lp\.DoRA"
    ):
        lp.from_layer(layer)
    assert type(layer.linear) is nn.Linear
    assert not lp.adapters(layer)
    for key, value in layer.state_dict().items():
        assert_close(value, before[key], rtol=0, atol=0)


def test_what_a_fresh_layer_does_is_seen_and_leaves_no_trace() -> None:
    layer = made(WithEverything)
    nn.init.zeros_(layer.lora.B)
    with pytest.raises(lp.AttachError, match="WithEverything does not compute"):
        lp.from_layer(layer)
    assert not layer.lora.B.any()
    assert layer.training


def test_what_is_no_such_layer() -> None:
    """Other attributes, other shapes, or another use of them."""
    with pytest.raises(lp.AttachError, match="Linear is no layer that is known; allowed: a module with `linear`"):
        lp.from_layer(nn.Linear(4, 6))
    for missing in ("linear", "lora"):
        layer = made(LinearWithLoRA)
        delattr(layer, missing)
        with pytest.raises(lp.AttachError, match="LinearWithLoRA is no layer that is known"):
            lp.from_layer(layer)
    layer = made(LinearWithLoRA)
    layer.lora.A = nn.Parameter(layer.lora.A.detach().T)
    with pytest.raises(lp.AttachError, match=r"LinearWithLoRA: A \(2, 5\), B \(2, 4\); allowed"):
        lp.from_layer(layer)
    layer = made(LinearWithLoRA)
    layer.m = 1.0
    with pytest.raises(lp.AttachError, match="LinearWithLoRA does not compute what its attributes say"):
        lp.from_layer(layer)
    with pytest.raises(lp.AttachError, match="WithEverything does not compute what its attributes say"):
        lp.from_layer(made(WithEverything))
    with pytest.raises(lp.AttachError, match="no function of a weight"):
        lp.from_layer(made(LinearWithDoRA))


def test_a_diverged_layer_is_refused_and_left_plain() -> None:
    layer = made(LinearWithLoRA)
    nn.init.constant_(layer.lora.A, float("nan"))
    with pytest.raises(lp.StateError, match=r"'weight\.lora_A' holds NaN or infinity"):
        lp.from_layer(layer)
    assert type(layer.linear) is nn.Linear
    assert not lp.adapters(layer)
