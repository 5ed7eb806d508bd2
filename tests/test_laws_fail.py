"""Every law is seen to fail on a subject broken on purpose."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loraparam as lp
from loraparam import guarded, merging
from loraparam.methods import REGISTRY
from loraparam.methods.lowrank import LowRank
from loraparam.stack import AdapterFactors, AdapterStack
from loraparam.testing import check_layer, check_method, laws, method_laws, state_laws

make_layer: Callable[[], nn.Module] = lambda: nn.Linear(4, 3)  # noqa: E731
make_inputs: Callable[[], Any] = lambda: (torch.randn(2, 4),)  # noqa: E731


@dataclass(frozen=True, kw_only=True)
class Broken(lp.Method):
    """A gain that is wrong in one chosen way."""

    how: str = ""

    def init(self, weight: Tensor, layout: lp.Layout, *, generator: Any = None) -> dict[str, Tensor]:
        gain = torch.ones(weight.shape[layout.out], dtype=weight.dtype if weight.dtype.itemsize > 2 else torch.float32)
        if self.how == "start":
            gain += 0.5
        if self.how == "random":
            gain += torch.rand(()) * 1e-3
            return {"gain": gain}
        if self.how == "dtype":
            return {"gain": gain.half()}
        return {"gain": gain}

    def apply(self, weight: Tensor, factors: dict[str, Tensor], layout: lp.Layout) -> Tensor:
        gain = factors["gain"].view([-1 if dim == layout.out else 1 for dim in range(weight.dim())])
        if self.how == "layout":
            gain = factors["gain"].sum() / factors["gain"].numel() + 0.1 * layout.out * (gain - 1)
        effective = (weight * gain).to(weight.dtype)
        if self.how == "rounding":
            effective = (effective + 64) - 64
        if self.how == "write":
            factors["gain"].data.add_(1e-3)
        if self.how == "batch" and layout.batch:
            effective = effective + 0.1 * (gain - 1) * weight.flip(0)
        if self.how == "gradient":
            effective = effective.detach() + 2 * (effective - effective.detach())
        if self.how == "nan":
            effective = effective + 0 * (gain - gain.detach()).abs().sqrt().to(weight.dtype)
        return effective

    @property
    def additive(self) -> bool:
        return self.how == "additive"

    def config(self) -> dict[str, Any]:
        return {"how": ""} if self.how == "config" else super().config()


BROKEN_METHODS = {
    "neutral": "start",
    "keeps_form": "write",
    "deterministic": "random",
    "factors_are_trainable": "dtype",
    "right_gradients": "gradient",
    "finite_gradients": "nan",
    "layout_is_only_a_view": "layout",
    "batches_are_independent": "batch",
    "rounded_once": "rounding",
    "additive_as_declared": "additive",
    "config_round_trip": "config",
}


@pytest.fixture(autouse=True, scope="module")
def _forget_broken() -> Any:
    yield
    REGISTRY.pop("Broken")


def test_every_law_has_its_failure() -> None:
    """No law is left out below."""
    assert set(laws()) == {*BROKEN_METHODS, *BROKEN_LAYERS}


def test_the_healthy_gain_passes() -> None:
    """What is broken below is whole without the break."""
    check_method(Broken(), max_examples=10)
    check_layer(make_layer, make_inputs, methods=[Broken()])


@pytest.mark.parametrize("law", method_laws.METHOD_LAWS, ids=lambda law: law.__name__)
def test_method_law_fails(law: Any) -> None:
    """Each law of methods finds the gain that breaks it."""
    method = Broken(how=BROKEN_METHODS[law.__name__])
    layout = lp.Layout(out=2, batch=(0,))
    with pytest.raises((AssertionError, RuntimeError)):
        law(method, torch.randn(3, 4, 2), layout)
    law(replace(method, how=""), torch.randn(3, 4, 2), layout)


def _base_instead(self: AdapterStack, base: Tensor, entries: list[AdapterFactors], *, noisy: bool = False) -> Tensor:
    return base * 1.0


def _wrong_gradient(self: AdapterFactors, weight: Tensor, strength: float, factors: Any) -> Tensor:
    right = UPDATE(self, weight, strength, factors)
    return right.detach() + 2 * (right - right.detach())


def _ignores_strength(self: AdapterFactors, weight: Tensor, strength: float, factors: Any) -> Tensor:
    return UPDATE(self, weight, 1.0, factors)


def _off_by_some(self: LowRank, form: Any, factors: dict[str, Tensor]) -> Any:
    return form.add(factors["lora_A"], factors["lora_B"] + 0.01, self.scale)


def _doubles_gradient(self: LowRank, form: Any, factors: dict[str, Tensor]) -> Any:
    B = factors["lora_B"]
    return form.add(factors["lora_A"], B.detach() + 2 * (B - B.detach()), self.scale)


def _stops_gradient(self: LowRank, form: Any, factors: dict[str, Tensor]) -> Any:
    return form.add(factors["lora_A"].detach(), factors["lora_B"].detach(), self.scale)


def _base_when_compiled(self: AdapterStack, base: Tensor, entries: list[AdapterFactors], *, noisy: bool = False) -> Any:
    return base * 1.0 if torch.compiler.is_compiling() else COMPOSE(self, base, entries, noisy=noisy)


def _writes_base(self: AdapterStack, base: Tensor, entries: list[AdapterFactors], *, noisy: bool = False) -> Tensor:
    with torch.no_grad():
        base.mul_(1.0001)
    return COMPOSE(self, base, entries, noisy=noisy)


def _writes_base_when_read(self: AdapterStack, base: Tensor) -> Tensor:
    with torch.no_grad():
        base.mul_(1.0001)
    return FORWARD(self, base)


def _merges_base(plist: Any, stack: AdapterStack, entries: list[AdapterFactors]) -> dict[str, Tensor]:
    return {"original": plist._parameters["original"].detach().clone()}


def _shallow(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    replica = copy.copy(self)
    replica._modules = dict(self._modules)
    return replica


def _pickles_untrained(self: nn.Module, protocol: Any) -> Any:
    replica = copy.deepcopy(self)
    with torch.no_grad():
        for factor in lp.parameters(replica):
            factor.zero_()
    return REDUCE(replica, protocol)


def _loads_zeros(model: nn.Module, path: Any) -> lp.Plan:
    plan = lp.load(model, path)
    with torch.no_grad():
        for factor in lp.parameters(model):
            factor.zero_()
    return plan


def _loads_nothing(model: nn.Module, given: Any, name: str = "default", strict: bool = True) -> None:
    return None


def _plain_loading(self: nn.Module, *args: Any) -> None:
    nn.Module._load_from_state_dict(self, *args)


UPDATE, COMPOSE, FORWARD = AdapterFactors.update, AdapterStack.compose, AdapterStack.forward
REDUCE = guarded._reduce_ex

# {law: (where, attribute, what breaks it)}
BROKEN_LAYERS: dict[str, tuple[Any, str, Any]] = {
    "equivalence": (AdapterFactors, "update", _wrong_gradient),
    "finite_differences": (LowRank, "term", _doubles_gradient),
    "neutral_start": (LowRank, "term", _off_by_some),
    "effect": (AdapterStack, "compose", _base_instead),
    "trains": (LowRank, "term", _stops_gradient),
    "exact_undo": (AdapterStack, "forward", _writes_base_when_read),
    "exact_blocks": (merging, "_folded", _merges_base),
    "merge_keeps_outputs": (merging, "_folded", _merges_base),
    "state_round_trip": (state_laws, "load_state_dict", _loads_nothing),
    "file_round_trip": (state_laws, "load", _loads_zeros),
    "original_checkpoint_loads": (guarded, "_load_from_state_dict", _plain_loading),
    "copies_are_independent": (guarded, "_deepcopy", _shallow),
    "pickles_are_independent": (guarded, "_reduce_ex", _pickles_untrained),
    "compiled_equals_eager": (AdapterStack, "compose", _base_when_compiled),
    "composition": (AdapterFactors, "update", _ignores_strength),
    "no_drift": (AdapterStack, "compose", _writes_base),
    "all_or_nothing": (importlib.import_module("loraparam.adapters"), "_refuse_duplicate", lambda row, name: None),
}


@pytest.mark.parametrize("law", BROKEN_LAYERS)
def test_layer_law_fails(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each law of layers finds the library that breaks it, and names itself."""
    where, attribute, broken = BROKEN_LAYERS[law]
    monkeypatch.setattr(where, attribute, broken)
    monkeypatch.setattr(guarded, "_classes", {})
    with pytest.raises(AssertionError, match=rf"law '{law}' is broken by"):
        check_layer(make_layer, make_inputs, methods=[lp.LoRA(r=1)], only=[law])
    monkeypatch.undo()
    check_layer(make_layer, make_inputs, methods=[lp.LoRA(r=1)], only=[law])


def test_failures_name_law_and_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which law, which layer, which method, dtype and mode."""
    monkeypatch.setattr(LowRank, "term", _off_by_some)
    with pytest.raises(AssertionError, match=r"law 'neutral_start' is broken by Linear, LoRA\(r=1.*train"):
        check_layer(make_layer, make_inputs, methods=[lp.LoRA(r=1)], only=["neutral_start"])
