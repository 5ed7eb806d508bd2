"""``loraparam.loralib`` where loralib is wrong, what it refuses, and with the rest of the library."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib as original
import pytest
import torch
from dropins import input_for, moved
from hypothesis import given
from hypothesis import strategies as st
from loralib_layers import LAYERS, both, make
from torch import nn
from torch.testing import assert_close

import loraparam as lp
import loraparam.loralib as lora


@pytest.mark.parametrize("case", LAYERS)
def test_eval_state_dicts_count_the_update_once(case: str) -> None:
    """A checkpoint taken in eval() is that taken in train(); loralib's holds the merged weight and the factors."""
    theirs, ours = (moved(model) for model in both(case))
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    x = input_for(*LAYERS[case])
    y = ours.eval()(x)
    for key, value in ours.state_dict().items():
        assert_close(value, before[key], rtol=0, atol=0)
    fresh = both(case)[1]
    fresh.load_state_dict(ours.state_dict())
    assert_close(fresh.eval()(x), y)
    weight = next(key for key in before if key.endswith("weight"))
    if LAYERS[case][1].get("r") and LAYERS[case][1].get("merge_weights", True):
        theirs.eval()
        assert not torch.allclose(theirs.state_dict()[weight], before[weight])


def test_no_drift() -> None:
    """Toggling modes leaves the base as it was, bit for bit; loralib's drifts in bfloat16."""
    for library, same in ((lora, True), (original, False)):
        torch.manual_seed(0)
        layer = moved(library.Linear(16, 16, r=4).bfloat16())
        before = layer.state_dict()["weight"].clone()
        for _ in range(20):
            layer.eval(), layer.train()
        assert torch.equal(layer.state_dict()["weight"], before) == same


def test_modes() -> None:
    """train() and eval() return the layer; ``merged`` says what loralib's would."""
    layer, conv = lora.Linear(4, 6, r=2), lora.Conv2d(2, 4, 3, r=2, merge_weights=False)
    assert original.Linear(4, 6, r=2).eval() is None
    assert layer.eval() is layer
    assert layer.merged
    assert layer.train() is layer
    assert not layer.merged
    assert conv.eval() is conv
    assert not conv.merged
    with pytest.raises(AttributeError):
        layer.merged = True  # the mode says it
    for name in ("lora_dropout", "lora_ind", "zero_pad"):
        assert not hasattr(lora.MergedLinear(4, 6, r=2, enable_lora=[True, False]), name)


def test_gradients_in_eval_mode() -> None:
    """loralib's merged weight sends none to the factors."""
    for library, arrives in ((lora, True), (original, False)):
        layer = moved(library.Linear(4, 6, r=2))
        layer.eval()
        layer.bias.requires_grad_(False)
        x = torch.randn(3, 4, requires_grad=True)
        layer(x).sum().backward()
        assert (layer.lora_A.grad is not None) == arrives


@pytest.mark.parametrize(("name", "n", "A", "B"), [("Conv1d", 1, (6, 12), (3, 6)), ("Conv3d", 3, (6, 36), (9, 6))])
def test_convolutions_in_one_and_three_dims(name: str, n: int, A: tuple[int, int], B: tuple[int, int]) -> None:
    """loralib's factors do not have the kernel's number of elements; ours are LoRA-Torch's."""
    settings = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "r": 2, "lora_alpha": 4, "groups": 2}
    x = torch.randn(2, 4, *(5,) * n)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        getattr(original, name)(**settings)(x)
    layer = moved(getattr(lora, name)(**settings))
    assert (tuple(layer.lora_A.shape), tuple(layer.lora_B.shape)) == (A, B)
    delta = 2 * (layer.lora_B @ layer.lora_A).view(6, 2, *(3,) * n)
    with lp.detached(layer):
        expected = layer(x) + getattr(torch, name.lower())(x, delta, groups=2)
    assert_close(layer(x), expected)


def test_a_merged_linear_with_nothing_enabled_is_plain() -> None:
    """The default; loralib's has no factors, and its forward asks for them."""
    x = torch.randn(3, 4)
    with pytest.raises(AttributeError, match="lora_A"):
        original.MergedLinear(4, 6, r=2)(x)
    layer = lora.MergedLinear(4, 6, r=2)
    assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=0)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert not hasattr(layer, "lora_A")
    assert lora.MergedLinear(4, 6, enable_lora=[True, False]).weight.requires_grad


def test_dropout_of_a_convolution() -> None:
    """It drops elements of the input of the low-rank path; loralib keeps the setting and never uses it."""
    x = torch.randn(2, 4, 5, 5)
    for library, drops in ((lora, True), (original, False)):
        layer = moved(library.Conv2d(4, 6, 3, r=2, lora_dropout=0.5))
        assert torch.equal(layer(x), layer(x)) != drops
        layer.eval()
        assert torch.equal(layer(x), layer(x))


def test_factors_of_low_precision_weights_are_float32() -> None:
    """loralib's are the weight's: small steps round away. Its checkpoints load all the same."""
    layer = lora.Linear(4, 6, r=2, dtype=torch.bfloat16)
    assert (layer.lora_A.dtype, layer.weight.dtype) == (torch.float32, torch.bfloat16)
    layer.load_state_dict(original.Linear(4, 6, r=2, dtype=torch.bfloat16).state_dict())
    assert layer.lora_A.dtype == torch.float32


@pytest.mark.parametrize(("setting", "same"), [({}, True), ({"scale_grad_by_freq": True}, False)])
def test_gradients_scaled_by_frequency(setting: dict[str, Any], same: bool) -> None:
    """Those of the effective row, so of both factors; loralib scales A's alone."""
    x, grads = torch.tensor([[1, 1, 2]]), []
    for library in (original, lora):
        torch.manual_seed(0)
        layer = moved(library.Embedding(5, 4, r=2, **setting))
        layer(x).square().sum().backward()
        grads.append((layer.lora_A.grad, layer.lora_B.grad))
    assert_close(grads[1][0], grads[0][0])
    assert torch.allclose(grads[1][1], grads[0][1]) == same


def test_rows_of_a_largest_norm() -> None:
    """max_norm bounds the effective rows, in what is read; loralib writes the base, and bounds the parts apart."""
    x = torch.arange(5)
    for library, bounded in ((original, False), (lora, True)):
        layer = moved(library.Embedding(5, 4, r=2, max_norm=1.0))
        before = layer.state_dict()["weight"].clone()
        y = layer(x)
        assert torch.equal(layer.state_dict()["weight"], before) == bounded
        assert bool((y.norm(dim=-1) <= 1 + 1e-5).all()) == bounded


def test_names_and_order_of_parameters() -> None:
    """The adapted weight comes after what is not adapted, under torch's names for parametrized tensors."""
    stem = "parametrizations.weight.0.default"
    names = ["bias", "parametrizations.weight.original", f"{stem}.lora_A", f"{stem}.lora_B"]
    assert [name for name, _ in lora.Linear(4, 6, r=2).named_parameters()] == names
    assert [name for name, _ in original.Linear(4, 6, r=2).named_parameters()] == ["weight", "bias", "lora_A", "lora_B"]


@given(
    blocks=st.lists(st.booleans(), min_size=1, max_size=4),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    transposed=st.booleans(),
)
def test_merged_linears_for_any_choice_of_blocks(
    blocks: list[bool], sizes: tuple[int, int, int], transposed: bool
) -> None:
    """Against the formula, row block by row block, in float64."""
    in_, rows, r = sizes
    layer = lora.MergedLinear(in_, rows * len(blocks), r, 3, enable_lora=blocks, fan_in_fan_out=transposed)
    layer = moved(layer.double())
    weight = layer.state_dict()["weight"]
    expected = (weight.T if transposed else weight).clone()
    for used, i in enumerate(i for i, on in enumerate(blocks) if on):
        A, B = layer.lora_A[used * r : (used + 1) * r], layer.lora_B[used * rows : (used + 1) * rows]
        expected[i * rows : (i + 1) * rows] += 3 / r * B @ A
    assert_close(layer.weight, expected.T if transposed else expected)


# --- what is given that makes no sense --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: lora.Linear(4, 6, r=-1), "r=-1; allowed: an integer"),
        (lambda: lora.MergedLinear(4, 6, r=1, enable_lora=[True] * 4), r"out_features=6; allowed: a list of booleans"),
        (lambda: lora.MergedLinear(4, 6, r=1, enable_lora=[1, 0, 1]), "allowed: a list of booleans"),
        (lambda: lora.Conv2d(4, 6, (3, 3), r=1), r"kernel_size=\(3, 3\); allowed: an integer.*lp\.attach"),
        (lambda: lora.Embedding(4, 6, r=1, sparse=True), "sparse"),
        (lambda: lora.Linear(4, 6, r=1, device="meta"), "on the meta device and has no values"),
        (lambda: lora.Linear(4, 6, r=1, lora_dropout=1.0), "dropout=1.0; allowed: 0 <= dropout < 1"),
    ],
)
def test_arguments_that_make_no_sense(build: Callable[[], nn.Module], message: str) -> None:
    """Each error says what is allowed."""
    with pytest.raises(lp.LoraparamError, match=message):
        build()


# --- with the rest of the library -------------------------------------------------------------------------------


def test_the_layers_carry_ordinary_adapters(tmp_path: Path) -> None:
    """lp.adapters, save, load, merge and detach work on a model of them."""
    model = moved(make(lora))
    assert set(lp.adapters(model)["default"]) == {"embed.weight", "qkv_proj.weight", "conv.conv.weight", "head.weight"}
    x = torch.randint(11, (4, 3))
    y = model.eval()(x)
    lp.save(model, tmp_path / "adapter.safetensors")
    other = make(lora)
    lp.detach(other)
    other.load_state_dict(lp.base_state_dict(model))
    lp.load(other, tmp_path / "adapter.safetensors")
    assert_close(other.eval()(x), y)
    lp.merge(model)
    assert "head.lora_A" not in model.state_dict()
    assert not hasattr(model.head, "lora_A")
    assert_close(model(x), y)


def test_a_second_adapter_on_top() -> None:
    """Under another name; the layer's own keys stay the originals'."""
    layer = moved(lora.Linear(4, 6, r=2))
    lp.attach(layer, lp.DoRA(r=2), "weight", name="task")
    state = layer.state_dict()
    assert list(state)[:4] == ["weight", "bias", "lora_A", "lora_B"]
    assert len(state) == 7
    other = lora.Linear(4, 6, r=2)
    lp.attach(other, lp.DoRA(r=2), "weight", name="task")
    other.load_state_dict(state)
    x = torch.randn(3, 4)
    assert_close(other(x), layer(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    """With their factors and their names."""
    model = moved(make(lora))
    twin, x = duplicate(model), torch.randint(11, (4, 3))
    assert_close(twin(x), model(x))
    twin.head.lora_B.data.zero_()
    assert model.head.lora_B.any()
    assert list(twin.state_dict()) == list(model.state_dict())
    assert type(twin.head) is type(model.head)


def test_inside_a_fused_encoder_layer() -> None:
    """Its fast path reads the weights of what replaced its linear layers, in eval() as loralib's merged ones."""
    results = []
    x = torch.randn(2, 5, 8)
    for library in (original, lora):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        layer.linear1, layer.linear2 = library.Linear(8, 16, r=2), library.Linear(16, 8, r=2)
        moved(layer)
        train_output = layer(x)
        layer.eval()
        results.append(layer(x))
        assert_close(results[-1], train_output, rtol=1e-4, atol=1e-5)  # float32 through another kernel
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
