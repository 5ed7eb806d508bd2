"""The training steps as bars, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .options import STEPS
from .peers import DORA, LORA
from .tables import names, short


def write(result: dict[str, Any], path: Path) -> str:
    """Draw the plot. Returns why there is none, or nothing."""
    rows = [row for row in result[STEPS] if row["kind"] == "train"]
    if not rows:
        return "no training step was measured"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "'matplotlib' is not installed"
    figure = Figure(figsize=(max(8.0, 1.1 * len(rows)), 8), layout="constrained")
    for axes, method in zip(figure.subplots(2, 1), (LORA, DORA), strict=True):
        _bars(axes, rows, method)
    machine = result["environment"]
    figure.suptitle(f"{machine['machine']}, {machine['threads']} threads, commit {machine['commit']}", fontsize=9)
    figure.savefig(path, dpi=120)
    return ""


def _bars(axes: Any, rows: list[dict[str, Any]], method: str) -> None:
    """Groups of bars: a group for each row, a bar for each library, a line at the limit."""
    variants = [name for name in names(method) if any(name in row["ratios"] for row in rows)]
    width = 0.85 / max(1, len(variants))
    for i, name in enumerate(variants):
        have = [(at, row["ratios"][name]["median"]) for at, row in enumerate(rows) if name in row["ratios"]]
        axes.bar([at + (i + 0.5) * width - 0.425 for at, _ in have], [y for _, y in have], width, label=short(name))
    limits = [(at, row["limits"][method]) for at, row in enumerate(rows) if row["limits"][method] is not None]
    axes.hlines(
        [y for _, y in limits],
        [at - 0.45 for at, _ in limits],
        [at + 0.45 for at, _ in limits],
        colors="black",
        linestyles="dashed",
        label="limit",
    )
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows], rotation=30, ha="right", fontsize=7)
    axes.set_ylabel(f"{method}: step ÷ frozen")
    axes.set_yscale("log")
    axes.set_yticks([1, 1.5, 2, 3, 5, 8], ["1", "1.5", "2", "3", "5", "8"])
    axes.legend(fontsize=7, ncols=7)
