"""A full fine-tune as an adapter: the best low-rank approximation of each weight's change.

Δ = W_tuned − W_base, Δ ≈ B·A by the truncated singular value decomposition, the best of its rank in the Frobenius norm
(Eckart and Young 1936); large matrices by random projection (Halko et al. 2011, https://arxiv.org/abs/0909.4061).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError, listed
from ..finite import all_finite
from ..formats import write_content
from ..formats.bases import Base
from ..formats.content import Content, Item
from ..formats.streams import DTYPES, check_free
from ..layouts import Layout
from ..methods import Full, LoRA
from .fitting import BaseLike, base_at
from .reports import Change, Changes, Progress, silent
from .spectra import Cut, cut_svd, left_out, pair_of
from .told import told_layouts

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # state of norms, which no adapter holds


def extract(
    base: BaseLike,
    tuned: BaseLike,
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    full: bool = False,
    strict: bool = True,
    layouts: Mapping[str, Layout] | None = None,
    to: str = "loraparam",
    options: dict[str, Any] | None = None,
    force: bool = False,
    seed: int = 0,
    progress: Progress[Any] = silent,
) -> Changes:
    """Write the difference between two checkpoints as a LoRA adapter, and say what of each tensor it does not hold.

    Exactly one of ``rank``, ``energy`` and ``error`` says how much is kept. One pair of tensors is in memory at a time.
    What changed and has no matrix form (biases, norms) is written as ``Full`` deltas with ``full=True``; without it,
    it is in the report's ``left_out``, as is all else that the adapter lacks.

    Args:
        base, tuned: each a model, a safetensors file, or a directory of shards with their index.
        out: the adapter to write.
        rank: of every pair; that of the matrix, where it is smaller.
        energy: the share of Σσ² to keep, in (0, 1]: each tensor gets the smallest rank that does.
        error: the largest ‖Δ − B·A‖ / ‖Δ‖ to allow, in [0, 1); the rounding of the factors to float32 comes on top.
        full: keep biases, norms and other vectors, whole.
        strict: tensors that only one of the two has, or that differ in shape, are an error; otherwise they are
            reported in ``left_out``.
        layouts: {pattern of a parameter's path, with ``*``: how it reads as a matrix}, where base does not say. In a
            checkpoint that is taken to be (out, in, …), and (E, out, in) for 3-D tensors that are not called "weight",
            as expert stacks are not. Embeddings are known by the names that models give them, and weights that are
            stored (in, out), as GPT-2's, by the sizes of their biases.
        to: the format to write.
        options: what the writer takes, as for ``lp.save``.
        force: replace what is at ``out``.
        seed: of the random projections.
        progress: shows progress.

    Raises:
        FormatError: damaged files, tensors without a counterpart or not finite, an ``out`` that exists.
        LoraparamError: not exactly one of the three, or one out of range.

    Example:
        >>> import loraparam as lp, tempfile
        >>> base, tuned = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
        >>> _ = tuned.load_state_dict(base.state_dict())
        >>> with torch.no_grad():
        ...     _ = tuned.weight.add_(torch.outer(torch.ones(4), torch.arange(6.0)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = lp.extract(base, tuned, f"{folder}/adapter", error=1e-3)
        >>> [(row.path, row.rank, row.residual < 1e-6) for row in done.rows]
        [('weight', 1, True)]
    """
    cut, place = Cut(rank=rank, energy=energy, error=error), Path(out)
    check_free(place, force)
    before, after = base_at(base), base_at(tuned)
    unmatched = _unmatched(before, after)
    if unmatched and strict:
        raise FormatError(
            f"the checkpoints differ in {listed(f'{name}: {why}' for name, why in unmatched.items())}; give two of one "
            "model, or strict=False (--allow-unmatched) to leave these out"
        )
    names = [name for name in before.names if name not in unmatched]
    items, rows, rest, told = [], [], dict(unmatched), told_layouts(before, layouts or {})
    for path in progress(names, "extracting"):
        found = _extracted(path, before, after, cut=cut, layout=told.get(path, Layout()), full=full, seed=seed)
        if isinstance(found, str):
            rest[path] = found
        elif found is not None:
            items.append(found[0])
            rows.append(found[1])
    if not items:
        why = f"; left out: {listed(f'{name}: {why}' for name, why in rest.items())}" if rest else ""
        raise FormatError(f"nothing to extract: no weight differs among the {len(names)} in both checkpoints{why}")
    write_content(place, Content(_named(tuned), tuple(items)), before, format=to, **(options or {}))
    return Changes(str(place), tuple(rows), rest)


def _unmatched(before: Base, after: Base) -> dict[str, str]:
    ours, theirs = set(before.names), set(after.names)
    found = {name: "only in the base" for name in before.names if name not in theirs}
    found |= {name: "only in the tuned one" for name in after.names if name not in ours}
    for name in before.names:
        if name in theirs and before.shape(name) != after.shape(name):
            found[name] = f"shape {before.shape(name)} against {after.shape(name)}"
    return found


def _difference(before: Base, after: Base, path: str) -> Tensor | str | None:
    """W_tuned − W_base in float32 or wider, rounded once; why it cannot be kept; None where there is none."""
    old, new = before.tensor(path), after.tensor(path)
    if old.dtype == new.dtype and torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (old, new))):
        return None
    if path.rpartition(".")[2] in _BUFFERS:
        return "changed; a buffer, which no adapter holds"
    if not {old.dtype, new.dtype} <= set(DTYPES.values()):
        return f"changed; of dtype {old.dtype} in the base and {new.dtype} in the tuned one, to which no adapter adds"
    wide = torch.promote_types(torch.promote_types(old.dtype, new.dtype), torch.float32)
    delta = new.to(wide) - old.to(wide)
    if not all_finite(delta):
        raise FormatError(f"{path!r} holds NaN or infinity in one of the two, or their difference does")
    return delta if bool(delta.any()) else None


def _extracted(
    path: str, before: Base, after: Base, *, cut: Cut, layout: Layout, full: bool, seed: int
) -> tuple[Item, Change] | str | None:
    """A tensor's change, as a pair or whole; why it is left out; None where there is none."""
    delta = _difference(before, after, path)
    if not isinstance(delta, Tensor):
        return delta
    shape, norm = tuple(delta.shape), float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    if shape and layout.is_matrix(shape):
        matrix = layout.matrix(delta)
        A, B = pair_of(cut_svd(matrix, cut, seed=seed), delta.dtype)
        k = A.shape[-2]
        item = Item(path, LoRA(r=k), {"lora_A": A, "lora_B": B}, layout, shape)
        return item, Change(path, shape, "LoRA", k, norm, left_out(matrix, A, B))
    if full:
        return Item(path, Full(), {"diff": delta}, layout, shape), Change(path, shape, "Full", None, norm, 0.0)
    return "changed; full=True (--full) keeps it whole"


def _named(base: BaseLike) -> str:
    return type(base).__name__ if isinstance(base, nn.Module) else os.fspath(base)
