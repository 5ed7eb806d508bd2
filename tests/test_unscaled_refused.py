"""Files of loralib and LoRA-Torch that are refused, and what they cannot hold: the error says why, nothing changes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dropins import FIXTURES
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

import loraparam as lp
from loraparam.formats.bases import FileBase
from loraparam.testing.subjects import shake


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
        lp.formats.known_format("loralib").read(fixture.file, None, alpha=6)


def test_a_square_table_in_a_checkpoint_could_be_either(tmp_path: Path) -> None:
    """An embedding or a linear layer: the model knows."""
    save_file({"layer.weight": torch.ones(5, 5)}, tmp_path / "base.safetensors")
    torch.save({"layer.lora_A": torch.ones(2, 5), "layer.lora_B": torch.ones(5, 2)}, tmp_path / "x.pt")
    with pytest.raises(lp.FormatError, match=r"shape \(5, 5\) does not tell an embedding from a linear layer"):
        lp.formats.known_format("loralib").read(tmp_path / "x.pt", FileBase(tmp_path / "base.safetensors"), alpha=1)


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
    lp.attach(model, {"0": lp.LoRA(r=2, alpha=4), "1": lp.LoRA(r=2, alpha=2), "0.bias": lp.Full()})
    shake(model)
    with pytest.raises(lp.FormatError, match=r"'1\.lora_A' needs alpha=2 and '0\.lora_A' alpha=4, while readers"):
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
