"""Adapter files. The only floor that touches files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters import check_known, check_name
from ..errors import FormatError, listed, nearest
from ..plans import Plan
from ..suspension import refuse_suspended
from . import native

# {name: module with save(model, path, name), load(model, path, name, **hints) and recognises(path)}
FORMATS = {native.NAME: native}

# The hints each format's reader takes.
HINTS: dict[str, tuple[str, ...]] = {native.NAME: ("check_base",)}


def save(model: nn.Module, path: str | os.PathLike[str], *, name: str = "default", format: str = native.NAME) -> None:
    """Write one adapter to a file, whole or not at all.

    Args:
        model: a model with the adapter.
        path: where to; missing folders are made.
        name: the adapter's name.
        format: "loraparam", one safetensors file.

    Raises:
        AttachError: there is no adapter of this name.
        FormatError: an unknown format.
        StateError: a factor is not finite.

    Example:
        >>> import loraparam as lp, tempfile, torch
        >>> model = nn.Linear(4, 6)
        >>> _ = lp.attach(model, lp.DoRA(r=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lp.save(model, f"{folder}/adapter.safetensors")
        ...     lp.detach(model)
        ...     print(len(lp.load(model, f"{folder}/adapter.safetensors")))
        1
    """
    refuse_suspended(model)
    check_known(model, name)
    _known_format(format).save(model, Path(path), name)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    format: str | None = None,
    **hints: Any,
) -> Plan:
    """Attach the adapter in a file, in place; a file that is not understood changes nothing.

    Args:
        model: the model the adapter was made for, with or without other adapters.
        path: the file.
        name: the name it gets here.
        format: as for ``save``; by default it is told from the file.
        hints: ``check_base=False`` takes a DoRA or Magnitude whose base weight was another one.

    Returns:
        What was attached.

    Raises:
        FormatError: the file is damaged, of an unknown format, or does not fit the model; or an unknown hint.
        AttachError: a target carries an adapter of this name already.
    """
    refuse_suspended(model)
    check_name(name)
    path = Path(path)
    reader = _known_format(format) if format is not None else _detect(path)
    allowed = HINTS[reader.NAME]
    for hint in hints:
        if hint not in allowed:
            raise FormatError(
                f"unknown hint {hint!r} for {reader.NAME}; allowed: {listed(allowed)}{nearest(hint, allowed)}"
            )
    plan: Plan = reader.load(model, path, name, **hints)
    return plan


def _known_format(format: str) -> Any:
    if format not in FORMATS:
        raise FormatError(f"unknown format {format!r}; allowed: {listed(FORMATS)}{nearest(str(format), FORMATS)}")
    return FORMATS[format]


def _detect(path: Path) -> Any:
    if not path.exists():
        raise FormatError(f"{str(path)!r} does not exist")
    for reader in FORMATS.values():
        if reader.recognises(path):
            return reader
    raise FormatError(f"{str(path)!r} is in no known format; known: {listed(FORMATS)}")
