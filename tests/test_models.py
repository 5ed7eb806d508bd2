"""Laws that adapters obey on unmodified models; see model_zoo.py for the models and the adapters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from model_zoo import CLOSE, EXACT, MODELS, effective_weights, one_thread
from torch import nn
from torch.testing import assert_close
from zoo.entry import RECIPES, Entry, randomise

import loraparam as lp

every_model = pytest.mark.parametrize("entry", MODELS, ids=str)
every_recipe = pytest.mark.parametrize("recipe", RECIPES)
every_execution = pytest.mark.parametrize("execution", ["factored", "merged"])
two_recipes = pytest.mark.parametrize("recipe", ["lora", "dora-everywhere"])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def structure(model: nn.Module) -> list[tuple[str, object, object]]:
    """Classes, and which objects the parameters and buffers are, in order, with their flags."""
    modules = [(path, type(module), module.training) for path, module in model.named_modules()]
    parameters = [(path, id(p), p.requires_grad) for path, p in model.named_parameters(remove_duplicate=False)]
    return modules + parameters + [(path, id(b), None) for path, b in model.named_buffers(remove_duplicate=False)]


def without_identities(items: list[tuple[str, object, object]]) -> list[tuple[str, object, object]]:
    return [(path, thing if isinstance(thing, type) else None, flag) for path, thing, flag in items]


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


@every_model
@every_recipe
def test_fresh_adapters_are_neutral(entry: Entry, recipe: str) -> None:
    model = entry.model()
    # In one grad mode: torch multiplies in another order where a gradient is wanted.
    with torch.no_grad():
        before = entry.call(model)
        entry.attach(model, recipe)
        # DoRA multiplies each row by m/‖W‖, which is 1 only to rounding where the two norms are computed apart.
        assert_close(entry.call(model), before, **CLOSE if "dora" in recipe else EXACT)
    assert_close(entry.call(model), before, **CLOSE)


@every_model
@every_recipe
@every_execution
def test_output_is_that_of_a_plain_model_with_the_effective_weights(entry: Entry, recipe: str, execution: str) -> None:
    model, plain = entry.adapted(recipe), entry.plain()
    base = entry.call(plain)
    with torch.no_grad():
        for path, weight in effective_weights(plain, model, lp.state_dict(model)).items():
            plain.get_parameter(path).copy_(weight)
    with lp.execution(execution):
        output = entry.call(model)
    assert_close(output, entry.call(plain), **CLOSE)
    assert (output - base).abs().max() > 0.1


@every_model
@every_recipe
@every_execution
def test_gradients_are_those_through_the_formulas(entry: Entry, recipe: str, execution: str) -> None:
    model, plain = entry.adapted(recipe), entry.plain()
    direction = torch.randn(entry.call(model).shape)
    with lp.execution(execution):
        (entry.call(model) * direction).mean().backward()
    factors = dict(lp.named_parameters(model))
    copies = {key: factor.detach().clone().requires_grad_() for key, factor in factors.items()}
    output = entry.call_with(plain, effective_weights(plain, model, copies))
    expected = torch.autograd.grad((output * direction).mean(), list(copies.values()))
    for (key, factor), gradient in zip(factors.items(), expected, strict=True):
        assert factor.grad is not None, key
        # A gradient may be tiny beside the others; the errors are as large as those of the largest.
        assert_close(factor.grad, gradient, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@every_model
@every_recipe
def test_check_finds_no_dead_target(entry: Entry, recipe: str) -> None:
    model = entry.adapted(recipe)
    report = lp.check(model, **entry.inputs())
    assert {row.path for row in report} == set(lp.adapters(model)["default"])
    assert all(row.reads for row in report)
    # Of the vectors, a bias of attention keys has a gradient that is zero but for rounding.
    low_rank = [row for row in report if not isinstance(lp.adapters(model)["default"][row.path], lp.Full)]
    assert {row.gradient for row in low_rank} == {"arrived"}


@every_model
@two_recipes
def test_eval_agrees_with_train(entry: Entry, recipe: str) -> None:
    model = entry.adapted(recipe)
    expected = entry.call(model)
    model.eval()
    assert_close(entry.call(model), expected, **CLOSE)
    with torch.no_grad():
        assert_close(entry.call(model), expected, **CLOSE)


@every_model
@two_recipes
def test_disabled_gives_the_base_bits(entry: Entry, recipe: str) -> None:
    base = entry.call(entry.model().requires_grad_(False))
    model = entry.adapted(recipe)
    adapted = entry.call(model)
    with lp.disabled(model):
        assert_close(entry.call(model), base, **EXACT)
    assert_close(entry.call(model), adapted, **EXACT)


@every_model
@two_recipes
def test_blocks_give_a_plain_model_and_put_everything_back(entry: Entry, recipe: str) -> None:
    model = entry.model()
    base, plain, keys = entry.call(model), structure(model), list(model.state_dict())
    entry.adapt(model, recipe)
    adapted, before, bits = entry.call(model), structure(model), values(model)
    with lp.detached(model):
        assert structure(model) == plain
        assert_close(entry.call(model), base, **EXACT)
    with lp.merged(model):
        assert without_identities(structure(model)) == without_identities(plain)
        assert list(model.state_dict()) == keys
        assert_close(entry.call(model), adapted, **CLOSE)
    assert structure(model) == before
    assert_close(values(model), bits, **EXACT)
    assert_close(entry.call(model), adapted, **EXACT)


@every_model
@two_recipes
def test_merge_keeps_the_output_and_leaves_a_plain_model(entry: Entry, recipe: str) -> None:
    model = entry.model()
    plain = structure(model)
    entry.adapt(model, recipe)
    output, state = entry.call(model), lp.merged_state_dict(model)
    lp.merge(model)
    assert_close(entry.call(model), output, **CLOSE)
    assert without_identities(structure(model)) == without_identities(plain)
    assert_close(values(model), dict(state), **EXACT)
    assert lp.adapters(model) == {}


@every_model
@two_recipes
def test_detach_restores_everything(entry: Entry, recipe: str) -> None:
    model = entry.model()
    next(model.parameters()).requires_grad_(False)
    before, bits = structure(model), values(model)
    entry.attach(model, recipe)
    randomise(lp.parameters(model))
    entry.call(model).sum().backward()
    lp.detach(model)
    assert structure(model) == before
    assert list(model.state_dict()) == list(bits)
    assert_close(values(model), bits, **EXACT)


@every_model
@pytest.mark.parametrize("recipe", ["lora", "dora"])
def test_a_step_changes_only_the_factors(entry: Entry, recipe: str) -> None:
    model = entry.adapted(recipe)
    factors = dict(lp.named_parameters(model))
    base = {key: tensor.clone() for key, tensor in lp.base_state_dict(model).items()}
    before = {key: factor.detach().clone() for key, factor in factors.items()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(factor) for factor in factors.values()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    entry.call(model).pow(2).mean().backward()
    optimizer.step()
    assert_close(dict(lp.base_state_dict(model)), base, **EXACT)
    assert [key for key, factor in factors.items() if torch.equal(factor, before[key])] == []


@every_model
@two_recipes
def test_save_and_load_give_the_same_bits_on_a_fresh_model(entry: Entry, recipe: str, tmp_path) -> None:
    model, fresh = entry.adapted(recipe), entry.model()
    lp.save(model, tmp_path / "adapter.safetensors")
    plan = lp.load(fresh, tmp_path / "adapter.safetensors")
    assert {row.path: row.method for row in plan} == lp.adapters(model)["default"] == lp.adapters(fresh)["default"]
    assert_close(lp.state_dict(fresh), lp.state_dict(model), **EXACT)
    assert_close(entry.call(fresh), entry.call(model), **EXACT)


@every_model
@two_recipes
def test_an_original_checkpoint_loads_into_the_adapted_model(entry: Entry, recipe: str) -> None:
    other = entry.model()
    randomise(other.parameters(), seed=11)
    checkpoint = values(other)
    model = entry.adapted(recipe)
    model.load_state_dict(checkpoint, strict=True)
    assert_close(dict(lp.base_state_dict(model)), checkpoint, **EXACT)
    entry.attach(other, recipe)
    lp.load_state_dict(other, lp.state_dict(model))
    assert_close(entry.call(model), entry.call(other), **EXACT)


@every_model
@two_recipes
def test_a_deepcopy_is_equal_and_independent(entry: Entry, recipe: str) -> None:
    copies_are_equal_and_independent(entry, recipe, copy.deepcopy)


_unpicklable = pytest.mark.xfail(
    raises=(AttributeError, RuntimeError), reason="torch cannot pickle a module with its own weight_norm"
)


@pytest.mark.parametrize(
    "entry", [pytest.param(e, id=e.name, marks=[] if e.pickles else [_unpicklable]) for e in MODELS]
)
@two_recipes
def test_a_pickle_is_equal_and_independent(entry: Entry, recipe: str) -> None:
    copies_are_equal_and_independent(entry, recipe, lambda model: pickle.loads(pickle.dumps(model)))


def copies_are_equal_and_independent(entry: Entry, recipe: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = entry.adapted(recipe)
    output, before = entry.call(model), structure(model)
    twin = duplicate(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert_close(entry.call(twin), output, **EXACT)
    randomise(lp.parameters(twin))
    with torch.no_grad():
        base = entry.call(entry.model())
        lp.detach(twin)
        assert_close(entry.call(twin), base, **EXACT)
    assert structure(model) == before
    assert_close(entry.call(model), output, **EXACT)
