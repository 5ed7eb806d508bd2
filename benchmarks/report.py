"""The machine, and the tables."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .peers import DORA, LORA, version
from .variants import FLOOR, FULL, LORA_DENSE, MERGED_AWAY, PEFT_DORA, PEFT_LORA

ABSENT = "–"
RATIOS = (LORA, PEFT_LORA, LORA_DENSE, FULL, DORA, PEFT_DORA, MERGED_AWAY)
SAVED = (LORA, PEFT_LORA, DORA, PEFT_DORA)
MADE = (FLOOR, LORA, PEFT_LORA, DORA, PEFT_DORA, LORA_DENSE, FULL)
VERSIONS = ("loraparam", "torch", "transformers", "peft", "loralib", "loratorch", "minlora", "lycoris")


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "machine": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load before": load(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "commit": _commit(),
    }


def load() -> float | None:
    """How many processes wanted to run in the last minute, this one included."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit, with a + where files differ from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    here = Path(__file__).parent
    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def markdown(result: dict[str, Any]) -> str:
    """Everything that was measured, as Markdown."""
    parts = [heading(result)]
    if result["cases"]:
        parts += [_times(result["cases"]), _saved(result["cases"])]
    if result["temporaries"]:
        parts.append(_temporaries(result["temporaries"]))
    if result["overhead"]:
        parts.append(_overhead(result["overhead"]))
    if result["skipped"]:
        lines = [f"- {where}, {what}: {why}" for where, gaps in result["skipped"].items() for what, why in gaps.items()]
        parts.append("Skipped:\n\n" + "\n".join(lines))
    differing = [
        f"- {case['name']}, {name}: {why}" for case in result["cases"] for name, why in case["differs"].items()
    ]
    if differing:
        parts.append("Not the same function in PEFT:\n\n" + "\n".join(differing))
    return "\n\n".join(parts) + "\n"


def heading(result: dict[str, Any]) -> str:
    """The machine, the versions, the commit."""
    machine = result["environment"]
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in machine["versions"].items())
    return (
        f"{machine['machine']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"load {machine['load before']} before and {machine['load after']} after; "
        f"Python {machine['python']}, {versions}; commit {machine['commit']}; "
        f"medians, {result['clock']}"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: names to the left, numbers to the right."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _times(cases: list[dict[str, Any]]) -> str:
    head = ["step ÷ frozen model's", "frozen, ms", "limit", *RATIOS, "LoRA ÷ PEFT's", "DoRA ÷ PEFT's"]
    rows = []
    for case in cases:
        ratios = [case["ratios"].get(name) for name in RATIOS] + [
            case["over"].get(name) for name in (PEFT_LORA, PEFT_DORA)
        ]
        shown = [f"{ratio['median']:.2f}" if ratio else ABSENT for ratio in ratios]
        rows.append([case["name"], f"{case['floor_ms']:.1f}", shown_limit(case["limits"][LORA]), *shown])
    return table(head, rows)


def shown_limit(limit: float | None) -> str:
    """A limit, where there is one."""
    return ABSENT if limit is None else f"{limit:.2f}"


def _saved(cases: list[dict[str, Any]]) -> str:
    head = ["saved for backward, MiB", FLOOR, *SAVED]
    rows = [[case["name"], *(_mib(case["saved"].get(name)) for name in (FLOOR, *SAVED))] for case in cases]
    return table(head, rows)


def _mib(size: int | None) -> str:
    return ABSENT if size is None else f"{size / 2**20:.2f}"


def _temporaries(found: dict[str, dict[str, dict[str, int]]]) -> str:
    rows = [
        [name, *(str(sum(by[variant].values())) if variant in by else ABSENT for variant in MADE)]
        for name, by in found.items()
    ]
    return table(["full-size tensors made in a step (tiny sizes)", *MADE], rows)


def _overhead(found: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(found.values())))
    rows = [[kind, *(f"{by[name]:.0f}" for name in names)] for kind, by in found.items()]
    return table(["one 64×64 linear, µs beyond the plain layer's", *names], rows)
