"""What a training loop relies on: which factors there are, which of all parameters train, and what is left behind."""

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_plans import bits, randomize, two_layers, unchanged
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import loraparam as lp

METHODS = {"0": lp.DoRA(r=2), "1[2:3]": lp.LoRA(r=1), "1.bias": lp.Full()}
DORA_KEYS = ["0.weight.lora_A", "0.weight.lora_B", "0.weight.magnitude"]
KEYS = [*DORA_KEYS, "1.weight[2:3].lora_A", "1.weight[2:3].lora_B", "1.bias.diff"]


# --- parameters -------------------------------------------------------------------------------------------------


def test_keys_are_those_of_the_state_dict() -> None:
    model = two_layers()
    lp.attach(model, METHODS)
    named = dict(lp.named_parameters(model))
    assert list(named) == list(lp.state_dict(model)) == KEYS
    assert [id(parameter) for parameter in lp.parameters(model)] == [id(parameter) for parameter in named.values()]
    assert all(type(p) is nn.Parameter and p.requires_grad and p.is_leaf for p in named.values())


def test_with_several_adapters_keys_start_with_the_name_of_theirs() -> None:
    model = two_layers()
    lp.attach(model, METHODS, name="style")
    lp.attach(model, lp.DoRA(r=1), "0", name="task")
    every = {key: id(parameter) for key, parameter in lp.named_parameters(model)}
    assert set(every) == {*(f"style:{key}" for key in KEYS), *(f"task:{key}" for key in DORA_KEYS)}
    for name, keys in (("style", KEYS), ("task", DORA_KEYS)):
        one = {key: id(parameter) for key, parameter in lp.named_parameters(model, name)}
        assert one == {key: every[f"{name}:{key}"] for key in keys}
    assert {id(parameter) for parameter in lp.parameters(model)} == set(every.values())


def test_a_shared_factor_is_given_once() -> None:
    shared = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = shared.weight
    model = nn.Sequential(shared, shared, tied)
    lp.attach(model, lp.LoRA(r=1))
    parameters = list(lp.parameters(model))
    assert len(parameters) == len({id(parameter) for parameter in parameters}) == 2


def test_targets_may_share_a_factor(tmp_path: Path) -> None:
    """As layers that have one A between them."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lp.attach(model, lp.LoRA(r=1))
    first, second = (layer.parametrizations.weight[0].default for layer in model)
    second.lora_A = first.lora_A
    assert len(list(lp.named_parameters(model))) == 4
    torch.optim.SGD(lp.parameters(model), lr=0.1)  # which warns of duplicates
    for format in ("loraparam", "peft"):
        lp.save(nn.ModuleDict({"m": model}), tmp_path / format, format=format)
        other = nn.ModuleDict({"m": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
        lp.load(other, tmp_path / format)
        for key, factor in lp.state_dict(other).items():
            torch.testing.assert_close(factor, lp.state_dict(model)[key.removeprefix("m.")], rtol=0, atol=0)


def test_without_adapters_there_are_none() -> None:
    assert list(lp.parameters(two_layers())) == list(lp.named_parameters(two_layers())) == []
    assert lp.adapters(two_layers()) == {}


# --- optimizer groups -------------------------------------------------------------------------------------------


def test_groups_of_lora_plus() -> None:
    model = two_layers()
    lp.attach(model, METHODS, train="1.weight")
    named = dict(lp.named_parameters(model))
    groups = lp.param_groups(model, 1e-3, lr_ratio=16.0, weight_decay=0.1)
    found = {group["name"]: {id(parameter) for parameter in group["params"]} for group in groups}
    expected = {
        "base": {id(named[key]) for key in named if key.endswith("lora_A")}
        | {id(model[1].parametrizations.weight.original)},
        "fast": {id(named[key]) for key in named if key.endswith("lora_B")},
        "vectors": {id(named[key]) for key in ("0.weight.magnitude", "1.bias.diff")},
    }
    assert found == expected
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "base": (1e-3, 0.1),
        "fast": (16e-3, 0.1),
        "vectors": (1e-3, 0.0),
    }
    torch.optim.AdamW(groups).step()  # an optimizer takes them, each parameter in one group


def test_the_vectors_of_experts_are_vectors() -> None:
    model = nn.ParameterDict({"w": torch.randn(3, 4, 5)})
    lp.attach(model, lp.DoRA(r=1), "w")
    groups = {group["name"]: [p.shape for p in group["params"]] for group in lp.param_groups(model, 1e-3)}
    assert groups == {"base": [(3, 1, 5)], "fast": [(3, 4, 1)], "vectors": [(3, 4)]}


def test_groups_hold_what_trains_and_nothing_else() -> None:
    model = two_layers()
    lp.attach(model, lp.LoRA(r=1), "0")
    (group, fast) = lp.param_groups(model, 0.1)
    assert {id(p) for p in [*group["params"], *fast["params"]]} == {id(p) for p in lp.parameters(model)}
    assert group["lr"] == fast["lr"] == 0.1


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": -1.0}, {"lr": 0.1, "lr_ratio": 0.0}, {"lr": float("nan")}])
def test_learning_rates_are_positive(options: dict[str, float]) -> None:
    with pytest.raises(lp.LoraparamError, match=r"lr=.*, lr_ratio=.*; allowed: positive numbers"):
        lp.param_groups(two_layers(), **options)


# --- the summary ------------------------------------------------------------------------------------------------


def test_summary() -> None:
    model = two_layers()
    lp.attach(model, METHODS, name="style", train="0.bias")
    lp.attach(model, lp.LoRA(r=1), "0", name="task", freeze=False)
    lp.activate(model, {"style": 0.5})
    assert lp.summary(model) == (
        "adapter  target         method  shape   factors  strength\n"
        "style    0.weight       DoRA    (4, 6)       24       0.5\n"
        "task     0.weight       LoRA    (4, 6)       10         0\n"
        "style    1.weight[2:3]  LoRA    (1, 4)        5       0.5\n"
        "style    1.bias         Full    (3,)          3       0.5\n"
        "style: DoRA 24, LoRA 5, Full 3\n"
        "task: LoRA 10\n"
        "trainable 46 of 85 parameters (54.12 %)"  # 42 factors and a bias of 4, of 43 + 42
    )


def test_summary_counts_a_tied_parameter_once() -> None:
    assert lp.summary(nn.Identity()) == "no adapters\ntrainable 0 of 0 parameters (0.00 %)"
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    assert lp.summary(model) == "no adapters\ntrainable 20 of 20 parameters (100.00 %)"
    lp.attach(model, lp.LoRA(r=2), "0")
    assert lp.summary(model).splitlines()[1:] == [
        "default  0.weight  LoRA    (5, 4)       18         1",
        "default: LoRA 18",
        "trainable 18 of 38 parameters (47.37 %)",
    ]


# --- what trains and what is frozen -----------------------------------------------------------------------------


def trainable(model: nn.Module) -> set[str]:
    return {path for path, parameter in model.named_parameters() if parameter.requires_grad}


FACTORS = {f"0.parametrizations.weight.0.default.lora_{factor}" for factor in "AB"}
BASE = {"0.parametrizations.weight.original", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, set()),
        ({"train": "1.bias"}, {"1.bias"}),
        ({"train": ["1"]}, {"1.weight", "1.bias"}),
        ({"train": nn.Linear}, BASE),
        ({"freeze": False}, BASE),
    ],
)
def test_freeze_and_train(options: dict[str, Any], left: set[str]) -> None:
    model = two_layers()
    with unchanged(model):
        lp.attach(model, lp.LoRA(r=2), "0", **options)
        assert trainable(model) == left | FACTORS
        lp.attach(model, lp.LoRA(r=1), "1", name="second")
        assert all(factor.requires_grad for factor in lp.parameters(model))
        lp.detach(model)


@pytest.mark.parametrize("end", [lp.detach, lp.merge])
def test_what_the_user_had_frozen_stays_frozen(end: Callable[[nn.Module], None]) -> None:
    model = two_layers()
    model[0].requires_grad_(False)
    lp.attach(model, lp.LoRA(r=1))
    lp.attach(model, lp.LoRA(r=1), name="second")
    end(model)
    assert trainable(model) == {"1.weight", "1.bias"}


def without_bias(layer: nn.Linear) -> None:
    layer.bias = None


@pytest.mark.parametrize("end", [lp.detach, lp.merge])
@pytest.mark.parametrize(
    ("change", "left"),
    [
        (without_bias, {"1.weight"}),
        (lambda layer: prune.l1_unstructured(layer, "bias", 0.5), {"1.weight", "1.bias_orig"}),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), {"1.bias", "1.weight_orig"}),
        (weight_norm, {"1.bias", "1.parametrizations.weight.original0", "1.parametrizations.weight.original1"}),
    ],
)
def test_a_frozen_layer_that_is_changed_after_attach_gets_its_flags_back(
    change: Callable[[nn.Module], Any], left: set[str], end: Callable[[nn.Module], None]
) -> None:
    model = two_layers()
    lp.attach(model, lp.LoRA(r=1), "0")
    change(model[1])
    end(model)
    assert trainable(model) == {"0.weight", "0.bias"} | left


def test_inside_detached_and_merged_the_flags_are_the_original_ones() -> None:
    model = two_layers()
    model[0].bias.requires_grad_(False)
    lp.attach(model, lp.LoRA(r=1))
    for context in (lp.detached, lp.merged):
        with unchanged(model), context(model):
            assert trainable(model) == {"0.weight", "1.weight", "1.bias"}


# --- the base through training ----------------------------------------------------------------------------------


class Net(nn.Module):
    """A recurrent net with attention, norms with and without statistics, and an embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.BatchNorm1d(5)])
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:  # (N, 5) -> (N, 5, 7)
        x, _ = self.lstm(self.embed(tokens))
        x = x + self.attention(x, x, x)[0]
        for norm in self.norms:
            x = norm(x)
        return self.head(x)


TARGETS = {
    "embed": lp.LoRA(r=2, dropout=0.5),
    "lstm[i,f]": lp.LoRA(r=2),
    "attention[q,v]": lp.DoRA(r=2),
    "out_proj": lp.Magnitude(),
    "norms.*": lp.Full(),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> float:
    loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_the_base_is_never_written() -> None:
    model, tokens = Net(), torch.randint(7, (3, 5))
    base = {path: (id(parameter), bits(parameter)) for path, parameter in model.named_parameters()}
    lp.attach(model, TARGETS)
    optimizer = torch.optim.AdamW(lp.param_groups(model, 0.03, weight_decay=0.1))
    losses = []
    for i in range(50):
        losses.append(train(model, optimizer, tokens))
        for block in (lp.disabled, lp.merged, lp.detached):
            model.train(i % 3 == 0)
            with block(model), contextlib.nullcontext() if i % 2 else torch.no_grad():
                model(tokens)
        lp.activate(model.train(), {"default": 1.0})
    assert losses[-1] < losses[0] / 2, losses  # it did train
    lp.detach(model)
    assert {path: (id(parameter), bits(parameter)) for path, parameter in model.named_parameters()} == base


def test_an_embedding_that_renormalises_what_it_reads_does_not_write_into_the_base() -> None:
    layer, tokens = nn.Embedding(7, 4, max_norm=0.1), torch.arange(7)
    lp.attach(layer, lp.LoRA(r=2), "weight")
    with unchanged(layer):
        layer(tokens)
        with lp.disabled(layer):
            layer(tokens)
    lp.activate(layer, {})
    with unchanged(layer):
        layer(tokens)


def test_training_resumes_from_the_state_of_model_and_optimizer() -> None:
    tokens = torch.randint(7, (3, 5))
    start = {**TARGETS, "embed": lp.LoRA(r=2)}  # no dropout: the same steps need no RNG state
    torch.manual_seed(1)
    models = [Net() for _ in range(2)]
    optimizers = []
    for model in models:
        lp.attach(model, start)
        optimizers.append(torch.optim.AdamW(lp.parameters(model), lr=0.03))
    losses = [train(models[0], optimizers[0], tokens) for _ in range(3)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for _ in range(3):
        losses.append(train(models[0], optimizers[0], tokens))
        # The same steps from the same state on the same machine.
        torch.testing.assert_close(train(models[1], optimizers[1], tokens), losses[-1], rtol=0, atol=0)


# --- checkpoints are written whole or not at all ----------------------------------------------------------------


def adapted() -> nn.Sequential:
    model = two_layers()
    lp.attach(model, METHODS)
    return model


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("function", ["os.replace", "os.fsync"])
def test_an_interrupted_save_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: type[BaseException]
) -> None:
    path, model = tmp_path / "adapter.safetensors", adapted()
    lp.save(model, path)
    before = path.read_bytes()
    randomize(model)

    def fails(*args: Any) -> None:
        raise error("no space left")

    monkeypatch.setattr(function, fails)
    for target in (path, tmp_path / "new.safetensors"):
        with unchanged(model), pytest.raises(error, match="no space left"):
            lp.save(model, target)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_save_makes_folders_replaces_files_and_refuses_directories(tmp_path: Path) -> None:
    model, path = adapted(), tmp_path / "a" / "b" / "adapter.safetensors"
    lp.save(model, str(path))
    saved = lp.state_dict(model)
    randomize(model)
    lp.save(model, path)
    lp.detach(model)
    lp.load(model, path)
    assert [bits(tensor) for tensor in lp.parameters(model)] == [bits(tensor) for tensor in saved.values()]
    with pytest.raises(lp.FormatError, match=r"is a directory; allowed: the path of a file"):
        lp.save(model, tmp_path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_diverged_factors_are_not_saved(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        list(lp.parameters(model))[-1].fill_(torch.inf)
    with unchanged(model), pytest.raises(lp.StateError, match=r"'1\.bias\.diff' holds NaN or infinity"):
        lp.save(model, tmp_path / "adapter.safetensors")
    assert list(tmp_path.iterdir()) == []


# --- nothing is kept alive --------------------------------------------------------------------------------------


def check(model: nn.Module) -> None:
    lp.check(model, torch.zeros(2, 5).int())


@pytest.mark.parametrize("end", [check, lp.detach, lp.merge])
def test_a_model_with_adapters_is_freed_with_its_last_reference(end: Callable[[nn.Module], Any]) -> None:
    model, tokens = Net(), torch.randint(7, (3, 5))
    lp.attach(model, TARGETS)
    train(model, torch.optim.SGD(lp.parameters(model), lr=0.1), tokens)
    for block in (lp.disabled, lp.merged, lp.detached):
        with block(model):
            model(tokens)
    end(model)
    watched = [weakref.ref(module) for module in model.modules()]
    gc.collect()
    gc.disable()  # reference counts alone must do
    try:
        del model
        alive = [module() for module in watched if module() is not None]
    finally:
        gc.enable()
    assert alive == []
