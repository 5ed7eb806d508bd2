"""Every library on the same work in one run: ``python -m benchmarks``. README.md in this folder says how to read it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from . import growth, handling, kernels, memory, plot, precision, steps, tables
from .cases import suite
from .measures import Pace
from .options import GROWTH, HANDLING, KERNELS, MEMORY, PRECISION, STEPS, parse, wanted
from .peers import LIBRARIES, METHODS, OURS, Library, PeerError
from .report import environment, load
from .variants import missing

ROUNDS = 3  # of what takes seconds and is done once


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, write them where asked to. Returns what JSON gets."""
    options = parse(arguments, (__doc__ or "").split(":")[0])
    if options.threads:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()
    libraries, absent = _installed()
    result: dict[str, Any] = {
        "environment": environment(),
        "sizes": options.sizes.as_json(),
        "clock": "CPU time" if options.cpu_time else "wall time",
        "libraries": [library.name for library in libraries],
        "skipped": absent,
    }
    result |= _sections(options, libraries)
    result["environment"]["load after"] = load()
    result["seconds"] = time.perf_counter() - start
    sys.stdout.write(tables.markdown(result))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "report.md").write_text(tables.markdown(result), encoding="utf-8")
        (options.out / "report.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
        if why := plot.write(result, options.out / "report.png"):
            sys.stderr.write(f"no plot: {why}\n")
    return result


def _installed() -> tuple[list[Library], dict[str, str]]:
    """The libraries that take part, and why others do not."""
    here: list[Library] = []
    absent = {}
    for library in LIBRARIES:
        try:
            library.module()
            here.append(library)
        except PeerError as reason:
            absent[library.name] = str(reason)
    assert OURS in here
    return here, absent


def _sections(options: argparse.Namespace, libraries: list[Library]) -> dict[str, Any]:
    """What each section that is wanted found."""
    pace, sizes = options.pace, options.sizes
    once = Pace(steps=min(ROUNDS, pace.steps), clock=pace.clock)
    found: dict[str, Any] = {STEPS: _steps(options, libraries)}
    run = {
        MEMORY: lambda: memory.rows(sizes, libraries, METHODS),
        HANDLING: lambda: handling.rows(sizes, libraries, once),
        PRECISION: lambda: precision.rows(libraries, cycles=sizes.cycles),
        GROWTH: lambda: growth.rows(sizes, pace),
        KERNELS: lambda: kernels.rows(sizes.block, pace, torch.device(options.device)),
    }
    for name in tqdm([name for name in run if wanted(options, name)], desc="other sections", disable=None):
        torch.manual_seed(0)
        if name == KERNELS and options.device is None:
            found["skipped_kernels"] = "no GPU is present; --device cpu runs it on the CPU"
            continue
        found[name] = run[name]()
    return found


def _steps(options: argparse.Namespace, libraries: list[Library]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for case in tqdm(suite(options.sizes), desc="steps", disable=None):
        if not wanted(options, STEPS, case.name):
            continue
        if reason := missing(case.needs):
            rows.append({"name": case.name, "kind": "absent", "skipped": {"all": reason}, "differs": {}})
            continue
        torch.manual_seed(0)
        rows += steps.measure(case, libraries, METHODS, options.pace)
    return rows


if __name__ == "__main__":
    main()
