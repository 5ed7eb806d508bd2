"""Methods against formulas written independently, and the laws of methods."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from cases import METHODS
from hypothesis import given
from hypothesis import strategies as st
from references import effective, matrices
from torch.testing import assert_close

import loraparam as lp
from loraparam.testing import check_method, layouts, weights
from loraparam.testing.method_laws import METHOD_LAWS, moved


@pytest.mark.parametrize("name", METHODS)
@given(data=st.data())
def test_apply_is_the_formula(name: str, data: st.DataObject) -> None:
    """In float64, over layouts and weights with zero rows, each matrix is what the formula says."""
    method, layout = data.draw(METHODS[name]), data.draw(layouts())
    if isinstance(method, lp.DoRA):
        method = dataclasses.replace(method, eps=data.draw(st.sampled_from([0.0, 0.01])))
    weight = data.draw(weights(layout=layout, dtype=torch.float64))
    factors = moved(method, weight, layout)
    actual = matrices(method.apply(weight, factors, layout).numpy(), layout)
    for index, W in enumerate(matrices(weight.numpy(), layout)):
        own = {key: t[index].numpy() if layout.batch else t.numpy() for key, t in factors.items()}
        if isinstance(method, lp.Full):
            own = {"diff": matrices(factors["diff"].numpy(), layout)[index]}
        expected = effective(method, W, own)
        # float64 sums of at most 125 terms, in another order.
        np.testing.assert_allclose(actual[index], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", METHODS)
@given(data=st.data())
def test_laws(name: str, law: object, data: st.DataObject) -> None:
    """Neutral, pure, deterministic, right and finite gradients, the same through every layout, rounded once."""
    layout = data.draw(layouts())
    law(data.draw(METHODS[name]), data.draw(weights(layout=layout)), layout)


@given(data=st.data())
def test_detached_norm_is_a_constant(data: st.DataObject) -> None:
    """DoRA's gradients with a detached norm are those of m V / c with c held at |V|."""
    W = lp.Layout().matrix(data.draw(weights(dtype=torch.float64))) + 0.1
    method = lp.DoRA(r=1, axis=data.draw(st.sampled_from(["out", "in"])))
    factors = {key: t.requires_grad_() for key, t in moved(method, W, lp.Layout()).items()}
    method.apply(W, factors, lp.Layout()).square().sum().backward()
    got = {key: t.grad for key, t in factors.items()}
    A, B, m = (factors[key].detach().requires_grad_() for key in ("lora_A", "lora_B", "magnitude"))
    V = W + B @ A
    dim = 1 if method.axis == "out" else 0
    constant = V.detach().square().sum(dim, keepdim=True).sqrt()
    (m.unsqueeze(dim) * V / constant).square().sum().backward()
    for key, expected in (("lora_A", A), ("lora_B", B), ("magnitude", m)):
        assert_close(got[key], expected.grad, rtol=1e-9, atol=1e-12)  # float64, another order of operations


def test_a_derived_method_shows_what_its_constructor_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraparam.methods.base.REGISTRY", {})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Derived(lp.LoRA):
        """A user's variant of LoRA, whose repr @dataclass writes."""

    derived = Derived(r=2, init="gaussian")
    assert repr(derived).endswith("(r=2, alpha=None, rslora=False, dropout=0.0, dropout_on='weight')")
    assert Derived(**derived.config()) == derived != Derived(r=2)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_start(init: str) -> None:
    """A ~ U(±1/√in) or N(0, std 1/r), B = 0; an embedding's zero factor is the vocabulary side."""
    W = torch.zeros(64, 4096)
    factors = lp.LoRA(r=8, init=init).init(W, lp.Layout())
    A = factors["lora_A"]
    assert not factors["lora_B"].any()
    # 32,768 draws: the standard error of a standard deviation is 0.4 %.
    assert_close(A.std(), torch.tensor(1 / 8 if init == "gaussian" else 1 / 64 / 3**0.5), rtol=0.02, atol=0)
    if init == "kaiming":
        assert A.abs().max() <= 1 / 64
    looked_up = lp.LoRA(r=8, init=init).init(W.T, lp.Layout(out=1, lookup=True))
    assert not looked_up["lora_A"].any()
    assert_close(looked_up["lora_B"].std(), torch.tensor(1.0), rtol=0.1, atol=0)  # 512 draws


def test_weight_dropout_is_inverted_and_drops_input_features() -> None:
    """Whole columns of A, for all ranks at once, at the rate p; the mean stays."""
    method = lp.LoRA(r=4, dropout=0.25)
    A = torch.ones(4, 20_000)
    dropped = method.regularize({"lora_A": A, "lora_B": torch.ones(3, 4)}, lp.Layout())["lora_A"]
    assert (dropped == dropped[:1]).all()
    assert dropped.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert_close(dropped.mean(), torch.tensor(1.0), rtol=0.03, atol=0)  # 20,000 draws: standard error 0.4 %


def test_weight_dropout_acts_in_training_only() -> None:
    """In eval mode, in merge and in effective_weight nothing is dropped."""
    layer = torch.nn.Linear(50, 3)
    lp.attach(layer, lp.LoRA(r=2, dropout=0.5))
    with torch.no_grad():
        layer.parametrizations.weight[0].default.lora_B.fill_(1.0)
    x = torch.randn(2, 50)
    assert not torch.equal(layer(x), layer(x))
    whole = lp.effective_weight(layer, "weight")
    layer.eval()
    assert_close(layer.weight, whole, rtol=0, atol=0)


def test_input_dropout_says_what_it_needs() -> None:
    """A dense weight cannot drop elements of the input."""
    layer = torch.nn.LSTM(3, 2)
    lp.attach(layer, lp.LoRA(r=1, dropout=0.5, dropout_on="input"), "weight_ih_l0")
    with pytest.raises(lp.LoraparamError, match='use dropout_on="weight"'):
        layer(torch.randn(2, 1, 3))
    layer.eval()
    assert layer(torch.randn(2, 1, 3))[0].shape == (2, 1, 2)


@pytest.mark.parametrize(
    "method", [lp.LoRA(r=1), lp.DoRA(r=1, axis="in"), lp.Magnitude(), lp.IA3(), lp.Full()], ids=repr
)
def test_check_method_accepts(method: lp.Method) -> None:
    """The shipped check passes on the library's own methods."""
    check_method(method, max_examples=5)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("method", [lp.LoRA(r=2), lp.DoRA(r=2), lp.Magnitude(), lp.IA3()], ids=repr)
def test_dims_say_what_each_factor_runs_along(method: lp.Method, axis: str) -> None:
    """Where a weight is in parts, these factors are in parts alike; one that is not named is whole on each process."""
    method = dataclasses.replace(method, axis=axis) if hasattr(method, "axis") else method
    factors, sizes = method.init(torch.randn(5, 7), lp.Layout()), {"out": 5, "in": 7, "": 2}
    found = {name: tuple(sizes[side] for side in sides) for name, sides in method.dims().items()}
    assert found == {name: tuple(factor.shape) for name, factor in factors.items()}


@pytest.mark.parametrize("method", [lp.DoRA(r=1, detach_norm=False), lp.Magnitude()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("kind", ["factored", "merged"])
def test_a_zero_row_poisons_no_gradient(method: lp.Method, kind: str) -> None:
    """A norm that is differentiated has no NaN at a row without a direction, in either execution."""
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[0] = 0
    lp.attach(layer, method, freeze=False)
    with lp.execution(kind):
        layer(torch.randn(2, 3)).sum().backward()
    assert [name for name, p in layer.named_parameters() if not torch.isfinite(p.grad).all()] == []


def test_functional_core_under_vmap() -> None:
    """A stack of factors is a batch of adapters on one weight."""
    W, A, B = torch.randn(3, 4), torch.randn(5, 2, 4), torch.randn(5, 3, 2)
    stacked = torch.func.vmap(lambda a, b: lp.functional.lora(W, a, b, 0.5))(A, B)
    looped = torch.stack([lp.functional.lora(W, a, b, 0.5) for a, b in zip(A, B, strict=True)])
    assert_close(stacked, looped)


@pytest.mark.parametrize(
    "bad", [{"alpha": float("nan")}, {"alpha": "2"}, {"dropout": 1.0}, {"dropout_on": "x"}, {"init": "x"}]
)
def test_bad_hyperparameters(bad: dict[str, object]) -> None:
    """Named with what is allowed."""
    with pytest.raises(lp.LoraparamError, match=rf"LoRA: {next(iter(bad))}=.*allowed"):
        lp.LoRA(**bad)


@pytest.mark.parametrize("r", [0, -1, 1.5, True, "8"])
def test_bad_rank(r: object) -> None:
    """A rank is a positive integer."""
    with pytest.raises(lp.RankError, match="allowed: an integer in 1"):
        lp.DoRA(r=r)


def test_ia3_on_weight_and_bias_rescales_the_output() -> None:
    """l on both is l times what the layer gives; columns are no part of a bias."""
    layer = torch.nn.Linear(4, 3)
    x, l = torch.randn(2, 4), torch.tensor([2.0, -1.0, 0.0])
    expected = l * layer(x)
    lp.attach(layer, lp.IA3(), ["weight", "bias"])
    with torch.no_grad():
        for scale in lp.parameters(layer):
            scale.copy_(l)
    assert_close(layer(x), expected)
    lp.detach(layer)
    with pytest.raises(lp.TargetError, match="has no input dim; IA3 needs at least"):
        lp.attach(layer, lp.IA3(axis="in"), "bias")


FLAT = st.tuples(st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 5, 7]))


@pytest.mark.parametrize("name", METHODS)
@given(data=st.data(), sizes=FLAT)
def test_a_flat_layout_reads_row_by_row(name: str, data: st.DataObject, sizes: tuple[int, int, int]) -> None:
    """As loralib's convolutions: the rows are not the weight's outputs. Formula and laws hold there too."""
    rows, more, kernel = sizes
    layout = lp.Layout(rows=rows)
    weight = torch.randn(rows, more, kernel, 2, dtype=torch.float64).transpose(0, 3)
    method = data.draw(METHODS[name])
    factors = moved(method, weight, layout)
    (W,) = matrices(weight.numpy(), layout)
    own = {key: t.reshape(rows, -1).numpy() if key == "diff" else t.numpy() for key, t in factors.items()}
    actual = method.apply(weight, factors, layout)
    assert actual.shape == weight.shape
    np.testing.assert_allclose(actual.reshape(rows, -1), effective(method, W, own), rtol=1e-10, atol=1e-12)


@given(
    blocks=st.lists(st.booleans(), min_size=1, max_size=4).filter(any),
    shared=st.booleans(),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
    data=st.data(),
)
def test_blocks_of_rows(blocks: list[bool], shared: bool, sizes: tuple[int, int, int], data: st.DataObject) -> None:
    """Formula, shapes, and the laws of methods, for any choice of blocks; what is off stays the base, bit for bit."""
    rows, in_, r = sizes
    method = lp.BlockLoRA(r=r, alpha=3, blocks=tuple(blocks), shared=shared)
    weight, layout = torch.randn(rows * len(blocks), in_, dtype=torch.float64), lp.Layout()
    factors = moved(method, weight, layout)
    n = sum(blocks)
    shapes = [(r, in_), (rows * len(blocks), r)] if shared else [(r * n, in_), (rows * n, r)]
    assert [tuple(t.shape) for t in factors.values()] == shapes
    actual = method.apply(weight, factors, layout)
    np.testing.assert_allclose(
        actual, effective(method, weight.numpy(), {k: t.numpy() for k, t in factors.items()}), rtol=1e-10, atol=1e-12
    )
    for on, new, old in zip(blocks, actual.chunk(len(blocks)), weight.chunk(len(blocks)), strict=True):
        assert on or torch.equal(new, old)
    law = data.draw(st.sampled_from([law for law in METHOD_LAWS if law.__name__ != "layout_is_only_a_view"]))
    law(method, weight, layout)


def test_blocks_must_divide_the_rows() -> None:
    """And one of them must be on."""
    with pytest.raises(lp.TargetError, match="'weight': 5 output rows do not divide into 3 equal blocks"):
        lp.plan(torch.nn.Linear(4, 5), lp.BlockLoRA(r=1, blocks=(True, False, True)), "weight")
    for blocks in ((), (False,), (1, 0), "ab"):
        with pytest.raises(lp.LoraparamError, match="allowed: booleans, at least one of them True"):
            lp.BlockLoRA(r=1, blocks=blocks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 0}, "an integer above 0"),
        ({"rows": True}, "an integer above 0"),
        ({"rows": 2, "out": 1}, "no out, batch or lookup with it"),
        ({"rows": 2, "lookup": True}, "no out, batch or lookup with it"),
    ],
)
def test_a_flat_layout_stands_alone(settings: dict[str, int], message: str) -> None:
    """The rows say everything."""
    with pytest.raises(lp.TargetError, match=message):
        lp.Layout(**settings)


def test_a_flat_layout_fits_and_has_no_slices() -> None:
    """Rows of the flat matrix are not rows of the weight."""
    layer = torch.nn.Conv2d(4, 6, 3)
    with pytest.raises(lp.TargetError, match=r"flat \(7, in\) does not fit shape \(6, 4, 3, 3\): 216 elements"):
        lp.plan(layer, lp.LoRA(r=1), "weight", layout=lp.Layout(rows=7))
    with pytest.raises(lp.TargetError, match=r"flat \(18, in\) has no slices"):
        lp.plan(layer, lp.LoRA(r=1), "weight[1/2]", layout=lp.Layout(rows=18))
