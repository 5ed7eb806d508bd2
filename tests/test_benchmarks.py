"""The benchmark runs, in tiny sizes: what it counts is asserted, what it times is not."""

import contextlib
import importlib
import io
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]

# What loraparam runs on the parts of a weight, so that nothing as large as the weight is made.
LINEAR = ("llama 64×37", "encoder", "gpt-2", "tied head")
EXPERTS = ("mixtral eager", "mixtral grouped_mm", "mixtral batched_mm")
NAMES = (*LINEAR, "convolutions", *EXPERTS)
OURS = ("LoRA", "LoRA merged", "full", "DoRA", "after merge")

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed")


@pytest.fixture(scope="module")
def benchmarks():
    """The modules of the benchmark, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        names = ("cases", "execution", "measures", "overhead", "report", "variants")
        yield {name: importlib.import_module(f"benchmarks.{name}") for name in names}


def run(benchmarks, *arguments):
    """What the program returns, and what it prints."""
    printed, threads = io.StringIO(), torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(printed):
            result = benchmarks["execution"].main(["--tiny", *arguments])
    finally:
        torch.set_num_threads(threads)
    return result, printed.getvalue()


@pytest.fixture(scope="module")
def measured(benchmarks, tmp_path_factory):
    """A whole run: (result, what it printed)."""
    file = tmp_path_factory.mktemp("benchmark") / "result.json"
    result, printed = run(benchmarks, "--steps", "2", "--threads", "1", "--json", str(file))
    assert json.loads(file.read_text(encoding="utf-8")) == result
    return result, printed


def by_name(result):
    return {case["name"]: case for case in result["cases"]}


# --- a whole run ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_transformers
class TestRun:
    def test_every_case_is_measured(self, measured, benchmarks):
        result, _ = measured
        assert tuple(case.name for case in benchmarks["cases"].cases(tiny=True)) == NAMES
        assert tuple(by_name(result)) == tuple(result["temporaries"]) == NAMES
        for case in result["cases"]:
            assert set(OURS) <= set(case["ratios"])
            assert case["floor_ms"] > 0
            assert 1 < case["limits"]["LoRA"] < case["limits"]["DoRA"] < 2
            for ratio in [*case["ratios"].values(), *case["over"].values()]:
                assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]

    def test_every_peer_is_measured_or_named_as_skipped(self, measured):
        result, printed = measured
        for name, case in by_name(result).items():
            for peer in ("PEFT LoRA", "PEFT DoRA"):
                assert (peer in case["ratios"]) != (peer in result["skipped"].get(name, {}))
        for name, gaps in result["skipped"].items():
            for peer, reason in gaps.items():
                assert f"- {name}, {peer}: {reason}" in printed

    def test_tables_have_a_row_for_each_case(self, measured):
        _, printed = measured
        for name in NAMES:
            rows = [line for line in printed.splitlines() if line.startswith(f"| {name} |")]
            assert len(rows) == 3  # times, bytes saved, full-size tensors

    @pytest.mark.parametrize("name", LINEAR + EXPERTS)
    def test_lora_makes_no_full_size_tensor(self, measured, name):
        made = measured[0]["temporaries"][name]
        assert made["LoRA"] == {}
        assert made["frozen"] == {}
        for dense in ("LoRA merged", "full"):  # the counter sees them where they are
            assert sum(made[dense].values()) > 0

    @needs_peft
    @pytest.mark.parametrize("name", NAMES)
    def test_lora_saves_no_more_than_peft(self, measured, name):
        saved = by_name(measured[0])[name]["saved"]
        assert saved["frozen"] < saved["LoRA"] <= saved["PEFT LoRA"]

    @needs_peft
    def test_peft_computes_the_same(self, measured):
        for name, case in by_name(measured[0]).items():
            assert "PEFT LoRA" in case["agreement"], name
            assert all(far < 1e-4 for peer, far in case["agreement"].items() if peer not in case["differs"])


# --- its parts ------------------------------------------------------------------------------------------------------


def test_missing_peers_are_named(benchmarks, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    result, printed = run(benchmarks, "--steps", "1", "--only", "encoder")
    reason = "'peft' is not installed"
    assert result["skipped"] == {"encoder": {"PEFT LoRA": reason, "PEFT DoRA": reason}}
    assert f"- encoder, PEFT LoRA: {reason}" in printed
    assert set(OURS) == set(by_name(result)["encoder"]["ratios"])


def test_missing_transformers_are_named(benchmarks, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    result, printed = run(benchmarks, "--steps", "1", "--only", "gpt-2", "temporaries")
    assert result["cases"] == []
    assert "- gpt-2, all: 'transformers' is not installed" in printed
    assert "gpt-2" not in result["temporaries"]
    assert "encoder" in result["temporaries"]


def test_overhead_is_measured_with_and_without_grad(benchmarks):
    result, printed = run(benchmarks, "--only", "overhead", "--cpu-time")
    assert list(result["overhead"]) == ["without grad", "with grad", "forward and backward"]
    for spent in result["overhead"].values():
        assert {"plain", "LoRA", "LoRA merged", "DoRA"} <= set(spent)
        assert spent["plain"] > 0
    assert "| with grad |" in printed


def test_limit_is_that_of_the_layer(benchmarks):
    assert benchmarks["variants"].limits(benchmarks["overhead"].layer()).step["LoRA"] == 1 + 1.5 * 8 * (64 + 64) / (
        64 * 64
    )


def test_counter_sees_new_tensors_but_no_views_and_no_writes(benchmarks):
    x = torch.randn(4, 6)
    with benchmarks["measures"].Temporaries({(4, 6), (6, 4)}) as counter:
        x.t().add_(1)
        x.view(2, 12).view(4, 6)
        torch.add(x, 1, out=torch.randn(4, 5).resize_(4, 6))
        assert set(counter.made) <= {"aten.resize_.default"}
        counter.made.clear()
        (x + 1).t().contiguous()
        x[:3] + 1
    assert counter.made == {"aten.add.Tensor": 1, "aten.clone.default": 1}


def test_counter_sees_the_backward(benchmarks):
    layer, x = nn.Linear(6, 4, bias=False), torch.randn(5, 6)
    with benchmarks["measures"].Temporaries({(4, 6), (6, 4)}) as counter:
        layer(x).sum().backward()
    assert sum(counter.made.values()) == 1  # the weight's gradient


def test_saved_bytes_count_a_storage_once_and_no_parameter(benchmarks):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8))

        def forward(self, x):
            y = x.exp()  # saves y
            return y * self.w + y.view(2, 4).square().view(8)  # saves y twice more, and w

    case, x = benchmarks["overhead"].layer(), torch.randn(8, requires_grad=True)
    variant = benchmarks["variants"].Variant("frozen", nn.Sequential(Twice()))
    assert benchmarks["measures"].saved_bytes(case, variant, x) == 8 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: 0; allowed: 1 or more"),
        (["--only", "bert"], "--only 'bert' matches nothing; allowed: llama"),
    ],
)
def test_wrong_options_are_refused(benchmarks, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmarks["execution"].main(arguments)
    assert message in capsys.readouterr().err


def test_runs_as_a_program():
    command = [sys.executable, "-m", "benchmarks.execution", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--only" in shown.stdout
