"""What is in an adapter file: methods, ranks, sizes, and the spectrum of each difference."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraparamError
from ..formats import detect, known_format
from ..formats.content import Content, Item
from ..formats.files import write_whole
from ..formats.portable import plain
from ..methods import Full
from ..methods.lowrank import LowRank
from ..plans import table
from .fitting import BaseLike, adapter_at, base_at
from .reports import Progress, silent
from .spectra import effective_rank, product_svd, stable_rank

LARGEST = 2048  # rows or columns up to which a dense difference is decomposed


@dataclass(frozen=True)
class Look:
    """One target of an adapter.

    Attributes:
        path: the target.
        method: its method.
        shape: of the parameter, where it is known.
        rank: r, where the method has one.
        parameters: how many numbers the file holds for it.
        dtype: of those.
        norm: ‖Δ‖ in the Frobenius norm: of s·B·A, or of a full difference. None for other methods, whose difference
            depends on the base.
        effective_rank: exp of the entropy of σ/Σσ (Roy and Vetterli 2007); over experts, the mean.
        stable_rank: Σσ²/σ₁² (Rudelson and Vershynin 2007); over experts, the mean.
        spectrum: the singular values, largest first; over experts, the root of the mean square.
    """

    path: str
    method: str
    shape: tuple[int, ...] | None
    rank: int | None
    parameters: int
    dtype: str
    norm: float | None = None
    effective_rank: float | None = None
    stable_rank: float | None = None
    spectrum: tuple[float, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """What an adapter file holds; prints as a table.

    Attributes:
        path: the file or directory.
        format: the format it is in.
        rows: its targets.
        replaced: {parameter stored whole: its shape}.
    """

    path: str
    format: str
    rows: tuple[Look, ...]
    replaced: dict[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        """How many numbers the file holds for its targets."""
        return sum(row.parameters for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**asdict(self), "parameters": self.parameters}

    def __str__(self) -> str:
        head = ["target", "shape", "method", "r", "parameters", "dtype", "norm", "effective", "stable", "spectrum"]
        lines = [head] + [
            [
                row.path,
                _cell(row.shape),
                row.method,
                _cell(row.rank),
                f"{row.parameters:,}",
                row.dtype,
                _cell(row.norm, ".4g"),
                _cell(row.effective_rank, ".2f"),
                _cell(row.stable_rank, ".2f"),
                _spectrum(row.spectrum),
            ]
            for row in self.rows
        ]
        whole = [f"replaces {name} {shape}" for name, shape in self.replaced.items()]
        count = f"{len(self.rows)} target{'s' * (len(self.rows) != 1)}, {self.parameters:,} parameters"
        return "\n".join([f"{self.path}: {self.format}", table(lines, right=(3, 4, 6, 7, 8)), *whole, count])


def inspect_file(
    path: str | os.PathLike[str],
    *,
    base: BaseLike | None = None,
    format: str | None = None,
    progress: Progress[Any] = silent,
    **hints: Any,
) -> Inspection:
    """Look into an adapter file.

    The singular values of s·B·A come from thin QR decompositions of its factors; no dense matrix is formed.

    Args:
        path: the adapter's file, or directory.
        base: model or checkpoint, where the format needs it.
        format: of the file, where it cannot be told from it.
        progress: shows progress.
        hints: as for ``lp.load``.

    Raises:
        FormatError: the file is damaged or of an unknown format, or needs the base.

    Example:
        >>> import loraparam as lp, tempfile
        >>> model = torch.nn.Linear(4, 6)
        >>> _ = lp.attach(model, lp.LoRA(r=2, init="gaussian"))
        >>> with torch.no_grad():
        ...     for factor in lp.parameters(model):
        ...         _ = factor.copy_(torch.eye(*factor.shape))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lp.save(model, f"{folder}/adapter")
        ...     (row,) = lp.inspect_file(f"{folder}/adapter").rows
        >>> row.rank, row.spectrum, row.effective_rank, row.stable_rank
        (2, (1.0, 1.0), 2.0, 2.0)
    """
    reader = detect(Path(path)) if format is None else known_format(format)
    known = None if base is None else base_at(base)
    if known is None and "names" in reader.HINTS:
        hints = {"names": "file", **hints}  # where only a model tells which modules the names mean
    content: Content = adapter_at(path, known, reader.NAME, hints)
    rows = tuple(_look(item) for item in progress(content.items, "decomposing"))
    return Inspection(str(path), reader.NAME, rows, {k: tuple(v.shape) for k, v in content.replaced.items()})


def _look(item: Item) -> Look:
    factors = item.factors.values()
    dtypes = sorted({str(factor.dtype).removeprefix("torch.") for factor in factors})
    look: dict[str, Any] = {
        "path": item.path,
        "method": type(item.method).__name__,
        "shape": item.shape,
        "rank": getattr(item.method, "r", None),
        "parameters": sum(factor.numel() for factor in factors),
        "dtype": ", ".join(dtypes),
    }
    S = _singular_values(item)
    if isinstance(item.method, Full):
        look["norm"] = float(torch.linalg.vector_norm(item.factors["diff"], dtype=torch.float64))
    if S is None or not S.numel():  # a parameter without elements has none
        return Look(**look)
    rows = S.reshape(-1, S.shape[-1])
    look["norm"] = float(torch.linalg.vector_norm(S))
    look["effective_rank"] = sum(map(effective_rank, rows)) / len(rows)
    look["stable_rank"] = sum(map(stable_rank, rows)) / len(rows)
    return Look(**look, spectrum=tuple((rows**2).mean(0).sqrt().tolist()))


def _singular_values(item: Item) -> Tensor | None:
    """Of s·B·A, or of a full difference that is a matrix and not too large; (*batch, k)."""
    item = plain(item)
    if isinstance(item.method, LowRank):
        return abs(item.method.scale) * product_svd(item.factors["lora_A"], item.factors["lora_B"])[1]
    if not isinstance(item.method, Full):
        return None
    diff, layout = item.factors["diff"], item.layout
    # The layout is the whole parameter's; one expert of a stack has a dim less.
    if layout.batch and item.shape is not None and diff.dim() < len(item.shape):
        layout = layout.select(layout.batch[0])
    if not diff.dim() or not layout.is_matrix(diff.shape) or min(layout.matrix(diff).shape[-2:]) > LARGEST:
        return None
    S: Tensor = torch.linalg.svdvals(layout.matrix(diff.double()))
    return S


def _cell(value: Any, spec: str = "") -> str:
    return "-" if value is None else format(value, spec) if spec else str(value)


def _spectrum(values: Sequence[float], most: int = 5) -> str:
    """The largest few and the smallest."""
    if not values:
        return "-"
    shown = [f"{value:.3g}" for value in values[:most]]
    return " ".join(shown + ([f"… {values[-1]:.3g}"] if len(values) > most else []))


def plot(inspection: Inspection, path: str | os.PathLike[str]) -> None:
    """Draw each target's norm, and its singular values, into a picture; its suffix says which kind.

    Raises:
        LoraparamError: matplotlib is not installed, or does not know the suffix; nothing has a norm.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LoraparamError("a plot needs matplotlib; pip install 'loraparam[plot]'") from None
    rows = [row for row in inspection.rows if row.norm is not None]
    if not rows:
        raise LoraparamError(f"{inspection.path!r}: no target has a norm without its base, so there is nothing to plot")
    figure = Figure(figsize=(12, max(3.0, 0.22 * len(rows) + 1.5)), layout="constrained")
    norms, values = figure.subplots(1, 2)
    norms.barh([row.path for row in rows], [row.norm for row in rows])
    norms.invert_yaxis()
    norms.set(xlabel="‖Δ‖ (Frobenius)", title="norms")
    norms.tick_params(axis="y", labelsize=7)
    for row in rows:
        if any(row.spectrum):
            values.plot(range(1, len(row.spectrum) + 1), [v or float("nan") for v in row.spectrum], marker=".", lw=0.8)
    values.set(xlabel="index", yscale="log", title="singular values, one line per target")
    kind, picture = Path(path).suffix.removeprefix(".") or "png", io.BytesIO()
    if kind not in figure.canvas.get_supported_filetypes():
        kinds = ", ".join(sorted(figure.canvas.get_supported_filetypes()))
        raise LoraparamError(f"{os.fspath(path)!r}: {kind!r} is no kind of picture; allowed suffixes: {kinds}")
    figure.savefig(picture, format=kind)
    write_whole(Path(path), picture.getvalue())
