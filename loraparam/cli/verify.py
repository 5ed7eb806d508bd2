"""Check that an adapter fits its base, acts, stays finite and survives being saved.

Each target must be a parameter of BASE, of that shape (and a DoRA's base must be the one it was trained on), change
it, and leave it finite in its dtype; saved and loaded again, the adapter must be the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import loraparam as lp

from .common import add_example, add_reading, add_showing, progress, reading, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``loraparam verify``."""
    parser.add_argument("base", type=Path, metavar="BASE", help="a safetensors file, or a directory of shards")
    parser.add_argument(
        "adapter", type=Path, metavar="ADAPTER", help="a file, or the directory of a format that has one"
    )
    add_reading(parser)
    add_showing(parser)
    add_example(
        parser,
        "verify base.safetensors adapter.safetensors && echo good",
        exit_codes="exit codes: 0 nothing found, 1 something found, 2 bad input (such as a BASE that cannot be read)",
    )


def run(args: argparse.Namespace) -> int:
    """Verify. The exit code is 1 where something was found."""
    found = lp.verify(args.base, args.adapter, progress=progress(args), **reading(args))
    show(found, args)
    return 0 if found else 1
