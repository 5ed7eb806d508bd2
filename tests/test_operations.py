"""Putting adapters on, choosing among them, folding them in, taking them off: what each does, and undoes."""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_plans import bits, randomize, two_layers, unchanged
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import loraparam as lp

CONTEXTS = [lp.merged, lp.detached, lp.disabled]


def adapted(*names: str, method: lp.Method | None = None, **options: Any) -> nn.Sequential:
    """Two layers with random adapters on them."""
    model = two_layers()
    for seed, name in enumerate(names or ("default",)):
        lp.attach(model, method or lp.LoRA(r=2), name=name, **options)
        randomize(model, name, seed=seed)
    return model


# --- composition, against the formulas in float64 ---------------------------------------------------------------

METHODS = {
    "lora": lp.LoRA(r=2, alpha=6),
    "dora": lp.DoRA(r=1, alpha=2),
    "columns": lp.DoRA(r=1, axis="in"),
    "length": lp.Magnitude(),
    "delta": lp.Full(),
}


def formula(name: str, W: Tensor, f: dict[str, Tensor]) -> Tensor:
    if name == "length":
        return f["magnitude"][:, None] * W / (W * W).sum(1, keepdim=True).sqrt()
    if name == "delta":
        return W + f["diff"]
    V = W + {"lora": 3.0, "dora": 2.0, "columns": 1.0}[name] * f["lora_B"] @ f["lora_A"]
    if name == "dora":
        return f["magnitude"][:, None] * V / (V * V).sum(1, keepdim=True).sqrt()
    return f["magnitude"] * V / (V * V).sum(0).sqrt() if name == "columns" else V


active = st.dictionaries(st.sampled_from(sorted(METHODS)), st.sampled_from([1.0, 0.5, -2.0, 0.0]))


@given(st.permutations(sorted(METHODS)), active)
def test_active_adapters_compose_in_order_at_their_weights(attached: list[str], weights: dict[str, float]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    base = model.weight.detach().clone()
    for seed, name in enumerate(attached):
        lp.attach(model, METHODS[name], name=name)
        randomize(model, name, seed)
    lp.activate(model, weights)
    expected = base
    for name, weight in weights.items():
        factors = {key.rpartition(".")[2]: factor for key, factor in lp.state_dict(model, name).items()}
        expected = expected + weight * (formula(name, expected, factors) - expected)
    x = torch.randn(3, 6, dtype=torch.float64)
    # A few float64 operations, each to 2e-16 of values up to about 1e3.
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x).detach(), x @ expected.T + model.bias.detach(), rtol=1e-11, atol=1e-11)


def test_a_new_adapter_acts_at_once_after_those_already_there() -> None:
    model = adapted("first", "second", method=lp.DoRA(r=1))
    before = model[0].weight.detach().clone()
    for one in (1.0, 1):
        lp.activate(model, {"first": one, "second": one})
        with lp.execution("merged"):
            torch.testing.assert_close(model[0].weight.detach(), before, rtol=0, atol=0)  # the same computation
    lp.activate(model, {"second": 1.0, "first": 1.0})
    assert not torch.equal(model[0].weight.detach(), before)


@pytest.mark.parametrize("weights", [{}, {"style": 0.0}])
def test_what_activate_does_not_name_is_off(weights: dict[str, float]) -> None:
    model = adapted("style", "task")
    lp.activate(model, weights)
    assert bits(model[0].weight) == bits(model[0].parametrizations.weight.original)


def test_extending_an_adapter() -> None:
    model = adapted("style", targets="0")
    lp.activate(model, {"style": 0.5})
    before = model[0].weight.detach().clone()
    lp.attach(model, lp.Full(), "1", name="style")
    assert lp.adapters(model) == {"style": {"0.weight": lp.LoRA(r=2), "1.weight": lp.Full()}}
    torch.testing.assert_close(model[0].weight.detach(), before, rtol=0, atol=0)  # left alone
    assert all(factor.requires_grad for factor in lp.parameters(model))
    with torch.no_grad():
        list(lp.parameters(model))[-1].fill_(1.0)
    # The weight is the adapter's, wherever it acts; W + (W + 1 - W) / 2 is rounded twice.
    torch.testing.assert_close(model[1].weight, model[1].parametrizations.weight.original + 0.5)


def test_dropout_acts_in_training_only() -> None:
    model = adapted(method=lp.LoRA(r=2, dropout=0.5))
    with lp.execution("merged"):
        assert len({bits(model[0].weight) for _ in range(9)}) > 1
        expected = bits(lp.effective_weight(model, "0.weight"))
        assert {bits(model.eval()[0].weight) for _ in range(9)} == {expected}


def test_a_generator_makes_the_start_reproducible() -> None:
    states = []
    for seed in (1, 1, 2):
        model = two_layers()
        lp.attach(model, lp.LoRA(r=2), generator=torch.Generator().manual_seed(seed))
        states.append([bits(factor) for factor in lp.parameters(model)])
    assert states[0] == states[1] != states[2]


# --- taking off -------------------------------------------------------------------------------------------------


LAYERS: list[tuple[Callable[[], nn.Module], Any, int]] = [
    (two_layers, "all-linear", 6),
    (two_layers, ["0.bias", "1.weight"], 6),
    (lambda: nn.LSTM(3, 4), nn.LSTM, 3),
    (lambda: nn.TransformerEncoderLayer(4, 2, 4), ["self_attn.in_proj_weight[q,v]", "linear1", "norm1.bias"], 4),
    (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4))), "0.weight", 3),
]


@pytest.mark.parametrize(("make", "targets", "features"), LAYERS)
def test_detach_gives_the_model_back(make: Callable[[], nn.Module], targets: Any, features: int) -> None:
    model = make()
    list(model.parameters())[-1].requires_grad_(False)  # the user's own choice, to be kept
    flat = [id(weight) for weight in getattr(model, "_flat_weights", [])]  # an LSTM's own list
    with unchanged(model):
        for name in ("a", "b"):
            lp.attach(model, lp.Full(), targets, name=name)
            randomize(model, name)
            model(torch.ones(2, features))
        lp.detach(model, "a")
        assert list(lp.adapters(model)) == ["b"]
        lp.detach(model, "b")
    assert [id(weight) for weight in getattr(model, "_flat_weights", [])] == flat


def test_detach_of_one_leaves_the_others_as_they_are() -> None:
    model = adapted("a", "b", "c", method=lp.DoRA(r=2))
    lp.activate(model, {"c": 0.5, "a": 1.0, "b": 1.0})
    alone = copy.deepcopy(model)
    lp.activate(alone, {"c": 0.5, "b": 1.0})
    lp.detach(model, "a")
    for layer, other in zip(model, alone, strict=True):
        torch.testing.assert_close(layer.weight, other.weight, rtol=0, atol=0)  # the same computation


# --- disabled, merged, detached ---------------------------------------------------------------------------------


def test_disabled_gives_the_outputs_of_the_base_bit_for_bit() -> None:
    x = torch.randn(3, 6)
    model = adapted("a", "b", method=lp.DoRA(r=2, dropout=0.5))
    with lp.detached(model):
        base = bits(model(x))
    with unchanged(model):
        with lp.disabled(model), lp.disabled(model, "a"):
            assert bits(model(x)) == base
        with lp.disabled(model, "a"):
            with lp.disabled(model):
                assert bits(model(x)) == base
            assert bits(model(x)) != base
            with lp.disabled(model, "b"):
                assert bits(model(x)) == base


def test_activate_inside_disabled_holds_afterwards() -> None:
    model = adapted("a")
    base = bits(model[0].parametrizations.weight.original)
    with lp.disabled(model):
        lp.activate(model, {"a": 0.5})
        assert bits(model[0].weight) == base
    assert bits(model[0].weight) != base


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_disabled_is_not_disabled_for_ever(make: Callable[[nn.Module], nn.Module]) -> None:
    model = adapted("a")
    with lp.disabled(model):
        replica = make(model)
    assert bits(replica[0].weight) == bits(model[0].weight)
    lp.merge(replica)


@pytest.mark.parametrize(("context", "read"), [(lp.merged, lp.effective_weight), (lp.detached, None)])
def test_inside_the_model_is_plain(context: Any, read: Any) -> None:
    plain, model = two_layers(), adapted("a", "b", targets="0")
    original = model[0].parametrizations.weight.original
    expected = lp.effective_weight(model, "0.weight").detach() if read else original.detach()
    with unchanged(model), context(model):
        assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
        assert list(model.state_dict()) == list(plain.state_dict())
        assert (model[0].weight is original) == (context is lp.detached)
        assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
        torch.testing.assert_close(model[0].weight.detach(), expected, rtol=0, atol=0)  # the same computation


NESTED = {(lp.merged, lp.merged), (lp.detached, lp.detached), *((lp.disabled, context) for context in CONTEXTS)}


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(CONTEXTS, CONTEXTS)))
def test_blocks_nest_or_refuse(outer: Any, inner: Any) -> None:
    model = adapted()
    with unchanged(model), outer(model):
        if (outer, inner) in NESTED:
            with unchanged(model), inner(model):
                pass
            if outer is not lp.disabled:  # it is still open
                with pytest.raises(lp.AttachError, match=rf"inside `with lp\.{outer.__name__}\(model\):`"):
                    lp.attach(model, lp.LoRA(r=1), "1", name="second")
        else:
            match = rf"inside `with lp\.{outer.__name__}\(model\):`; leave that block first"
            with unchanged(model), pytest.raises(lp.AttachError, match=match):
                inner(model).__enter__()


CHANGES: list[Callable[[nn.Module], Any]] = [
    lambda model: lp.attach(model, lp.LoRA(r=1), "1", name="second"),
    lambda model: lp.detach(model),
    lambda model: lp.merge(model),
    lambda model: lp.activate(model, {}),
    lambda model: lp.save(model, "never-written.safetensors"),
    lambda model: lp.check(model, torch.ones(1, 6)),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("context", [lp.merged, lp.detached])
def test_what_would_be_lost_at_the_end_of_a_block_is_refused(change: Callable[..., Any], context: Any) -> None:
    model = adapted(targets="0")
    match = rf"inside `with lp\.{context.__name__}\(model\):`; leave that block first"
    with unchanged(model), context(model), unchanged(model), pytest.raises(lp.AttachError, match=match):
        change(model)


@pytest.mark.parametrize("context", [lp.merged, lp.detached])
@pytest.mark.parametrize("part", [lambda model: model, lambda model: model[1]])
def test_attaching_inside_a_block_is_refused_or_lasts(context: Any, part: Callable[[nn.Module], nn.Module]) -> None:
    for model in (two_layers(), adapted(targets="0")):
        with context(model):
            try:
                lp.attach(part(model), lp.LoRA(r=1), [nn.Linear], name="second")
            except lp.AttachError:
                continue
        assert "second" in lp.adapters(model)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_block_that_is_left_by_an_exception_restores_everything(context: Any, error: type[BaseException]) -> None:
    model = adapted("a", "b")
    with unchanged(model), pytest.raises(error, match="on purpose"), context(model):
        raise error("on purpose")
    lp.detach(model)


CONVERSIONS: list[Callable[[nn.Module], Any]] = [
    lambda model: model.half(),
    lambda model: model.to(torch.float64),
    lambda model: model.to("meta"),
    lambda model: model.eval().requires_grad_(True),
    lambda model: model.insert(0, nn.Identity()),
    lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(4, 6))),
]


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize("context", [lp.merged, lp.detached])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_conversions_inside_a_block_are_undone(context: Any, convert: Callable[..., Any], with_gradients: bool) -> None:
    model = two_layers().append(nn.BatchNorm1d(3))
    lp.attach(model, lp.LoRA(r=2), "0", train="1")
    if with_gradients:
        model(torch.randn(4, 6)).sum().backward()
    with unchanged(model), context(model):
        convert(model)
