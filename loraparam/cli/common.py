"""What the commands on files share: arguments that mean the same everywhere, progress, and how results are shown."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import LoraparamError
from ..formats import FORMATS

EXIT_CODES = "exit codes: 0 done, 2 bad input, with nothing written"


def add_example(parser: argparse.ArgumentParser, *lines: str, exit_codes: str = EXIT_CODES) -> None:
    """Show examples and exit codes under the arguments."""
    parser.epilog = "\n".join(["example:", *(f"  loraparam {line}" for line in lines), "", exit_codes])


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How adapters are read."""
    parser.add_argument("--format", choices=sorted(FORMATS), help="of the adapters, where the files do not tell it")
    parser.add_argument(
        "--hint",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what a format's files do not say (alpha=16, prefix=unet, enable_lora=[true,false,true]); repeatable",
    )


def add_writing(parser: argparse.ArgumentParser, *, to: bool = True) -> None:
    """How adapters are written."""
    if to:
        parser.add_argument("--to", default="loraparam", choices=sorted(FORMATS), help="format to write (%(default)s)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what the format's writer takes (prefix=lora_unet, flavor=comfyui, alpha=16); repeatable",
    )


def add_showing(parser: argparse.ArgumentParser) -> None:
    """How results are shown."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bar (there is none where stderr is no terminal)"
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """What happens to something that is at OUT already."""
    parser.add_argument("--force", action="store_true", help="replace what is at OUT")


def add_cut(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """How much to keep."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--rank", type=int, help="keep this rank")
    group.add_argument("--energy", type=float, help="keep the least rank that holds this share of the squared norm")
    group.add_argument("--error", type=float, help="keep the least rank whose relative error is no larger")


def cut(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``add_cut``."""
    return {"rank": args.rank, "energy": args.energy, "error": args.error}


def settings(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """KEY=VALUE arguments; a value that is JSON is taken as such.

    Raises:
        LoraparamError: no KEY=VALUE.

    Example:
        >>> settings(["alpha=16", "prefix=unet", "enable_lora=[true, false]"], "--hint")
        {'alpha': 16, 'prefix': 'unet', 'enable_lora': [True, False]}
    """
    found = {}
    for text in pairs:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise LoraparamError(f"{option} {text!r}; allowed: KEY=VALUE, such as alpha=16")
        try:
            found[key] = json.loads(value)
        except (ValueError, RecursionError):
            found[key] = value
    return found


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``add_reading``."""
    return {**settings(args.hint, "--hint"), "format": args.format}


def weighted(texts: Sequence[str]) -> tuple[list[Path], list[float]]:
    """Adapters as ``PATH`` or ``PATH:WEIGHT``; a path that exists is taken as it is written.

    Example:
        >>> weighted(["style:0.5", "C:/task", "a:b"])[1]
        [0.5, 1.0, 1.0]
    """
    paths, weights = [], []
    for text in texts:
        path, weight = text, 1.0
        before, colon, after = text.rpartition(":")
        if colon and before and not os.path.exists(text):
            with contextlib.suppress(ValueError):
                path, weight = before, float(after)
        paths.append(Path(path))
        weights.append(weight)
    return paths, weights


def progress(args: argparse.Namespace) -> Callable[[Sequence[Any], str], Iterable[Any]]:
    """A bar on stderr, where that is a terminal and --quiet is not given."""

    def bar(items: Sequence[Any], what: str) -> Iterable[Any]:
        shown: Iterable[Any] = tqdm(items, desc=what, disable=True if args.quiet else None, mininterval=0.2)
        return shown

    return bar


def show(result: Any, args: argparse.Namespace) -> None:
    """Print what a tool returned."""
    print(json.dumps(result.as_dict(), indent=2, ensure_ascii=False) if args.json else str(result), file=sys.stdout)
