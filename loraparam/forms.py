"""The structured weight: M = diag(row)·W·diag(col) + Σ s·B·A, kept as its parts.

Read as matrices (*batch, out, in), the form covers LoRA, DoRA, magnitudes, and any stack of them; it is closed
under taking rows, selecting batch indices and transposing. Operations on it cost thin products instead of a
full-size weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import LoraparamError
from .functional import Axis, compute_dtype, row_norm
from .layouts import Layout
from .refusals import can_dequantize


class Term(NamedTuple):
    """s·B·A on the rows ``start:stop`` (all of them where ``stop`` is None).

    A (*batch, r, in); B (*batch, rows, r). ``dropout`` is of the elements of the input that A sees.
    """

    A: Tensor
    B: Tensor
    scale: float | Tensor
    start: int = 0
    stop: int | None = None
    dropout: float = 0.0


@dataclass(slots=True)
class Form:
    """A weight as diag(row)·W·diag(col) + Σ s·B·A. Never changed once made (and not frozen: that doubles the cost).

    Attributes:
        weight: W as it is stored; ``layout`` says how it reads as (*batch, out, in).
        layout: of the weight.
        terms: the low-rank terms.
        row: (*batch, out), or None for ones.
        col: (*batch, in), or None for ones.
        noisy: in training, where methods may drop.
        window: the rows that the next operation acts on: a slice target's; None for all.
        squares: gives ‖W‖² along an axis, which a frozen W need not compute twice.
        index: where this is part of a stack, the matrices of the terms that it takes. Gathered when they are used: a
            copy for each token is more than the stack, and would be kept for backward.
    """

    weight: Tensor
    layout: Layout
    terms: tuple[Term, ...] = ()
    row: Tensor | None = None
    col: Tensor | None = None
    noisy: bool = False
    window: tuple[int, int] | None = None
    squares: Callable[[Axis], Tensor] | None = None
    index: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """W as (*batch, out, in): a view, where the storage allows."""
        weight = self.weight.dequantize() if can_dequantize(self.weight) else self.weight
        if weight.dim() == 2 and self.layout.rows is None:
            return weight if self.layout.out == 0 else weight.t()
        return self.layout.matrix(weight)

    @property
    def sizes(self) -> tuple[tuple[int, ...], int, int]:
        """(batch sizes, out, in)."""
        return self.layout.sizes(self.weight.shape)

    # --- what methods do ------------------------------------------------------------------------------------

    def add(self, A: Tensor, B: Tensor, scale: float | Tensor, dropout: float = 0.0) -> Form:
        """M + s·B·A, on the window's rows."""
        start, stop = self.window or (0, None)
        terms = (*self.terms, Term(A, B, scale, start, stop, dropout))
        # Not dataclasses.replace, which takes several times as long: this is on the path of every read.
        return Form(self.weight, self.layout, terms, self.row, self.col, self.noisy, self.window, self.squares)

    def scale_rows(self, ratio: Tensor) -> Form:
        """diag(ratio)·M, on the window's rows; ratio (*batch, rows)."""
        whole = self._spread(ratio)
        row = whole if self.row is None else self.row * whole
        terms = tuple([Term(t.A, t.B * _rows(whole, t).unsqueeze(-1), *t[2:]) for t in self.terms])
        return Form(self.weight, self.layout, terms, row, self.col, self.noisy, self.window, self.squares)

    def scale_cols(self, ratio: Tensor) -> Form | None:
        """M·diag(ratio); None on a window of rows, where columns differ inside and outside of it."""
        if self.window is not None:
            return None
        terms = tuple(t._replace(A=t.A * ratio.unsqueeze(-2)) for t in self.terms)
        return replace(self, col=ratio if self.col is None else self.col * ratio, terms=terms)

    def blend(self, before: Form, weight: float | Tensor) -> Form | None:
        """before + weight·(self − before); None where the two scale rows and columns both."""
        if (self.col is not before.col) and (self.row is not None or before.row is not None):
            return None
        common = {id(term) for term in self.terms} & {id(term) for term in before.terms}
        kept = tuple(t for t in self.terms if id(t) in common)
        new = tuple(t._replace(scale=t.scale * weight) for t in self.terms if id(t) not in common)
        gone = tuple(t._replace(scale=t.scale * (1 - weight)) for t in before.terms if id(t) not in common)
        return replace(
            self,
            terms=kept + gone + new,
            row=_mix(before.row, self.row, weight),
            col=_mix(before.col, self.col, weight),
        )

    def norm(self, axis: Axis) -> Tensor:
        """‖M‖ per output row of the window, (*batch, rows); with axis "in" per input column.

        Per row without forming B·A: ‖W‖² + 2s⟨W, BA⟩ + s²‖BA‖², from W·Aᵀ and A·Aᵀ (arXiv 2603.22276). Where
        low precision or cancellation would hurt, the direct norm.
        """
        if self.window is not None:
            start, stop = self.window
            inside = self.narrow(self.layout.out, start, stop - start)
            assert inside is not None
            return replace(inside, window=None).norm(axis)
        plain = self.row is None and self.col is None and not can_dequantize(self.weight)
        if plain and self.weight.dtype.itemsize >= 4:
            squared, own = self._expanded(axis)
            # Rounding is relative to the parts, W and s·B·A: where ‖M‖ is a tenth of ‖W‖, the other part is at most
            # eleven times ‖M‖, so at most two digits are lost.
            if bool((squared >= 1e-2 * own).all()):
                return _root(squared)
        return row_norm(self.dense(), axis)

    def _expanded(self, axis: Axis) -> tuple[Tensor, Tensor]:
        """(‖M‖², ‖W‖²) per row, or per column."""
        matrix = self.matrix
        own = self.squares(axis) if self.squares is not None else squared_norm(matrix, axis)
        pair = self.factors(matrix.dtype)
        if pair is None:
            return own, own
        A, B, scale = pair
        if axis == "in":
            matrix, A, B = matrix.mT, B.mT, A.mT
        if not isinstance(scale, float):
            B, scale = B * scale, 1.0
        At = A.mT
        # 2·W·Aᵀ + s·B·(A·Aᵀ)
        if matrix.dim() > 3:
            inner = 2 * (matrix @ At) + scale * (B @ (A @ At))
        else:
            add_product = torch.addmm if matrix.dim() == 2 else torch.baddbmm
            inner = add_product(matrix @ At, B, A @ At, beta=2, alpha=scale)
        return torch.add(own, (inner * B).sum(-1), alpha=scale), own

    @property
    def drops_input(self) -> bool:
        """Whether a term drops elements of the input."""
        if self.noisy:
            for term in self.terms:
                if term.dropout:
                    return True
        return False

    # --- what operations read -------------------------------------------------------------------------------

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float | Tensor] | None:
        """(A, B, s) of all terms in one pair, in a dtype; None where there are none."""
        pair = self.stacked_factors(dtype)
        if pair is None or self.index is None:
            return pair
        A, B, scale = pair
        return A[self.index], B[self.index], scale

    def stacked_factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float | Tensor] | None:
        """``factors`` of all matrices of the stack, where ``index`` takes some."""
        if not self.terms:
            return None
        if len(self.terms) == 1 and self.terms[0].stop is None:
            A, B, scale = self.terms[0][:3]
            if A.dtype is dtype and B.dtype is dtype:
                return A, B, scale
            return A.to(dtype), B.to(dtype), scale
        out = self.sizes[1]
        A = torch.cat([t.A for t in self.terms], dim=-2)
        padded = [F.pad(t.B * t.scale, (0, 0, t.start, out - (out if t.stop is None else t.stop))) for t in self.terms]
        return A.to(dtype), torch.cat(padded, dim=-1).to(dtype), 1.0

    def dense(self) -> Tensor:
        """M itself, in the dtype that updates are computed in."""
        wide = compute_dtype(self.weight.dtype)
        dense = self.matrix.to(wide)
        if self.row is not None:
            dense = dense * self.row.unsqueeze(-1)
        if self.col is not None:
            dense = dense * self.col.unsqueeze(-2)
        factors = self.factors(wide)
        if factors is not None:
            A, B, scale = factors
            dense = dense + scale * (B @ A)
        return dense

    def tensor(self) -> Tensor:
        """M as the stored weight is shaped and typed.

        Raises:
            LoraparamError: a term drops elements of the input.
        """
        if self.drops_input:
            raise LoraparamError(
                'dropout_on="input" drops elements of the layer\'s input, which a dense weight cannot express, and '
                'this operation needs one; use dropout_on="weight", or eval()'
            )
        return self.layout.tensor(self.dense(), self.weight.shape).to(self.weight.dtype)

    def tensors(self) -> list[Tensor]:
        """Everything the form is computed from."""
        parts = [self.weight, self.row, self.col, *(t for term in self.terms for t in term[:3])]
        return [part for part in parts if isinstance(part, Tensor)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Form:
        """The same form of other tensors, in the order of ``tensors()``."""
        queue = iter(tensors)

        def swap(part: Any) -> Any:
            return next(queue) if isinstance(part, Tensor) else part

        weight, row, col = swap(self.weight), swap(self.row), swap(self.col)
        terms = tuple(t._replace(A=swap(t.A), B=swap(t.B), scale=swap(t.scale)) for t in self.terms)
        return replace(self, weight=weight, row=row, col=col, terms=terms, squares=None)

    # --- views ----------------------------------------------------------------------------------------------

    def narrow(self, dim: int, start: int, length: int) -> Form | None:
        """``weight.narrow`` on the output dim; None on another."""
        if dim != self.layout.out:
            return None
        stop = start + length
        terms = []
        for term in self.terms:
            first, last = max(term.start, start), min(self.sizes[1] if term.stop is None else term.stop, stop)
            if first < last:
                B = term.B[..., first - term.start : last - term.start, :]
                terms.append(term._replace(B=B, start=first - start, stop=last - start))
        whole = tuple(t._replace(start=0, stop=None) if (t.start, t.stop) == (0, length) else t for t in terms)
        row = None if self.row is None else self.row[..., start:stop]
        return replace(self, weight=self.weight.narrow(dim, start, length), terms=whole, row=row, squares=None)

    def take(self, index: int | Tensor) -> Form | None:
        """``weight[index]`` on a leading batch dim: one matrix for an integer, a stack for a vector of indices."""
        if self.layout.batch != (0,):
            return None
        row, col = (None if scale is None else scale[index] for scale in (self.row, self.col))
        taken = replace(self, weight=self.weight[index], row=row, col=col, squares=None)
        index = index if self.index is None else self.index[index]
        if isinstance(index, Tensor) and index.dim():
            return replace(taken, index=index)
        terms = tuple(t._replace(A=t.A[index], B=t.B[index]) for t in self.terms)
        return replace(taken, layout=self.layout.select(0), terms=terms, index=None)

    def transpose(self) -> Form | None:
        """``weight.mT`` of one matrix, or of a stack with a leading batch dim."""
        ndim = self.weight.dim()
        if ndim - len(self.layout.batch) != 2 or self.layout.batch not in ((), (0,)):
            return None
        layout = Layout(out=2 * ndim - 3 - self.layout.out, batch=self.layout.batch, lookup=self.layout.lookup)
        return replace(self, weight=self.weight.mT, layout=layout)

    @property
    def is_transposed(self) -> bool:
        """Whether the stored weight is (*batch, in, out)."""
        return self.layout.out == self.weight.dim() - 1

    def _spread(self, ratio: Tensor) -> Tensor:
        """A window's row scales among ones."""
        if self.window is None:
            return ratio
        out, (start, stop) = self.sizes[1], self.window
        return torch.cat([_ones(ratio, start), ratio, _ones(ratio, out - stop)], dim=-1)


def squared_norm(matrix: Tensor, axis: Axis) -> Tensor:
    """‖W‖² per output row, or per input column."""
    return matrix.square().sum(-1 if axis == "out" else -2)


def _root(squared: Tensor) -> Tensor:
    """The square root with a gradient of zero at zero, as ``vector_norm`` has it, where plain sqrt gives 0·∞."""
    if not squared.requires_grad:
        return squared.sqrt()
    zero = squared == 0
    return squared.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _rows(scales: Tensor, term: Term) -> Tensor:
    """The row scales of a term's rows."""
    return scales if term.stop is None else scales[..., term.start : term.stop]


def _ones(like: Tensor, count: int) -> Tensor:
    return like.new_ones(*like.shape[:-1], count)


def _mix(before: Tensor | None, after: Tensor | None, weight: float | Tensor) -> Tensor | None:
    if after is before:
        return after
    start = torch.ones_like(after) if before is None and after is not None else before
    end = torch.ones_like(start) if after is None and start is not None else after
    assert start is not None
    assert end is not None
    return start + weight * (end - start)
