"""The patterns of ``rank_pattern`` and ``alpha_pattern``, matched without a regex engine.

PEFT takes the first key for which ``re.match(rf"(.*\\.)?({key})$", name)`` holds. A key comes from the file, and a
backtracking engine can be made to run for minutes on 26 characters. Here a key is text with ``.``, ``\\.``, ``\\d``,
``[0-9]``, ``(a|b)``, ``^``, ``$``, and ``* + ?`` after single characters; anything else is refused. Alternatives are
written out, and each is matched by the set of places it can have reached, in time linear in its length.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from ..errors import FormatError

_LONGEST, _MOST, _REPEATS = 500, 100, 8  # characters of a key; alternatives it stands for; * and + in each

# One character (escaped, a class, plain, or the dot), and how often.
_PIECE = re.compile(r"(\\[^A-Za-z0-9]|\\d|\[(?:\w-\w|\w)+\]|[^\\^$()\[\]{}|*+?])([*+?]?)")
_GROUP = re.compile(r"(?<!\\)\((?:\?:)?((?:[^()\\]|\\.)*)\)(?![*+?{])")
_BAR = re.compile(r"(?<!\\)\|")

Pieces = tuple[tuple[str, str], ...]


def first_match(keys: Iterable[str], name: str) -> str | None:
    """The first key that stands for a module of this name; None where there is none.

    Raises:
        FormatError: a key that is more than a simple pattern.

    Example:
        >>> first_match(["k_proj", r"^layers\\.(0|1)\\.q"], "layers.1.q")
        '^layers\\\\.(0|1)\\\\.q'
    """
    return next((key for key in keys if matches(key, name)), None)


def matches(key: str, name: str, *, whole: bool = False) -> bool:
    """Whether a key stands for a name: for its part from some dot to the end, or (``whole``) for all of it."""
    starts = 1
    for i, character in enumerate(name):
        if character == "." and not whole:
            starts |= 1 << (i + 1)
    return any(_consumes(pieces, name, 1 if anchored else starts) for anchored, pieces in _parse(key))


@functools.lru_cache(maxsize=4096)
def _parse(key: str) -> tuple[tuple[bool, Pieces], ...]:
    """A key's alternatives, each (begins with ``^``, its pieces)."""
    if len(key) > _LONGEST:
        raise FormatError(f"pattern {key[:40]!r}… has {len(key)} characters; allowed: {_LONGEST}")
    parsed = []
    for text in _alternatives(key):
        body = text.removeprefix("^")
        if body.endswith("$") and not body.endswith("\\$"):
            body = body[:-1]
        pieces, position = [], 0
        while found := _PIECE.match(body, position):
            pieces.append((found[1], found[2]))
            position = found.end()
        if position < len(body) or sum(repeat in ("*", "+") for _, repeat in pieces) > _REPEATS:
            raise _unreadable(key)
        parsed.append((text.startswith("^"), tuple(pieces)))
    return tuple(parsed)


def _alternatives(key: str) -> list[str]:
    """``a(b|c)`` as ``ab`` and ``ac``; groups neither nest nor repeat."""
    parts = _GROUP.split(key)  # text outside and inside of brackets, in turn
    if len(parts) == 1:
        return _BAR.split(key)
    found = [""]
    for i, part in enumerate(parts):
        choices = _BAR.split(part)
        inside = i % 2 == 1
        if inside and any(choice.startswith("^") or choice.endswith("$") for choice in choices):
            raise _unreadable(key)
        if (not inside and len(choices) > 1) or len(found) * len(choices) > _MOST:
            raise _unreadable(key)
        found = [left + right for left in found for right in choices]
    return found


def _unreadable(key: str) -> FormatError:
    return FormatError(
        f"pattern {key[:80]!r}; allowed: module paths, with . \\. \\d [0-9] (a|b) ^ $ and a few * + ? after single "
        "characters. Write one full path per module instead"
    )


def _consumes(pieces: Pieces, name: str, reached: int) -> bool:
    """Whether the pieces use up the name from one of the places in ``reached``, a set of bits, to its end."""
    for piece, repeat in pieces:
        fits = _places(piece, name)
        once = (reached & fits) << 1
        if repeat in ("*", "+"):
            more = once
            while more:
                more = (more & fits) << 1 & ~once
                once |= more
        reached = once | reached if repeat in ("*", "?") and repeat else once
        if not reached:
            return False
    return bool(reached >> len(name) & 1)


@functools.lru_cache(maxsize=4096)
def _places(piece: str, name: str) -> int:
    """The places of a name whose character a piece stands for, as a set of bits."""
    return sum(1 << i for i, character in enumerate(name) if _fits(piece, character))


def _fits(piece: str, character: str) -> bool:
    if piece == ".":
        return character != "\n"
    if piece == "\\d":
        return character.isdecimal()
    if piece.startswith("["):
        return any(low <= character <= (high or low) for low, high in re.findall(r"(\w)(?:-(\w))?", piece))
    return character == piece[-1]
