"""Make a LoRA adapter of the difference between two checkpoints.

Each weight's change is approximated by the pair of the smallest error for its rank (singular value decomposition; by
random projection where the matrix is large), and what that leaves out is shown as the residual ‖Δ − BA‖/‖Δ‖.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import loraparam as lp

from .common import add_cut, add_example, add_force, add_showing, add_writing, cut, progress, settings, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``loraparam extract``."""
    parser.add_argument("base", type=Path, metavar="BASE", help="a safetensors file, or a directory of shards")
    parser.add_argument("tuned", type=Path, metavar="TUNED", help="the same model after training")
    parser.add_argument("out", type=Path, metavar="OUT", help="the adapter to write")
    add_cut(parser)
    parser.add_argument("--full", action="store_true", help="keep changed biases and norms, whole")
    parser.add_argument("--allow-unmatched", action="store_true", help="leave out tensors that only one of them has")
    add_writing(parser)
    add_force(parser)
    add_showing(parser)
    add_example(
        parser,
        "extract base.safetensors tuned.safetensors adapter.safetensors --rank 16",
        "extract base/ tuned/ adapter.safetensors --error 0.1 --full",
    )


def run(args: argparse.Namespace) -> int:
    """Extract."""
    done = lp.extract(
        args.base,
        args.tuned,
        args.out,
        **cut(args),
        full=args.full,
        strict=not args.allow_unmatched,
        to=args.to,
        options=settings(args.option, "--option"),
        force=args.force,
        progress=progress(args),
    )
    show(done, args)
    return 0
