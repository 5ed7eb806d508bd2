"""Several adapters as one, by what they add to the weights: Δᵢ = apply(W) − W, weighted by wᵢ.

Everything happens to the differences themselves. Averaging A and B apart would add cross terms, Bᵢ·Aⱼ with i ≠ j, that
none of the adapters has.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import FormatError, LoraparamError, listed, nearest
from ..finite import all_finite
from ..formats import write_content
from ..formats.bases import Base
from ..formats.content import Content, Item, difference
from ..formats.portable import at_most_full_rank, joined, part_of, plain
from ..formats.streams import check_free
from ..methods import Full, LoRA
from ..methods.base import is_int, is_number
from ..methods.lowrank import LowRank
from ..slices import overlap
from .entrywise import dare, generator_for, ties
from .fitting import Adapters, BaseLike, adapter_at, base_at, change, weighted
from .reports import Change, Changes, Progress, silent
from .spectra import Cut, cut_svd, left_out, pair_of, product_svd

How = Literal["cat", "linear", "svd", "ties", "dare"]
HOW: tuple[How, ...] = ("cat", "linear", "svd", "ties", "dare")
SUM_ERROR = 1e-10  # what "linear" may drop: singular values that are rounding


@dataclass(frozen=True)
class Part:
    """What one adapter has to say about a target: the adapter's place among them, its weight, and its item."""

    index: int
    weight: float
    item: Item


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How differences become one.

    Attributes:
        how: see ``combine``.
        cut: the rank of the result; None for the default of ``how``.
        density, seed: of ties and dare.
    """

    how: str
    cut: Cut | None
    density: float
    seed: int


def combine(
    adapters: Adapters,
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    how: How = "cat",
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    density: float | None = None,
    seed: int = 0,
    base: BaseLike | None = None,
    to: str = "loraparam",
    format: str | None = None,
    options: dict[str, Any] | None = None,
    force: bool = False,
    progress: Progress[Any] = silent,
    **hints: Any,
) -> Changes:
    """Write one adapter that adds to each weight what several add together, and say what of that was lost.

    A target that an adapter does not have counts as zero there. Ranks and scales may differ.

    - ``cat``: Δ = Σ wᵢΔᵢ, exactly: B = [w₁s₁B₁ w₂s₂B₂ …], A = [A₁; A₂; …], of rank Σrᵢ, at most min(out, in).
    - ``linear``: the same Δ at the least rank that holds it to rounding: below Σrᵢ where adapters share directions.
    - ``svd``: the best approximation of the same Δ of the rank, energy or error asked for; by default the largest rᵢ.
    - ``ties`` (Yadav et al. 2023, https://arxiv.org/abs/2306.01708): each wᵢΔᵢ is trimmed to its share ``density`` of
      largest entries; for each entry the sign of the sum is elected, and Δ is the mean of the entries of that sign.
    - ``dare`` (Yu et al. 2023, https://arxiv.org/abs/2311.03099): each entry of Δᵢ is dropped with probability
      1 − ``density`` and divided by ``density`` otherwise; Δ = Σ wᵢΔᵢ.

    The last two give matrices of full rank. They are kept whole, as ``Full`` deltas, unless a rank, energy or error is
    asked for. What a DoRA or Magnitude adds depends on the base weight, which they therefore need; a sum with one of
    them, or with a ``Full``, is a ``Full`` with cat and linear. A target that only one adapter has, at weight 1, stays
    as it is with these two.

    Args:
        adapters: {file: weight}, or files.
        out: the adapter to write.
        weights: w of each file. Default: 1.
        how: see above.
        rank, energy, error: at most one, for svd, ties and dare: as for ``lp.extract``.
        density: for ties and dare, in (0, 1]. Default: 0.5.
        seed: for dare; the same seed gives the same result.
        base: model or checkpoint, where the methods or the formats need it.
        to: the format to write.
        format: of the adapters, where it cannot be told from the files.
        options: what the writer takes, as for ``lp.save``.
        force: replace what is at ``out``.
        progress: shows progress.
        hints: as for ``lp.load``.

    Raises:
        FormatError: a damaged file, adapters of different models, a method that cannot be added up, an ``out`` that
            exists.
        LoraparamError: a setting out of range.

    Example:
        >>> import loraparam as lp, tempfile
        >>> model = torch.nn.Linear(8, 6)
        >>> _ = lp.attach(model, lp.LoRA(r=2), name="a"), lp.attach(model, lp.LoRA(r=3), name="b")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in "ab":
        ...         lp.save(model, f"{folder}/{name}", name=name)
        ...     done = lp.combine({f"{folder}/a": 0.7, f"{folder}/b": 0.3}, f"{folder}/ab")
        >>> [(row.path, row.rank, row.residual < 1e-6) for row in done.rows]
        [('weight', 5, True)]
    """
    recipe, place, given = _recipe(how, rank, energy, error, density, seed), Path(out), weighted(adapters, weights)
    check_free(place, force)
    known = None if base is None else base_at(base)
    contents = [(weight, adapter_at(file, known, format, hints)) for file, weight in given]
    items, rows = [], []
    for group in progress(_groups(contents, known), "combining"):
        item, row = _combined(group, recipe, known)
        items.append(item)
        rows.append(row)
    combined = Content(f"combination of {len(contents)} adapters", tuple(items))
    write_content(place, combined, known, format=to, **(options or {}))
    return Changes(str(place), tuple(rows), {})


def _recipe(
    how: str, rank: int | None, energy: float | None, error: float | None, density: float | None, seed: int
) -> Recipe:
    if how not in HOW:
        raise LoraparamError(f"how={how!r}; allowed: {listed(HOW)}{nearest(str(how), HOW)}")
    if density is None:
        density = 0.5
    elif how not in ("ties", "dare"):
        raise LoraparamError(f"density={density!r} is for how='ties' and 'dare'; how={how!r} keeps all entries")
    if not is_number(density) or not 0 < density <= 1:
        raise LoraparamError(f"density={density!r}; allowed: 0 < density <= 1")
    if not is_int(seed) or not 0 <= seed < 2**63:
        raise LoraparamError(f"seed={seed!r}; allowed: an integer from 0")
    asked = [value for value in (rank, energy, error) if value is not None]
    cut = Cut(rank=rank, energy=energy, error=error) if asked else None
    if cut is not None and how in ("cat", "linear"):
        raise LoraparamError(f"how={how!r} keeps all of the sum; how='svd' takes a rank, energy or error")
    return Recipe(how=how, cut=cut, density=density, seed=seed)


# --- which items belong together ------------------------------------------------------------------------------------


def _groups(contents: Sequence[tuple[float, Content]], base: Base | None) -> list[list[Part]]:
    """The parts of each target over all adapters; slices that differ between adapters are joined into the whole."""
    given = [replace(content, items=_all_items(content, base), replaced={}) for _, content in contents]
    found = []
    for parameter in dict.fromkeys(item.parameter for content in given for item in content.items):
        own = [replace(c, items=tuple(item for item in c.items if item.parameter == parameter)) for c in given]
        if _clash([item for content in own for item in content.items], base):
            own = [replace(content, items=tuple(joined(content, base))) for content in own]
        paths = dict.fromkeys(item.path for content in own for item in content.items)
        found += [[part for part in _parts(own, contents) if part.item.path == path] for path in paths]
    return found


def _parts(given: Sequence[Content], contents: Sequence[tuple[float, Content]]) -> list[Part]:
    weights = [weight for weight, _ in contents]
    return [Part(i, weights[i], item) for i, content in enumerate(given) for item in content.items]


def _all_items(content: Content, base: Base | None) -> tuple[Item, ...]:
    if content.replaced and base is None:
        raise FormatError(f"{content.source!r} replaces {listed(content.replaced)} as a whole; give the base")
    changes = [difference(p, v, base, content.source) for p, v in content.replaced.items() if base is not None]
    return (*content.items, *changes)


def _clash(items: Sequence[Item], base: Base | None) -> bool:
    """Whether two different slices of a parameter share an element."""
    paths = {item.path: item for item in items}
    if len(paths) == 1:
        return False
    parts = [part_of(item, base) for item in paths.values()]
    return any(overlap(a, b) for i, a in enumerate(parts) for b in parts[:i])


# --- one target -----------------------------------------------------------------------------------------------------


def _combined(group: Sequence[Part], recipe: Recipe, base: Base | None) -> tuple[Item, Change]:
    first, kind = group[0].item, type(group[0].item.method).__name__
    shapes = {part.item.shape for part in group if part.item.shape is not None}
    if len(shapes) > 1 or len({part.item.layout for part in group}) > 1:
        told = sorted({f"{part.item.shape} read as {part.item.layout}" for part in group})
        raise FormatError(f"{first.path!r} is {' and '.join(told)}: adapters of different models")
    sums = recipe.how in ("cat", "linear")
    if sums and len(group) == 1 and group[0].weight == 1 and type(first.method) is not LoRA:
        note = f"a {kind} that no other adapter has; kept as it is"
        return first, Change(first.path, first.shape, kind, getattr(first.method, "r", None), None, 0.0, note)
    group = [replace(part, item=plain(part.item)) for part in group]
    if recipe.how in ("ties", "dare") or any(type(part.item.method) is not LoRA for part in group):
        return _dense(group, recipe, base)
    # Each weight and scale goes into B, and is rounded once, at the end.
    A = torch.cat([part.item.factors["lora_A"].double() for part in group], -2)
    B = torch.cat([part.item.factors["lora_B"].double() * (part.weight * _scale(part.item)) for part in group], -1)
    _refuse_infinite(first, B.to(_dtype(group)))
    if recipe.how == "cat":
        new = at_most_full_rank(A, B)
    else:
        cut = Cut(error=SUM_ERROR) if recipe.how == "linear" else recipe.cut or Cut(rank=_largest_rank(group))
        U, S, Vh = product_svd(A, B)
        keep = cut.choose(S, float((S**2).sum()))
        new = pair_of((U[..., :keep], S[..., :keep], Vh[..., :keep, :]), torch.float64)
    new = new[0].to(_dtype(group)), new[1].to(_dtype(group))
    rest = product_svd(torch.cat([A, new[0].double()], -2), torch.cat([B, -new[1].double()], -1))[1]
    norm = float(torch.linalg.vector_norm(product_svd(A, B)[1]))
    return _lora(first, new, norm, float(torch.linalg.vector_norm(rest)) / norm if norm else 0.0)


def _refuse_infinite(item: Item, made: Tensor) -> None:
    if not all_finite(made):
        dtype = str(made.dtype).removeprefix("torch.")
        raise LoraparamError(f"{item.path!r}: the sum is not finite in {dtype}; give smaller weights")


def _scale(item: Item) -> float:
    assert isinstance(item.method, LoRA)
    return item.method.scale


def _largest_rank(group: Sequence[Part]) -> int | None:
    return max((part.item.method.r for part in group if isinstance(part.item.method, LowRank)), default=None)


def _dtype(group: Sequence[Part]) -> torch.dtype:
    """The widest of the factors, and float32 at least."""
    dtype = torch.float32
    for part in group:
        for factor in part.item.factors.values():
            dtype = torch.promote_types(dtype, factor.dtype)
    return dtype


def _lora(like: Item, new: tuple[Tensor, Tensor], norm: float, residual: float) -> tuple[Item, Change]:
    k = new[0].shape[-2]
    item = replace(like, method=LoRA(r=k), factors={"lora_A": new[0], "lora_B": new[1]}, fingerprint=None)
    return item, Change(like.path, like.shape, "LoRA", k, norm, residual)


def _dense(group: Sequence[Part], recipe: Recipe, base: Base | None) -> tuple[Item, Change]:
    """The combined difference as a dense tensor, then as a low-rank pair where a rank is asked for."""
    first = group[0].item
    deltas = [part.weight * change(part.item, base) for part in group]
    if recipe.how == "ties":
        delta = ties(deltas, recipe.density)
    elif recipe.how == "dare":
        labels = [(recipe.seed, part.index, first.path) for part in group]
        dropped = [dare(d, recipe.density, generator_for(*label)) for d, label in zip(deltas, labels, strict=True)]
        delta = torch.stack(dropped).sum(0)
    else:
        delta = torch.stack(deltas).sum(0)
    dtype, norm = _dtype(group), float(torch.linalg.vector_norm(delta))
    _refuse_infinite(first, delta.to(dtype))
    part = part_of(first, base)
    layout = first.layout if part is None else part.layout(first.layout)
    rank = _largest_rank(group)
    cut = recipe.cut or (Cut(rank=rank) if recipe.how == "svd" and rank is not None else None)
    if cut is None or not delta.dim() or not layout.is_matrix(delta.shape):
        diff = delta.to(dtype)
        residual = float(torch.linalg.vector_norm(diff.double() - delta)) / norm if norm else 0.0
        item = replace(first, method=Full(), factors={"diff": diff}, fingerprint=None)
        return item, Change(first.path, first.shape, "Full", None, norm, residual)
    matrix = layout.matrix(delta)
    new = pair_of(cut_svd(matrix, cut, seed=recipe.seed), dtype)
    return _lora(first, new, norm, left_out(matrix, *new))
