"""Another rank for an adapter's low-rank pairs: the best there is, without forming B·A."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import FormatError
from ..formats import detect, known_format, write_content
from ..formats.content import Item
from ..formats.portable import padded
from ..formats.streams import check_free
from ..methods import BlockLoRA, DoRA, Factors
from ..methods.lowrank import LowRank
from .fitting import BaseLike, adapter_at, base_at
from .reports import Change, Changes, Progress, silent
from .spectra import Cut, pair_of, product_svd


def resize(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    base: BaseLike | None = None,
    format: str | None = None,
    options: dict[str, Any] | None = None,
    force: bool = False,
    progress: Progress[Any] = silent,
    **hints: Any,
) -> Changes:
    """Write an adapter at another rank, in its own format, and say what of each target was lost.

    Exactly one of ``rank``, ``energy`` and ``error`` says how much is kept. The singular value decomposition of s·B·A
    comes from the thin QR decompositions of both factors, so it is exact at O((out + in)·r²), and its first k triplets
    are the best of rank k. A larger rank pads with zeros. alpha stays as it is.

    A DoRA keeps its lengths: m·V/‖V‖ with V = W + s·B·A, in which s·B·A is shortened. The residual is that of s·B·A;
    the lengths of the rows stay exact, their directions move. Items without a pair (Full, Magnitude, …) stay as they
    are.

    Args:
        adapter: the adapter's file, or directory.
        out: where to.
        rank: of every pair, up to min(out, in) of its target.
        energy: the share of Σσ² to keep, in (0, 1].
        error: the largest ‖s·B·A − B'·A'‖ / ‖s·B·A‖ to allow, in [0, 1).
        base: model or checkpoint, where the format needs it.
        format: of the adapter, where it cannot be told from the file.
        options: what the format's writer takes, as for ``lp.save``.
        force: replace what is at ``out``; it may be ``adapter`` itself.
        progress: shows progress.
        hints: as for ``lp.load``.

    Raises:
        FormatError: a damaged file, nothing in it that has a rank, an ``out`` that exists.
        LoraparamError: not exactly one of the three, or one out of range.

    Example:
        >>> import loraparam as lp, tempfile
        >>> model = torch.nn.Linear(8, 6)
        >>> _ = lp.attach(model, lp.LoRA(r=4, init="gaussian"))
        >>> with torch.no_grad():
        ...     _ = model.parametrizations.weight[0].default.lora_B[:, :2].fill_(1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lp.save(model, f"{folder}/four")
        ...     done = lp.resize(f"{folder}/four", f"{folder}/one", rank=1)
        >>> [(row.path, row.rank, row.residual < 1e-6) for row in done.rows]
        [('weight', 1, True)]
    """
    cut, source, place = Cut(rank=rank, energy=energy, error=error), Path(adapter), Path(out)
    check_free(place, force)
    known = None if base is None else base_at(base)
    reader = detect(source) if format is None else known_format(format)
    content = adapter_at(source, known, reader.NAME, hints)
    if not any(isinstance(item.method, LowRank) for item in content.items):
        raise FormatError(f"{str(source)!r} holds no low-rank pair, so there is no rank to change")
    items, rows = [], []
    for item in progress(content.items, "resizing"):
        resized, row = _resized(item, cut)
        items.append(resized)
        rows.append(row)
    write_content(place, replace(content, items=tuple(items)), known, format=reader.NAME, **(options or {}))
    return Changes(str(place), tuple(rows), {})


def _resized(item: Item, cut: Cut) -> tuple[Item, Change]:
    kind = type(item.method).__name__
    if not isinstance(item.method, LowRank):
        return item, Change(item.path, item.shape, kind, None, None, 0.0, "has no rank; kept as it is")
    method, own = item.method, _pairs(item.method, item.factors)
    # Without s, which changes no share of the norm, and which may be beyond float32 where the factors are not.
    A, B = own["lora_A"].double(), own["lora_B"].double()
    U, S, Vh = product_svd(A, B)
    total, r, k = float(torch.linalg.vector_norm(S)), A.shape[-2], cut.rank or 0
    if k >= r:
        k = min(k, max(r, min(B.shape[-2], A.shape[-1])))
        pair = padded(A, B, k)
    else:
        k = cut.choose(S, total**2)
        pair = pair_of((U[..., :k], S[..., :k], Vh[..., :k, :]), torch.float64)
    # alpha stays, for there are files that do not say it; B takes up the change of s = alpha/r.
    resized = replace(method, r=k)
    grown = method.scale / resized.scale if resized.scale else 1.0
    new = pair[0].to(own["lora_A"].dtype), (pair[1] * grown).to(own["lora_B"].dtype)
    # What is written, less what was read, is a pair as well: its norm counts the rounding of the factors, too.
    rest = product_svd(torch.cat([A, new[0].double()], -2), torch.cat([B, -new[1].double() / grown], -1))[1]
    residual = float(torch.linalg.vector_norm(rest)) / total if total else 0.0
    moved = isinstance(method, DoRA) and residual > 1e-6
    note = "lengths kept; the residual is that of s·B·A, which moves directions" if moved else ""
    factors, norm = _joined(method, {**own, "lora_A": new[0], "lora_B": new[1]}), abs(method.scale) * total
    return replace(item, method=resized, factors=factors), Change(item.path, item.shape, kind, k, norm, residual, note)


def _pairs(method: LowRank, factors: Factors) -> Factors:
    """The factors as one pair, or as a stack of pairs: a ``BlockLoRA`` has one for each block."""
    if not isinstance(method, BlockLoRA):
        return factors
    if method.shared:  # one A; of B, the rows of some blocks do not act
        return method.plain(factors)
    return {key: factor.unflatten(-2, (sum(method.blocks), -1)) for key, factor in factors.items()}


def _joined(method: LowRank, factors: Factors) -> Factors:
    """The inverse of ``_pairs``, at any rank."""
    if not isinstance(method, BlockLoRA) or method.shared:
        return factors
    return {key: factor.flatten(-3, -2) for key, factor in factors.items()}
