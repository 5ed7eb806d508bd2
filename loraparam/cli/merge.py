"""Fold adapters into a checkpoint on disk.

BASE is a safetensors file, or a directory of shards with their index; OUT is of the same kind. One tensor is in memory
at a time; it is computed in float32 and written in the base's dtype. Other files of the directory are carried over.
OUT appears in one step, once all of it is written and read back.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import loraparam as lp

from .common import add_example, add_force, add_reading, add_showing, progress, reading, show, weighted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``loraparam merge``."""
    parser.add_argument("base", type=Path, metavar="BASE", help="a safetensors file, or a directory of shards")
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER[:WEIGHT]", help="in the order in which they act; weight 1 by default"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="where to; what exists is refused")
    parser.add_argument("--any-base", action="store_true", help="take a DoRA that was trained on another base")
    add_reading(parser)
    add_force(parser)
    add_showing(parser)
    add_example(parser, "merge llama/ style.safetensors task.safetensors:0.5 llama-merged/")


def run(args: argparse.Namespace) -> int:
    """Merge."""
    adapters, weights = weighted(args.adapters)
    done = lp.merge_files(
        args.base,
        adapters,
        args.out,
        weights=weights,
        check_base=not args.any_base,
        force=args.force,
        progress=progress(args),
        **reading(args),
    )
    show(done, args)
    return 0
