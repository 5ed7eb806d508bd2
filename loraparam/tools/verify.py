"""Whether an adapter does on a base what it should: it fits, it acts, it stays finite, it survives being saved."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import FormatError, LoraparamError
from ..finite import all_finite
from ..formats import detect, known_format, native, read_content, write_content
from ..formats.bases import Base
from ..formats.content import Content, Item, difference
from .fitting import BaseLike, Target, base_at, by_parameter, change, check_bases, fit, update
from .reports import Progress, silent

NEUTRAL = 1e-6  # a fresh DoRA changes W by the rounding of its magnitudes, 1e-7·‖W‖


@dataclass(frozen=True)
class Verified:
    """What ``verify`` found; true where it found nothing.

    Attributes:
        adapter: the file or directory.
        checked: how many targets were put on the base.
        findings: [(target, what is wrong)].
        notes: what is worth knowing, and no fault.
    """

    adapter: str
    checked: int
    findings: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**asdict(self), "ok": bool(self)}

    def __str__(self) -> str:
        lines = [f"{place}: {what}" for place, what in self.findings]
        lines += [f"note: {note}" for note in self.notes]
        found = f"{len(self.findings)} found" if self.findings else "fits, acts, stays finite, comes back from a file"
        return "\n".join([*lines, f"{self.adapter}: {self.checked} targets checked; {found}"])


def verify(
    base: BaseLike,
    adapter: str | os.PathLike[str],
    *,
    format: str | None = None,
    progress: Progress[Any] = silent,
    **hints: Any,
) -> Verified:
    """Check an adapter against its base, one tensor at a time.

    - It can be read, and each target fits: there is such a parameter, of that shape, and the base is the one a DoRA or
      Magnitude was trained on.
    - Each target acts: it changes the weight, by more than rounding.
    - Factors and merged weights are finite, in the base's dtype.
    - Saved and loaded again, in the native format every bit is the same; in its own format the merged weights are.

    Args:
        base: a model, a safetensors file, or a directory of shards with their index.
        adapter: the adapter's file, or directory.
        format: of the adapter, where it cannot be told from the file.
        progress: shows progress.
        hints: as for ``lp.load``.

    Raises:
        FormatError: the base cannot be read, or there is nothing at ``adapter``. An adapter that cannot be read is a
            finding.

    Example:
        >>> import loraparam as lp, tempfile
        >>> model = torch.nn.Linear(4, 6)
        >>> _ = lp.attach(model, lp.LoRA(r=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lp.save(model, f"{folder}/fresh")
        ...     lp.detach(model)
        ...     print(lp.verify(model, f"{folder}/fresh").findings)
        (('weight', 'dead: it changes nothing'),)
    """
    known, source = base_at(base), Path(adapter)
    if not source.exists():
        raise FormatError(f"{str(source)!r} does not exist")
    try:
        reader = detect(source) if format is None else known_format(format)
        content = read_content(source, known, format=reader.NAME, **hints)
    except FormatError as error:
        return Verified(str(source), 0, ((str(source), f"cannot be read: {error}"),), ())
    findings: list[tuple[str, str]] = []
    notes: list[str] = []
    targets = _fitting(content, known, findings)
    for parameter, own in progress(list(by_parameter(targets).items()), "verifying"):
        _act(parameter, own, known, findings, notes)
    if not findings:
        _round_trip(content, known, reader.NAME, findings, notes)
    return Verified(str(source), len(targets), tuple(findings), tuple(notes))


def _fitting(content: Content, base: Base, findings: list[tuple[str, str]]) -> list[Target]:
    """The targets that fit; each one that does not is a finding."""
    found, items = [], list(content.items)
    for path, value in content.replaced.items():
        try:
            items.append(difference(path, value, base, content.source))
        except LoraparamError as error:
            findings.append((path, str(error)))
    for item in items:
        try:
            found += fit(replace(content, items=(item,), replaced={}), base)
        except LoraparamError as error:
            findings.append((item.path, str(error)))
    if not findings:
        try:
            fit(content, base)
        except LoraparamError as error:  # what only shows in all of them together
            findings.append((content.source, str(error)))
    return found


def _act(
    parameter: str, targets: Sequence[Target], base: Base, findings: list[tuple[str, str]], notes: list[str]
) -> None:
    """Put the targets of one parameter on it."""
    weight = base.tensor(parameter)
    for target in targets:
        try:
            check_bases(weight, [target])
        except FormatError as error:
            findings.append((target.item.path, str(error)))
        added, size = (float(torch.linalg.vector_norm(t.double())) for t in (change(target.item, base), weight))
        additive = target.item.method.additive
        if not additive and size == 0:
            notes.append(f"{target.item.path}: the base is zero, which {type(target.item.method).__name__} leaves zero")
        elif added <= (0.0 if additive else NEUTRAL * size):
            findings.append((target.item.path, "dead: it changes nothing"))
    new = update(weight.clone(), targets)
    if not all_finite(new):
        findings.append((parameter, f"the merged weight is not finite in {str(weight.dtype).removeprefix('torch.')}"))
    elif (
        torch.equal(new, weight)
        and bool(weight.any())
        and all(place != t.item.path for place, _ in findings for t in targets)
    ):
        dtype = str(weight.dtype).removeprefix("torch.")
        notes.append(f"{parameter}: all of the change is below the rounding of {dtype}; merging it has no effect")


def _round_trip(content: Content, base: Base, format: str, findings: list[tuple[str, str]], notes: list[str]) -> None:
    """Save and load: bit for bit in the native format, and to the same weights in the adapter's own."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_content(place / "native", content, base, format=native.NAME)
        again = {item.path: item for item in read_content(place / "native", base, format=native.NAME).items}
        findings += [
            (item.path, "does not come back from a native file as it was")
            for item in content.items
            if not _same(item, again.get(item.path))
        ]
        if format == native.NAME:
            return
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                write_content(place / "own", content, base, format=format)
            notes += dict.fromkeys(f"writing {format}: {warning.message}" for warning in said)
            back = read_content(place / "own", base, format=format)
        except LoraparamError as error:
            notes.append(f"not written back as {format}: {error}")
            return
        old, new = by_parameter(fit(content, base)), by_parameter(fit(back, base))
        for parameter in {**old, **new}:
            weight = base.tensor(parameter).double()
            merged = [update(weight.clone(), side.get(parameter, [])) for side in (old, new)]
            apart, moved = (float(torch.linalg.vector_norm(merged[0] - other)) for other in (merged[1], weight))
            if apart > 1e-5 * moved:
                findings.append((parameter, f"comes back from a {format} file changed, by {apart / (moved or 1):.1e}"))


def _same(one: Item, other: Item | None) -> bool:
    return (
        other is not None
        and (one.method, one.layout, one.fingerprint) == (other.method, other.layout, other.fingerprint)
        and one.factors.keys() == other.factors.keys()
        and all(torch.equal(factor, other.factors[key]) for key, factor in one.factors.items())
    )
