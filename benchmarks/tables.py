"""The suite's result as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .handling import ACTIONS, BARE
from .options import GROWTH, HANDLING, KERNELS, MEMORY, PRECISION, STEPS
from .peers import DORA, LIBRARIES, LORA, MAGNITUDE, OURS, PEERS
from .report import ABSENT, heading, shown_limit, table
from .steps import MERGED
from .variants import FLOOR, FULL

Row = dict[str, Any]


def markdown(result: Row) -> str:
    """Everything that was measured."""
    parts = [heading(result) + f"; {result['seconds']:.0f} s in all"]
    train = [row for row in result[STEPS] if row["kind"] == "train"]
    infer = [row for row in result[STEPS] if row["kind"] == "infer"]
    if train:
        parts += [_steps(train, "training step", LORA), _steps(train, "training step", DORA)]
        parts += [_magnitude(train, infer), _saved(train)]
        parts += [_steps(infer, "inference, adapters on", LORA), _steps(infer, "inference, adapters on", DORA)]
        parts.append(_steps(infer, "inference, merged", MERGED))
    sections: dict[str, Callable[[Any], str]] = {
        MEMORY: _memory,
        HANDLING: _handling,
        PRECISION: _precision,
        GROWTH: _growth,
        KERNELS: _kernels,
    }
    parts += [show(result[name]) for name, show in sections.items() if result.get(name)]
    parts.append(_notes(result))
    return "\n\n".join(part for part in parts if part) + "\n"


def names(method: str) -> list[str]:
    """The variants of a method: ours, then the peers'."""
    if method == MERGED:
        return [f"{library.name} {MERGED}" for library in LIBRARIES]
    return [library.variant(method) for library in LIBRARIES if method in library.methods]


def _columns(rows: Iterable[Row], method: str) -> list[str]:
    """The variants that at least one row has."""
    rows = list(rows)
    return [name for name in names(method) if any(name in row["ratios"] for row in rows)]


def short(name: str) -> str:
    """A column's head: the library's name."""
    return next((lib.name for lib in PEERS if name.startswith(f"{lib.name} ")), OURS.name)


def _steps(rows: list[Row], title: str, method: str) -> str:
    columns = _columns(rows, method)
    training = title.startswith("training")
    head = [f"{method}: {title} ÷ frozen model's", "frozen, ms", "limit", *map(short, columns)]
    head += [FULL] * training + ["ours ÷ best peer's"]
    lines = []
    for row in rows:
        shown = [_ratio(row["ratios"].get(name)) for name in columns]
        shown += [_ratio(row["ratios"].get(FULL))] * training
        limit = shown_limit(row["limits"].get(method))
        lines.append([row["name"], f"{row['floor_ms']:.1f}", limit, *shown, _ratio(best(row, method))])
    return table(head, lines)


def best(row: Row, method: str) -> Mapping[str, float] | None:
    """Ours over that of the fastest peer that computes the same; None without one."""
    peers = [row["over"][name] for name in names(method) if name in row["over"] and name not in row["differs"]]
    return max(peers, key=lambda ratio: ratio["median"], default=None)


def _ratio(ratio: Mapping[str, float] | None) -> str:
    return f"{ratio['median']:.2f}" if ratio else ABSENT


def _magnitude(train: list[Row], infer: list[Row]) -> str:
    lines = [
        [
            row["name"],
            shown_limit(row["limits"][MAGNITUDE]),
            *(_ratio(r["ratios"].get(MAGNITUDE)) for r in (row, other)),
        ]
        for row, other in zip(train, infer, strict=True)
    ]
    return table(["Magnitude ÷ frozen model's (no peer has it)", "limit", "training step", "inference"], lines)


def _saved(rows: list[Row]) -> str:
    columns = [*_columns(rows, LORA), *_columns(rows, DORA)]
    head = ["saved for backward, MiB", FLOOR, "limit for LoRA", *_with_method(columns), FULL]
    lines = [
        [row["name"], _mib(row["saved"][FLOOR]), _mib(row["saved_limit"])]
        + [_mib(row["saved"].get(name)) for name in [*columns, FULL]]
        for row in rows
    ]
    return table(head, lines)


def _with_method(columns: Iterable[str]) -> list[str]:
    return [name if " " in name else f"{OURS.name} {name}" for name in columns]


def _mib(size: float | None) -> str:
    return ABSENT if size is None else f"{size / 2**20:.2f}" if size < 2**23 else f"{size / 2**20:.0f}"


def _memory(rows: list[Row]) -> str:
    columns = [name for name in [FLOOR, *names(LORA), *names(DORA), MAGNITUDE, FULL] if name in rows[0]["peaks"]]
    head = ["peak resident memory of steps, MiB", "limit for LoRA", *_with_method(columns)]
    head = [text.removeprefix(f"{OURS.name} ") if text.endswith((FLOOR, FULL)) else text for text in head]
    lines = [[row["name"], _mib(row["limit"]), *(_mib(row["peaks"].get(name)) for name in columns)] for row in rows]
    return table(head, lines)


def _handling(found: Row) -> str:
    columns = [BARE, *(lib.name for lib in LIBRARIES if lib.name in found["ms"]["attach"])]
    lines = [[f"{action}, ms", *(_number(found["ms"][action].get(name)) for name in columns)] for action in ACTIONS]
    lines.append(["file, KiB", *(_number(size / 1024 if (size := found["files"].get(n)) else None) for n in columns)])
    return table([found["about"], *columns], lines)


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _precision(found: Row) -> str:
    columns = [lib.name for lib in LIBRARIES if lib.name in found["merged"] or lib.name in found["drift"]["float32"]]
    lines = [["error of a merged bfloat16 weight ÷ that of the exact one rounded once", "1"]]
    lines[0] += [_ratio_of(found["merged"].get(name)) for name in columns]
    for dtype, drifts in found["drift"].items():
        shown = [ABSENT if (d := drifts.get(name)) is None else f"{d:.1e}" if d else "0" for name in columns]
        lines.append([f"drift of a {dtype} base after {found['cycles']} cycles", "0", *shown])
    return table([found["about"], "limit", *columns], lines)


def _ratio_of(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"


def _growth(rows: list[Row]) -> str:
    columns = _columns(rows, LORA)
    head = ["growth: training step ÷ frozen model's", "frozen, ms", "limit", *map(short, columns), FULL]
    lines = [
        [row["name"], f"{row['floor_ms']:.1f}", shown_limit(row["limits"][LORA])]
        + [_ratio(row["ratios"].get(name)) for name in [*columns, FULL]]
        for row in rows
    ]
    return table(head, lines)


def _kernels(rows: list[Row]) -> str:
    columns = [name for name in (*names(LORA), *names(DORA), FULL) if any(name in row["ratios"] for row in rows)]
    shown = _with_method(columns)
    head = ["training step ÷ frozen model's", "frozen, ms", "TFLOP/s", "LoRA's limit", *shown]
    times = [
        [row["name"], f"{row['floor_ms']:.2f}", f"{row['floor_tflops']:.1f}", shown_limit(row["limits"][LORA])]
        + [_ratio(row["ratios"].get(name)) for name in columns]
        for row in rows
    ]
    counts = [
        [row["name"], *(f"{k['count']}" if (k := row["kernels"].get(name)) else ABSENT for name in (FLOOR, *columns))]
        for row in rows
    ]
    parts = [table(head, times), table(["kernels launched in a step", FLOOR, *shown], counts)]
    if rows[0]["peak"]:
        lines = [[row["name"], *(_mib(row["peak"].get(name)) for name in (FLOOR, *columns))] for row in rows]
        parts.append(table(["peak device memory of a step, MiB", FLOOR, *shown], lines))
    return "\n\n".join(parts)


def _notes(result: Row) -> str:
    """What is missing, and what is not the same."""
    skipped = [f"- {name}: {why}" for name, why in result["skipped"].items()]
    skipped += [f"- {KERNELS}: {why}"] if (why := result.get("skipped_kernels")) else []
    rows: Sequence[Row] = [*result[STEPS], *result.get(MEMORY, ()), *result.get(GROWTH, ()), *result.get(KERNELS, ())]
    gaps = [(row["name"], name, why) for row in rows for name, why in row["skipped"].items()]
    gaps += [
        (section, *pair)
        for section in (HANDLING, PRECISION)
        for pair in result.get(section, {}).get("skipped", {}).items()
    ]
    skipped += _grouped(gap for gap in gaps if not gap[2].endswith("is not installed") or gap[1] == "all")
    differs = _grouped((row["name"], name, why) for row in rows for name, why in row.get("differs", {}).items())
    parts = ["Skipped:\n\n" + "\n".join(skipped)] * bool(skipped)
    parts += ["Not the same function:\n\n" + "\n".join(differs)] * bool(differs)
    return "\n\n".join(parts)


def _grouped(gaps: Iterable[tuple[str, str, str]]) -> list[str]:
    """One line for each reason a variant has, with its rows."""
    found: dict[tuple[str, str], list[str]] = {}
    for row, name, why in gaps:
        found.setdefault((name, why), []).append(row)
    return [f"- {name} ({', '.join(dict.fromkeys(rows))}): {why}" for (name, why), rows in found.items()]
