"""The errors users meet. Each says where, what was given, what is allowed, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

E = TypeVar("E", bound="LoraparamError")


class LoraparamError(ValueError):
    """Base of every error raised on purpose by this library."""

    def at(self: E, place: str) -> E:
        """The same error with the place in front: inner code knows the fact, its caller the place."""
        return type(self)(f"{place!r}: {self}")


class TargetError(LoraparamError):
    """A target that matches nothing, or a parameter the method cannot be put on."""


class RankError(LoraparamError):
    """A rank outside ``1..min(out, in)``."""


class AttachError(LoraparamError):
    """An adapter operation that the model, or the adapters on it, do not allow.

    Attributes:
        dead: all dead targets, where ``lp.check`` raised it; the message names the first few.
    """

    dead: tuple[str, ...] = ()


class StateError(LoraparamError):
    """Factor tensors that do not fit: missing, unexpected, mis-shaped, or not finite."""


class FormatError(LoraparamError):
    """A file that is damaged, foreign, or made for another model."""


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """A clause naming the closest known words, or an empty string when nothing is close.

    Example:
        >>> nearest("q_prj", ["q_proj", "k_proj", "norm"])
        "; nearest: 'q_proj', 'k_proj'"
    """
    found = difflib.get_close_matches(word, sorted(set(known)), n=n, cutoff=0.6)
    return "; nearest: " + ", ".join(map(repr, found)) if found else ""


def listed(names: Iterable[str], most: int = 5) -> str:
    """Up to ``most`` names, quoted, then how many more there are.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        "'a', 'b' and 1 more"
    """
    names = list(names)
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
