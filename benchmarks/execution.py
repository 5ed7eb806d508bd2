"""Training steps of adapted models beside the frozen model's own and PEFT's: ``python -m benchmarks.execution``.

README.md in this folder says what each column is.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .case import Case
from .cases import cases
from .measures import Pace, temporaries
from .options import positive
from .overhead import overhead
from .report import environment, load, markdown
from .steps import train
from .variants import FLOOR, MERGED_AWAY, compare, missing, weight_shapes

TEMPORARIES, OVERHEAD = "temporaries", "overhead"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, write them as JSON where asked to. Returns what JSON gets."""
    parser = _parser()
    options = parser.parse_args(arguments)
    everything = [case.name for case in cases(tiny=options.tiny)] + [TEMPORARIES, OVERHEAD]
    for pattern in options.only or ():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in everything):
            parser.error(f"--only {pattern!r} matches nothing; allowed: {', '.join(everything)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    chosen = [case for case in cases(tiny=options.tiny) if _wanted(case.name, options.only)]
    result: dict[str, Any] = {"environment": environment(), "steps": options.steps, "tiny": options.tiny}
    result["clock"] = "CPU time" if options.cpu_time else "wall time"
    result |= {"cases": [], "temporaries": {}, "overhead": {}, "skipped": {}}
    for case in tqdm(chosen, desc="steps", disable=None):
        torch.manual_seed(0)
        _one_case(case, result, Pace(steps=options.steps, clock=clock))
    if _wanted(TEMPORARIES, options.only):
        _all_temporaries(result)
    if _wanted(OVERHEAD, options.only):
        torch.manual_seed(0)
        rounds, calls = (3, 3) if options.tiny else (21, 1000)  # few calls measure a cold cache
        result["overhead"] = overhead(Pace(steps=rounds, clock=clock), calls_a_round=calls)
    result["environment"]["load after"] = load()
    sys.stdout.write(markdown(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def _parser() -> argparse.ArgumentParser:
    names = [*(case.name for case in cases(tiny=False)), TEMPORARIES, OVERHEAD]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.execution", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"what to measure, * allowed, of: {', '.join(names)}")
    parser.add_argument("--steps", type=positive, default=21, help="rounds of steps (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small models: a check that it runs, not a measurement")
    parser.add_argument("--threads", type=positive, help="torch's threads (default: torch's choice)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU seconds: for a busy machine, with --threads 1"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to a file as well")
    return parser


def _wanted(name: str, only: list[str] | None) -> bool:
    return only is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in only)


def _one_case(case: Case, result: dict[str, Any], pace: Pace) -> None:
    """Measure a case into the result."""
    if reason := missing(case.needs):
        result["skipped"][case.name] = {"all": reason}
        return
    record = train(compare(case), pace)
    if skipped := record.pop("skipped"):
        result["skipped"][case.name] = skipped
    result["cases"].append(record)


def _all_temporaries(result: dict[str, Any]) -> None:
    """Count in the tiny sizes, where no activation has the shape of a weight."""
    for case in cases(tiny=True):
        if missing(case.needs):
            continue
        torch.manual_seed(0)
        found, x, shapes = compare(case), case.x(), weight_shapes(case)
        grad = torch.randn_like(case.call(found.variants[FLOOR].model, x))
        result["temporaries"][case.name] = {
            name: temporaries(case, variant, x, grad, shapes)
            for name, variant in found.variants.items()
            if name != MERGED_AWAY
        }


if __name__ == "__main__":
    main()
