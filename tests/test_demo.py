"""The command line, and the demo end to end on the real texts with a few steps."""

import contextlib
import dataclasses
import io
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import loraparam as lp
from loraparam.cli import COMMANDS, demo, demo_data, main
from loraparam.cli.demo_model import WINDOW, CharModel, held_out_windows, loss, measure, reproducible

STEPS = 5
LINE = re.compile(
    r"^(?P<method>\S.*?)  +(?P<trained>[\d,]+) +(?P<share>[\d.]+)% +(?P<code_before>[\d.]+) +(?P<code>[\d.]+)"
    r" +(?P<prose_before>[\d.]+) +(?P<prose>[\d.]+) +(?P<difference>\d\.\de[+-]\d\d)$",
    re.MULTILINE,
)


def run_demo(out):
    """Exit code, stdout and stderr of a short demo."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main(["demo", "--steps", str(STEPS), "--out", str(out)])
    return SimpleNamespace(code=code, stdout=stdout.getvalue(), stderr=stderr.getvalue(), out=out)


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo") / "new" / "folder")


def base_model(out):
    model = CharModel()
    model.load_state_dict(load_file(out / "base.safetensors"))
    return model


def test_demo_prints_one_true_line_per_adapter(demo_run):
    assert demo_run.code == 0
    rows = {row["method"]: row for row in LINE.finditer(demo_run.stdout)}
    assert list(rows) == ["LoRA", "DoRA", "Magnitude", "DoRA attention, Magnitude MLP"]
    base = sum(p.numel() for p in CharModel().parameters())
    # Two layers; q, v and out_proj are (96, 96), the feed-forward weights (192, 96) and (96, 192); r = 4.
    attention, feed_forward = 2 * 3 * 4 * (96 + 96), 2 * 2 * 4 * (96 + 192)
    magnitudes = 2 * 3 * 96, 2 * (96 + 192)
    trained = {
        "LoRA": attention + feed_forward,
        "DoRA": attention + feed_forward + sum(magnitudes),
        "Magnitude": sum(magnitudes),
        "DoRA attention, Magnitude MLP": attention + sum(magnitudes),
    }
    for method, row in rows.items():
        number = trained[method]
        assert row["trained"] == f"{number:,}"
        assert float(row["share"]) == pytest.approx(100 * number / (base + number), abs=0.006)
        assert float(row["prose"]) < float(row["prose_before"])
        assert float(row["difference"]) < 1e-4


def test_demo_says_what_it_checked_and_wrote(demo_run):
    assert "base restored bit for bit: yes" in demo_run.stdout
    assert "loaded back onto a fresh copy of the base: same losses" in demo_run.stdout
    assert f"saved in {demo_run.out}:" in demo_run.stdout
    assert len(demo_run.stdout.partition("Try next:\n")[2].splitlines()) == 3
    assert max(len(line) for line in demo_run.stdout.splitlines() if str(demo_run.out) not in line) <= 100
    assert "100%" in demo_run.stderr
    assert "\r" not in demo_run.stdout


@pytest.mark.parametrize("name", demo.ADAPTERS)
def test_demo_files_load_onto_the_base(demo_run, name):
    assert {path.name for path in demo_run.out.iterdir()} == {f"{n}.safetensors" for n in ["base", *demo.ADAPTERS]}
    label, methods = demo.ADAPTERS[name]
    row = next(row for row in LINE.finditer(demo_run.stdout) if row["method"] == label)
    text = demo_data.prose().held_out
    model = base_model(demo_run.out)
    assert f"{measure(model, text):.3f}" == row["prose_before"]
    lp.load(model, demo_run.out / f"{name}.safetensors")
    assert f"{measure(model, text):.3f}" == row["prose"]
    assert {type(method) for method in lp.adapters(model)["default"].values()} == set(map(type, methods.values()))


def test_demo_repeats_itself_and_leaves_the_process_alone(demo_run, tmp_path):
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    again = run_demo(tmp_path)
    assert again.stdout.replace(str(tmp_path), "") == demo_run.stdout.replace(str(demo_run.out), "")
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"restored": False}, "base restored bit for bit: NO"),
        ({"reloaded": 2.5}, "loaded back onto a fresh copy of the base: losses differ by 5.0e-01"),
    ],
)
def test_demo_fails_when_a_check_does(changes, message, tmp_path, monkeypatch, capsys):
    good = demo.Result(
        label="LoRA",
        trained=1,
        total=2,
        code=1.0,
        prose=2.0,
        difference=0.0,
        restored=True,
        file=tmp_path / "lora.safetensors",
        reloaded=2.0,
    )
    bad = iter([good, dataclasses.replace(good, **changes), good, good])
    monkeypatch.setattr(demo, "adapt", lambda *_, **__: next(bad))
    assert main(["demo", "--steps", "1", "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().out


def negative_zero(model):
    with torch.no_grad():
        model[0].bias.neg_()


def equal_parameter(model):
    model[0].bias = nn.Parameter(model[0].bias.detach().clone())


def other_flag(model):
    model[0].weight.requires_grad_(False)


def other_order(model):
    model[0].weight, weight = None, model[0].weight
    del model[0].weight
    model[0].register_parameter("weight", weight)


def other_class(model):
    model[0].__class__ = type("Linear", (nn.Linear,), {})


def more_state(model):
    model.register_buffer("extra", torch.zeros(1))


@pytest.mark.parametrize("change", [negative_zero, equal_parameter, other_flag, other_order, other_class, more_state])
def test_restored_notices(change):
    model = nn.Sequential(nn.Linear(2, 2))
    nn.init.zeros_(model[0].bias)
    base = demo._Base(model)
    assert base.is_back()
    change(model)
    assert not base.is_back()


def test_model_sees_no_later_character():
    with reproducible(0):
        model = CharModel().eval()
    text = torch.arange(WINDOW)[None]
    changed = text.clone()
    changed[:, 20:] = 0
    for mode in (contextlib.nullcontext, torch.no_grad):  # the second takes the encoder's fast path
        with mode():
            scores = model(text), model(changed)
        torch.testing.assert_close(scores[0][:, :20], scores[1][:, :20])
        assert not torch.equal(scores[0][:, 20:], scores[1][:, 20:])


def test_seed_decides_the_start():
    heads = []
    for seed in (0, 0, 1):
        with reproducible(seed):
            heads.append(CharModel().head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_held_out_windows_span_the_text():
    text = torch.arange(10 * WINDOW + 1).remainder(96).to(torch.uint8)
    found = held_out_windows(text)
    assert found.shape == (10, WINDOW + 1)
    assert torch.equal(found[0], text[: WINDOW + 1].long())
    assert torch.equal(found[-1], text[-WINDOW - 1 :].long())
    assert loss(CharModel(), found).isfinite()


def decoded(characters):
    return "".join(chr(number + 31) if number else "\n" for number in characters.tolist())


@pytest.mark.parametrize("domain", [demo_data.code, demo_data.prose])
def test_text_is_the_same_every_time(domain):
    first, second = domain(), domain()
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.held_out, second.held_out)
    assert 0 < first.documents_held_out < first.documents
    assert 0.05 < len(first.held_out) / len(first.train) < 0.3


def test_prose_held_out_is_never_trained_on():
    text = demo_data.prose()
    train, held_out = (set(decoded(part).split("\n\n")) for part in (text.train, text.held_out))
    assert len(held_out) > 100
    assert not train & held_out


def test_code_is_split_by_file_in_the_order_of_names(tmp_path):
    names = sorted(["abc", "ast", "bdb", "cmd", "csv", "dis", "glob", "gzip", "heapq"])
    for number, name in reversed(list(enumerate(names))):
        (tmp_path / f"{name}.py").write_text(f"{number}" * 10_000, encoding="utf-8")
    (tmp_path / "a_module_of_mine.py").write_text("x" * 10_000, encoding="utf-8")
    text = demo_data.code(tmp_path)
    assert (text.documents, text.documents_held_out) == (9, 2)
    assert decoded(text.held_out) == "0" * 10_000 + "\n" + "8" * 10_000
    assert decoded(text.train) == "\n".join(f"{n}" * 10_000 for n in range(1, 8))


def test_python_without_its_sources_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert re.fullmatch(r"loraparam demo: .*50,000 characters of .*found 0; .*\n", capsys.readouterr().err)


def test_python_without_its_reference_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(lp.LoraparamError, match=r"pydoc_data\.topics.*found 0"):
        demo_data.prose()


def test_out_that_is_a_file_is_said_in_one_line(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert main(["demo", "--out", str(file)]) == 2
    assert re.fullmatch(r"loraparam demo: --out '.*file': .*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--steps", "0"], "--steps: '0'; a whole number from 1 on"),
        (["demo", "--steps", "many"], "--steps: 'many'; a whole number"),
        (["demo", "--seed", str(2**63)], "--seed: '9223372036854775808'; a whole number from 0 on"),
        (["dmeo"], "invalid choice: 'dmeo'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_command_and_its_arguments(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name:<{max(map(len, COMMANDS))}}  {line}\n" in text for name, line in COMMANDS.items())
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: loraparam demo ")
    assert all(flag in text for flag in ("--seed", "--steps", "--out"))


def test_module_runs_and_imports_only_the_command_it_needs():
    code = """
import runpy, sys
sys.argv = ["loraparam", "--version"]
try:
    runpy.run_module("loraparam", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
assert not [name for name in sys.modules if name.startswith("loraparam.cli.")]
"""
    root = Path(lp.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert (result.returncode, result.stdout) == (0, f"loraparam {lp.__version__}\n"), result.stderr
