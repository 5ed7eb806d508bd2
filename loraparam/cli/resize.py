"""Write an adapter at another rank, in its own format.

The best approximation there is: the singular values of s·B·A come exactly from its two factors. A larger rank pads
with zeros. A DoRA keeps its lengths.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import loraparam as lp

from .common import (
    add_cut,
    add_example,
    add_force,
    add_reading,
    add_showing,
    add_writing,
    cut,
    progress,
    reading,
    settings,
    show,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``loraparam resize``."""
    parser.add_argument(
        "adapter", type=Path, metavar="ADAPTER", help="a file, or the directory of a format that has one"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="where to; with --force it may be ADAPTER itself")
    add_cut(parser)
    parser.add_argument("--base", type=Path, help="the checkpoint it is for, where the format needs it")
    add_writing(parser, to=False)
    add_reading(parser)
    add_force(parser)
    add_showing(parser)
    add_example(parser, "resize adapter.safetensors small.safetensors --energy 0.95")


def run(args: argparse.Namespace) -> int:
    """Resize."""
    done = lp.resize(
        args.adapter,
        args.out,
        **cut(args),
        base=args.base,
        options=settings(args.option, "--option"),
        force=args.force,
        progress=progress(args),
        **reading(args),
    )
    show(done, args)
    return 0
