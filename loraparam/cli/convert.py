"""Write an adapter in another format, with the same effective weights.

What the format cannot hold is refused, with the reason and the alternative.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import loraparam as lp

from ..formats import FORMATS
from .common import (
    add_example,
    add_force,
    add_reading,
    add_showing,
    add_writing,
    reading,
    settings,
    show,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``loraparam convert``."""
    parser.add_argument("adapter", type=Path, metavar="IN", help="a file, or the directory of a format that has one")
    parser.add_argument("out", type=Path, metavar="OUT", help="where to")
    parser.add_argument("--to", required=True, choices=sorted(FORMATS), help="the format to write")
    parser.add_argument("--base", type=Path, help="the checkpoint it is for, where a format needs it")
    add_writing(parser, to=False)
    add_reading(parser)
    add_force(parser)
    add_showing(parser)
    add_example(parser, "convert adapter.safetensors adapter-peft/ --to peft --base base/")


def run(args: argparse.Namespace) -> int:
    """Convert."""
    done = lp.convert(
        args.adapter,
        args.out,
        to=args.to,
        base=args.base,
        options=settings(args.option, "--option"),
        force=args.force,
        **reading(args),
    )
    show(done, args)
    return 0
