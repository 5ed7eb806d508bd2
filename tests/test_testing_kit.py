"""The kit that users test with: what its strategies draw and shrink to, and the tests it makes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.fx import symbolic_trace
from torch.nn.utils.parametrizations import weight_norm

import loraparam as lp
from loraparam.catalogue import catalogue
from loraparam.methods import REGISTRY
from loraparam.methods.lowrank import LowRank
from loraparam.testing import (
    LayerCase,
    Subject,
    check_layer,
    check_method,
    check_model,
    laws,
    layers,
    layouts,
    methods,
    parametrize,
    weights,
)
from loraparam.testing.laws import LAYER_LAWS
from loraparam.testing.layers import LAYERS


def smallest(strategy: st.SearchStrategy[Any], condition: Callable[[Any], bool] = lambda drawn: True) -> Any:
    return hypothesis.find(strategy, condition, settings=hypothesis.settings(database=None, max_examples=1000))


def has(cls: type[nn.Module], **values: Any) -> Callable[[Any], bool]:
    """Whether a case has a module of a class with these attributes."""

    def found(case: Any) -> bool:
        return any(
            isinstance(module, cls) and all(getattr(module, name) == value for name, value in values.items())
            for module in case.make_layer().modules()
        )

    return found


def tied(case: Any) -> bool:
    return any(len(leaf.places) > 1 for leaf in catalogue(case.make_layer()).unique())


@pytest.mark.parametrize(
    ("condition", "shown"),
    [
        (lambda case: True, "Linear(in_features=2, out_features=2, bias=True) on (2,)"),
        (lambda case: case.dtype == torch.bfloat16, "Linear(in_features=2, out_features=2, bias=True) on (2,), "),
        (has(nn.Conv1d, groups=2), "Conv1d(2, 2, kernel_size=(1,), stride=(1,), groups=2, bias=False) on (1, 2, 6)"),
        (has(nn.LSTM), "LSTM(2, 3, bias=False, batch_first=True) on (2, 3, 2)"),
        (lambda case: case.name == "shared" and tied(case), "Shared( (embed): Embedding(2, 2) "),
    ],
    ids=["any", "dtype", "groups", "lstm", "tied"],
)
def test_layers_shrink_to_what_a_person_would_write(condition: Callable[[Any], bool], shown: str) -> None:
    assert repr(smallest(layers(), condition)).startswith(shown)


def test_weights_of_layers_are_strided() -> None:
    case = smallest(LAYERS["linear"], lambda case: not case.make_layer().weight.is_contiguous())
    assert repr(case) == "Linear(in_features=2, out_features=2, bias=True) on (2,), strided"


@given(case=layers(), method=methods())
@hypothesis.settings(max_examples=hypothesis.settings().max_examples // 2)
def test_what_is_drawn_is_fit_for_the_checks(case: LayerCase, method: lp.Method) -> None:
    """A layer and a method drawn are all that a user's own law needs; each layer has a weight that Full fits."""
    given_method = method if case.name != "norm" else lp.Full()
    check_layer(case.make_layer, case.make_inputs, methods=[given_method], only=["equivalence", "effect"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_shrink_to_one_contiguous_element_in_every_dtype(dtype: torch.dtype) -> None:
    weight = smallest(weights(), lambda weight: weight.dtype == dtype)
    assert weight.shape == (1, 1)
    assert (weight.dtype, weight.is_contiguous(), weight.storage_offset()) == (dtype, True, 0)


@pytest.mark.parametrize(
    ("condition", "shape"),
    [
        (lambda weight: weight.stride(0) == 1 and not weight.is_contiguous(), (2, 2)),
        (lambda weight: weight.storage_offset() > 0, (1, 1)),
        (lambda weight: bool((weight == 0).all(dim=1).any()) and len(weight) > 1, (2, 1)),
        (lambda weight: len({*weight.shape, 1}) == 3, (2, 3)),
    ],
    ids=["transposed", "part of a buffer", "zero row", "uneven"],
)
def test_weights_are_drawn_awkward_and_shrink(condition: Callable[[torch.Tensor], bool], shape: Any) -> None:
    weight = smallest(weights(), condition)
    assert tuple(sorted(weight.shape)) == tuple(sorted(shape))
    assert torch.isfinite(weight).all()


def test_layouts_and_methods_shrink_to_the_plain_ones() -> None:
    assert smallest(layouts()) == lp.Layout()
    assert smallest(methods()) == lp.LoRA(r=1)
    assert smallest(methods(max_r=4), lambda method: getattr(method, "r", 0) > 1) == lp.LoRA(r=2)
    for cls in (lp.BlockLoRA, lp.DoRA, lp.Magnitude, lp.IA3, lp.Full):
        own = {"r": 1} if issubclass(cls, LowRank) else {}
        assert smallest(methods(), lambda method, cls=cls: type(method) is cls) == cls(**own)


# --- tests by the dozen --------------------------------------------------------------------------------------


def linear() -> Subject:
    return Subject(lambda: nn.Linear(4, 3), lambda: (torch.randn(2, 4),), lp.LoRA(r=1))


def test_one_id_for_each_subject_and_law() -> None:
    mark = parametrize({"gain": lp.Magnitude(), "linear": linear}, without=["no_drift"])
    ids = [param.id for param in mark.args[1]]
    assert {"gain-neutral", "linear-equivalence"} <= set(ids)
    assert len(ids) == len(set(ids))
    own = {name: {i.partition("-")[2] for i in ids if i.startswith(f"{name}-")} for name in ("gain", "linear")}
    assert own["gain"] == set(laws()) - {"no_drift"}
    assert own["linear"] == {law.__name__ for law in LAYER_LAWS} - {"no_drift"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"without": ["no_drif"]}, "no law named 'no_drif'; nearest: 'no_drift'"),
        ({"expected_failures": {"linaer": {}}}, "no subject named 'linaer'; nearest: 'linear'"),
        ({"expected_failures": {"linear": {"neutral": "x"}}}, "no law of 'linear' named 'neutral'"),
        ({"expected_failures": {"linear": {"effect": ""}}}, "'linear' is expected to fail 'effect' without a reason"),
    ],
)
def test_names_that_do_not_exist_are_refused(options: Any, match: str) -> None:
    with pytest.raises(lp.LoraparamError, match=match):
        parametrize({"linear": linear}, **options)


TESTS = '''
import torch
from torch import nn

import loraparam as lp
from loraparam.testing import Subject, parametrize


class Forgets(nn.Linear):
    """Reads its weight where no gradient can follow."""

    def forward(self, x):
        return x @ self.weight.detach().T + self.bias


def subject(layer):
    return Subject(lambda: layer(2, 2), lambda: (torch.ones(1, 2),), lp.LoRA(r=1))


few = {"compiled_equals_eager", "finite_differences", "equivalence"}


@parametrize(
    {"healthy": subject(nn.Linear), "forgets": subject(Forgets), "unknown": subject(Forgets)},
    without=few,
    expected_failures={
        "forgets": {"trains": "the weight is detached", "effect": "a guess that is wrong"},
        "healthy": {},
    },
)
def test_laws(law):
    law()
'''


def test_an_expected_failure_has_to_fail_with_its_reason(tmp_path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-rxfX", "-p", "no:cacheprovider", "-W", "ignore", str(tmp_path)]
    wide = {**os.environ, "COLUMNS": "300"}  # pytest cuts its summary to the terminal
    report = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=wide).stdout
    assert "XFAIL test_it.py::test_laws[forgets-trains] - the weight is detached" in report
    assert "FAILED test_it.py::test_laws[forgets-effect]" in report  # it passed, against the expectation
    assert "FAILED test_it.py::test_laws[unknown-trains] - AssertionError: law 'trains' is broken by Forgets" in report
    assert "[healthy" not in report


# --- check_layer and check_model -----------------------------------------------------------------------------


class Gated(nn.Module):
    """Takes keyword arguments alone, and has a layer that its forward leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate, self.spare = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, *, x: torch.Tensor, gate: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.value(x) * torch.sigmoid(self.gate(gate))}


INPUTS = {"x": torch.ones(1, 3), "gate": torch.ones(1, 3)}


def test_check_model_takes_keyword_arguments_and_names_what_is_dead() -> None:
    model = Gated().eval()
    with pytest.raises(AssertionError, match=r"law 'trains' is broken by Gated.*eval: dead target.*'spare\.weight'"):
        check_model(model, keywords=INPUTS, only=["trains"])
    check_model(model, keywords=INPUTS, exclude="spare", only=["trains", "equivalence", "no_drift"])
    assert lp.adapters(model) == {}


def normed() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))


def traced() -> nn.Module:
    return symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))


class Noted(nn.Linear):
    """Keeps more than tensors in its state, as neuraloperator's models do."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 1}


@pytest.mark.parametrize("make", [normed, traced, lambda: Noted(3, 2)], ids=["weight_norm", "FX", "extra state"])
def test_check_model_leaves_the_model_as_it_is(make: Callable[[], nn.Module]) -> None:
    model, x = make().eval(), torch.ones(1, 3)
    before = model(x)
    check_model(model, x, targets=nn.Linear)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_check_layer_takes_keyword_arguments() -> None:
    check_layer(Gated, lambda: INPUTS, methods=[lp.LoRA(r=1)], targets=["value", "gate"], only=["equivalence"])


def test_names_of_laws_are_checked() -> None:
    with pytest.raises(lp.LoraparamError, match="no law named 'train'; nearest: 'trains'"):
        check_model(nn.Linear(2, 2), torch.ones(1, 2), only=["train"])
    with pytest.raises(lp.LoraparamError, match="no law named 'neutrl'; nearest: 'neutral'"):
        check_method(lp.Magnitude(), only=["neutrl"])


class Counting(nn.Linear):
    """Gives other outputs at each call."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counting.calls += 1
        return super().forward(x) + Counting.calls


ONE: Callable[[], Any] = lambda: (torch.ones(1, 2),)  # noqa: E731


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: check_model(nn.Linear(2, 2), *ONE(), keywords=INPUTS), "positional inputs or keywords="),
        (lambda: check_method(lp.LoRA), "check_method takes a method, such as lp.LoRA.r=1., not <class"),
        (lambda: check_layer(nn.Linear(2, 2), ONE), "takes a function that makes the layer, not a Linear; or use"),
        (lambda: check_layer(nn.Linear, ONE), "the layer cannot be made: TypeError: .*missing 2 required"),
        (lambda: check_layer(lambda: None, ONE), "make_layer made a NoneType; allowed: an nn.Module"),
        (lambda: check_layer(lambda: nn.Linear(2, 2), ONE, methods=lp.Full()), r"allowed: a list, such as .Full\(\)."),
        (lambda: check_layer(lambda: nn.Linear(2, 2), ONE, only="trains"), r"only='trains'; allowed: a list of names"),
        (lambda: check_model(nn.Linear), "check_model takes a model, not <class"),
        (lambda: check_layer(lambda: nn.Linear(2, 2), lambda: torch.ones(1, 2)), "sequence of arguments.*not a tensor"),
        (lambda: check_model(nn.Linear(3, 2), *ONE()), "Linear fails before anything is attached: RuntimeError: mat1"),
        (lambda: check_layer(lambda: Counting(2, 2), ONE), "Counting differs from itself when built and run again"),
        (lambda: check_model(nn.Embedding(3, 2), torch.tensor([1])), "target 'all-linear' matches nothing"),
        (lambda: check_layer(lambda: nn.LayerNorm(2), ONE, methods=[lp.LoRA(r=1)]), "none of the methods fits"),
    ],
)
def test_what_the_laws_say_nothing_about_is_refused(call: Callable[[], None], match: str) -> None:
    with pytest.raises(lp.LoraparamError, match=match):
        call()


@dataclass(frozen=True, kw_only=True)
class Crashes(lp.Magnitude):
    """Looks for a factor that is not there."""

    def apply(self, weight: torch.Tensor, factors: Any, layout: lp.Layout) -> torch.Tensor:
        return weight * factors["gain"]


def test_a_failure_is_one_line_with_the_smallest_weight() -> None:
    """Below it is what Hypothesis notes: the weight itself."""
    says = r"^law 'neutral' is broken by .* on shape \(1, 1\), torch.float32, \(out, in\): KeyError: 'gain'\nFailing"
    with pytest.raises(AssertionError, match=says) as caught:
        check_method(Crashes())
    assert "\n" not in str(caught.value)
    REGISTRY.pop("Crashes")
