"""Adapter files. The only floor that touches files."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters import check_known, check_name
from ..errors import FormatError, listed, nearest
from ..plans import Plan
from ..sharding import one_writes
from ..suspension import refuse_suspended
from ..training import parameters
from . import native
from .bases import Base, ModelBase
from .content import Content, attach_content, content_of, refuse_unusable
from .files import PICKLES


class _Formats(Mapping[str, Any]):
    """Each reader and writer by name, imported when it is asked for: together they take as long as all the rest.

    formats/content.py says what such a module has. The order is that of detection: a bare "lora_A" is kohya's below a
    name of its own, else loralib's.
    """

    _names = (native.NAME, "peft", "kohya", "loralib", "loratorch", "diffusers")

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return native if name == native.NAME else importlib.import_module(f"{__name__}.{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


FORMATS: Mapping[str, Any] = _Formats()


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    format: str = native.NAME,
    **options: Any,
) -> None:
    """Write one adapter to a file, whole or not at all.

    Where its factors are in parts on several processes (FSDP2, tensor parallelism), all of them must call this: they
    gather, and the first writes.

    Args:
        model: a model with the adapter.
        path: where to; missing folders are made.
        name: the adapter's name.
        format: "loraparam", one safetensors file; "peft", a directory; "kohya" and "diffusers", one safetensors file;
            "loralib" or "loratorch", what their ``lora_state_dict`` gives, as ``torch.save`` writes it, or as
            safetensors where the name ends so.
        options: what the format's writer takes (its module's ``write``): loralib's and LoRA-Torch's ``alpha``, the one
            to rescale B to where targets need several, or another than they were trained with; kohya's ``flavor`` and
            ``prefix``.

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
    check_known(model, name, one=True)
    content = content_of(model, name)
    if one_writes(parameters(model, name)):
        write_content(path, content, ModelBase(model), format=format, **options)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    format: str | None = None,
    check_base: bool = True,
    **hints: Any,
) -> Plan:
    """Attach the adapter in a file, in place; a file that is not understood changes nothing.

    Args:
        model: the model the adapter was made for, with or without other adapters.
        path: the file.
        name: the name it gets here.
        format: as for ``save``; by default it is told from the file.
        check_base: refuse a DoRA or Magnitude whose base weight was another one, where the file says so.
        hints: what the format's files do not say: ``prefix``, the part of the file to load, or a map of the file's
            prefixes to module paths; for "peft" also ``adapter``, the name of one in a directory of its own, and
            ``out_proj``, how often ("once", "twice") the delta of an attention's output projection counts. loralib's
            and LoRA-Torch's need ``alpha``, the lora_alpha of training, and for a MergedLinear ``enable_lora``, its
            list of booleans.

    Returns:
        What was attached.

    Raises:
        FormatError: the file is damaged, of an unknown format, or does not fit the model; or an unknown hint.
        AttachError: a target carries an adapter of this name already.
    """
    refuse_suspended(model)
    check_name(name)
    content = read_content(path, ModelBase(model), format=format, also=("check_base",), **hints)
    return attach_content(model, content, name, check_base=check_base)


def read_content(
    path: str | os.PathLike[str],
    base: Base | None,
    *,
    format: str | None = None,
    also: tuple[str, ...] = (),
    **hints: Any,
) -> Content:
    """What an adapter file says.

    Args:
        path: the file, or the directory of a format that has one.
        base: what the adapter goes onto, where it is known.
        format: as for ``load``.
        also: what the caller takes beside the reader's own hints, to be named in its error.
        hints: as for ``load``.

    Raises:
        FormatError: the file is damaged or of an unknown format, or needs the base; or an unknown hint; or values that
            nothing computes with.
    """
    path = Path(path)
    reader = known_format(format) if format is not None else detect(path)
    _check_keywords("hint", hints, reader.HINTS, reader.NAME, also)
    content: Content = reader.read(path, base, **hints)
    refuse_unusable(content)
    return content


def write_content(
    path: str | os.PathLike[str], content: Content, base: Base | None, *, format: str, **options: Any
) -> None:
    """Write an adapter in a format, whole or not at all.

    Raises:
        FormatError: an unknown format or option, or content that the format cannot hold.
    """
    writer = known_format(format)
    _check_keywords("option", options, writer.OPTIONS, format)
    writer.write(Path(path), content, base, **options)


def _check_keywords(
    kind: str, given: dict[str, Any], own: tuple[str, ...], format: str, also: tuple[str, ...] = ()
) -> None:
    allowed = (*also, *own)
    for key in given:
        if key not in allowed:
            known = f"allowed: {listed(allowed, len(allowed))}{nearest(key, allowed)}"
            raise FormatError(f"unknown {kind} {key!r} for {format}; {known}")


def _known() -> str:
    return listed(FORMATS, len(FORMATS))


def known_format(format: str) -> Any:
    """The module of a format, by name."""
    if format not in FORMATS:
        raise FormatError(f"unknown format {format!r}; allowed: {_known()}{nearest(str(format), FORMATS)}")
    return FORMATS[format]


def detect(path: Path) -> Any:
    """The module of the format a file is in."""
    if not path.exists():
        raise FormatError(f"{str(path)!r} does not exist")
    if path.suffix in PICKLES and path.is_file():
        raise FormatError(
            f"{str(path)!r} is a file of torch.save, which is opened only where its format is named: give format=, "
            "such as 'loralib'; its tensors are read then, and no code is run"
        )
    for reader in FORMATS.values():
        if reader.recognises(path):
            return reader
    raise FormatError(f"{str(path)!r} is in no known format; known: {_known()}")
