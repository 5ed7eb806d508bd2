"""Files of loralib and LoRA-Torch: what they wrote loads onto plain models, and what is written loads into theirs."""

from __future__ import annotations

import pickle
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
from loraparam.formats.portable import whole
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


# --- LoRA-Torch's attention ---------------------------------------------------------------------------------------


def test_a_pair_for_some_letters() -> None:
    """Where the other rows are zero it trains on no others; where they are not, it is read as what it was."""
    A, B = torch.randn(2, 6), torch.randn(18, 2)
    sane = B.clone()
    sane[6:12] = 0
    for rows, method in ((sane, lp.BlockLoRA), (B, lp.LoRA)):
        model = nn.MultiheadAttention(6, 2)
        base = model.in_proj_weight.detach().clone()
        state = {"qv_lora_A": A, "qv_lora_B": rows}
        path = Path("pair.safetensors")
        content = _read(state, model, path)
        assert isinstance(content.items[0].method, method)
        lp.formats.attach_content(model, content, "default")
        assert_close(model.in_proj_weight, base + 1.5 * rows @ A)


def _read(state: dict[str, Tensor], model: nn.Module, path: Path) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save_file(state, Path(folder) / path)
        return lp.formats.loratorch.read(Path(folder) / path, ModelBase(model), alpha=3)


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
    (item,) = whole(content_of(layer, "default"), base)
    assert isinstance(item.method, lp.LoRA)
    assert item.layout == base.layout(item.path)
    weight = base.tensor(item.path)
    actual = item.method.apply(weight, {k: v.double() for k, v in item.factors.items()}, item.layout)
    assert_close(actual, lp.effective_weight(layer, item.path).detach())


# --- what is refused ----------------------------------------------------------------------------------------------


def model_for_errors() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 9))


GOOD = {
    "0.lora_A": torch.ones(2, 4),
    "0.lora_B": torch.ones(6, 2),
    "1.lora_A": torch.ones(4, 6),
    "1.lora_B": torch.ones(6, 2),
    "0.bias": torch.ones(6),
}
WITHOUT: Any = object()
HINTS: dict[str, Any] = {"alpha": 2, "enable_lora": [True, False, True]}

BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no alpha": ({}, {"alpha": None}, r"holds no scale, and alpha=None; give alpha="),
    "alpha of another kind": ({}, {"alpha": "2"}, r"alpha='2'; give alpha="),
    "no enable_lora": (
        {},
        {"enable_lora": None},
        r"'1\.weight': a MergedLinear, which does not say which blocks",
    ),
    "nothing enabled": ({}, {"enable_lora": [False]}, r"enable_lora=\[False\]; give it as it was"),
    "other blocks": (
        {},
        {"enable_lora": [True, True, True]},
        r"do not fit '1\.weight' of .* with enable_lora",
    ),
    "blocks that do not divide": ({}, {"enable_lora": [True, True]}, r"do not fit '1\.weight'"),
    "unknown hint": ({}, {"rank": 2}, r"unknown hint 'rank' for loralib; allowed: .*'alpha', 'enable_lora', 'prefix'"),
    "prefix": ({}, {"prefix": "net"}, r"prefix='net' selects none of '0\.lora_A'"),
    "half a pair": ({"0.lora_B": WITHOUT}, {}, r"0\.lora_B is missing"),
    "no such module": (
        {"2.lora_A": GOOD["0.lora_A"], "2.lora_B": GOOD["0.lora_B"]},
        {},
        r"is for '2\.weight'",
    ),
    "no such bias": ({"2.bias": GOOD["0.bias"]}, {}, r"replaces '2\.bias'; the model has no such parameter"),
    "a whole checkpoint": ({"0.weight": torch.ones(6, 4)}, {}, r"'0\.weight': neither a factor nor a bias; allowed"),
    "LoRA-Torch's": (
        {"0.w_lora_A": torch.ones(2, 4)},
        {},
        r"no factor of this format; allowed: 'lora_A'",
    ),
    "shapes": (
        {"0.lora_A": torch.ones(2, 5)},
        {},
        r"A \(2, 5\) and B \(6, 2\) do not fit '0\.weight'",
    ),
    "no matrix": ({"0.lora_A": torch.ones(2)}, {}, r"are no matrices"),
    "empty": ({"0.lora_A": torch.ones(0, 4), "0.lora_B": torch.ones(6, 0)}, {}, r"0\.weight.*has shape|do not fit"),
    "a bias of another shape": ({"0.bias": torch.ones(5)}, {}, r"replaces '0\.bias' by shape \(5,\)"),
    "not finite": ({"0.lora_B": torch.full((6, 2), float("nan"))}, {}, r"'0\.weight\.lora_B' holds NaN or infinity"),
    "integers": ({"0.lora_B": torch.ones(6, 2, dtype=torch.int64)}, {}, r"dtype torch\.int64; allowed: a floating"),
    "no tensor": ({"0.lora_B": [1.0]}, {}, r"'0\.lora_B': a list; allowed: a tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_not_understood_changes_nothing(case: str, tmp_path: Path) -> None:
    """Each error names the file, what was found and what is allowed."""
    changes, given, message = BAD[case]
    state = {key: value for key, value in {**GOOD, **changes}.items() if value is not WITHOUT}
    torch.save(state, tmp_path / "x.pt")
    model = model_for_errors()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(lp.FormatError, match=message):
        lp.load(model, tmp_path / "x.pt", format="loralib", **{**HINTS, **given})
    assert model.state_dict().keys() == before.keys()
    for key, value in model.state_dict().items():
        assert_close(value, before[key], rtol=0, atol=0)
    torch.save(GOOD, tmp_path / "x.pt")
    lp.load(model, tmp_path / "x.pt", format="loralib", **HINTS)


class Hostile:
    """Pickled code: unpickling it would make a file."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "code": (lambda path: torch.save({"0.lora_A": Hostile()}, path), "not a readable file of torch.save"),
    "a bare pickle": (lambda path: path.write_bytes(pickle.dumps(Hostile())), "not a readable file of torch.save"),
    "damaged": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "not a readable file of torch.save"),
    "nothing": (lambda path: path.write_bytes(b""), "not a readable file of torch.save"),
    "a list": (lambda path: torch.save([torch.ones(1)], path), "holds a list; allowed: a dict of names"),
    "an empty dict": (
        lambda path: torch.save({}, path),
        "holds a dict; allowed: .* not empty",
    ),
    "not there": (lambda path: None, "is not a file"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_of_something_else(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no code of a file is executed."""
    monkeypatch.chdir(tmp_path)
    write, message = FILES[case]
    write(tmp_path / "x.pt")
    with pytest.raises(lp.FormatError, match=message):
        lp.load(model_for_errors(), tmp_path / "x.pt", format="loralib", **HINTS)
    assert not Path("executed").exists()


def test_a_pickle_is_opened_only_where_its_format_is_named(tmp_path: Path) -> None:
    """The error says how."""
    for name in ("x.pt", "x.bin", "x.pth"):
        torch.save(GOOD, tmp_path / name)
        with pytest.raises(lp.FormatError, match="opened only where its format is named: give format="):
            lp.load(model_for_errors(), tmp_path / name, alpha=2)


def test_a_base_is_needed() -> None:
    """The file does not say what its layers are."""
    fixture = FIXTURES["loralib", "linear"]
    with pytest.raises(lp.FormatError, match="the base is needed"):
        lp.formats.loralib.read(fixture.file, None, alpha=6)


def test_a_square_table_in_a_checkpoint_could_be_either(tmp_path: Path) -> None:
    """An embedding or a linear layer: the model knows."""
    save_file({"layer.weight": torch.ones(5, 5)}, tmp_path / "base.safetensors")
    torch.save({"layer.lora_A": torch.ones(2, 5), "layer.lora_B": torch.ones(5, 2)}, tmp_path / "x.pt")
    with pytest.raises(lp.FormatError, match=r"shape \(5, 5\) does not tell an embedding from a linear layer"):
        lp.formats.loralib.read(tmp_path / "x.pt", FileBase(tmp_path / "base.safetensors"), alpha=1)


def test_the_rank_of_a_kernels_pair(tmp_path: Path) -> None:
    """It is r·k, with the scale alpha / r."""
    torch.save({"lora_A": torch.ones(4, 12), "lora_B": torch.ones(18, 4)}, tmp_path / "x.pt")
    with pytest.raises(lp.FormatError, match="4 rows of A; allowed: a multiple of the kernel's 3"):
        lp.load(nn.Conv2d(4, 6, 3), tmp_path / "x.pt", format="loralib", alpha=1)


def test_recognising_opens_no_pickle(tmp_path: Path) -> None:
    """Nor takes one format for the other."""
    for name, key in (("loralib", "0.lora_"), ("loratorch", "0.qv_lora_")):
        state = {f"{key}{side}": torch.ones(2, 2) for side in "AB"}
        torch.save(state, tmp_path / "x.pt")
        save_file(state, tmp_path / "x.safetensors")
        for format in ("loralib", "loratorch"):
            assert not lp.formats.known_format(format).recognises(tmp_path / "x.pt")
            assert lp.formats.known_format(format).recognises(tmp_path / "x.safetensors") == (format == name)


UNWRITABLE: dict[str, tuple[Any, str, str, str]] = {
    "DoRA": (lp.DoRA(r=1), "0", "loralib", r"'0\.weight': DoRA; loralib holds LoRA of"),
    "a whole weight": (lp.Full(), "0.weight", "loralib", r"'0\.weight': loralib stores low-rank factors and biases"),
    "a kernel": (
        lp.LoRA(r=1),
        "1",
        "loralib",
        r"'1\.weight': loralib has a kernel's factors in another",
    ),
    "a kernel's rank": (lp.LoRA(r=2), "4", "loralib", r"'4\.weight': .* a rank that k divides"),
    "experts": (lp.LoRA(r=1), "2.stack", "loratorch", r"'2\.stack': LoRA on a stack of matrices; loratorch holds"),
    "a bare parameter": (
        lp.LoRA(r=1),
        "2.bare",
        "loralib",
        r"'2\.bare': loralib has factors for the weight of",
    ),
    "attention's": (lp.LoRA(r=1), "3.in_proj_weight", "loralib", r"'3\.in_proj_weight': loralib has factors for"),
    "a bare parameter, LoRA-Torch": (lp.LoRA(r=1), "2.bare", "loratorch", r"'2\.bare': loratorch has factors for"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_such_files_cannot_hold(case: str, tmp_path: Path) -> None:
    """Nothing is written."""
    method, target, name, message = UNWRITABLE[case]
    model = nn.Sequential(nn.Linear(4, 6), nn.Conv2d(4, 6, 3), nn.Module(), nn.MultiheadAttention(4, 2))
    model[2].stack, model[2].bare = nn.Parameter(torch.ones(2, 4, 3)), nn.Parameter(torch.ones(4, 3))
    if target == "4":
        model.append(nn.Conv2d(4, 6, 3))
    lp.attach(model, method, target, layout={"4": lp.Layout(rows=18)} if target == "4" else None)
    with pytest.raises(lp.FormatError, match=message):
        lp.save(model, tmp_path / "x.pt", format=name)
    assert not list(tmp_path.iterdir())


def test_several_alphas(tmp_path: Path) -> None:
    """A reader gives one; so B is rescaled where it is asked for."""
    model = model_for_errors()
    lp.attach(model, {"0": lp.LoRA(r=2, alpha=4), "1": lp.LoRA(r=2, alpha=6), "0.bias": lp.Full()})
    shake(model)
    with pytest.raises(lp.FormatError, match=r"'0\.lora_A' needs alpha=4 and '1\.lora_A' alpha=6, while readers"):
        lp.save(model, tmp_path / "x.pt", format="loralib")
    with pytest.raises(lp.FormatError, match="alpha=0; allowed: a number other than 0"):
        lp.save(model, tmp_path / "x.pt", format="loralib", alpha=0)
    assert not list(tmp_path.iterdir())
    lp.save(model, tmp_path / "x.pt", format="loralib", alpha=3)
    other = model_for_errors()
    other.load_state_dict(lp.base_state_dict(model))
    plan = lp.load(other, tmp_path / "x.pt", format="loralib", alpha=3)
    assert [row.path for row in plan] == ["0.weight", "1.weight", "0.bias"]
    x = torch.randn(3, 4)
    assert_close(other(x), model(x))
