"""The command line. One file per command, each short; a command is imported only when it is run.

A command ``x`` is a module ``loraparam/cli/x.py`` with two functions, ``add_arguments(parser)`` and
``run(args) -> int`` (the exit code), and one row in ``COMMANDS``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from .. import __version__
from ..errors import LoraparamError

# name -> what it does, in one line
COMMANDS = {
    "combine": "make one adapter of several, by what they add to the weights",
    "convert": "write an adapter in another format",
    "demo": "train a small language model on text that comes with Python and put four adapters on it",
    "extract": "make a LoRA adapter of the difference between two checkpoints",
    "inspect": "show what is in an adapter file, with the spectrum of each difference",
    "merge": "fold adapters into a checkpoint on disk, one tensor in memory at a time",
    "resize": "write an adapter at another rank",
    "verify": "check that an adapter fits its base, acts, stays finite and survives being saved",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 is success; 1 is a check that found something (``verify``, ``demo``); 2 is bad input, or a file that cannot be
    read or written, explained in one line on stderr, with nothing written; 130 is Ctrl-C, as in a shell, and 141 that
    nobody reads what is printed, as when it goes to ``head``.

    Args:
        argv: the arguments without the program's name. Default: those of this process.

    Raises:
        SystemExit: as argparse does, after ``--help``, ``--version`` or a usage error.
    """
    first = _parser().parse_args(argv)
    command = importlib.import_module(f"{__name__}.{first.command}")
    parser = argparse.ArgumentParser(
        prog=f"loraparam {first.command}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    args = parser.parse_args(first.arguments)

    def tell(what: object, kind: str = "") -> None:
        print(f"loraparam {first.command}: {kind}{' '.join(str(what).split())}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_, **__: tell(message, "warning: ")
            code: int = command.run(args)
            sys.stdout.flush()
    except BrokenPipeError:
        # What Python still holds would raise again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (LoraparamError, OSError) as error:
        tell(error)
        return 2
    except KeyboardInterrupt:
        tell("interrupted; what was there before is unchanged")
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    """The first stage: which command. The command's own arguments are left for its own parser."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="loraparam",
        description="Adapters (LoRA, DoRA and others) on any parameter of any PyTorch model.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}  {line}" for name, line in COMMANDS.items())
        + "\n\n'loraparam COMMAND --help' lists the arguments of one command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"loraparam {__version__}")
    parser.add_argument("command", choices=sorted(COMMANDS), metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser
