"""The benchmark of all libraries runs, in tiny sizes: what it counts and computes is asserted, what it times is not."""

import contextlib
import gc
import importlib
import io
import json
import subprocess
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import loraparam as lp

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("__main__", "case", "cases", "handling", "kernels", "measures", "memory", "options", "peers")
MODULES += ("peers.base", "plot", "precision", "steps", "tables", "variants")
ROWS = ("llama 64×37 r4", "encoder", "gpt-2", "embedding 211", "tied head", "unet", "mixtral eager")
ROWS += ("mixtral grouped_mm", "lstm")

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


@pytest.fixture(scope="module")
def bench():
    """The modules of the benchmark, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield {name: importlib.import_module(f"benchmarks.{name}") for name in MODULES}


@pytest.fixture(params=["PEFT", "loralib", "LoRA-Torch", "minLoRA", "LyCORIS"])
def peer(request, bench):
    """Each peer that is installed."""
    library = next(library for library in bench["peers"].PEERS if library.name == request.param)
    if find_spec(library.package) is None:
        pytest.skip(f"{library.package} is not installed")
    return library


def run(bench, *arguments):
    """What the program returns, and what it prints."""
    printed, threads = io.StringIO(), torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(printed):
            result = bench["__main__"].main(["--tiny", "--threads", "1", *arguments])
    finally:
        torch.set_num_threads(threads)
    return result, printed.getvalue()


@pytest.fixture(scope="module")
def measured(bench, tmp_path_factory):
    """A run of all but what starts processes or compiles: (result, what it printed, the folder it wrote)."""
    folder = tmp_path_factory.mktemp("report")
    only = ["steps", "handling", "precision", "growth"]
    result, printed = run(bench, "--steps", "1", "--out", str(folder), "--only", *only)
    return result, printed, folder


def rows(result, kind):
    return {row["name"]: row for row in result["steps"] if row["kind"] == kind}


def linear_case(bench, **options):
    Case, called, floats = (getattr(bench["case"], name) for name in ("Case", "called", "floats"))
    usual = {
        "name": "linear",
        "about": "one linear",
        "model": lambda: nn.Sequential(nn.Linear(16, 12)),
        "x": floats(5, 16),
        "call": called,
        "targets": "0",
        "peft": {"target_modules": ["0"]},
        "r": 4,
        "positions": 5,
    }
    return Case(**usual | options)


# --- a whole run ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_transformers
class TestRun:
    def test_every_row_is_measured_in_training_and_inference(self, measured):
        result = measured[0]
        for kind in ("train", "infer"):
            assert tuple(rows(result, kind)) == ROWS
        for row in result["steps"]:
            assert {"LoRA", "DoRA", "Magnitude"} <= set(row["ratios"])
            assert row["floor_ms"] > 0
            for ratio in [*row["ratios"].values(), *row["over"].values()]:
                assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        assert all("full" in row["ratios"] for row in rows(result, "train").values())
        assert all("loraparam merged" in row["ratios"] for row in rows(result, "infer").values())

    def test_every_library_is_measured_or_named_as_skipped(self, measured, bench):
        result, printed, _ = measured
        for library in bench["peers"].PEERS:
            absent = library.name not in result["libraries"]
            assert absent == (library.name in result["skipped"])
            if absent:
                assert f"- {library.name}: {library.package!r} is not installed" in printed
                continue
            for row in rows(result, "train").values():
                for method in library.methods:
                    name = library.variant(method)
                    assert (name in row["ratios"]) != (name in row["skipped"]), row["name"]

    def test_peers_compute_what_ours_computes_unless_it_says_so(self, measured):
        for row in measured[0]["steps"]:
            theirs = set(row["over"])
            assert set(row["agreement"]) == theirs, row["name"]
            assert all(far < 1e-4 for name, far in row["agreement"].items() if name not in row["differs"]), row["name"]

    def test_ours_is_within_the_limit_of_bytes_on_linear_layers(self, measured):
        for name in ("llama 64×37 r4", "encoder", "gpt-2", "embedding 211", "mixtral eager"):
            row = rows(measured[0], "train")[name]
            assert row["saved"]["LoRA"] == row["saved_limit"], name

    def test_tables_have_a_line_for_each_row(self, measured):
        _, printed, _ = measured
        for name in ROWS:
            lines = [line for line in printed.splitlines() if line.startswith(f"| {name} |")]
            assert len(lines) == 7  # LoRA and DoRA trained and inferred, merged, Magnitude, bytes

    def test_reports_are_written(self, measured):
        result, printed, folder = measured
        assert (folder / "report.md").read_text(encoding="utf-8") == printed
        assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == json.loads(json.dumps(result))
        assert (folder / "report.png").exists() == (find_spec("matplotlib") is not None)

    def test_growth_has_a_point_for_each_size(self, measured):
        points = [(row["grows"], row["to"]) for row in measured[0]["growth"]]
        assert points == [
            *(("rank", 2), ("rank", 4), ("adapters", 1), ("adapters", 2)),
            *(("targets", 2), ("targets", 14), ("batch", 1), ("batch", 2)),
        ]
        limits = [row["limits"]["LoRA"] for row in measured[0]["growth"]]
        assert limits[1] - 1 == pytest.approx(2 * (limits[0] - 1))
        assert limits[3] - 1 == pytest.approx(2 * (limits[2] - 1))

    def test_handling_has_every_action_of_ours(self, measured):
        found = measured[0]["handling"]
        assert all(found["ms"][action]["loraparam"] > 0 for action in ("attach", "load", "switch", "merge"))
        assert found["files"]["loraparam"] > found["files"]["bare tensors"] == 4 * 5 * 2 * 4 * 16

    def test_merged_weights_are_rounded_once_and_the_base_does_not_drift(self, measured):
        found = measured[0]["precision"]
        assert found["merged"]["loraparam"] == pytest.approx(1, abs=0.01)
        assert [found["drift"][dtype]["loraparam"] for dtype in ("float32", "bfloat16")] == [0, 0]


# --- its sections ---------------------------------------------------------------------------------------------------


def test_missing_peers_are_named(bench, monkeypatch):
    for library in bench["peers"].PEERS:
        monkeypatch.setitem(sys.modules, library.package, None)
    result, printed = run(bench, "--steps", "1", "--only", "encoder")
    assert result["libraries"] == ["loraparam"]
    assert set(result["skipped"]) == {library.name for library in bench["peers"].PEERS}
    assert "- PEFT: 'peft' is not installed" in printed
    assert tuple(rows(result, "train")) == ("encoder",)


def test_missing_transformers_are_named(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    result, printed = run(bench, "--steps", "1", "--only", "gpt-2")
    assert result["steps"][0]["skipped"] == {"all": "'transformers' is not installed"}
    assert "- all (gpt-2): 'transformers' is not installed" in printed


def test_kernels_without_a_gpu_are_named(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, printed = run(bench, "--steps", "1", "--only", "kernels")
    assert "- kernels: no GPU is present; --device cpu runs it on the CPU" in printed


@pytest.mark.slow
@pytest.mark.parametrize(("index", "dtype", "way"), [(0, "float32", "compiled"), (1, "bfloat16", "eager")])
def test_kernels_run_on_the_cpu(bench, index, dtype, way):
    kernels, pace = bench["kernels"], bench["measures"].Pace(steps=1)
    case = kernels.kernel_cases(32, 5, 4)[index]
    row = kernels._row(case, dtype, way, pace, torch.device("cpu"))
    assert {"LoRA", "DoRA", "full"} <= set(row["ratios"])
    assert row["kernels"]["LoRA"]["count"] > row["kernels"]["frozen"]["count"] > 0
    assert row["peak"] == {}
    table = bench["tables"]._kernels([row])
    assert f"| {case.name} {dtype} {way} |" in table


def test_a_process_of_its_own_measures_its_peak(bench):
    memory, sizes = bench["memory"], bench["cases"].TINY
    tied = next(case for case in bench["cases"].suite(sizes) if case.name == "tied head")
    found = memory._in_a_fresh_process(tied, "frozen", sizes)
    assert found["peak"] > 0
    assert found["limit"] > sum(p.nbytes for p in tied.model().parameters())


def test_a_process_says_why_it_cannot(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    case = linear_case(bench)
    assert bench["memory"].measure(case, "PEFT LoRA") == {"skipped": "'peft' is not installed"}


def test_a_peak_of_large_tensors_is_seen(bench):
    case = linear_case(bench, x=bench["case"].floats(200_000, 16))
    one = 200_000 * 12 * 4  # an output
    assert bench["memory"].measure(case, "full")["peak"] > 2 * one


# --- its parts ------------------------------------------------------------------------------------------------------


def test_a_peer_that_computes_something_else_stops_the_run(bench, peer, monkeypatch):
    case = linear_case(bench)
    monkeypatch.setattr(type(peer), "differs", lambda *_: "")
    monkeypatch.setattr(type(peer), "fill", lambda self, model, *_: torch.manual_seed(1))
    found = bench["variants"].compare(case, (bench["peers"].OURS, peer), ("LoRA",), dense=False)
    with pytest.raises(RuntimeError, match=f"linear: LoRA and {peer.name} LoRA differ by"):
        bench["steps"].train(found, bench["measures"].Pace(steps=1))


def test_a_peer_learns_what_ours_learns(bench, peer):
    """The peers' adapters are live: their factors take gradients, as large as ours do."""
    case = linear_case(bench)
    found = bench["variants"].compare(case, (bench["peers"].OURS, peer), ("LoRA",), dense=False)
    x, total = case.x(), {}
    for name in ("LoRA", f"{peer.name} LoRA"):
        model = found.variants[name].model
        case.call(model, x).square().sum().backward()
        factors = [p.grad for p in model.parameters() if p.grad is not None]
        total[name] = sum(float(grad.square().sum()) for grad in factors)
    assert total["LoRA"] > 0
    assert total[f"{peer.name} LoRA"] == pytest.approx(total["LoRA"], rel=1e-4)


def test_a_peer_writes_and_reads_its_adapter(bench, peer, tmp_path):
    case = linear_case(bench, targets="all-linear", peft={"target_modules": r"\d+"})
    base = case.model()
    wrapped = peer.wrap(bench["variants"].copied(base, share=False), case)
    with torch.no_grad():
        beside = wrapped.__dict__.get("benchmark_network", wrapped)  # LyCORIS's is no part of the model
        for name, parameter in beside.named_parameters():
            if "lora_B" in name or "lora_up" in name:
                parameter.fill_(0.1)
    x = torch.randn(3, 16)
    expected = wrapped(x)
    peer.save(wrapped, tmp_path)
    loaded = peer.load(bench["variants"].copied(base, share=False), case, tmp_path)
    torch.testing.assert_close(loaded(x), expected)
    assert not torch.allclose(expected, base(x))


def test_variants_start_from_the_same_weights_and_leave_them_alone(bench):
    case = linear_case(bench)
    found = bench["variants"].compare(case)
    before = found.base[0].weight.clone()
    x = case.x()
    for variant in found.variants.values():
        bench["measures"].step(case, variant, x, torch.ones(5, 12))
    torch.testing.assert_close(found.base[0].weight, before, rtol=0, atol=0)
    assert found.variants["full"].model[0].weight is not found.base[0].weight


def test_limit_of_dora_adds_the_factored_norm(bench):
    case = linear_case(bench)
    found = bench["variants"].limits(case)
    rows_, r, in_, out = 5, 4, 16, 12
    step = 2 * rows_ * in_ * out  # x·Wᵀ and g·W
    norm = r * in_ * out + r * r * (in_ + out)  # W·Aᵀ, then A·Aᵀ and B·(A·Aᵀ)
    assert found.step["LoRA"] == pytest.approx(1 + 3 * rows_ * r * (in_ + out) / step)
    assert found.step["DoRA"] == pytest.approx(found.step["LoRA"] + norm / step)
    assert found.forward["LoRA"] == pytest.approx(1 + rows_ * r * (in_ + out) / (step / 2))


def test_limit_of_bytes_counts_inputs_once_and_the_thin_products(bench):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 12), nn.Linear(16, 12)

        def forward(self, x):
            return self.a(x) + self.b(x)

    case = linear_case(bench, model=Twice, targets=["a", "b"])
    x = case.x()
    assert bench["steps"].saved_limit(case, Twice().requires_grad_(False), x) == 4 * (5 * 16 + 2 * 5 * 4)


def test_drift_is_seen_where_a_library_writes_into_the_base(bench):
    class Rounding(type(bench["peers"].OURS)):
        def merge(self, model):
            model[0].weight.data += 1e-3

        def unmerge(self, model):
            model[0].weight.data -= 1e-3

        def attach(self, model, case, method):
            return model

        def fill(self, *_):
            pass

    precision = bench["precision"]
    assert precision.drift(precision.layer(), Rounding(), torch.bfloat16, 20) > 0


def test_best_peer_is_the_fastest_that_computes_the_same(bench):
    over = {"PEFT LoRA": 0.9, "loralib LoRA": 1.2, "minLoRA LoRA": 0.4}
    row = {"over": {name: {"median": ratio} for name, ratio in over.items()}, "differs": {"loralib LoRA": "why"}}
    assert bench["tables"].best(row, "LoRA") == {"median": 0.9}
    assert bench["tables"].best({"over": {}, "differs": {}}, "LoRA") is None


def test_rounds_end_with_the_time_but_not_before_three(bench):
    Pace = bench["measures"].Pace
    assert list(Pace(steps=9, seconds=0).rounds()) == [False] + [True] * 3
    assert list(Pace(steps=9).rounds()) == [False, False] + [True] * 9
    assert list(Pace(steps=1).rounds()) == [False, True]


def test_a_case_leaves_no_model_behind(bench):
    """Each row makes a dozen copies of a model: a run has to hold those of one row only."""
    made = []

    def model():
        made.append(nn.Sequential(nn.Linear(16, 12), nn.Tanh()))  # which saves its own result
        return made[-1]

    case = linear_case(bench, model=model)
    bench["steps"].measure(case, bench["peers"].LIBRARIES, ("LoRA", "DoRA"), bench["measures"].Pace(steps=1))
    left = [weakref.ref(module) for module in made]
    made.clear()
    gc.collect()
    assert [ref for ref in left if ref() is not None] == []


def test_bytes_are_counted_without_keeping_them(bench):
    class Saves(nn.Module):
        def forward(self, x):
            seen.append(weakref.ref(y := x.exp()))
            return y * 2

    seen = []
    case, x = linear_case(bench), torch.randn(8, requires_grad=True)
    variant = bench["variants"].Variant("frozen", nn.Sequential(Saves()))
    assert bench["measures"].saved_bytes(case, variant, x) == 8 * 4
    gc.collect()
    assert seen[0]() is None


def test_sizes_are_arguments(bench):
    options = bench["options"].parse(
        ["--hidden", "64", "128", "--rank", "4", "--vocabulary", "99", "--targets", "3"], ""
    )
    assert options.sizes.llama == ((64, 512, 4), (128, 512, 4))
    assert (options.sizes.vocabularies, options.sizes.targets) == ((99,), 3)
    names = [case.name for case in bench["cases"].suite(options.sizes)]
    assert names[:2] == ["llama 64×512 r4", "llama 128×512 r4"]
    assert "embedding 99" in names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: 0; allowed: 1 or more"),
        (["--only", "bert"], "--only 'bert' matches nothing; allowed: steps"),
        (["--tiny", "--full"], "not allowed with argument"),
    ],
)
def test_wrong_options_are_refused(bench, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench["__main__"].main(arguments)
    assert message in capsys.readouterr().err


def test_runs_as_a_program():
    shown = subprocess.run([sys.executable, "-m", "benchmarks", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert "--full" in shown.stdout, shown.stderr


def test_places_name_each_reader_of_a_tied_weight(bench):
    tied = next(case for case in bench["cases"].suite(bench["cases"].TINY) if case.name == "tied head")
    model = tied.model()
    places = list(bench["peers"].base.places(model, tied))
    assert [(place.module_path, place.turned) for place in places] == [("embed", False), ("head", True)]
    lp.attach(model, lp.LoRA(r=2), "embed")
    factors = bench["peers"].by_target(model)
    assert places[1].factors(factors)["lora_A"].shape == (2, 32)
