"""``import loraparam.loralib as lora`` beside the loralib package: the same wherever loralib is right."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib as original
import pytest
import torch
from dropins import cases, input_for, moved, train
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import loraparam as lp
import loraparam.loralib as lora

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("Linear", {"in_features": 5, "out_features": 6, "r": 4, "lora_alpha": 3}),
    "linear, no bias, rank above both": ("Linear", {"in_features": 5, "out_features": 3, "r": 7, "bias": False}),
    "linear, dropout": ("Linear", {"in_features": 5, "out_features": 6, "r": 2, "lora_dropout": 0.5}),
    "linear, fan_in_fan_out": ("Linear", {"in_features": 5, "out_features": 6, "r": 2, "fan_in_fan_out": True}),
    "linear, not merging": ("Linear", {"in_features": 5, "out_features": 6, "r": 2, "merge_weights": False}),
    "linear, r=0": ("Linear", {"in_features": 5, "out_features": 6, "fan_in_fan_out": True}),
    "merged": (
        "MergedLinear",
        {"in_features": 5, "out_features": 9, "r": 2, "lora_alpha": 3, "enable_lora": [True, False, True]},
    ),
    "merged, all, dropout, transposed": (
        "MergedLinear",
        {
            "in_features": 5,
            "out_features": 9,
            "r": 2,
            "lora_dropout": 0.3,
            "enable_lora": [True, True, True],
            "fan_in_fan_out": True,
        },
    ),
    "merged, r=0": ("MergedLinear", {"in_features": 5, "out_features": 9, "enable_lora": [True, False, True]}),
    "embedding": ("Embedding", {"num_embeddings": 7, "embedding_dim": 5, "r": 3, "lora_alpha": 2}),
    "embedding, padding": ("Embedding", {"num_embeddings": 7, "embedding_dim": 2, "r": 3, "padding_idx": 1}),
    "conv": ("Conv2d", {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "r": 2, "lora_alpha": 3, "groups": 2}),
    "conv, rank above both": (
        "Conv2d",
        {"in_channels": 3, "out_channels": 6, "kernel_size": 3, "r": 8, "stride": 2, "bias": False},
    ),
    "conv, r=0": ("Conv2d", {"in_channels": 4, "out_channels": 6, "kernel_size": 3}),
    "conv1d, kernel 1": ("Conv1d", {"in_channels": 3, "out_channels": 6, "kernel_size": 1, "r": 2, "lora_alpha": 3}),
}


def both(case: str) -> tuple[nn.Module, nn.Module]:
    """loralib's layer and ours, from the same seed."""
    name, settings = LAYERS[case]
    made = []
    for library in (original, lora):
        torch.manual_seed(0)
        made.append(getattr(library, name)(**settings))
    return made[0], made[1]


@pytest.mark.parametrize("case", LAYERS)
def test_same_seed_same_layer_and_same_losses(case: str) -> None:
    """Weights, keys and their order at the start; 20 steps with evaluations between; outputs at the end."""
    theirs, ours = both(case)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for key, value in theirs.state_dict().items():
        assert_close(ours.state_dict()[key], value, rtol=0, atol=0)
    losses = []
    for library, model in ((original, theirs), (lora, ours)):
        library.mark_only_lora_as_trainable(model, bias="all")
        torch.manual_seed(1)
        batches = [input_for(*LAYERS[case]) for _ in range(20)]
        losses.append(train(model, batches, eval_between=True))
    assert_close(losses[1], losses[0])
    assert losses[0][-1] < losses[0][0] or not LAYERS[case][1].get("r")
    x = input_for(*LAYERS[case])
    assert_close(ours.eval()(x), (theirs.eval(), theirs(x))[1])  # loralib's eval() returns None


@pytest.mark.parametrize("case", LAYERS)
def test_checkpoints_move_both_ways(case: str, tmp_path: Path) -> None:
    """Full ones strictly, and those of ``lora_state_dict`` onto the same base, through ``torch.save``."""
    theirs, ours = (moved(model) for model in both(case))
    x = input_for(*LAYERS[case])
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    torch.save(original.lora_state_dict(theirs), tmp_path / "theirs_lora.pt")
    torch.save(ours.state_dict(), tmp_path / "ours.pt")
    torch.save(lora.lora_state_dict(ours), tmp_path / "ours_lora.pt")
    for save, library, source in (("theirs", lora, theirs), ("ours", original, ours)):
        torch.manual_seed(9)
        fresh = nn.Module()
        fresh.layer = getattr(library, LAYERS[case][0])(**LAYERS[case][1])
        fresh.layer.load_state_dict(torch.load(tmp_path / f"{save}.pt", weights_only=True))
        factors_only = copy.deepcopy(fresh)
        for key, value in factors_only.state_dict().items():
            if "lora_" in key:
                value.zero_()
        state = {f"layer.{k}": v for k, v in torch.load(tmp_path / f"{save}_lora.pt", weights_only=True).items()}
        assert factors_only.load_state_dict(state, strict=False).unexpected_keys == []
        for model in (fresh, factors_only):
            source.eval(), model.eval()
            assert_close(model.layer(x), source(x))
            source.train(), model.train()


class Model(nn.Module):
    """As in loralib's README: some layers replaced, others not."""

    def __init__(self, lib: Any, r: int = 2) -> None:
        super().__init__()
        self.embed = lib.Embedding(11, 8, r=r)
        self.qkv_proj = lib.MergedLinear(8, 24, r=r, enable_lora=[True, False, True], lora_alpha=4)
        self.norm = nn.LayerNorm(24)
        self.conv = lib.Conv2d(1, 2, 3, r=r, padding=1)
        self.head = lib.Linear(48, 3, r=r)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.qkv_proj(self.embed(x)))
        return self.head(self.conv(hidden.unsqueeze(1)).flatten(1).view(len(x), -1, 48).mean(1))


def make(library: Any) -> nn.Module:
    torch.manual_seed(0)
    return Model(library)


BIASES = ("none", "all", "lora_only")


@pytest.mark.parametrize("bias", BIASES)
def test_the_readme_of_loralib(bias: str, tmp_path: Path) -> None:
    """Mark, train, save, load the pretrained and then the LoRA checkpoint: the same under both imports."""
    results = []
    for library in (original, lora):
        model = make(library)
        library.mark_only_lora_as_trainable(model, bias=bias)
        trained = [name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad]
        torch.manual_seed(2)
        losses = train(model, [torch.randint(11, (4, 3)) for _ in range(20)])
        torch.save(library.lora_state_dict(model, bias=bias), tmp_path / "ckpt_lora.pt")
        again = make(library)
        pretrained = {k: v for k, v in make(library).state_dict().items() if "lora_" not in k}
        again.load_state_dict(pretrained, strict=False)
        again.load_state_dict(torch.load(tmp_path / "ckpt_lora.pt", weights_only=True), strict=False)
        x = torch.randint(11, (4, 3), generator=torch.Generator().manual_seed(3))
        model.eval(), again.eval()
        results.append((trained, losses, again(x)))
        if bias == "none" or library is lora:
            assert_close(again(x), model(x))
    (their_names, their_losses, their_output), (our_names, our_losses, our_output) = results
    if bias == "lora_only":  # loralib leaves out a convolution's bias, which it keeps one module further down
        assert our_names.count("bias") == their_names.count("bias") + 1
        return
    assert sorted(our_names) == sorted(their_names)
    assert_close(our_losses, their_losses)
    if bias == "none":
        assert_close(our_output, their_output)


@pytest.mark.parametrize("bias", BIASES)
def test_lora_state_dict_has_the_originals_keys(bias: str) -> None:
    """And with lora_only the bias of a convolution too, which loralib trains nor saves."""
    theirs, ours = (library.lora_state_dict(make(library), bias=bias) for library in (original, lora))
    more = {"conv.conv.bias"} if bias == "lora_only" else set()
    assert set(ours) == set(theirs) | more
    for key, value in theirs.items():
        assert_close(ours[key], value, rtol=0, atol=0)


def test_marking_by_hand() -> None:
    """Users write the loop themselves: names of factors, and of nothing else, contain lora_."""
    model = make(lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    assert sum(p.requires_grad for p in model.parameters()) == 8
    assert [p is model.head.lora_A for p in model.head.parameters() if p.requires_grad] == [True, False]


@pytest.mark.parametrize("library", [original, lora])
def test_an_unknown_bias_mode(library: Any) -> None:
    """Both raise NotImplementedError; ours says what is allowed, and has changed nothing."""
    model = make(library)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(NotImplementedError, match=r"^$" if library is original else "allowed: 'none', 'all'"):
        library.mark_only_lora_as_trainable(model, bias="some")
    assert library is original or flags == [p.requires_grad for p in model.parameters()]
    with pytest.raises(NotImplementedError, match=r"^$" if library is original else "allowed: 'none', 'all'"):
        library.lora_state_dict(model, bias="some")


# --- pretrained checkpoints of plain layers ---------------------------------------------------------------------


class Plain(nn.Module):
    """The model before any layer was replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv_proj = nn.Embedding(11, 8), nn.Linear(8, 24)
        self.norm, self.conv, self.head = nn.LayerNorm(24), nn.Conv2d(1, 2, 3, padding=1), nn.Linear(48, 3)

    forward = Model.forward


def test_a_pretrained_checkpoint_loads() -> None:
    """With strict=False, the missing keys being the factors; a convolution's weight too, which loralib drops."""
    plain = Plain()
    model, theirs = make(lora), make(original)
    found = model.load_state_dict(plain.state_dict(), strict=False)
    assert found.unexpected_keys == []
    assert sorted(found.missing_keys) == sorted(lora.lora_state_dict(model))
    x = torch.randint(11, (4, 3))
    assert_close(model(x), plain(x))
    assert "conv.weight" in theirs.load_state_dict(plain.state_dict(), strict=False).unexpected_keys


def test_strict_loading_names_what_is_missing() -> None:
    """By the originals' names, as with any other layer."""
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"embed\.lora_A", "embed\.lora_B", "qkv_proj\.lora_A"'):
        make(lora).load_state_dict(Plain().state_dict())
    layer = lora.Linear(4, 6, r=2)
    assert layer.load_state_dict({}, strict=False).missing_keys == ["weight", "lora_A", "lora_B", "bias"]
    state = {**layer.state_dict(), "lora_A": torch.zeros(3, 4), "weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"size mismatch for lora_A: .*\(3, 4\) from checkpoint.*\(2, 4\)"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"lora_A"'):
        lora.Linear(4, 6).load_state_dict(layer.state_dict())


def test_checkpoints_of_loralibs_latest_source() -> None:
    """Its convolutions save their weight twice."""
    model = moved(lora.Conv2d(2, 4, 3, r=2))
    state = model.state_dict()
    twice = {**state, "weight": state["conv.weight"], "bias": state["conv.bias"]}
    assert list(lora.Conv2d(2, 4, 3, r=2).load_state_dict(twice)) == [[], []]


# --- where loralib is wrong -------------------------------------------------------------------------------------


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


# --- attributes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LAYERS)
def test_attributes(case: str) -> None:
    """r, lora_alpha, scaling, lora_A, lora_B, merged, and the layer's own."""
    theirs, ours = both(case)
    assert type(ours).__name__ == type(theirs).__name__
    for name in ("r", "lora_alpha", "scaling", "merged", "merge_weights", "fan_in_fan_out", "enable_lora"):
        assert hasattr(ours, name) == hasattr(theirs, name)
        assert getattr(ours, name, None) == getattr(theirs, name, None)
    for name in ("lora_A", "lora_B"):
        assert hasattr(ours, name) == hasattr(theirs, name)
        if hasattr(ours, name):
            assert isinstance(getattr(ours, name), nn.Parameter)
            assert getattr(ours, name).shape == getattr(theirs, name).shape
    assert isinstance(ours, lora.LoRALayer)
    assert isinstance(ours, original.LoRALayer) is False


def test_scaling_can_be_set() -> None:
    """As users do to weaken a LoRA."""
    for library in (original, lora):
        layer = moved(library.Linear(4, 6, r=2, lora_alpha=4))
        assert layer.scaling == 2
        layer.scaling = 0.5
        x = torch.randn(3, 4)
        expected = x @ (layer.state_dict()["weight"] + 0.5 * layer.lora_B @ layer.lora_A).T + layer.bias
        assert_close(layer(x), expected)
    assert layer.scaling == 0.5


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    ".data =": lambda layer: setattr(layer.weight, "data", torch.full((6, 4), 2.0)),
    ".data.copy_": lambda layer: layer.weight.data.copy_(torch.full((6, 4), 2.0)),
    "copy_": lambda layer: layer.weight.copy_(torch.full((6, 4), 2.0)),
    "init": lambda layer: nn.init.constant_(layer.weight, 2.0),
    "part of .data": lambda layer: [row.fill_(2.0) for row in layer.weight.data],
    "setitem": lambda layer: layer.weight.__setitem__(slice(None), 2.0),
    "+=": lambda layer: layer.weight.zero_().__iadd__(2.0),
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.full((6, 4), 2.0))),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("library", [original, lora])
def test_writing_the_weight_writes_the_base(library: Any, write: str) -> None:
    """As code that initialises models, or copies weights into them, does."""
    layer = moved(library.Linear(4, 6, r=2))
    factors = layer.lora_A.clone(), layer.lora_B.clone()
    with torch.no_grad():
        WRITES[write](layer)
    assert_close(layer.state_dict()["weight"], torch.full((6, 4), 2.0), rtol=0, atol=0)
    assert_close((layer.lora_A, layer.lora_B), factors, rtol=0, atol=0)
    x = torch.randn(3, 4)
    assert_close(layer(x), x @ (2 + 0.5 * layer.lora_B @ layer.lora_A).T + layer.bias)
    assert_close(layer.weight.data, torch.full((6, 4), 2.0), rtol=0, atol=0)


@pytest.mark.parametrize("init", [nn.init.xavier_uniform_, nn.init.orthogonal_, nn.init.trunc_normal_])
def test_initialising_the_weight(init: Callable[[Tensor], Tensor]) -> None:
    """Of a fresh layer, whatever torch's initialisers read and write on the way."""
    weights = []
    for library in (original, lora):
        layer = library.Linear(4, 6, r=2)
        torch.manual_seed(3)
        init(layer.weight)
        weights.append(layer.state_dict()["weight"])
    assert_close(weights[1], weights[0], rtol=0, atol=0)


def test_reading_the_weight_gives_the_effective_one() -> None:
    """In train() and eval(); ``.data`` shows the base in train(), the effective weight in eval(), as loralib's."""
    theirs, ours = (moved(model) for model in both("linear"))
    effective = ours.state_dict()["weight"] + 0.75 * ours.lora_B @ ours.lora_A
    assert_close(ours.weight, effective)
    assert_close(ours.weight.data, theirs.weight.data)
    ours.eval(), theirs.eval()
    assert_close(ours.weight, effective)
    assert_close(ours.weight.data, theirs.weight.data)
    assert_close(theirs.weight.data, effective.detach())


def test_assigning_and_resetting_factors() -> None:
    """A parameter assigned to lora_A is the factor; reset_parameters starts weight, bias and factors anew."""
    for library in (original, lora):
        layer = library.Linear(4, 6, r=2)
        layer.lora_A, layer.lora_B = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(6, 2))
        x = torch.ones(1, 4)
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
        assert_close(layer(x), torch.full((1, 6), 4.0))
        assert len(list(layer.parameters())) == 4
        layer.reset_parameters()
        assert not layer.lora_B.any()
        assert layer.lora_A.unique().numel() == 8
        assert layer.state_dict()["weight"].any()
    conv = moved(lora.Conv2d(2, 4, 3, r=2))
    conv.reset_parameters()
    assert not conv.lora_B.any()
    table = moved(lora.Embedding(5, 4, r=2, padding_idx=1))
    table.weight.data.fill_(1.0)
    table.reset_parameters()
    assert (table.state_dict()["weight"] == 0).all(1).tolist() == [False, True, False, False, False]
    assert not table.lora_A.any()


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


CASES = cases("loralib")


@pytest.mark.parametrize("case", CASES)
def test_files_that_loralib_wrote(case: str) -> None:
    """Weights and outputs are what loralib made of them."""
    model = CASES[case].model(lora)
    assert_close(CASES[case].output(model), CASES[case].expected["output"])
    for name, merged in CASES[case].expected.items():
        if name.startswith("merged/"):
            assert_close(lp.effective_weight(model, name.removeprefix("merged/")).detach(), merged)


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


def test_tying_a_plain_layers_weight_to_a_drop_ins() -> None:
    """As language models tie their head: the plain layer has the base, without the LoRA, as with the original."""
    table, head = lora.Embedding(10, 6, r=2), nn.Linear(6, 10, bias=False)
    twin, theirs = original.Embedding(10, 6, r=2), nn.Linear(6, 10, bias=False)
    with pytest.raises(TypeError, match="cannot assign"):
        head.weight = table.weight  # the effective weight, which is no Parameter
    table.weight = head.weight
    theirs.weight = twin.weight
    twin.load_state_dict(table.state_dict())
    for layer in (table, twin):
        with torch.no_grad():
            layer.lora_A.copy_(torch.linspace(-1, 1, 20).reshape(2, 10))
    twin.lora_B.data.copy_(table.lora_B.data)
    ids = torch.arange(10)
    for _ in range(2):
        assert_close(head(table(ids)), theirs(twin(ids)))
        with torch.no_grad():
            for weight in (head.weight, theirs.weight):
                weight.mul_(2)
    assert torch.equal(copy.deepcopy(nn.ModuleList([table, head]))[0].state_dict()["weight"], head.weight)
