"""Telling who asks what becomes of each adapted parameter that is read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

# Called with ((id of the module, parameter name), "read" | "factored" | "merged") while ``watching``.
Watcher = Callable[[Any, str], None]
_watchers: list[Watcher] = []


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Inside: ``watcher`` is told of each read of an adapted parameter, and of what becomes of it."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def tell(site: Any, event: str) -> None:
    """Tell the watchers."""
    for watcher in _watchers:
        watcher(site, event)


def watched() -> bool:
    """Whether anybody is watching."""
    return bool(_watchers)
