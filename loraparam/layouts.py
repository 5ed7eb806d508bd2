"""How a parameter reads as a matrix: which dim is the output, which are batch dims, the rest is the input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .errors import TargetError

_MOST_DIMS = 64  # torch's own limit


@dataclass(frozen=True)
class Layout:
    """The dims of a weight, read as a stack of matrices (*batch, out, in).

    Args:
        out: the dim of the output features.
        batch: dims that index independent matrices, such as experts.
        lookup: the input is an index that selects a row (an embedding), not a vector that is
            multiplied. It decides which LoRA factor starts at zero.
        rows: read the weight flat instead, row by row into a matrix of this many rows, whatever its dims mean
            (loralib's convolutions). No other argument goes with it.

    The input runs over the remaining dims, row-major.

    Example:
        >>> import torch
        >>> Layout(out=1).matrix(torch.zeros(4, 6, 3, 3)).shape  # ConvTranspose2d(4, 6, 3)
        torch.Size([6, 36])
        >>> Layout(out=2, batch=(0,)).matrix(torch.zeros(8, 5, 7)).shape  # experts (E, in, out)
        torch.Size([8, 7, 5])
        >>> Layout(rows=18).matrix(torch.zeros(6, 4, 3, 3)).shape
        torch.Size([18, 12])
    """

    out: int = 0
    batch: tuple[int, ...] = ()
    lookup: bool = False
    rows: int | None = None

    def __post_init__(self) -> None:
        # Values come from files too, where anything may stand.
        batch: Any = self.batch
        dims = (self.out, *batch) if isinstance(batch, (tuple, list)) else ()
        valid = dims and all(type(dim) is int and 0 <= dim < _MOST_DIMS for dim in dims)
        if not valid or len(set(dims)) != len(dims):
            raise TargetError(
                f"Layout(out={self.out!r}, batch={self.batch!r}); allowed: distinct integers in 0..{_MOST_DIMS - 1}, "
                "those of batch in a tuple"
            )
        object.__setattr__(self, "batch", tuple(batch))  # which has a hash
        if self.rows is not None:
            if type(self.rows) is not int or self.rows < 1:
                raise TargetError(f"Layout(rows={self.rows!r}); allowed: an integer above 0, or None")
            if self.out or self.batch or self.lookup:
                raise TargetError(
                    f"Layout(rows={self.rows}) reads a weight flat; allowed: no out, batch or lookup with it"
                )

    def _order(self, ndim: int) -> list[int]:
        """The weight's dims, sorted into batch, out, in."""
        first = [*self.batch, self.out]
        if max(first) >= ndim:
            raise TargetError(f"layout {self} names dim {max(first)} of a tensor with {ndim} dims")
        return [*first, *(dim for dim in range(ndim) if dim not in first)]

    def sizes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
        """(batch sizes, out, in) of a weight of this shape."""
        if self.rows is not None:
            if (numel := math.prod(shape)) % self.rows:
                raise TargetError(f"layout {self} does not fit shape {tuple(shape)}: {numel} elements")
            return (), self.rows, numel // self.rows
        order = self._order(len(shape))
        n_batch = len(self.batch)
        batch = tuple(shape[dim] for dim in order[:n_batch])
        return batch, shape[self.out], math.prod([shape[dim] for dim in order[n_batch + 1 :]])

    def is_matrix(self, shape: Sequence[int]) -> bool:
        """Whether the weight has an input dim at all: a bias or a norm's weight has none."""
        return self.rows is not None or len(shape) - len(self.batch) >= 2

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (*batch, out, in)."""
        batch, out, in_ = self.sizes(weight.shape)
        if self.rows is not None:
            return weight.reshape(out, in_)
        return weight.permute(self._order(weight.dim())).reshape(*batch, out, in_)

    def tensor(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of ``matrix``: a (*batch, out, in) matrix as a weight of this shape."""
        if self.rows is not None:
            return matrix.reshape(tuple(shape))
        order = self._order(len(shape))
        inverse = [order.index(dim) for dim in range(len(shape))]
        return matrix.reshape([shape[dim] for dim in order]).permute(inverse)

    def select(self, dim: int) -> Layout:
        """The layout of ``weight.select(dim, i)``, where ``dim`` is a batch dim."""
        batch = tuple(b - (b > dim) for b in self.batch if b != dim)
        return Layout(out=self.out - (self.out > dim), batch=batch, lookup=self.lookup)

    def stack(self, dim: int) -> Layout:
        """The inverse of ``select``: the layout of a stack, along ``dim``, of weights with this layout."""
        shifted = Layout(out=self.out + (self.out >= dim), batch=tuple(b + (b >= dim) for b in self.batch))
        return Layout(out=shifted.out, batch=tuple(sorted((dim, *shifted.batch))), lookup=self.lookup)

    def __str__(self) -> str:
        if self.rows is not None:
            return f"flat ({self.rows}, in)"
        names = {self.out: "out", **dict.fromkeys(self.batch, "E")}
        last = max(self.out, *self.batch, 1 + len(self.batch))  # of those that are named, and one input
        return "(" + ", ".join(names.get(dim, "in") for dim in range(last + 1)) + ")"


def layout_of(module: nn.Module, name: str, shape: Sequence[int]) -> Layout:
    """The layout of ``module``'s parameter ``name``, recognised from the module's type.

    Any 3-D weight of a module no rule knows is read as a stack of experts: (E, in, out) where the module
    says so (``is_transposed``, as transformers' GPT-OSS) or is known to (Llama4, say), else (E, out, in).
    """
    if name == "weight" and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return Layout(out=1, lookup=True)
    if name == "weight" and isinstance(module, nn.modules.conv._ConvTransposeNd):
        return Layout(out=1)
    if name == "weight" and is_transformers_conv1d(module):
        return Layout(out=1)
    if len(shape) == 3 and _is_a_stack(module):
        return Layout(out=2 if _experts_are_transposed(module) else 1, batch=(0,))
    return Layout()


_NOT_EXPERTS = (nn.modules.conv._ConvNd, nn.Bilinear, nn.MultiheadAttention, nn.LayerNorm)

# {class: its package}: stacks stored (E, in, out) whose class carries no flag saying so.
_TRANSPOSED_EXPERTS = {
    "Llama4TextExperts": "transformers",
    "CsmCodebooksHead": "transformers",  # a head for each codebook
    "GroupedLinearLayer": "transformers",  # ConvBERT's, a matrix for each part of the features
    "SwiGLUExperts": "diffusers",  # Nucleus
}
# Attention stored (model, heads, head): one matrix, of the model's width by that of all heads.
_HEADS_APART = {"XLNetRelativeAttention": "transformers", "FunnelRelMultiheadAttention": "transformers"}


def _is_a_stack(module: nn.Module) -> bool:
    return not isinstance(module, _NOT_EXPERTS) and not _is_one_of(module, _HEADS_APART)


def _experts_are_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", False)) or _is_one_of(module, _TRANSPOSED_EXPERTS)


def _is_one_of(module: nn.Module, known: Mapping[str, str]) -> bool:
    """Whether a module's class is known by name and package; told without importing the package."""
    return any(known.get(cls.__name__) == cls.__module__.partition(".")[0] for cls in type(module).__mro__)


def is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``, a Linear stored (in, out); told without importing it."""
    return _is_one_of(module, {"Conv1D": "transformers"})
