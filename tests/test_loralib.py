"""``import loraparam.loralib as lora`` beside the loralib package: the same wherever loralib is right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib as original
import pytest
import torch
from dropins import cases, input_for, moved, train
from loralib_layers import LAYERS, Model, both, make
from torch import Tensor, nn
from torch.testing import assert_close

import loraparam as lp
import loraparam.loralib as lora


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


CASES = cases("loralib")


@pytest.mark.parametrize("case", CASES)
def test_files_that_loralib_wrote(case: str) -> None:
    """Weights and outputs are what loralib made of them."""
    model = CASES[case].model(lora)
    assert_close(CASES[case].output(model), CASES[case].expected["output"])
    for name, merged in CASES[case].expected.items():
        if name.startswith("merged/"):
            assert_close(lp.effective_weight(model, name.removeprefix("merged/")).detach(), merged)


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
