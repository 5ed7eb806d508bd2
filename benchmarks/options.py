"""The suite's command line."""

from __future__ import annotations

import argparse
import fnmatch
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .cases import DEFAULT, FULL, TINY, Sizes, suite
from .measures import Pace

STEPS, MEMORY, HANDLING, PRECISION, GROWTH, KERNELS = SECTIONS = (
    "steps",
    "memory",
    "handling",
    "precision",
    "growth",
    "kernels",
)


def parse(arguments: Sequence[str] | None, description: str) -> argparse.Namespace:
    """The options, with ``sizes``, ``pace`` and ``device`` made of them."""
    parser = _parser(description)
    options = parser.parse_args(arguments)
    options.sizes = _sizes(options)
    names = [*SECTIONS, *(case.name for case in suite(options.sizes))]
    for pattern in options.only or ():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            parser.error(f"--only {pattern!r} matches nothing; allowed: {', '.join(names)}")
    clock = time.process_time if options.cpu_time else time.perf_counter
    options.pace = Pace(steps=options.steps, seconds=options.seconds, clock=clock)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else None
    return options


def wanted(options: argparse.Namespace, section: str, name: str = "") -> bool:
    """Whether ``--only`` lets a section, or one row of it, through."""
    if options.only is None:
        return True
    return any(fnmatch.fnmatchcase(text, pattern) for pattern in options.only for text in (section, name) if text)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=description)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="all sizes: hours")
    size.add_argument("--tiny", action="store_true", help="small models: a check that it runs, not a measurement")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"sections ({', '.join(SECTIONS)}) or rows, * allowed"
    )
    for name, what in (
        ("hidden", "hidden sizes of the Llama stacks"),
        ("tokens", "their numbers of tokens"),
        ("rank", "their ranks; every combination of the three is run"),
        ("vocabulary", "sizes of the embeddings' vocabularies"),
    ):
        parser.add_argument(f"--{name}", nargs="+", type=positive, metavar="N", help=what)
    parser.add_argument("--layers", type=positive, metavar="N", help="layers of the stacks")
    parser.add_argument("--targets", type=positive, metavar="N", help="linear layers of the model in 'handling'")
    parser.add_argument("--width", type=positive, metavar="N", help="and their width")
    parser.add_argument("--cycles", type=positive, metavar="N", help="toggles in 'precision'")
    parser.add_argument("--steps", type=positive, default=21, help="rounds of steps at most (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=6.0, help="no more rounds of one row after so many (default: %(default)s)"
    )
    parser.add_argument("--threads", type=positive, help="torch's threads (default: torch's choice)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count CPU seconds: for a busy machine, with --threads 1"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where 'kernels' runs (default: on a GPU if there is one, else not at all)",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write report.md, report.json and report.png there")
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}; allowed: 1 or more")
    return number


def _sizes(options: argparse.Namespace) -> Sizes:
    sizes = FULL if options.full else TINY if options.tiny else DEFAULT
    changes: dict[str, Any] = {
        name: value
        for name in ("layers", "targets", "width", "cycles")
        if (value := getattr(options, name)) is not None
    }
    if options.vocabulary:
        changes["vocabularies"] = tuple(options.vocabulary)
    if options.hidden or options.tokens or options.rank:
        usual = ((512,), (512,), (8,))
        given = (options.hidden, options.tokens, options.rank)
        changes["llama"] = tuple(product(*(own or other for own, other in zip(given, usual, strict=True))))
    return replace(sizes, **changes)
