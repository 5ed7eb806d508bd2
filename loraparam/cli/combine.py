"""Make one adapter of several, by what they add to the weights.

cat: the sum, exactly, at the sum of the ranks; linear: the same at the least rank that holds it; svd: its best
approximation of a rank; ties (arXiv 2306.01708) and dare (arXiv 2311.03099): by entries, kept whole unless a rank,
energy or error is given. There are no cross terms between the factors of different adapters.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import loraparam as lp

from ..tools.combine import HOW
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
    weighted,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``loraparam combine``."""
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER[:WEIGHT]", help="weight 1 by default")
    parser.add_argument("out", type=Path, metavar="OUT", help="the adapter to write")
    parser.add_argument("--how", default="cat", choices=HOW, help="see above (default: %(default)s)")
    add_cut(parser, required=False)
    parser.add_argument("--density", type=float, help="share of entries kept by ties and dare (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of dare (default: %(default)s)")
    parser.add_argument("--base", type=Path, help="the checkpoint they are for; a DoRA needs it")
    add_writing(parser)
    add_reading(parser)
    add_force(parser)
    add_showing(parser)
    add_example(
        parser,
        "combine style.safetensors:0.7 task.safetensors:0.3 both.safetensors",
        "combine style.safetensors task.safetensors both.safetensors --how ties --density 0.3 --rank 16",
    )


def run(args: argparse.Namespace) -> int:
    """Combine."""
    adapters, weights = weighted(args.adapters)
    done = lp.combine(
        adapters,
        args.out,
        weights=weights,
        how=args.how,
        **cut(args),
        density=args.density,
        seed=args.seed,
        base=args.base,
        to=args.to,
        options=settings(args.option, "--option"),
        force=args.force,
        progress=progress(args),
        **reading(args),
    )
    show(done, args)
    return 0
