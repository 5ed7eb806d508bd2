"""The commands on files: what they write, print and return, and that bad input writes nothing."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import adapted, content, many, save_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file

import loraparam as lp
from loraparam.cli import COMMANDS, common, main
from loraparam.formats import read_content

FILES = [name for name in COMMANDS if name != "demo"]


def run(*args: Any) -> SimpleNamespace:
    """Exit code, stdout and stderr of a command."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as error:
            code = error.code
    return SimpleNamespace(code=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base, a fine-tune of it, and two adapters."""
    save_checkpoint(many().state_dict(), tmp_path / "base", shards=2)
    save_checkpoint(
        adapted(many(), {"linear": lp.LoRA(r=2)}) and many(seed=1).state_dict(), tmp_path / "tuned", shards=1
    )
    for name, r in (("a", 2), ("b", 3)):
        model = adapted(many(), {"linear": lp.LoRA(r=r), "up": lp.LoRA(r=1)})
        lp.save(model, tmp_path / f"{name}.safetensors")
    return tmp_path


def arguments(command: str, place: Path) -> list[Any]:
    """A call of each command that works; what it writes is at ``out``."""
    a, b, out = place / "a.safetensors", place / "b.safetensors", place / "out"
    return {
        "combine": [f"{a}:0.7", f"{b}:0.3", out],
        "convert": [a, out, "--to", "loraparam"],
        "extract": [place / "base", place / "tuned", out, "--rank", 2],
        "inspect": [a],
        "merge": [place / "base", a, f"{b}:0.5", out],
        "resize": [a, out, "--energy", 0.9],
        "verify": [place / "base", a],
    }[command]


def held(path: Path) -> Any:
    """What is in an adapter or checkpoint; safetensors writes the header's metadata in any order."""
    if path.is_dir():
        return content(path)
    with safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118


WRITING = [name for name in FILES if name not in ("inspect", "verify")]


@pytest.mark.parametrize("command", FILES)
def test_it_works_and_says_what_it_did(place: Path, command: str) -> None:
    before = content(place)
    done = run(command, *arguments(command, place))
    assert (done.code, done.stderr) == (0, "")  # stderr is no terminal here: no bar
    after = content(place)
    new = {name for name in after if name not in before}
    assert {name.partition("/")[0] for name in new} == ({"out"} if command in WRITING else set())
    assert {name: after[name] for name in before} == before
    if command in WRITING:
        assert f"wrote {place / 'out'}" in done.stdout


@pytest.mark.parametrize("command", FILES)
def test_json(place: Path, command: str) -> None:
    done = run(command, *arguments(command, place), "--json")
    assert done.code == 0
    assert isinstance(json.loads(done.stdout), dict)


@pytest.mark.parametrize("command", FILES)
def test_help_shows_an_example_that_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(command, "--help")
    assert done.code == 0
    assert "exit codes: 0" in done.stdout
    examples = re.findall(rf"^  loraparam {command} (.*?)(?: &&.*)?$", done.stdout, re.MULTILINE)
    assert examples
    module = sys.modules[f"loraparam.cli.{command}"]
    seen: list[Any] = []
    monkeypatch.setattr(module, "run", lambda args: seen.append(args) or 0)
    # A format that this build lacks would be a usage error.
    for example in examples:
        if "--to peft" not in example or "peft" in common.FORMATS:
            assert run(command, *example.split()).code == 0
            assert seen


@pytest.mark.parametrize("command", FILES)
def test_bad_input_is_one_line_and_exit_code_2(place: Path, command: str) -> None:
    """Each file argument in turn is missing, junk, or a folder of nothing."""
    good = arguments(command, place)
    (place / "junk").write_bytes(b"\x07" * 40)
    (place / "hollow").mkdir()
    before = content(place)
    for i, argument in enumerate(good):
        path = Path(str(argument).removesuffix(":0.7").removesuffix(":0.3").removesuffix(":0.5"))
        for bad in ("missing", "junk", "hollow") if path.is_absolute() and path.exists() else ():
            args = [*good[:i], place / bad, *good[i + 1 :]]
            done = run(command, *args)
            # What cannot be read as an adapter is just what verify is there to find.
            expected = {1} if command == "verify" and i == 1 and bad != "missing" else {2}
            assert done.code in expected, (args, done)
            if done.code == 2:
                assert done.stderr.startswith(f"loraparam {command}: ")
                assert done.stderr.count("\n") == 1
                assert done.stdout == ""
            assert content(place) == before, args


@pytest.mark.parametrize("command", WRITING)
def test_what_is_there_is_replaced_only_by_force(place: Path, command: str) -> None:
    args = arguments(command, place)
    assert run(command, *args).code == 0
    before = content(place)
    done = run(command, *args)
    assert done.code == 2
    assert "exists; give another path" in done.stderr
    assert content(place) == before
    out = held(place / "out")
    assert run(command, *args, "--force").code == 0
    assert held(place / "out") == out


@pytest.mark.parametrize("command", WRITING)
def test_an_out_that_cannot_be_written(place: Path, command: str) -> None:
    args = [place / "a.safetensors" / "below" if arg == place / "out" else arg for arg in arguments(command, place)]
    before = content(place)
    done = run(command, *args)
    assert done.code == 2
    assert done.stderr.count("\n") == 1
    assert content(place) == before


@pytest.mark.parametrize("command", WRITING)
def test_ctrl_c_is_one_line_and_leaves_nothing(place: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    before = content(place)
    monkeypatch.setattr(os, "fsync", interrupt)
    done = run(command, *arguments(command, place))
    assert (done.code, done.stderr.count("\n"), done.stdout) == (130, 1, "")
    assert done.stderr.startswith(f"loraparam {command}: interrupted")
    assert content(place) == before


def test_nobody_reads_what_is_printed(place: Path) -> None:
    """As in ``loraparam inspect … | head``: no traceback, and the exit code of a closed pipe."""
    command = [sys.executable, "-m", "loraparam", *("inspect", str(place / "a.safetensors"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (141, b"")


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["resize", "a", "out"], "one of the arguments --rank --energy --error is required"),
        (["resize", "a", "out", "--rank", "1", "--error", "0.5"], "not allowed with argument"),
        (["extract", "base", "tuned", "out", "--rank", "two"], "invalid int value"),
        (["convert", "a", "out"], "the following arguments are required: --to"),
        (["convert", "a", "out", "--to", "onnx"], "invalid choice: 'onnx'"),
        (["combine", "a", "out", "--how", "mean"], "invalid choice: 'mean'"),
        (["merge", "base", "out"], "the following arguments are required: OUT"),
    ],
)
def test_usage_errors(args: list[str], match: str) -> None:
    done = run(*args)
    assert done.code == 2
    assert match in done.stderr


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["resize", "{a}", "{out}", "--rank", "0"], "rank=0; allowed: an integer from 1"),
        (["resize", "{a}", "{out}", "--energy", "nan"], "energy=nan; allowed: 0 < energy <= 1"),
        (["combine", "{a}:nan", "{b}", "{out}"], "weight nan; allowed: a finite number"),
        (["combine", "{a}", "{b}", "{out}", "--rank", "2"], "how='cat' keeps all of the sum"),
        (["combine", "{a}", "{out}", "--how", "ties", "--density", "2"], "density=2.0; allowed: 0 < density <= 1"),
        (["inspect", "{a}", "--hint", "alpha"], "--hint 'alpha'; allowed: KEY=VALUE"),
        (["inspect", "{a}", "--hint", "alpha=1"], "unknown hint 'alpha' for loraparam"),
        (["convert", "{a}", "{out}", "--to", "loraparam", "--option", "x=1"], "unknown option 'x' for loraparam"),
        (["merge", "{base}", "{a}", "{base}"], "is, is inside, or holds the input"),
    ],
)
def test_bad_settings(place: Path, args: list[str], match: str) -> None:
    names = {"a": place / "a.safetensors", "b": place / "b.safetensors", "base": place / "base", "out": place / "out"}
    before = content(place)
    done = run(*(arg.format(**names) for arg in args))
    assert done.code == 2
    assert match in done.stderr
    assert content(place) == before


def test_merge_is_the_library_function(place: Path) -> None:
    run("merge", *arguments("merge", place))
    lp.merge_files(place / "base", {place / "a.safetensors": 1.0, place / "b.safetensors": 0.5}, place / "expected")
    assert content(place / "out") == content(place / "expected")
    assert content(place / "out") != content(place / "base")


def test_combine_reads_weights(place: Path) -> None:
    a, b = place / "a.safetensors", place / "b.safetensors"
    run("combine", f"{a}:-0.5", b, place / "out")
    lp.combine({a: -0.5, b: 1.0}, place / "expected")
    assert held(place / "out") == held(place / "expected")
    a.rename(place / "odd:2")  # a path that exists is taken as it is written
    lp.combine({place / "odd:2": 1.0, b: 1.0}, place / "odd-expected")
    run("combine", place / "odd:2", b, place / "odd-out")
    assert held(place / "odd-out") == held(place / "odd-expected")


def test_extract_reports_what_it_leaves_out(place: Path) -> None:
    done = run("extract", place / "base", place / "tuned", place / "out", "--error", "0.3")
    assert re.search(
        r"^left out linear\.bias: changed; full=True \(--full\) keeps it whole$", done.stdout, re.MULTILINE
    )
    assert run("extract", place / "base", place / "tuned", place / "full", "--error", "0.3", "--full").code == 0
    assert "linear.bias" in {item.path for item in read_content(place / "full", None).items}
    residuals = [
        row["residual"]
        for row in json.loads(
            run("extract", place / "base", place / "tuned", place / "json", "--error", "0.3", "--json").stdout
        )["rows"]
    ]
    assert max(residuals) <= 0.3 + 1e-6


def test_verify_exits_with_1_where_something_is_wrong(place: Path) -> None:
    model = many()
    lp.attach(model, {"linear": lp.LoRA(r=1)})
    lp.save(model, place / "fresh")
    done = run("verify", place / "base", place / "fresh")
    assert (done.code, done.stderr) == (1, "")
    assert "linear.weight: dead: it changes nothing" in done.stdout
    assert json.loads(run("verify", place / "base", place / "fresh", "--json").stdout)["ok"] is False


def test_inspect_draws(place: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run("inspect", place / "a.safetensors", "--plot", place / "a.png").code == 0
    assert (place / "a.png").read_bytes().startswith(b"\x89PNG")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_shown_on_a_terminal_unless_quiet(place: Path) -> None:
    for quiet in ([], ["--quiet"]):
        stderr = Terminal()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
            assert main([str(arg) for arg in ["merge", *arguments("merge", place), "--force", *quiet]]) == 0
        assert ("merging: 100%" in stderr.getvalue()) != bool(quiet)
        assert ("merging" in stderr.getvalue()) != bool(quiet)


def test_in_a_process_of_its_own(place: Path) -> None:
    args = [str(arg) for arg in arguments("merge", place)]
    done = subprocess.run([sys.executable, "-m", "loraparam", "merge", *args], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    again = subprocess.run([sys.executable, "-m", "loraparam", "merge", *args], capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("loraparam merge: ")
    merged = {k: v for file in (place / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    assert not torch.equal(merged["linear.weight"], many().linear.weight)
