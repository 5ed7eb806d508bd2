"""Looking into adapter files, checking them against a base, and converting them."""

import importlib
import json
import math
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import adapted, content, every_interruption, items, many, save_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import loraparam as lp
from loraparam import formats
from loraparam.formats import native, read_content
from loraparam.formats.content import Content, Item
from loraparam.tools import inspect
from loraparam.tools.fitting import base_at, change
from loraparam.tools.reports import Change, Changes


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_checkpoint(many().state_dict(), tmp_path / "base")
    lp.save(adapted(many()), tmp_path / "adapter")
    return tmp_path


# --- inspect --------------------------------------------------------------------------------------------------------


def test_every_target_is_shown_as_it_is(place: Path) -> None:
    found = lp.inspect_file(place / "adapter")
    model = many()
    plan = lp.load(model, place / "adapter")
    assert found.format == "loraparam"
    assert {row.path: (row.method, row.parameters) for row in found.rows} == {
        row.path: (type(row.method).__name__, row.num_params) for row in plan
    }
    assert found.parameters == plan.num_params
    dense = items(place / "adapter")
    for row in found.rows:
        item = dense[row.path]
        assert row.shape == item.shape
        assert row.dtype == "float32"
        if "lora_A" in item.factors:
            matrix = item.method.scale * item.factors["lora_B"].double() @ item.factors["lora_A"].double()
            S = torch.linalg.svdvals(matrix)[..., : row.rank].reshape(-1, len(row.spectrum))
            torch.testing.assert_close(torch.tensor(row.spectrum), (S**2).mean(0).sqrt().float())
            assert row.norm == pytest.approx(float(torch.linalg.vector_norm(matrix)))
            p = S / S.sum(1, keepdim=True)
            assert row.effective_rank == pytest.approx(float(torch.exp(-(p * p.log()).sum(1)).mean()))
            assert row.stable_rank == pytest.approx(float(((S**2).sum(1) / S[:, 0] ** 2).mean()))
        elif "diff" in item.factors:
            assert row.norm == pytest.approx(float(torch.linalg.vector_norm(item.factors["diff"])))
        else:
            assert (row.norm, row.spectrum) == (None, ())


def test_full_differences_have_a_spectrum_where_they_are_small_matrices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(many(), {"linear": lp.Full(), "experts.gate[1]": lp.Full(), "linear.bias": lp.Full()})
    lp.save(model, tmp_path / "adapter")
    rows = {row.path: row for row in lp.inspect_file(tmp_path / "adapter").rows}
    factors = lp.state_dict(model)
    for path in ("linear.weight", "experts.gate[1]"):
        expected = torch.linalg.svdvals(factors[f"{path}.diff"])
        torch.testing.assert_close(torch.tensor(rows[path].spectrum), expected)
    assert rows["linear.bias"].spectrum == ()
    monkeypatch.setattr(inspect, "LARGEST", 4)
    rows = {row.path: row for row in lp.inspect_file(tmp_path / "adapter").rows}
    assert (rows["linear.weight"].spectrum, rows["linear.weight"].effective_rank) == ((), None)
    assert rows["linear.weight"].norm > 0


@pytest.mark.parametrize("shape", [(4, 0), (0, 4), (0, 2, 3)])
def test_a_parameter_without_elements_has_no_spectrum(tmp_path: Path, shape: tuple[int, ...]) -> None:
    model = nn.ParameterDict({"w": torch.zeros(shape)})
    lp.attach(model, lp.Full(), "w")
    lp.save(model, tmp_path / "adapter")
    (row,) = lp.inspect_file(tmp_path / "adapter").rows
    assert (row.norm, row.spectrum, row.effective_rank) == (0.0, (), None)


def test_blocks_have_the_spectrum_of_the_whole(tmp_path: Path) -> None:
    model = adapted(many(), {"attention.in_proj_weight": lp.BlockLoRA(r=1, alpha=2, blocks=(True, False, True))})
    lp.save(model, tmp_path / "adapter")
    (row,) = lp.inspect_file(tmp_path / "adapter").rows
    (item,) = read_content(tmp_path / "adapter", None).items
    S = torch.linalg.svdvals(change(item, None))
    assert (row.method, row.rank, row.parameters) == ("BlockLoRA", 1, 2 * 6 + 2 * 6)
    torch.testing.assert_close(torch.tensor(row.spectrum, dtype=torch.float64), S[:2])


def test_the_table(tmp_path: Path) -> None:
    model = nn.Linear(8, 8)
    lp.attach(model, {"weight": lp.LoRA(r=6, alpha=12), "bias": lp.Full()})
    with torch.no_grad():
        for parameter in lp.parameters(model):
            parameter.copy_(torch.eye(*parameter.shape) if parameter.dim() > 1 else torch.ones_like(parameter))
    lp.save(model, tmp_path / "a")
    assert str(lp.inspect_file(tmp_path / "a")) == (
        f"{tmp_path / 'a'}: loraparam\n"
        "target  shape   method  r  parameters  dtype     norm  effective  stable  spectrum\n"
        "weight  (8, 8)  LoRA    6          96  float32  4.899       6.00    6.00  2 2 2 2 2 … 2\n"
        "bias    (8,)    Full    -           8  float32  2.828          -       -  -\n"
        "2 targets, 104 parameters"
    )
    json.dumps(lp.inspect_file(tmp_path / "a").as_dict(), allow_nan=False)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(place: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    inspect.plot(lp.inspect_file(place / "adapter"), place / f"out.{suffix}")
    start = (place / f"out.{suffix}").read_bytes()[:300]
    assert start.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in start or b"<?xml" in start
    with pytest.raises(lp.LoraparamError, match=r"'doc' is no kind of picture; allowed suffixes: .*png"):
        inspect.plot(lp.inspect_file(place / "adapter"), place / "out.doc")


def test_plot_without_matplotlib(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(lp.LoraparamError, match=r"a plot needs matplotlib; pip install 'loraparam\[plot\]'"):
        inspect.plot(lp.inspect_file(place / "adapter"), place / "out.png")
    assert not (place / "out.png").exists()


def test_plot_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lp.save(adapted(many(), {"linear": lp.Magnitude()}), tmp_path / "a")
    with pytest.raises(lp.LoraparamError, match="no target has a norm"):
        inspect.plot(lp.inspect_file(tmp_path / "a"), tmp_path / "out.png")


# --- verify ---------------------------------------------------------------------------------------------------------


@given(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), in_memory=st.booleans())
def test_a_good_adapter_has_no_findings(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, in_memory: bool
) -> None:
    place = tmp_path_factory.mktemp("good")
    base = many(dtype)
    save_checkpoint(base.state_dict(), place / "base", shards=2)
    lp.save(adapted(many(dtype)), place / "adapter")
    before = content(place)
    found = lp.verify(base if in_memory else place / "base", place / "adapter")
    assert found, found.findings
    assert found.checked == len(read_content(place / "adapter", None).items)
    assert found.notes == ()
    assert content(place) == before


def faulty(place: Path, targets: Any, value: float | None, model: nn.Module | None = None) -> Path:
    """An adapter, all of whose factors have this value; None leaves them as they start."""
    model = model or many()
    lp.attach(model, targets)
    if value is not None:
        with torch.no_grad():
            for factor in lp.parameters(model):
                factor.fill_(value)
    lp.save(model, place / "faulty")
    return place / "faulty"


def edit(path: Path, key: str, value: float) -> Path:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[key].reshape(-1)[0] = value
    save_file(tensors, path, metadata)
    return path


FAULTS: dict[str, tuple[Any, Any, str]] = {
    "dead LoRA": ({"linear": lp.LoRA(r=2)}, None, r"linear\.weight: dead: it changes nothing"),
    "dead DoRA": ({"linear": lp.DoRA(r=2)}, None, r"linear\.weight: dead"),
    "dead magnitude": ({"linear": lp.Magnitude()}, None, r"linear\.weight: dead"),
    "dead slice": ({"attention.in_proj_weight[q]": lp.LoRA(r=2)}, 0.0, r"in_proj_weight\[q\]: dead"),
    "dead difference": ({"norm.weight": lp.Full()}, 0.0, r"norm\.weight: dead"),
    "overflow": ({"linear": lp.LoRA(r=2)}, 2e19, r"linear\.weight: the merged weight is not finite in float32"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(place: Path, fault: str) -> None:
    targets, value, match = FAULTS[fault]
    found = lp.verify(place / "base", faulty(place, {**targets, "conv": lp.LoRA(r=1, init="gaussian")}, value))
    assert not found
    assert re.search(match, str(found))


def test_adapters_of_another_base_or_model_are_found(place: Path) -> None:
    found = lp.verify(place / "base", faulty(place, {"linear": lp.DoRA(r=1)}, 0.5, many(seed=7)))
    assert [path for path, _ in found.findings] == ["linear.weight"]
    assert "on another base weight" in found.findings[0][1]
    other = nn.ModuleDict({"linear": nn.Linear(6, 4), "gone": nn.Linear(2, 2), "conv": nn.Linear(3, 3)})
    found = lp.verify(place / "base", faulty(place, {"all-linear": lp.LoRA(r=1)}, 0.5, other))
    assert [path for path, _ in found.findings] == ["linear.weight", "gone.weight", "conv.weight"]
    assert found.checked == 0
    assert "3 found" in str(found)


def test_files_that_cannot_be_read_are_found(place: Path) -> None:
    found = lp.verify(place / "base", edit(place / "adapter", "linear.weight.lora_A", math.nan))
    assert "cannot be read: " in found.findings[0][1]
    assert "NaN" in found.findings[0][1]
    (place / "junk").write_bytes(b"junk")
    assert not lp.verify(place / "base", place / "junk")
    with pytest.raises(lp.FormatError, match="does not exist"):
        lp.verify(place / "base", place / "nothing")
    with pytest.raises(lp.FormatError, match="does not exist"):
        lp.verify(place / "nothing", place / "adapter")


def test_overlapping_slices_are_found(place: Path) -> None:
    parts = [
        Item(f"linear.weight[{rows}]", lp.LoRA(r=1), {"lora_A": torch.ones(1, 6), "lora_B": torch.ones(4, 1)})
        for rows in ("0:4", "2:6")
    ]
    native.write(place / "overlapping", Content("test", tuple(parts)), None)
    found = lp.verify(place / "base", place / "overlapping")
    assert len(found.findings) == 1
    assert "'linear.weight[0:4]' and 'linear.weight[2:6]' are one parameter" in found.findings[0][1]


def test_a_zero_base_is_no_fault_of_what_scales_it(tmp_path: Path) -> None:
    targets = {"attention.in_proj_weight": lp.IA3(), "attention.in_proj_bias": lp.IA3()}
    found = lp.verify(many(), faulty(tmp_path, targets, 2.0))
    assert found, found.findings
    assert found.notes == ("attention.in_proj_bias: the base is zero, which IA3 leaves zero",)


def test_a_change_below_rounding_is_noted(tmp_path: Path) -> None:
    base = many(torch.bfloat16)
    found = lp.verify(base, faulty(tmp_path, {"linear": lp.LoRA(r=1)}, 1e-9, many(torch.bfloat16)))
    assert found
    assert found.notes == (
        "linear.weight: all of the change is below the rounding of bfloat16; merging it has no effect",
    )


def test_a_writer_that_changes_something_is_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = importlib.import_module("loraparam.tools.verify")  # tools.verify is the function
    real = verify.write_content

    def careless(path: Path, content_: Any, *args: Any, **options: Any) -> None:
        content_.items[1].factors["lora_A"][0, 0] += 1e-6
        real(path, content_, *args, **options)
        content_.items[1].factors["lora_A"][0, 0] -= 1

    monkeypatch.setattr(verify, "write_content", careless)
    found = lp.verify(place / "base", place / "adapter")
    assert found.findings == (("linear.weight", "does not come back from a native file as it was"),)


class Halved:
    """A format that loses half of each difference."""

    NAME, HINTS, OPTIONS = "halved", (), ()
    refuses = False

    def recognises(self, path: Path) -> bool:
        return path.name == "halved"

    def read(self, path: Path, base: Any) -> Any:
        return native.read(path, base)

    def write(self, path: Path, content_: Any, base: Any) -> None:
        if self.refuses:
            raise lp.FormatError("it holds nothing of this kind")
        native.write(path, content_, base)
        if path.name == "own":
            key = next(key for key in load_file(path) if key.endswith("lora_B"))
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            tensors = load_file(path)
            tensors[key] /= 2
            save_file(tensors, path, metadata)


@pytest.mark.parametrize("refuses", [False, True])
def test_the_round_trip_in_its_own_format(place: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool) -> None:
    halved = Halved()
    halved.refuses = refuses
    monkeypatch.setattr(formats, "FORMATS", {"halved": halved, **formats.FORMATS})
    (place / "adapter").rename(place / "halved")
    found = lp.verify(place / "base", place / "halved")
    if refuses:
        assert found
        assert found.notes == ("not written back as halved: it holds nothing of this kind",)
    else:
        assert len(found.findings) == 1
        assert "comes back from a halved file changed, by" in found.findings[0][1]


# --- convert --------------------------------------------------------------------------------------------------------


def test_converting_keeps_what_an_adapter_adds(place: Path) -> None:
    done = lp.convert(place / "adapter", place / "out", to="loraparam")
    assert (done.read, done.written) == ("loraparam", "loraparam")
    assert list(done.targets) == [item.path for item in read_content(place / "adapter", None).items]
    base = base_at(place / "base")
    old, new = (read_content(place / name, base).items for name in ("adapter", "out"))
    for a, b in zip(old, new, strict=True):
        torch.testing.assert_close(change(a, base), change(b, base), rtol=0, atol=0)


def test_converting_is_whole_or_not_at_all(place: Path) -> None:
    before = content(place)
    with pytest.raises(lp.FormatError, match="unknown format 'pfet'"):
        lp.convert(place / "adapter", place / "out", to="pfet")
    with pytest.raises(lp.FormatError, match="unknown option 'sclae' for loraparam"):
        lp.convert(place / "adapter", place / "out", to="loraparam", options={"sclae": 1})
    with pytest.raises(lp.FormatError, match="exists; give another path"):
        lp.convert(place / "adapter", place / "base", to="loraparam")
    assert content(place) == before

    def check() -> None:
        assert content(place) == before

    convert = lambda: lp.convert(place / "adapter", place / "base", to="loraparam", force=True)  # noqa: E731
    assert every_interruption(convert, check) >= 2


def test_all_reports_are_json(place: Path) -> None:
    reports = [
        lp.inspect_file(place / "adapter"),
        lp.verify(place / "base", place / "adapter"),
        lp.convert(place / "adapter", place / "1", to="loraparam"),
        lp.resize(place / "adapter", place / "2", rank=1),
        lp.combine([place / "adapter"], place / "3"),
        lp.merge_files(place / "base", place / "adapter", place / "4"),
        lp.extract(place / "base", place / "4", place / "5", rank=1, full=True),
    ]
    for report in reports:
        told = json.loads(json.dumps(report.as_dict(), allow_nan=False))
        assert {field.name for field in fields(report)} <= set(told)
        assert str(report)


def test_reports_say_what_was_done_to_each_target() -> None:
    rows = (
        Change("a.weight", (4, 6), "LoRA(r=2)", 2, 1.5, 0.25, "of 3 that act"),
        Change("b.weight", None, "Full()", None, None, 0.0),
    )
    changes = Changes("out", rows, {"c.weight": "unchanged"})
    assert str(changes) == (
        "target    shape   method     rank  norm  residual\n"
        "a.weight  (4, 6)  LoRA(r=2)     2   1.5  2.50e-01\n"
        "b.weight  -       Full()        -     -  0.00e+00\n"
        "a.weight: of 3 that act\n"
        "left out c.weight: unchanged\n"
        "wrote out"
    )
    assert changes.as_dict()["left_out"] == {"c.weight": "unchanged"}
