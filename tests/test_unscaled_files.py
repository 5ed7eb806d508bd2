"""Files of loralib and LoRA-Torch: what they wrote loads onto plain models, and what is written loads into theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from dropins import FIXTURES, moved
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

import loraparam as lp
import loraparam.loralib
import loraparam.loratorch
from loraparam.formats.bases import FileBase, ModelBase
from loraparam.formats.content import content_of
from loraparam.formats.portable import joined
from loraparam.testing.subjects import shake


@pytest.mark.parametrize(("name", "case"), FIXTURES)
def test_what_the_originals_wrote(name: str, case: str, tmp_path: Path) -> None:
    """Effective weights and outputs are the originals'; written again, each tensor is what it was."""
    fixture = FIXTURES[name, case]
    model = fixture.plain()
    plan = lp.load(model, fixture.file, format=name, **fixture.hints())
    for key, merged in fixture.expected.items():
        if key.startswith("merged/"):
            assert_close(lp.effective_weight(model, key.removeprefix("merged/")).detach(), merged)
    assert_close(fixture.output(model), fixture.expected["output"])
    assert {row.rule for row in plan} == {str(fixture.file)}
    for suffix in (".pt", ".safetensors"):
        lp.save(model, tmp_path / f"again{suffix}", format=name)
        other = fixture.plain()
        # safetensors is recognised by its keys.
        lp.load(other, tmp_path / f"again{suffix}", format=name if suffix == ".pt" else None, **fixture.hints())
        assert_close(fixture.output(other), fixture.output(model))
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again.keys() == fixture.state.keys()
    for key, tensor in fixture.state.items():
        assert_close(again[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "case"), FIXTURES)
def test_a_checkpoint_is_base_enough(name: str, case: str, tmp_path: Path) -> None:
    """Where no model is at hand: shapes say what the layers are, unless an embedding could be a linear layer."""
    fixture = FIXTURES[name, case]
    save_file(fixture.base, tmp_path / "base.safetensors")
    reader = lp.formats.known_format(name)
    content = reader.read(fixture.file, FileBase(tmp_path / "base.safetensors"), **fixture.hints())
    known = reader.read(fixture.file, ModelBase(fixture.plain()), **fixture.hints())
    for one, other in zip(content.items, known.items, strict=True):
        assert (one.path, one.method) == (other.path, other.method)
        if one.part is None:  # in the same layout, or with the two factors exchanged
            base = fixture.base[one.parameter]
            assert_close(*(item.method.apply(base, item.factors, item.layout) for item in (one, other)))


LAYERS: dict[str, tuple[str, dict[str, Any], Callable[[], nn.Module]]] = {
    "linear": ("Linear", {"in_features": 5, "out_features": 6, "r": 2}, lambda: nn.Linear(5, 6)),
    "a rank above both": ("Linear", {"in_features": 5, "out_features": 3, "r": 7}, lambda: nn.Linear(5, 3)),
    "merged": (
        "MergedLinear",
        {"in_features": 5, "out_features": 9, "r": 2, "enable_lora": [False, True, True]},
        lambda: nn.Linear(5, 9),
    ),
    "merged, one block, a rank above it": (
        "MergedLinear",
        {"in_features": 5, "out_features": 6, "r": 3, "enable_lora": [False, True, False]},
        lambda: nn.Linear(5, 6),
    ),
    "embedding": ("Embedding", {"num_embeddings": 5, "embedding_dim": 5, "r": 3}, lambda: nn.Embedding(5, 5)),
    "conv": (
        "Conv2d",
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "r": 2, "groups": 2},
        lambda: nn.Conv2d(4, 6, 3, groups=2),
    ),
    "conv, a rank above both": (
        "Conv2d",
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "r": 7},
        lambda: nn.Conv2d(4, 6, 3),
    ),
}
ALPHA = 5


def input_of(case: str) -> Tensor:
    name, settings, _ = LAYERS[case]
    if name == "Embedding":
        return torch.randint(settings["num_embeddings"], (4, 3))
    return torch.randn(2, 4, 6, 6) if name == "Conv2d" else torch.randn(3, settings["in_features"])


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("case", LAYERS)
def test_with_loralib_itself(case: str, bias: str, tmp_path: Path) -> None:
    """Its file onto a plain model in another place, biases included; that model's file into loralib's."""
    name, settings, make = LAYERS[case]
    theirs = nn.ModuleDict({"layer": moved(getattr(loralib, name)(**settings, lora_alpha=ALPHA), "bias")})
    inner = theirs["layer"].conv if name == "Conv2d" else theirs["layer"]
    model = nn.ModuleDict({"net": nn.ModuleDict({"layer": make()})})
    model["net"]["layer"].load_state_dict({k: v for k, v in inner.state_dict().items() if "lora_" not in k})
    if bias == "all" and name != "Embedding":
        nn.init.zeros_(model["net"]["layer"].bias)
    state = loralib.lora_state_dict(theirs, bias=bias)
    torch.save({f"old.{key}": value for key, value in state.items()}, tmp_path / "theirs.pt")
    given = {"alpha": ALPHA, "enable_lora": settings.get("enable_lora")}
    plan = lp.load(model, tmp_path / "theirs.pt", format="loralib", prefix={"old": "net"}, **given)
    replaced = [row.path for row in plan if isinstance(row.method, lp.Full)]
    assert replaced == (["net.layer.bias"] if bias == "all" and name != "Embedding" else [])
    x = input_of(case)
    assert_close(model["net"]["layer"](x), theirs["layer"](x))
    shake(model)
    lp.save(model["net"], tmp_path / "ours.pt", format="loralib")
    ours = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert ours.keys() == state.keys()
    if "above" not in case:  # a pair of a higher rank than LoRA's largest comes back in that
        assert theirs.load_state_dict(ours, strict=False).unexpected_keys == []
        assert_close(theirs["layer"](x), model["net"]["layer"](x), rtol=1e-4, atol=1e-4)  # float32, another order


@pytest.mark.parametrize("library", [loraparam.loralib, loraparam.loratorch], ids=["loralib", "loratorch"])
def test_drop_in_models_save_what_lora_state_dict_gives(library: Any, tmp_path: Path) -> None:
    """Every layer of the drop-ins, stacked factors and high ranks included."""
    layers: dict[str, nn.Module] = {
        case.replace(" ", "_"): getattr(library, name)(**settings, lora_alpha=ALPHA)
        for case, (name, settings, _) in LAYERS.items()
    }
    if library is loraparam.loratorch:
        for letters in ("qkvo", "qv", "k"):
            layers[letters] = library.MultiheadAttention(6, 2, list(letters), r=2, lora_alpha=ALPHA)
        layers["kdim"] = library.MultiheadAttention(6, 2, r=2, lora_alpha=ALPHA, kdim=3)
    model = moved(nn.ModuleDict(layers))
    name = library.__name__.rpartition(".")[2]
    lp.save(model, tmp_path / "x.pt", format=name)
    expected = library.lora_state_dict(model)
    for stem in ("qv", "k"):  # the rows that do not act are zero, for LoRA-Torch lets all rows act
        if f"{stem}.{stem}_lora_B" in expected:
            on = torch.tensor([letter in stem for letter in "qkv"]).repeat_interleave(6)
            expected[f"{stem}.{stem}_lora_B"] = expected[f"{stem}.{stem}_lora_B"] * on[:, None]
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_close(state[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("format", ["loralib", "loratorch"])
@pytest.mark.parametrize("name", ["adapter", "adapter.bin", "adapter.safetensors"])
def test_what_is_saved_under_any_name_is_read(format: str, name: str, tmp_path: Path) -> None:
    model, other = (nn.Sequential(nn.Linear(4, 6)) for _ in range(2))
    lp.attach(model, lp.LoRA(r=2, alpha=3))
    shake(model)
    lp.save(model, tmp_path / name, format=format)
    lp.load(other, tmp_path / name, format=format, alpha=3)
    for key, factor in lp.state_dict(model).items():
        assert_close(lp.state_dict(other)[key], factor, rtol=0, atol=0)


SLICED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "projections": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight[q,v]", "loratorch"),
    "rows": (lambda: nn.Linear(4, 6), "weight[1:3,4:6]", "loralib"),
}


@pytest.mark.parametrize("case", SLICED)
def test_slices_in_one_pair_say_which_alpha_they_need(case: str, tmp_path: Path) -> None:
    """A file holds none, and who reads it would give that of the training."""
    make, targets, format = SLICED[case]
    model = make()
    (path,) = {row.path.partition("[")[0] for row in lp.attach(model, lp.LoRA(r=1, alpha=3), targets)}
    shake(model)
    delta = lp.effective_weight(model, path) - lp.base_state_dict(model)[path]
    with pytest.warns(UserWarning, match=rf"'{path}': .* read with alpha=2, where it was trained with 3; give alpha="):
        lp.save(model, tmp_path / "told.pt", format=format)
    lp.save(model, tmp_path / "chosen.pt", format=format, alpha=3)
    for file, alpha in (("told.pt", 2), ("chosen.pt", 3)):
        other = make()
        lp.load(other, tmp_path / file, format=format, alpha=alpha)
        assert_close(lp.effective_weight(other, path) - lp.base_state_dict(other)[path], delta, rtol=1e-5, atol=1e-6)


# --- LoRA-Torch's attention ---------------------------------------------------------------------------------------


def test_a_pair_for_some_letters(tmp_path: Path) -> None:
    """Where the other rows are zero it trains on no others; where they are not, it is read as what it was."""
    A, B = torch.randn(2, 6), torch.randn(18, 2)
    sane = B.clone()
    sane[6:12] = 0
    for rows, method in ((sane, lp.BlockLoRA), (B, lp.LoRA)):
        model = nn.MultiheadAttention(6, 2)
        base = model.in_proj_weight.detach().clone()
        save_file({"qv_lora_A": A, "qv_lora_B": rows}, tmp_path / "pair.safetensors")
        (row,) = lp.load(model, tmp_path / "pair.safetensors", format="loratorch", alpha=3)
        assert isinstance(row.method, method)
        assert_close(model.in_proj_weight, base + 1.5 * rows @ A)


def test_where_a_convolution_has_its_factors(tmp_path: Path) -> None:
    """On itself, or, where it stands alone as in loralib's layers, one module further up; read at both places."""
    block = nn.Sequential()
    block.conv, block.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    alone = nn.Sequential()
    alone.conv = nn.Conv2d(4, 6, 3)
    model = nn.ModuleDict({"block": block, "alone": alone, "last": nn.Conv2d(4, 6, 3)})
    lp.attach(
        model, {nn.Conv2d: lp.LoRA(r=3), "bias": lp.Full()}, layout={nn.Conv2d: lp.Layout(rows=18)}, exclude="norm"
    )
    lp.save(model, tmp_path / "x.pt", format="loralib")
    keys = set(torch.load(tmp_path / "x.pt", weights_only=True))
    factors = {f"{path}lora_{side}" for path in ("block.conv.", "alone.", "last.") for side in "AB"}
    assert keys == factors | {"block.conv.conv.bias", "alone.conv.bias", "last.conv.bias"}
    lp.detach(model)
    plan = lp.load(model, tmp_path / "x.pt", format="loralib", alpha=1)
    assert len(plan) == 6


def test_what_is_no_layer_like_loralibs(tmp_path: Path) -> None:
    """A convolution called conv, beside other modules or parameters, has its factors on itself."""
    with_module, with_parameter = nn.Sequential(), nn.Sequential()
    with_module.conv, with_module.relu = nn.Conv2d(4, 6, 3), nn.ReLU()
    with_parameter.conv = nn.Conv2d(4, 6, 3)
    with_parameter.scale = nn.Parameter(torch.ones(()))
    model = nn.ModuleDict({"a": with_module, "b": with_parameter})
    lp.attach(model, lp.LoRA(r=3), nn.Conv2d, layout=lp.Layout(rows=18), exclude="scale")
    lp.save(model, tmp_path / "x.pt", format="loralib")
    keys = [f"{path}.conv.lora_{side}" for path in "ab" for side in "AB"]
    assert list(torch.load(tmp_path / "x.pt", weights_only=True)) == keys


FACTORS: dict[str, tuple[str, Callable[[], nn.Module], dict[str, lp.Method]]] = {
    "slices with ranks of their own": (
        "loralib",
        lambda: nn.Linear(6, 9),
        {"weight[1/3]": lp.LoRA(r=2, alpha=4), "weight[3/3]": lp.LoRA(r=1, alpha=3)},
    ),
    "slices with scales of their own": (
        "loralib",
        lambda: nn.Linear(6, 9),
        {"weight[1/3]": lp.LoRA(r=2, alpha=4), "weight[3/3]": lp.LoRA(r=2, alpha=3)},
    ),
    "slices of other sizes": (
        "loratorch",
        lambda: nn.Linear(6, 9),
        {"weight[1/9]": lp.LoRA(r=1), "weight[2:9]": lp.LoRA(r=2)},
    ),
    "equal slices": (
        "loratorch",
        lambda: nn.Linear(6, 9),
        {"weight[3/3]": lp.LoRA(r=2, alpha=4), "weight[1/3]": lp.LoRA(r=2, alpha=4)},
    ),
    "blocks that share A": (
        "loralib",
        lambda: nn.Linear(6, 9),
        {"weight": lp.BlockLoRA(r=2, alpha=4, blocks=(True, False, True), shared=True)},
    ),
    "blocks of attention": (
        "loratorch",
        lambda: nn.MultiheadAttention(6, 2),
        {"in_proj_weight": lp.BlockLoRA(r=2, alpha=4, blocks=(True, False, True))},
    ),
    "equal slices of attention": (
        "loratorch",
        lambda: nn.MultiheadAttention(6, 2),
        {"in_proj_weight[1/3]": lp.LoRA(r=2, alpha=4), "in_proj_weight[3/3]": lp.LoRA(r=2, alpha=4)},
    ),
    "an embedding": ("loratorch", lambda: nn.Embedding(9, 4), {"weight": lp.LoRA(r=2, alpha=4)}),
    "an embedding of loralib's": ("loralib", lambda: nn.Embedding(9, 4), {"weight": lp.LoRA(r=2, alpha=4)}),
}


@pytest.mark.parametrize("case", FACTORS)
def test_what_is_written_is_read_as_the_same_update(case: str, tmp_path: Path) -> None:
    """However the factors have to be put together for it."""
    name, make, methods = FACTORS[case]
    model, other = make(), make()
    lp.attach(model, methods)
    shake(model)
    lp.save(model, tmp_path / "x.pt", format=name, alpha=2)
    other.load_state_dict(lp.base_state_dict(model))
    plan = lp.load(other, tmp_path / "x.pt", format=name, alpha=2, enable_lora=[True, False, True])
    path = next(iter(methods)).partition("[")[0]
    assert_close(lp.effective_weight(other, path), lp.effective_weight(model, path))
    assert len(plan) == (2 if case == "equal slices" else 1)


@pytest.mark.parametrize("name", ["loralib", "loratorch"])
def test_a_table_of_either_library_goes_into_files_of_both(name: str, tmp_path: Path) -> None:
    """The two store an embedding's factors transposed to each other."""
    for library in (loraparam.loralib, loraparam.loratorch):
        model = moved(library.Embedding(9, 4, r=2, lora_alpha=3))
        lp.save(model, tmp_path / "x.pt", format=name)
        state = torch.load(tmp_path / "x.pt", weights_only=True)
        sizes = {"lora_A": (2, 9), "lora_B": (4, 2)} if name == "loralib" else {"w_lora_A": (2, 4), "w_lora_B": (9, 2)}
        assert {key: tuple(t.shape) for key, t in state.items()} == sizes
        other = nn.Embedding(9, 4)
        other.load_state_dict(lp.base_state_dict(model))
        lp.load(other, tmp_path / "x.pt", format=name, alpha=3)
        assert_close(lp.effective_weight(other, "weight"), lp.effective_weight(model, "weight"))


def test_onto_a_layer_that_stores_its_weight_transposed(tmp_path: Path) -> None:
    """fan_in_fan_out, also where the weight is square and does not show it."""
    theirs = moved(loralib.Linear(5, 5, r=2, fan_in_fan_out=True))
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "x.pt")
    layer = loraparam.loralib.Linear(5, 5, fan_in_fan_out=True)
    layer.load_state_dict({key: value for key, value in theirs.state_dict().items() if "lora_" not in key})
    lp.load(layer, tmp_path / "x.pt", format="loralib", alpha=1)
    x = torch.randn(3, 5)
    assert_close(layer(x), theirs(x))


def test_a_fresh_pair_has_the_letters_that_are_enabled(tmp_path: Path) -> None:
    """B is zero then, and does not show them."""
    lp.save(loraparam.loratorch.MultiheadAttention(6, 2, ["q", "v"], r=2), tmp_path / "x.pt", format="loratorch")
    assert list(torch.load(tmp_path / "x.pt", weights_only=True)) == ["qv_lora_A", "qv_lora_B"]


def test_slices_of_attention_become_one_pair(tmp_path: Path) -> None:
    """Named by the letters it acts on; the ranks add up."""
    model = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    lp.attach(model, {"in_proj_weight[q,v]": lp.LoRA(r=2, alpha=3), "out_proj": lp.LoRA(r=2, alpha=4)})
    shake(model)
    lp.save(model, tmp_path / "x.pt", format="loratorch", alpha=4)
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    assert {key: tuple(t.shape) for key, t in state.items()} == {
        "self_attn.qv_lora_A": (4, 6),
        "self_attn.qv_lora_B": (18, 4),
        "self_attn.o_lora_A": (2, 6),
        "self_attn.o_lora_B": (6, 2),
    }
    other = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    other.load_state_dict(lp.base_state_dict(model))
    lp.load(other, tmp_path / "x.pt", format="loratorch", alpha=4)
    x = torch.randn(2, 3, 6)
    assert_close(other.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)  # float32, B rescaled


def test_the_pair_that_never_acts(tmp_path: Path) -> None:
    """Zeros that LoRA-Torch keeps where only o is enabled; anything else under that name is not understood."""
    model = nn.MultiheadAttention(6, 2)
    state = loraparam.loratorch.lora_state_dict(loraparam.loratorch.MultiheadAttention(6, 2, ["o"], r=2))
    torch.save(state, tmp_path / "x.pt")
    assert [row.path for row in lp.load(model, tmp_path / "x.pt", format="loratorch", alpha=1)] == ["out_proj.weight"]
    torch.save({key: torch.ones_like(value) for key, value in state.items()}, tmp_path / "x.pt")
    with pytest.raises(lp.FormatError, match="'_lora_A' and B of '' are not zero"):
        lp.load(nn.MultiheadAttention(6, 2), tmp_path / "x.pt", format="loratorch", alpha=1)


# --- what other formats make of it --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LAYERS)
def test_in_plain_factors(case: str) -> None:
    """Other tools' formats get stacked blocks, and pairs on flat kernels, as one pair of the same update."""
    name, settings, _ = LAYERS[case]
    layer = moved(getattr(loraparam.loralib, name)(**settings, lora_alpha=ALPHA)).double()
    base = ModelBase(layer)
    (item,) = joined(content_of(layer, "default"), base)
    assert isinstance(item.method, lp.LoRA)
    assert item.layout == base.layout(item.path)
    weight = base.tensor(item.path)
    actual = item.method.apply(weight, {k: v.double() for k, v in item.factors.items()}, item.layout)
    assert_close(actual, lp.effective_weight(layer, item.path).detach())
