"""What the tools take and give beside files: progress, and reports that print as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from ..plans import table

T = TypeVar("T")

# Called with what is about to be worked through and a word for it; yields it on, and may count.
Progress = Callable[[Sequence[T], str], Iterable[T]]


def silent(items: Sequence[T], what: str) -> Iterable[T]:
    """No progress shown."""
    return items


@dataclass(frozen=True)
class Change:
    """What was done to one target.

    Attributes:
        path: the target.
        shape: of the parameter; None where the file does not say.
        method: what stands for it now.
        rank: of the result; None where it has none.
        norm: ‖Δ‖ in the Frobenius norm, of what was to be kept; None where it was not computed.
        residual: ‖Δ − Δ'‖ / ‖Δ‖, what was lost of it.
        note: what else there is to say.
    """

    path: str
    shape: tuple[int, ...] | None
    method: str
    rank: int | None
    norm: float | None
    residual: float
    note: str = ""


@dataclass(frozen=True)
class Changes:
    """What a tool wrote: one row per target, printed as a table.

    Attributes:
        out: the file or directory written.
        rows: the targets in it.
        left_out: {what is not in it: why}.
    """

    out: str
    rows: tuple[Change, ...]
    left_out: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = ["target", "shape", "method", "rank", "norm", "residual"]
        lines = [head] + [
            [
                row.path,
                "-" if row.shape is None else str(row.shape),
                row.method,
                "-" if row.rank is None else str(row.rank),
                "-" if row.norm is None else f"{row.norm:.4g}",
                f"{row.residual:.2e}",
            ]
            for row in self.rows
        ]
        notes = [f"{row.path}: {row.note}" for row in self.rows if row.note]
        notes += [f"left out {name}: {why}" for name, why in self.left_out.items()]
        return "\n".join([table(lines, right=(3, 4, 5)), *notes, f"wrote {self.out}"])
