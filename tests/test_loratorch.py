"""``import loraparam.loratorch as lora`` beside formulas, loralib (as LoRA-Torch's notebooks do) and its own files."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from dropins import Formula, cases, input_for, leaf, moved, train
from torch import Tensor, nn
from torch.testing import assert_close

import loraparam as lp
import loraparam.loratorch as lora


def blocks(A: Tensor, B: Tensor, on: list[bool], rows: int, r: int) -> Tensor:
    """B_i A_i in the rows of each block that is on."""
    used = iter(range(sum(on)))
    parts = []
    for flag in on:
        i = next(used) if flag else 0
        delta = B[i * rows : (i + 1) * rows] @ A[i * r : (i + 1) * r]
        parts.append(delta if flag else 0 * delta)
    return torch.cat(parts)


# Class, arguments, the plain layer, and what of A and B is added to its weight.
LAYERS: dict[str, tuple[str, dict[str, Any], Callable[[], nn.Module], Callable[[Tensor, Tensor], Tensor]]] = {
    "linear": (
        "Linear",
        {"in_features": 5, "out_features": 6, "r": 4, "lora_alpha": 3},
        lambda: nn.Linear(5, 6),
        lambda A, B: B @ A,
    ),
    "merged": (
        "MergedLinear",
        {"in_features": 5, "out_features": 9, "r": 2, "enable_lora": [True, False, True], "bias": False},
        lambda: nn.Linear(5, 9, bias=False),
        lambda A, B: blocks(A, B, [True, False, True], 3, 2),
    ),
    "embedding": (
        "Embedding",
        {"num_embeddings": 7, "embedding_dim": 5, "r": 3, "lora_alpha": 2},
        lambda: nn.Embedding(7, 5),
        lambda A, B: B @ A,
    ),
    "embedding, rank above both": (
        "Embedding",
        {"num_embeddings": 7, "embedding_dim": 2, "r": 3, "padding_idx": 1},
        lambda: nn.Embedding(7, 2, padding_idx=1),
        lambda A, B: B @ A,
    ),
    "conv1d": (
        "Conv1d",
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "r": 2, "lora_alpha": 3, "groups": 2},
        lambda: nn.Conv1d(4, 6, 3, groups=2),
        lambda A, B: (B @ A).view(6, 2, 3),
    ),
    "conv2d": (
        "Conv2d",
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "r": 2, "padding": 1},
        lambda: nn.Conv2d(4, 6, 3, padding=1),
        lambda A, B: (B @ A).view(6, 4, 3, 3),
    ),
    "conv3d": (
        "Conv3d",
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "r": 2, "groups": 2},
        lambda: nn.Conv3d(4, 6, 3, groups=2),
        lambda A, B: (B @ A).view(6, 2, 3, 3, 3),
    ),
}


def layer_and_formula(case: str) -> tuple[nn.Module, Formula]:
    name, settings, make, delta = LAYERS[case]
    layer, plain = moved(getattr(lora, name)(**settings)), make()
    plain.load_state_dict(lp.base_state_dict(layer))
    scale = settings.get("lora_alpha", 1) / settings["r"]
    return layer, Formula(plain, scale, {"weight": (leaf(layer.w_lora_A), leaf(layer.w_lora_B), delta)})


@pytest.mark.parametrize("case", LAYERS)
def test_same_losses_as_the_formula(case: str) -> None:
    """Over 20 steps from the same factors, with evaluations between; keys in the original's order."""
    layer, formula = layer_and_formula(case)
    keys = [*formula.plain.state_dict(), "w_lora_A", "w_lora_B"]
    lora.mark_only_lora_as_trainable(layer)
    batches = [input_for(*LAYERS[case][:2]) for _ in range(20)]
    got = train(layer, batches, eval_between=True, after=lora.register_model_param_after_backward)
    assert_close(got, train(formula, batches, eval_between=True))
    assert got[-1] < got[0]
    x = batches[0]
    assert_close(layer.eval()(x), formula(x))
    assert list(layer.state_dict()) == keys
    assert [name for name, p in layer.named_parameters() if p.requires_grad and "lora_" not in name] == []


@pytest.mark.parametrize("case", LAYERS)
def test_attributes_and_shapes(case: str) -> None:
    """r, lora_alpha, scaling, merged, w_lora_A, w_lora_B; train() and eval() return the layer."""
    layer, _ = layer_and_formula(case)
    settings = LAYERS[case][1]
    assert (layer.r, layer.lora_alpha) == (settings["r"], settings.get("lora_alpha", 1))
    assert layer.scaling == layer.lora_alpha / layer.r
    assert isinstance(layer.w_lora_A, nn.Parameter)
    assert not hasattr(layer, "lora_A")
    assert not layer.merged
    assert layer.eval() is layer
    assert layer.merged
    plain = getattr(lora, LAYERS[case][0])(**{**settings, "r": 0})
    assert "w_lora_A" not in plain.state_dict()
    assert not hasattr(plain, "scaling")
    assert all(p.requires_grad for p in plain.parameters())


def test_the_notebook_that_compares_with_loralib() -> None:
    """LoRA-Torch's examples/linear.ipynb, with its assignments to ``.data``."""
    model_lib, model_torch = loralib.Linear(5, 6, r=4, lora_alpha=1), lora.Linear(5, 6, r=4, lora_alpha=1)
    model_lib.weight.data = copy.deepcopy(model_torch.weight.data)
    model_lib.lora_A.data = copy.deepcopy(model_torch.w_lora_A.data)
    model_lib.lora_B.data = copy.deepcopy(model_torch.w_lora_B.data)
    model_lib.bias.data = copy.deepcopy(model_torch.bias.data)
    back = lora.Linear(5, 6, r=4, lora_alpha=1)
    for name in ("weight", "w_lora_A", "w_lora_B", "bias"):
        getattr(back, name).data = copy.deepcopy(getattr(model_torch, name).data)
    models = (model_lib, model_torch, back)
    for model in models:
        loralib.mark_only_lora_as_trainable(model)
    batches = [torch.rand(2, 5) for _ in range(20)]
    theirs, ours, again = (train(model, batches, eval_between=True) for model in models)
    assert_close(ours, theirs)
    assert_close(again, theirs)
    assert_close(model_torch.w_lora_A.grad, model_lib.lora_A.grad)


# --- where LoRA-Torch is wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LAYERS)
def test_the_inputs_gradient_sees_the_update(case: str) -> None:
    """LoRA-Torch's is that of the base alone."""
    layer, formula = layer_and_formula(case)
    if case.startswith("embedding"):
        return  # indices have no gradient
    x = input_for(*LAYERS[case][:2]).requires_grad_()
    (got,) = torch.autograd.grad(layer(x).square().sum(), x)
    (wanted,) = torch.autograd.grad(formula(x).square().sum(), x)
    assert_close(got, wanted, rtol=1e-5, atol=1e-4)  # float32 sums of some hundred terms


@pytest.mark.parametrize("case", LAYERS)
def test_weights_stay_where_they_are(case: str) -> None:
    """In parameters and state_dict, frozen, the same bits; LoRA-Torch's leave, and come back trainable."""
    layer, _ = layer_and_formula(case)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    identities = [id(p) for p in layer.parameters()]
    layer(input_for(*LAYERS[case][:2])).sum().backward()
    lora.register_model_param_after_backward(layer)
    assert [id(p) for p in layer.parameters()] == identities
    assert {key: torch.equal(value, before[key]) for key, value in layer.state_dict().items()} == dict.fromkeys(
        before, True
    )
    frozen = [name for name, p in layer.named_parameters() if not p.requires_grad]
    assert [name.rpartition(".")[2] for name in frozen] == ["original"]


def test_no_drift() -> None:
    """Forwards and changes of mode leave a bfloat16 base as it was, bit for bit."""
    layer = moved(lora.Linear(16, 16, r=4).bfloat16())
    before = layer.state_dict()["weight"].clone()
    for _ in range(10):
        layer.train()(torch.randn(2, 16, dtype=torch.bfloat16))
        layer.eval()(torch.randn(2, 16, dtype=torch.bfloat16))
    assert torch.equal(layer.state_dict()["weight"], before)


@pytest.mark.parametrize("name", ["Linear", "MergedLinear"])
def test_fan_in_fan_out(name: str) -> None:
    """The weight is stored (in, out); LoRA-Torch's Linear fails unless square, its MergedLinear ignores it."""
    settings = {"r": 2, "lora_alpha": 4, "fan_in_fan_out": True}
    more = {"enable_lora": [True, False, True]} if name == "MergedLinear" else {}
    layer = moved(getattr(lora, name)(5, 9, **settings, **more))
    assert layer.state_dict()["weight"].shape == (5, 9)
    A, B = layer.w_lora_A, layer.w_lora_B
    delta = blocks(A, B, more["enable_lora"], 3, 2) if more else B @ A
    x = torch.randn(3, 5)
    assert_close(layer(x), x @ (layer.state_dict()["weight"] + 2 * delta.T) + layer.bias)


def test_lora_only_biases_are_trained_and_saved() -> None:
    """LoRA-Torch saves none of them, and does not know attention's."""
    model = nn.Sequential(lora.Linear(4, 6, r=2), nn.Linear(6, 6), lora.MultiheadAttention(6, 2, r=2))
    lora.mark_only_lora_as_trainable(model, bias="lora_only")
    biases = {"0.bias", "2.in_proj_bias", "2.out_proj.bias"}
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name} == biases
    assert {key for key in lora.lora_state_dict(model, bias="lora_only") if "lora_" not in key} == biases
    assert [key for key in lora.lora_state_dict(model) if "lora_" not in key] == []
    assert {key for key in lora.lora_state_dict(model, bias="all") if "lora_" not in key} == {*biases, "1.bias"}


def test_checkpoints_move_through_files(tmp_path: Path) -> None:
    """Full ones and those of lora_state_dict, onto the same base."""
    for case, (name, settings, _, _) in LAYERS.items():
        layer, _ = layer_and_formula(case)
        torch.save(layer.eval().state_dict(), tmp_path / "full.pt")
        torch.save(lora.lora_state_dict(layer), tmp_path / "lora.pt")
        full, partial = (getattr(lora, name)(**settings) for _ in range(2))
        full.load_state_dict(torch.load(tmp_path / "full.pt", weights_only=True))
        partial.load_state_dict(lp.base_state_dict(layer), strict=False)
        partial.load_state_dict(torch.load(tmp_path / "lora.pt", weights_only=True), strict=False)
        x = input_for(name, settings)
        assert_close(full(x), layer(x))
        assert_close(partial(x), layer(x))


def test_signatures() -> None:
    """The original's arguments, in its order, with its defaults."""
    linear = ["in_features", "out_features", "r", "lora_alpha"]
    assert list(inspect.signature(lora.Linear).parameters) == [*linear, "fan_in_fan_out", "kwargs"]
    assert list(inspect.signature(lora.MergedLinear).parameters) == [*linear, "enable_lora", "fan_in_fan_out", "kwargs"]
    attention = inspect.signature(lora.MultiheadAttention).parameters
    assert list(attention) == ["embed_dim", "num_heads", "enable_lora", "r", "lora_alpha", "kwargs"]
    defaults = [attention[name].default for name in ("enable_lora", "r", "lora_alpha")]
    assert defaults == [["q", "k", "v", "o"], 0, 1]


CASES = cases("loratorch")


@pytest.mark.parametrize("case", CASES)
def test_files_that_loratorch_wrote(case: str) -> None:
    """Weights and outputs are what LoRA-Torch made of them."""
    model = CASES[case].model(lora)
    assert_close(CASES[case].output(model), CASES[case].expected["output"])
    for name, merged in CASES[case].expected.items():
        if name.startswith("merged/"):
            assert_close(lp.effective_weight(model, name.removeprefix("merged/")).detach(), merged)


def test_marking_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Totals are printed by the function of that name."""
    layer = lora.Linear(4, 6, r=2)
    lora.mark_only_lora_as_trainable(layer, bias="all")
    assert capsys.readouterr().out == ""
    lora.print_trainable_parameters(layer)
    assert capsys.readouterr().out == "trainable params: 26 || all params: 50 || trainable%: 52.00\n"
