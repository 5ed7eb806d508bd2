"""From one file format to another, through the one form they share."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..formats import detect, known_format, write_content
from ..formats.streams import check_free
from .fitting import BaseLike, adapter_at, base_at


@dataclass(frozen=True)
class Converted:
    """What ``convert`` did.

    Attributes:
        out: the file or directory written.
        read, written: the two formats.
        targets: the paths adapted; replaced: those stored whole.
    """

    out: str
    read: str
    written: str
    targets: tuple[str, ...]
    replaced: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        count = len(self.targets) + len(self.replaced)
        return f"{count} target{'s' * (count != 1)} from {self.read} to {self.written}\nwrote {self.out}"


def convert(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str,
    base: BaseLike | None = None,
    format: str | None = None,
    options: dict[str, Any] | None = None,
    force: bool = False,
    **hints: Any,
) -> Converted:
    """Write an adapter in another format, with the same effective weights; what it cannot hold is refused.

    Args:
        adapter: the adapter's file, or directory.
        out: where to; a directory for formats that are one.
        to: the format to write.
        base: model or checkpoint, where one of the formats needs it; the error says so.
        format: of ``adapter``, where it cannot be told from the file.
        options: what the writer takes, as for ``lp.save``.
        force: replace what is at ``out``.
        hints: what the reader takes, as for ``lp.load``.

    Raises:
        FormatError: a damaged file, content that the format cannot hold (with the reason), a base that is needed,
            an ``out`` that exists.

    Example:
        >>> import loraparam as lp, tempfile, torch
        >>> model = torch.nn.Linear(4, 6)
        >>> _ = lp.attach(model, lp.LoRA(r=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lp.save(model, f"{folder}/one")
        ...     done = lp.convert(f"{folder}/one", f"{folder}/other", to="loraparam")
        >>> done.read, done.targets
        ('loraparam', ('weight',))
    """
    source, place = Path(adapter), Path(out)
    check_free(place, force)
    known = None if base is None else base_at(base)
    reader = detect(source) if format is None else known_format(format)
    known_format(to)
    content = adapter_at(source, known, reader.NAME, hints)
    write_content(place, content, known, format=to, **(options or {}))
    targets = tuple(item.path for item in content.items)
    return Converted(str(place), reader.NAME, to, targets, tuple(content.replaced))
