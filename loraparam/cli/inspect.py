"""Show what is in an adapter file: methods, ranks, sizes, and the spectrum of each difference.

norm: of s·B·A, or of a full difference. effective: exp of the entropy of σ/Σσ; stable: Σσ²/σ₁². spectrum: the largest
singular values, and the smallest. Over a stack of experts: means.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import loraparam as lp

from ..tools.inspect import plot
from .common import add_example, add_reading, add_showing, progress, reading, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``loraparam inspect``."""
    parser.add_argument("adapter", type=Path, metavar="FILE", help="a file, or the directory of a format that has one")
    parser.add_argument("--base", type=Path, help="the checkpoint it is for, where the format needs it")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw norms and singular values (needs matplotlib)")
    add_reading(parser)
    add_showing(parser)
    add_example(parser, "inspect adapter.safetensors --plot adapter.png", exit_codes="exit codes: 0 shown, 2 bad input")


def run(args: argparse.Namespace) -> int:
    """Inspect."""
    found = lp.inspect_file(args.adapter, base=args.base, progress=progress(args), **reading(args))
    show(found, args)
    if args.plot is not None:
        plot(found, args.plot)
    return 0
