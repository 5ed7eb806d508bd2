"""Shape operations that keep an effective weight's parts."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..effective import Detached, EffectiveWeight, view
from ..forms import Form
from .registry import form_of, implements


def _part(weight: Any, form: Form | None) -> Any:
    return view(weight, form) if form is not None else NotImplemented


def _from_front(index: int, size: int) -> int:
    """A dim, or a row, counted from the front. One that is not there stays none: it is torch's to refuse."""
    return index + size if index < 0 else index


_PROPERTIES: tuple[Any, ...] = (torch.Tensor.T, torch.Tensor.mT)
_DATA: Any = torch.Tensor.data
_TRANSPOSES = [getter.__get__ for getter in _PROPERTIES]


@implements(torch.t, torch.Tensor.t, *_TRANSPOSES)
def transpose_matrix(weight: Any) -> Any:
    """The transposed matrix, or stack of matrices."""
    form = form_of(weight, drops=True)
    return NotImplemented if form is None else _part(weight, form.transpose())


@implements(torch.transpose, torch.Tensor.transpose, torch.swapaxes, torch.Tensor.swapaxes)
def transpose(weight: Any, dim0: int, dim1: int) -> Any:
    """The last two dims exchanged."""
    if not isinstance(weight, EffectiveWeight):
        return NotImplemented
    ndim = weight.dim()
    if {_from_front(dim0, ndim), _from_front(dim1, ndim)} != {ndim - 2, ndim - 1}:
        return NotImplemented
    return transpose_matrix(weight)


@implements(torch.Tensor.permute, torch.permute)
def permute(weight: Any, *dims: Any) -> Any:
    """The last two dims exchanged, or nothing."""
    order = list(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list, torch.Size)) else list(dims)
    ndim = len(order)
    if not isinstance(weight, EffectiveWeight) or ndim != weight.dim() or ndim < 2:
        return NotImplemented
    order = [_from_front(dim, ndim) for dim in order]
    if order == list(range(ndim)):
        return weight
    if order == [*range(ndim - 2), ndim - 1, ndim - 2]:
        return transpose_matrix(weight)
    return NotImplemented


@implements(torch.narrow, torch.Tensor.narrow)
def narrow(weight: Any, dim: int, start: Any, length: int) -> Any:
    """A block of output rows."""
    form = form_of(weight, drops=True)
    if form is None or not isinstance(start, int):
        return NotImplemented
    out = form.layout.out
    if _from_front(dim, form.weight.dim()) != out:
        return NotImplemented
    start = _from_front(start, form.weight.shape[out])
    return NotImplemented if start < 0 else _part(weight, form.narrow(out, start, length))


@implements(torch.chunk, torch.Tensor.chunk)
def chunk(weight: Any, chunks: int, dim: int = 0) -> Any:
    """Equal blocks of output rows."""
    return split(weight, -(-weight.shape[dim] // chunks), dim) if chunks > 0 else NotImplemented


@implements(torch.split, torch.Tensor.split, torch.split_with_sizes, torch.Tensor.split_with_sizes)
def split(weight: Any, split_size_or_sections: Any, dim: int = 0) -> Any:
    """Blocks of output rows."""
    form = form_of(weight, drops=True)
    if form is None or _from_front(dim, form.weight.dim()) != form.layout.out:
        return NotImplemented
    size, sections = form.weight.shape[dim], split_size_or_sections
    if isinstance(sections, int):
        if sections < 1:
            return NotImplemented
        sections = [min(sections, size - start) for start in range(0, size, sections)]
    *starts, end = accumulate(sections, initial=0)
    if end != size:  # torch's to refuse
        return NotImplemented
    return tuple(
        view(weight, form.narrow(form.layout.out, start, n)) for start, n in zip(starts, sections, strict=True)
    )


@implements(torch.select, torch.Tensor.select)
def select(weight: Any, dim: int, index: Any) -> Any:
    """One matrix of a stack."""
    if not isinstance(weight, EffectiveWeight) or _from_front(dim, weight.dim()) != 0 or not isinstance(index, int):
        return NotImplemented
    return _taken(weight, index)


@implements(torch.unbind, torch.Tensor.unbind)
def unbind(weight: Any, dim: int = 0) -> Any:
    """The matrices of a stack."""
    form = form_of(weight, drops=True)
    if form is None or dim != 0 or form.layout.batch != (0,):
        return NotImplemented
    return tuple(view(weight, form.take(index)) for index in range(form.weight.shape[0]))


def _taken(weight: EffectiveWeight, index: int | Tensor) -> Any:
    return NotImplemented if weight._is_leaf else _part(weight, weight._source.take(index))


@implements(torch.Tensor.__getitem__)
def getitem(weight: Any, index: Any) -> Any:
    """A matrix of a stack by index, several by a vector of indices, or a block of output rows."""
    if not isinstance(weight, EffectiveWeight):
        return NotImplemented
    if isinstance(index, slice) and index.step in (None, 1):
        form = form_of(weight, drops=True)
        start, stop, _ = index.indices(weight.shape[0])
        return NotImplemented if form is None else _part(weight, form.narrow(0, start, max(0, stop - start)))
    if isinstance(index, bool) or not isinstance(index, (int, Tensor)):
        return NotImplemented
    if isinstance(index, Tensor):
        if index.dtype not in (torch.int64, torch.int32) or isinstance(index, EffectiveWeight) or index.dim() > 1:
            return NotImplemented
        index = index if index.dim() else int(index)
    return _taken(weight, index)


@implements(_DATA.__get__)
def data(weight: Any) -> Any:
    """The same weight without gradients, no more writable than itself; of a drop-in layer in training the base's."""
    return weight._base.data if weight._base is not None and getattr(weight._source, "noisy", False) else detach(weight)


@implements(torch.Tensor.detach, torch.detach)
def detach(weight: Any) -> Any:
    """The same weight without gradients."""
    detached = EffectiveWeight(weight, Detached(weight._source), weight._site)
    detached._detached = True
    detached._base = None if weight._base is None else weight._base.detach()
    return detached


@implements(torch.Tensor.to)
def to(weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Itself, where nothing would change."""
    try:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    except RuntimeError:  # it knows no copy=
        return NotImplemented
    same = dtype in (None, weight.dtype) and device in (None, weight.device) and memory_format is None
    return weight if isinstance(weight, EffectiveWeight) and same else NotImplemented


@implements(torch.Tensor.view_as)
def view_as(weight: Any, other: Any) -> Any:
    """Itself in its own shape, so that a write into it, as ``nn.init.orthogonal_`` does, is noticed."""
    return weight if isinstance(weight, EffectiveWeight) and weight.shape == other.shape else NotImplemented


@implements(torch.Tensor.contiguous)
def contiguous(weight: Any, **kwargs: Any) -> Any:
    """Itself, where its parts lie as it says."""
    form = form_of(weight, drops=True)
    whole = form is not None and form.weight.is_contiguous(**kwargs)
    return weight if whole else NotImplemented
