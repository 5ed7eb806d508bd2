"""What an installed loraparam promises: version, import cost, types, docstrings, the command line, the wheel."""

import importlib.metadata
import subprocess
import sys
import sysconfig
import types
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import loraparam

ROOT = Path(__file__).resolve().parents[1]
IMPORT_BUDGET_S = 0.2


def run_python(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run this Python away from the source tree, where only what is installed can be imported."""
    return subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, check=True)


def test_version_is_the_installed_one() -> None:
    assert importlib.metadata.version("loraparam") == loraparam.__version__


def import_cost_beyond_torch(cwd: Path) -> float:
    """Seconds that `import loraparam` takes in a new process, less those that torch takes inside it."""
    # stderr lines: "import time:  self [us] | cumulative [us] | <indent>module"
    report = run_python("-X", "importtime", "-c", "import loraparam", cwd=cwd).stderr
    rows = [line.split("|") for line in report.splitlines() if line.startswith("import time:")]
    cumulative = {module.strip(): int(us) for _, us, module in rows if us.strip().isdigit()}
    return (cumulative["loraparam"] - cumulative["torch"]) / 1e6


def test_import_costs_little_more_than_torch(tmp_path: Path) -> None:
    # The best of a few runs: a busy machine only ever makes an import slower.
    costs: list[float] = []
    while len(costs) < 4 and min(costs, default=1.0) > IMPORT_BUDGET_S:
        costs.append(import_cost_beyond_torch(tmp_path))
    assert min(costs) <= IMPORT_BUDGET_S, f"seconds beyond torch, by run: {costs}"


def test_import_brings_in_nothing_but_the_dependencies(tmp_path: Path) -> None:
    # Counted after torch, so that what torch itself imports is not ours to answer for.
    code = (
        "import sys, torch; before = set(sys.modules); import loraparam; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    ours = {"loraparam", "torch", "safetensors", "numpy", "tqdm"}
    brought_in = set(run_python("-c", code, cwd=tmp_path).stdout.split())
    assert "loraparam" in brought_in
    assert brought_in - ours - sys.stdlib_module_names == set()


def test_import_leaves_files_and_tools_for_later(tmp_path: Path) -> None:
    asked = "print(lp.extract.__name__, lp.formats.FORMATS['peft'].NAME)"
    code = f"import sys, loraparam as lp; print(*sys.modules); {asked}"
    modules, names = run_python("-c", code, cwd=tmp_path).stdout.splitlines()
    assert {"loraparam.formats.native", "loraparam.methods.lora"} <= set(modules.split())
    assert not {"loraparam.tools", "loraparam.formats.peft", "loraparam.formats.kohya"} & set(modules.split())
    assert names == "extract peft"


def is_documented(name: str) -> bool:
    value = getattr(loraparam, name)
    if not isinstance(value, types.ModuleType) and not callable(value):
        return True  # a constant has no docstring of its own
    # A dataclass without a docstring gets its signature for one.
    return bool(value.__doc__) and not value.__doc__.startswith(f"{name}(")


def test_every_public_name_is_documented() -> None:
    assert loraparam.__all__
    assert [name for name in loraparam.__all__ if not is_documented(name)] == []


@pytest.mark.parametrize(
    "command",
    [
        pytest.param([str(Path(sysconfig.get_path("scripts"), "loraparam"))], id="script"),
        pytest.param([sys.executable, "-m", "loraparam"], id="module"),
    ],
)
def test_command_line_helps(command: list[str], tmp_path: Path) -> None:
    shown = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "usage: loraparam" in shown.stdout
    assert "demo" in shown.stdout


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    # No isolation, so no network: the `test` extra has the build backend.
    run_python("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path), cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"loraparam-{loraparam.__version__}-")
    held = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "loraparam").rglob("*.py")}
    assert sources | {"loraparam/py.typed"} <= held
    info = f"loraparam-{loraparam.__version__}.dist-info"
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= held
    assert {name.partition("/")[0] for name in held} == {"loraparam", info}


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for text in importlib.metadata.requires("loraparam") or []:
        requirement = Requirement(text)
        if requirement.name != "loraparam":
            assert requirement.specifier.contains(pins[requirement.name]), text
