"""The tools on files that other libraries wrote: what these computed from them is what comes out."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import adapted, content
from diffusion_files import CASES
from diffusion_files import case as diffusion_case
from dropins import FIXTURES
from peft_files import DATA, MALFORMED, Case, case
from safetensors.torch import load_file, save_file
from test_kohya_read import READ as KOHYA
from test_peft_read import READ
from torch import Tensor

import loraparam as lp
from loraparam.cli import main


def merged_by(folder: Path, adapter: Path, out: Path) -> dict[str, Tensor]:
    lp.merge_files(folder / "base.safetensors", adapter, out)
    return load_file(out)


@pytest.mark.parametrize("name", READ)
def test_merging_gives_what_peft_merges(name: str, tmp_path: Path) -> None:
    subject = case(name)
    found = merged_by(subject.folder, subject.folder, tmp_path / "out")
    base = load_file(subject.folder / "base.safetensors")
    for path, value in base.items():
        expected = subject.merged.get(path, value)
        torch.testing.assert_close(found[path], expected, rtol=1e-5, atol=1e-6, msg=path)
    assert set(found) == set(base)


def gives_what_peft_merges(subject: Case, adapter: Path, out: Path) -> None:
    found = merged_by(subject.folder, adapter, out)
    for path, value in subject.merged.items():
        torch.testing.assert_close(found[path], value, rtol=1e-5, atol=1e-6)


def to_native(subject: Case, folder: Path) -> None:
    """The fixture as the folder's "native", which means the same."""
    lp.convert(subject.folder, folder / "native", to="loraparam", base=subject.folder / "base.safetensors")
    gives_what_peft_merges(subject, folder / "native", folder / "merged")


# What this product adds is read as a difference, which PEFT keeps only beside a LoRA.
DIFFERENCES = ("loha_linear",)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_products_become_differences_that_peft_has_no_place_for(name: str, tmp_path: Path) -> None:
    subject = case(name)
    to_native(subject, tmp_path)
    with pytest.raises(lp.FormatError, match="adapts no layer: PEFT needs at least one LoRA"):
        lp.convert(tmp_path / "native", tmp_path / "peft", to="peft", base=subject.model())
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("name", [name for name in READ if name not in DIFFERENCES])
def test_converting_to_the_native_format_and_back_keeps_the_weights(name: str, tmp_path: Path) -> None:
    subject = case(name)
    to_native(subject, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what PEFT's own forward does with the file
        lp.convert(tmp_path / "native", tmp_path / "peft", to="peft", base=subject.model())
    gives_what_peft_merges(subject, tmp_path / "peft", tmp_path / "again")


@pytest.mark.parametrize("name", READ)
def test_they_verify_and_can_be_looked_into(name: str) -> None:
    subject = case(name)
    found = lp.verify(subject.folder / "base.safetensors", subject.folder)
    assert found, found.findings
    assert found.checked == len(subject.merged)
    looked = lp.inspect_file(subject.folder, base=subject.folder / "base.safetensors")
    assert {row.path for row in looked.rows} | set(looked.replaced) == set(subject.merged)


RANKED = [name for name in READ if name.startswith(("lora", "dora"))]


@pytest.mark.parametrize("name", RANKED)
def test_resizing_in_their_own_format(name: str, tmp_path: Path) -> None:
    subject = case(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        done = lp.resize(subject.folder, tmp_path / "same", error=1e-6, base=subject.model())
        lp.resize(subject.folder, tmp_path / "one", rank=1, base=subject.model())
    assert max(row.residual for row in done.rows) < 2e-6
    found = merged_by(subject.folder, tmp_path / "same", tmp_path / "out")
    for path, value in subject.merged.items():
        torch.testing.assert_close(found[path], value, rtol=1e-4, atol=1e-5)
    one = lp.inspect_file(tmp_path / "one", base=subject.model())
    assert {row.rank for row in one.rows} <= {1, None}


# --- kohya, LyCORIS, diffusers, loralib and LoRA-Torch ----------------------------------------------------------


@dataclass(frozen=True)
class Foreign:
    """A file of another tool: its base, what its format needs to be told, and the weights that must come out."""

    base: dict[str, Tensor]
    file: Path
    format: str
    hints: dict[str, Any]
    wanted: dict[str, Tensor]

    def merged(self, folder: Path, adapter: Path, **hints: Any) -> dict[str, Tensor]:
        """What merging an adapter into the base gives."""
        save_file(self.base, folder / "base")
        lp.merge_files(folder / "base", adapter, folder / "merged", force=True, **hints)
        return load_file(folder / "merged")


def _foreign() -> dict[str, Foreign]:
    found = {}
    for name in [*KOHYA, *(name for name in CASES if name.startswith("diffusers/"))]:
        subject = diffusion_case(name)
        alphas = subject.spec.get("network_alphas")
        hints = {} if alphas is None else {"alpha": alphas}
        format = "diffusers" if name.startswith("diffusers/") else "kohya"
        found[name] = Foreign(load_file(subject.base_file), subject.file, format, hints, subject.wanted())
    for (format, name), fixture in FIXTURES.items():
        start = "merged/"
        wanted = {key[len(start) :]: value for key, value in fixture.expected.items() if key.startswith(start)}
        found[f"{format}/{name}"] = Foreign(fixture.base, fixture.file, format, fixture.hints(), wanted)
    return found


FOREIGN = _foreign()


def check(found: dict[str, Tensor], subject: Foreign, rtol: float = 1e-5) -> None:
    assert found.keys() == subject.base.keys()
    for path, value in subject.wanted.items():
        torch.testing.assert_close(found[path], value.to(found[path]), rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("name", FOREIGN)
def test_merging_gives_what_the_other_tool_merges(name: str, tmp_path: Path) -> None:
    subject = FOREIGN[name]
    check(subject.merged(tmp_path, subject.file, format=subject.format, **subject.hints), subject)


@pytest.mark.parametrize("name", FOREIGN)
def test_converted_to_the_native_format_they_mean_the_same(name: str, tmp_path: Path) -> None:
    subject = FOREIGN[name]
    save_file(subject.base, tmp_path / "base")
    options = {"base": tmp_path / "base", "format": subject.format, **subject.hints}
    lp.convert(subject.file, tmp_path / "native", to="loraparam", **options)
    check(subject.merged(tmp_path, tmp_path / "native"), subject)


@pytest.mark.parametrize("name", [name for name in FOREIGN if name != "lycoris/full"])  # which has no pair
def test_resized_in_their_own_format_to_what_they_hold(name: str, tmp_path: Path) -> None:
    """alpha, which some of the files do not say, means the same for the new one."""
    subject = FOREIGN[name]
    save_file(subject.base, tmp_path / "base")
    out = tmp_path / f"same{subject.file.suffix}"
    options = {"base": tmp_path / "base", "format": subject.format, **subject.hints}
    done = lp.resize(subject.file, out, error=1e-6, **options)
    assert max(row.residual for row in done.rows) < 2e-6
    hints = {} if subject.format == "diffusers" else subject.hints  # which has no alphas now
    check(subject.merged(tmp_path, out, format=subject.format, **hints), subject, rtol=1e-4)


@pytest.mark.parametrize("name", FOREIGN)
def test_they_verify(name: str, tmp_path: Path) -> None:
    subject = FOREIGN[name]
    save_file(subject.base, tmp_path / "base")
    found = lp.verify(tmp_path / "base", subject.file, format=subject.format, **subject.hints)
    assert found, found.findings
    assert found.checked >= len(subject.wanted) - 1


# --- broken files -----------------------------------------------------------------------------------------------

BROKEN = sorted(set(MALFORMED) - {"redos_target_modules"})  # which is harmless where no pattern of a file is run


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("command", ["inspect", "merge", "resize", "convert", "combine", "verify"])
def test_malformed_files_are_refused_in_one_line(
    name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, base, out = DATA / "malformed" / name, DATA / "peft" / "lora_linear" / "base.safetensors", tmp_path / "out"
    args: list[Any] = {
        "inspect": [broken, "--base", base],
        "merge": [base, broken, out],
        "resize": [broken, out, "--rank", 1, "--base", base],
        "convert": [broken, out, "--to", "loraparam", "--base", base],
        "combine": [broken, out, "--base", base],
        "verify": [base, broken],
    }[command]
    before = content(DATA / "malformed")
    code = main([command, *map(str, args)])
    printed = capsys.readouterr()
    if command == "verify" and code == 1:
        assert "1 found" in printed.out
    else:
        assert code == 2
        assert printed.out == ""
        assert printed.err.count("\n") == 1
    assert content(DATA / "malformed") == before
    assert list(tmp_path.iterdir()) == []


def test_what_a_writer_warns_of_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(4, 2)})
    lp.save(adapted(model, {"attention": lp.LoRA(r=1)}), tmp_path / "native")
    lp.detach(model)
    save_file(model.state_dict(), tmp_path / "base")
    args = ["convert", tmp_path / "native", tmp_path / "peft", "--to", "peft", "--base", tmp_path / "base"]
    assert main([str(arg) for arg in args]) == 0
    error = capsys.readouterr().err
    assert error.startswith("loraparam convert: warning: 'attention.out_proj.weight': PEFT up to 0.21.2")
    assert error.count("\n") == 1
    found = lp.verify(model, tmp_path / "peft")
    assert found
    assert [note for note in found.notes if note.startswith("writing peft: 'attention.out_proj.weight': PEFT up to")]
