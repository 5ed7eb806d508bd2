"""Folding adapters into the weights: what it gives, where it is refused, and what it leaves as it was."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from test_operations import adapted
from test_plans import bits, randomize, two_layers, unchanged
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import loraparam as lp

LORA, DORA = lp.LoRA(r=1), lp.DoRA(r=1)


class Same(nn.Module):
    """A parametrization with a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, weight: Tensor) -> Tensor:
        return weight

    right_inverse = forward


@pytest.mark.parametrize("end", [lp.merge, lp.detach])
def test_the_modes_of_another_parametrization_stay(end: Callable[[nn.Module], None]) -> None:
    model = nn.Linear(3, 4)
    parametrize.register_parametrization(model, "weight", Same())
    other = model.parametrizations.weight[0]
    other.inner.eval()
    lp.attach(model, lp.LoRA(r=1))
    assert (other.training, other.inner.training) == (True, False)
    end(model)
    assert (other.training, other.inner.training) == (True, False)
    assert model.parametrizations.weight.unsafe is False


def test_merge_folds_everything_that_acts_and_leaves_a_plain_model() -> None:
    model, x = adapted("a", "b", method=lp.DoRA(r=2)), torch.randn(3, 6)
    lp.activate(model, {"b": 0.5})
    with lp.execution("merged"):
        expected, base = model(x).detach(), model[0].parametrizations.weight.original
    before = bits(base)
    lp.merge(model)
    torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=0)  # the same weight
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    assert (model[0].weight is not base, bits(base)) == (True, before)


@pytest.mark.parametrize(
    ("methods", "merged", "why_not"),
    [
        ((LORA, LORA), "0", None),
        ((LORA, LORA), "1", None),
        ((DORA, LORA), "0", None),
        ((DORA, LORA), "1", "'1' acts after '0', and DoRA then LoRA do not commute"),
        ((LORA, DORA), "1", "'1' acts after '0', and LoRA then DoRA do not commute"),
        ((LORA, LORA, DORA), "1", None),
        ((LORA, DORA, lp.Full()), "2", "'2' acts after '1', and DoRA then Full do not commute"),
    ],
)
def test_merge_of_one_adapter_is_allowed_where_it_changes_nothing(
    methods: tuple[lp.Method, ...], merged: str, why_not: str | None
) -> None:
    model, x = two_layers().double(), torch.randn(3, 6, dtype=torch.float64)
    for name, method in enumerate(methods):
        lp.attach(model, method, name=str(name))
        randomize(model, str(name), seed=name)
    expected = model(x).detach()
    if why_not:
        with (
            unchanged(model),
            pytest.raises(lp.AttachError, match=rf"'0\.weight': {why_not}; lp\.merge\(model, '.'\) first"),
        ):
            lp.merge(model, merged)
        return
    lp.merge(model, merged)
    assert list(lp.adapters(model)) == [str(name) for name in range(len(methods)) if str(name) != merged]
    # The same sum in another order, in float64, of values up to about 1e2.
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-12, atol=1e-12)


def test_merge_of_one_that_is_alone_on_its_rows_or_switched_off() -> None:
    model = nn.Linear(6, 4)
    lp.attach(model, DORA, "weight[1/2]", name="upper")
    lp.attach(model, DORA, "weight[2/2]", name="lower")
    randomize(model)
    expected = lp.effective_weight(model, "weight").detach()
    lp.merge(model, "lower")
    torch.testing.assert_close(
        lp.effective_weight(model, "weight").detach(), expected, rtol=0, atol=0
    )  # each row by the same computation
    lp.activate(model, {})
    with unchanged(model), pytest.raises(lp.AttachError, match=r"'upper' is switched off; lp\.activate it first, or"):
        lp.merge(model, "upper")
    with lp.disabled(model), pytest.raises(lp.AttachError, match=r"'upper' is inside `with lp\.disabled"):
        lp.merge(model)


def test_merge_where_nothing_acts_gives_a_parameter_of_its_own() -> None:
    model = adapted()
    base = model[0].parametrizations.weight.original
    before = bits(base)
    lp.activate(model, {})
    lp.merge(model)
    assert bits(model[0].weight) == before
    with torch.no_grad():
        model[0].weight.zero_()
    assert bits(base) == before


class Times(nn.Module):
    """A parametrization that can be undone."""

    def forward(self, X: Tensor) -> Tensor:
        return 2 * X

    def right_inverse(self, Y: Tensor) -> Tensor:
        return Y / 2


class Plus(nn.Module):
    """Another, with which it does not commute."""

    def forward(self, X: Tensor) -> Tensor:
        return X + 1

    def right_inverse(self, Y: Tensor) -> Tensor:
        return Y - 1


def test_merge_goes_back_through_the_models_own_parametrizations() -> None:
    model = nn.Linear(6, 4)
    parametrize.register_parametrization(model, "weight", Times())
    parametrize.register_parametrization(model, "weight", Plus())
    lp.attach(model, lp.LoRA(r=2), "weight")
    randomize(model)
    expected = lp.effective_weight(model, "weight").detach()
    lp.merge(model)
    assert [type(part) for part in model.parametrizations.weight] == [Times, Plus]
    torch.testing.assert_close(model.weight.detach(), expected)  # undone and done again, in float32


def test_merge_under_a_parametrization_without_an_inverse_is_refused() -> None:
    model = nn.Linear(6, 4)
    parametrize.register_parametrization(model, "weight", nn.Softplus())
    lp.attach(model, lp.LoRA(r=2), "weight")
    with unchanged(model), pytest.raises(lp.AttachError, match="Softplus on the same weight cannot hold the merged"):
        lp.merge(model)


def test_merge_of_a_part_of_a_tied_weight() -> None:
    model = two_layers()
    model.append(nn.Linear(6, 4))
    model[2].weight = model[0].weight
    lp.attach(model, LORA, "0")
    match = r"'weight' is tied with 1 place outside of this module.*call lp\.{} on the whole model"
    for whole, call in itertools.product((model, copy.deepcopy(model)), (lp.merge, lp.detach)):
        with unchanged(whole), pytest.raises(lp.AttachError, match=match.format(call.__name__)):
            call(whole[0])


def test_merge_into_a_weight_that_cannot_hold_it() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 4)))
    lp.attach(model, LORA, "0")
    randomize(model)
    with unchanged(model), pytest.raises(lp.AttachError, match="SpectralNorm on the same weight cannot hold"):
        lp.merge(model)
    with unchanged(model), pytest.raises(lp.AttachError, match="SpectralNorm on the same weight"), lp.merged(model):
        pass


def test_merge_of_diverged_factors() -> None:
    model = two_layers()
    lp.attach(model, LORA)
    with torch.no_grad():
        next(lp.parameters(model)).fill_(float("inf"))
    match = r"'0\.weight': the merged weight is not finite; .*factors \(lp\.state_dict\)"
    with unchanged(model), pytest.raises(lp.AttachError, match=match):
        lp.merge(model)
