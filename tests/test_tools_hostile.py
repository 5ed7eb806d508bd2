"""Damaged checkpoints and adapters given to the tools: our error and nothing written, or a result that can be read."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import adapted, content, many, save_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import loraparam as lp
from loraparam.formats import write_content
from loraparam.formats.content import Content, Item

TOOLS: dict[str, Any] = {
    "merge": lambda at: lp.merge_files(at / "base", at / "adapter", at / "out"),
    "extract": lambda at: lp.extract(at / "base", at / "tuned", at / "out", rank=1),
    "resize": lambda at: lp.resize(at / "adapter", at / "out", rank=1),
    "combine": lambda at: lp.combine([at / "adapter"], at / "out", how="ties", base=at / "base"),
    "convert": lambda at: lp.convert(at / "adapter", at / "out", to="loraparam"),
    "inspect": lambda at: lp.inspect_file(at / "adapter"),
    "verify": lambda at: lp.verify(at / "base", at / "adapter"),
}
READS = {name: ("base", "adapter") if name in ("merge", "verify", "combine") else ("adapter",) for name in TOOLS}
READS["extract"] = ("base", "tuned")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    for seed, name in enumerate(("base", "tuned")):
        save_checkpoint({k: v for k, v in many(seed=seed).state_dict().items() if "norm" not in k}, folder / name)
    lp.save(adapted(many(), {"linear": lp.LoRA(r=2), "up": lp.DoRA(r=1), "linear.bias": lp.Full()}), folder / "adapter")
    return folder


WORDS = [
    (b'"F32"', b'"I32"'),
    (b'"F32"', b'"U8"'),
    (b'"F32"', b'"BF1"'),
    (b"linear.weight", b"lineer.weight"),
    (b"linear.weight", b"../../.weight"),
    (b'"shape":[8,6]', b'"shape":[6,8]'),
    (b'"shape":[8,6]', b'"shape":[48]'),
    (b'"shape":[2,6]', b'"shape":[6,2]'),
    (b'"shape\\": [8, 6]', b'"shape\\": [6, 8]'),
    (b'"shape\\": [8, 6]', b'"shape\\": null  '),
    (b'"r\\": 2', b'"r\\": 9'),
    (b'"r\\": 2', b'"r\\": 1'),
    (b'"alpha\\": null', b'"alpha\\": 1e99'),
    (b'"LoRA', b'"Full'),
    (b"__metadata__", b"__metadatb__"),
    (b'"out\\": 0', b'"out\\": 1'),
    (b'"rows\\": null', b'"rows\\": 7'),
]


@st.composite
def damage(draw: st.DrawFn) -> Any:
    """A change of a file's bytes: flipped, cut, put in between or replaced, most often in the header."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "word", "length"]))
    where = draw(st.floats(0, 1)) ** 3  # headers come first
    value, word = draw(st.integers(0, 255)), draw(st.sampled_from(WORDS))

    def change(data: bytes) -> bytes:
        at = int(where * (len(data) - 1))
        if kind == "flip":
            return data[:at] + bytes([value]) + data[at + 1 :]
        if kind == "cut":
            return data[:at]
        if kind == "insert":
            return data[:at] + bytes([value]) * (value % 9) + data[at:]
        if kind == "length":
            length = int.from_bytes(data[:8], "little") + value - 128
            return (length % 2**64).to_bytes(8, "little") + data[8:]
        return data.replace(*word, 1)

    return change


@given(tool=st.sampled_from(sorted(TOOLS)), changes=st.lists(damage(), min_size=1, max_size=2), which=st.booleans())
def test_damaged_files(
    tmp_path_factory: pytest.TempPathFactory, place: Path, tool: str, changes: list[Any], which: bool
) -> None:
    at = tmp_path_factory.mktemp("case")
    for name, data in content(place).items():
        (at / name).write_bytes(data)
    damaged = at / READS[tool][-1 if which else 0]
    for change in changes:
        damaged.write_bytes(change(damaged.read_bytes()))
    before = content(at)
    refused = result = None
    try:
        result = TOOLS[tool](at)
    except lp.LoraparamError as error:
        refused = str(error)
    after = content(at)
    if refused is not None:
        assert after == before
        assert len(refused) < 2000
    else:
        assert json.dumps(result.as_dict())
        if out := after.pop("out", None):
            assert load_file(at / "out"), len(out)
        assert after == before


def test_undamaged_files_pass_each_tool(tmp_path: Path, place: Path) -> None:
    for tool, call in TOOLS.items():
        at = tmp_path / tool
        at.mkdir()
        for name, data in content(place).items():
            (at / name).write_bytes(data)
        assert call(at)


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool != "extract"])
@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (b'"shape":[2,6]', b'"shape":[6,2]', r"'linear.weight(.lora_A)?'.*(\(6, 2\).*\(2, 6\)|shape)"),
        (b'"shape\\": [8, 6]', b'"shape\\": [6, 8]', r"'linear.weight'.*\(6, 8\)"),
    ],
)
def test_factors_of_another_shape(tmp_path: Path, place: Path, tool: str, old: bytes, new: bytes, match: str) -> None:
    for name, data in content(place).items():
        (tmp_path / name).write_bytes(data)
    data = (tmp_path / "adapter").read_bytes()
    assert old in data
    (tmp_path / "adapter").write_bytes(data.replace(old, new, 1))
    before = content(tmp_path)
    if tool == "verify":  # which reports it
        assert any("linear.weight" in str(finding) for finding in TOOLS[tool](tmp_path).findings)
    else:
        with pytest.raises(lp.FormatError, match=match):
            TOOLS[tool](tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("value", "match"),
    [(math.nan, "holds NaN or infinity"), (torch.int64, r"has dtype torch\.int64; allowed: a floating")],
)
@pytest.mark.parametrize("key", ["linear.lora_A", "linear.lora_B", "linear.bias"])
@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool != "extract"])
def test_values_that_are_no_finite_numbers_in_a_format_without_its_own_check(
    tmp_path: Path, place: Path, tool: str, key: str, value: Any, match: str
) -> None:
    (tmp_path / "base").write_bytes((place / "base").read_bytes())
    state = {"linear.lora_A": torch.ones(2, 6), "linear.lora_B": torch.ones(8, 2), "linear.bias": torch.ones(8)}
    state[key] = state[key].to(value) if isinstance(value, torch.dtype) else state[key] * value
    torch.save(state, tmp_path / "adapter.pt")
    before, hints = content(tmp_path), {"format": "loralib", "alpha": 2}
    call: Any = {
        "merge": lambda at: lp.merge_files(at / "base", at / "adapter.pt", at / "out", **hints),
        "resize": lambda at: lp.resize(at / "adapter.pt", at / "out.pt", rank=1, base=at / "base", **hints),
        "combine": lambda at: lp.combine([at / "adapter.pt"], at / "out", base=at / "base", **hints),
        "convert": lambda at: lp.convert(at / "adapter.pt", at / "out", to="peft", base=at / "base", **hints),
        "inspect": lambda at: lp.inspect_file(at / "adapter.pt", base=at / "base", **hints),
        "verify": lambda at: lp.verify(at / "base", at / "adapter.pt", **hints),
    }[tool]
    if tool == "verify":  # which reports it
        assert re.search(match, str(call(tmp_path)))
    else:
        with pytest.raises(lp.FormatError, match=rf"'linear\.(weight\.)?{key[7:]}' {match}"):
            call(tmp_path)
    assert content(tmp_path) == before


def _low_rank(path: str, rows: int, shape: tuple[int, ...] | None = (8, 6)) -> Item:
    return Item(path, lp.LoRA(r=1), {"lora_A": torch.ones(1, 6), "lora_B": torch.ones(rows, 1)}, lp.Layout(), shape)


OVERLAPPING = {
    "the whole, then a slice": (_low_rank("linear.weight", 8), _low_rank("linear.weight[1/2]", 4)),
    "a slice, then the whole": (_low_rank("linear.weight[1/2]", 4), _low_rank("linear.weight", 8)),
    "two slices": (_low_rank("linear.weight[0:4]", 4), _low_rank("linear.weight[3:5]", 2)),
    "no known shape": (_low_rank("linear.weight", 8, None), _low_rank("linear.weight[1/2]", 4, None)),
}


@pytest.mark.parametrize("tool", [name for name, reads in READS.items() if "adapter" in reads and name != "verify"])
@pytest.mark.parametrize("case", OVERLAPPING)
def test_targets_that_share_elements(tmp_path: Path, place: Path, case: str, tool: str) -> None:
    """No model can carry such an adapter; a tool must not keep one of the two and say nothing."""
    (tmp_path / "base").symlink_to(place / "base")
    write_content(tmp_path / "adapter", Content("made", OVERLAPPING[case]), None, format="loraparam")
    with pytest.raises(lp.FormatError, match=r"targets 'linear\.weight.*' and 'linear\.weight.*' (share|are one)"):
        TOOLS[tool](tmp_path)
    assert not (tmp_path / "out").exists()


def test_slices_beside_each_other_pass(tmp_path: Path) -> None:
    items = (_low_rank("linear.weight[1/2]", 4), _low_rank("linear.weight[4:8]", 4))
    write_content(tmp_path / "adapter", Content("made", items), None, format="loraparam")
    assert len(lp.inspect_file(tmp_path / "adapter").rows) == 2
