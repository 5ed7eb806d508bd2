"""Every law is seen to fail on a subject broken on purpose."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import loraparam as lp
from loraparam import guarded, merging
from loraparam.methods import REGISTRY
from loraparam.methods.lowrank import LowRank
from loraparam.stack import AdapterFactors, AdapterStack
from loraparam.testing import check_layer, check_method, check_model, laws, method_laws, state_laws

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
        return {"gain": gain, "idle": gain.clone()} if self.how == "idle" else {"gain": gain}

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

    def factored(self, form: Any, factors: dict[str, Tensor]) -> Any:
        gain = factors["gain"].expand(*form.sizes[0], -1)
        return form.scale_rows(gain.detach() if self.how == "structured" else gain)

    @property
    def additive(self) -> bool:
        return self.how == "additive"

    def config(self) -> dict[str, Any]:
        return {"how": ""} if self.how == "config" else super().config()


# {law: (what breaks it, what the failure says of it)}
BROKEN_METHODS = {
    "neutral": ("start", "apply with fresh factors: "),
    "keeps_form": ("write", "apply wrote into its arguments"),
    "deterministic": ("random", "gain: another start from the same generator"),
    "factors_are_trainable": ("dtype", "gain: torch.float16 for a weight in"),
    "every_factor_acts": ("idle", "idle: apply gives it no gradient"),
    "right_gradients": ("gradient", "the gradient of weight is not that of finite differences"),
    "factored_is_apply": ("structured", "the structured form's gradient of gain"),
    "finite_gradients": ("nan", "the gradient of gain is not finite"),
    "layout_is_only_a_view": ("layout", "through the layout"),
    "batches_are_independent": ("batch", "matrix 0 of a stack"),
    "rounded_once": ("rounding", "apply in bfloat16"),
    "additive_as_declared": ("additive", "the difference on another weight"),
    "config_round_trip": ("config", "is another method"),
}


@pytest.fixture(autouse=True, scope="module")
def _forget_broken() -> Any:
    yield
    REGISTRY.pop("Broken")
    REGISTRY.pop("Still")


def test_every_law_has_its_failure() -> None:
    """No law is left out below."""
    assert set(laws()) == {*BROKEN_METHODS, *BROKEN_LAYERS}


def test_the_healthy_gain_passes() -> None:
    """What is broken below is whole without the break."""
    check_method(Broken(), max_examples=10)
    check_layer(make_layer, make_inputs, methods=[Broken()])


@pytest.mark.parametrize("law", method_laws.METHOD_LAWS, ids=lambda law: law.__name__)
def test_method_law_fails(law: Any) -> None:
    """Each law of methods finds the gain that breaks it, and says what differs."""
    how, what = BROKEN_METHODS[law.__name__]
    with pytest.raises(AssertionError, match=rf"law '{law.__name__}' is broken by Broken\(how='{how}'\) on.*{what}"):
        check_method(Broken(how=how), only=[law.__name__])


@dataclass(frozen=True, kw_only=True)
class Still(Broken):
    """Nothing in it trains."""

    def init(self, weight: Tensor, layout: lp.Layout, *, generator: Any = None) -> dict[str, Tensor]:
        return {} if self.how == "none" else super().init(weight, layout)

    def apply(self, weight: Tensor, factors: dict[str, Tensor], layout: lp.Layout) -> Tensor:
        return weight.clone()


@pytest.mark.parametrize(
    ("how", "match"), [("none", "init makes no factors"), ("constant", "no gradient to any of its factors: gain")]
)
def test_a_method_in_which_nothing_trains(how: str, match: str) -> None:
    with pytest.raises(AssertionError, match=f"law 'every_factor_acts' is broken by Still.*{match}"):
        check_method(Still(how=how), max_examples=5)


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


def _writes_base_when_read(self: AdapterStack, base: Tensor, kind: Any) -> Any:
    with torch.no_grad():
        base.mul_(1.0001)
    return READ(self, base, kind)


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


UPDATE, COMPOSE, READ = AdapterFactors.update, AdapterStack.compose, AdapterStack.read_as
REDUCE = guarded._reduce_ex

# {law: (where, attribute, what breaks it)}
BROKEN_LAYERS: dict[str, tuple[Any, str, Any]] = {
    "equivalence": (AdapterFactors, "update", _wrong_gradient),
    "finite_differences": (LowRank, "term", _doubles_gradient),
    "neutral_start": (LowRank, "term", _off_by_some),
    "effect": (AdapterStack, "compose", _base_instead),
    "trains": (LowRank, "term", _stops_gradient),
    "exact_undo": (AdapterStack, "read_as", _writes_base_when_read),
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


# {law: what its failure says}
SAYS = {
    "equivalence": "gradient of (0.)?weight.default.lora_A: Mismatched elements",
    "finite_differences": "gradients are not those of finite differences",
    "neutral_start": "outputs right after attach: Mismatched",
    "effect": "(0.)?weight: moving its factors changes nothing",
    "trains": "dead targets?: read, but no gradient arrived: '(0.)?weight'",
    "composition": "(0.)?weight under two adapters: Mismatched",
    "exact_undo": "parameter '(0.)?weight': Mismatched",
    "exact_blocks": r"outputs inside merged\(\): Mismatched",
    "merge_keeps_outputs": "outputs after merge: Mismatched",
    "no_drift": "the base after 20 cycles: Mismatched",
    "all_or_nothing": "a second attach under the same name was not refused",
    "state_round_trip": "factors after load_state_dict: Mismatched",
    "file_round_trip": "factors after load: Mismatched",
    "original_checkpoint_loads": "RuntimeError: .* in loading state_dict",
    "copies_are_independent": "'(0.)?weight' is tied with 1 place outside of this module",
    "pickles_are_independent": "outputs of a copy: Mismatched",
    "compiled_equals_eager": "output 0, compiled: Mismatched",
}

CHECKS: dict[str, Callable[[str], None]] = {
    "method": lambda law: check_method(lp.LoRA(r=1), only=[law]),
    "layer": lambda law: check_layer(make_layer, make_inputs, methods=[lp.LoRA(r=1)], only=[law]),
    "model": lambda law: check_model(make_layer(), *make_inputs(), only=[law]),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("law", BROKEN_LAYERS)
def test_layer_law_fails(law: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each law of layers finds the library that breaks it, and names itself and what differs; in every check."""
    where, attribute, broken = BROKEN_LAYERS[law]
    monkeypatch.setattr(where, attribute, broken)
    monkeypatch.setattr(guarded, "_classes", {})
    with pytest.raises(AssertionError, match=rf"law '{law}' is broken by (Linear|ConvThenLinear), LoRA.*: {SAYS[law]}"):
        CHECKS[check](law)
    monkeypatch.undo()
    CHECKS[check](law)


class Odd(nn.Linear):
    """A layer that defeats one law by what a user's own layer may well do."""

    how = ""

    def __init__(self) -> None:
        super().__init__(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.how == "detaches":
            weight = weight.detach()
        if self.how == "writes" and parametrize.is_parametrized(self):
            with torch.no_grad():
                self.parametrizations.weight.original.mul_(1.001)
        if self.how == "looks" and parametrize.is_parametrized(self):
            weight = 1.1 * weight
        if self.how == "compiled" and torch.compiler.is_compiling():
            weight = 1.1 * weight
        return x @ weight.T

    def _load_from_state_dict(self, state: Any, *args: Any) -> None:
        if self.how != "deaf":
            super()._load_from_state_dict(state, *args)


# {how: {law that it breaks: what the failure says}}
ODD = {
    "detaches": {"trains": "dead target: read, but no gradient arrived: 'weight'"},
    "writes": {"exact_undo": "parameter 'weight'", "no_drift": "the base after 20 cycles"},
    "looks": {"neutral_start": "outputs right after attach", "merge_keeps_outputs": "outputs after merge"},
    "compiled": {"compiled_equals_eager": "output 0, compiled"},
    "deaf": {"state_round_trip": "outputs under merged_state_dict"},
}


@pytest.mark.parametrize(("how", "law"), [(how, law) for how, own in ODD.items() for law in own])
def test_odd_layer_fails(how: str, law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer does wrong with nothing of the library broken."""
    check_layer(Odd, make_inputs, methods=[lp.LoRA(r=1)], only=[law])
    monkeypatch.setattr(Odd, "how", how)
    with pytest.raises(AssertionError, match=rf"law '{law}' is broken by Odd, LoRA.*: {ODD[how][law]}"):
        check_layer(Odd, make_inputs, methods=[lp.LoRA(r=1)], only=[law])


def test_failures_name_law_and_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which law, which layer, which method, dtype and mode."""
    monkeypatch.setattr(LowRank, "term", _off_by_some)
    with pytest.raises(AssertionError, match=r"law 'neutral_start' is broken by Linear, LoRA\(r=1.*train"):
        check_layer(make_layer, make_inputs, methods=[lp.LoRA(r=1)], only=["neutral_start"])
