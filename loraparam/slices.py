"""Named parts of a parameter: ``[q,v]``, ``[i,f,g,o]``, ``[1/3]``, ``[0:768]``, and experts by index."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import TargetError
from .layouts import Layout


@dataclass(frozen=True)
class Slice:
    """A block of one dim of a tensor, or one index of a batch dim.

    Attributes:
        key: how it is written, in one canonical spelling.
        dim: the dim it cuts.
        start, stop: the block ``start:stop``; for an index, ``stop = start + 1``.
        index: select one index and drop the dim, as ``weight[3]`` does.
    """

    key: str
    dim: int
    start: int
    stop: int
    index: bool = False

    def take(self, tensor: Tensor) -> Tensor:
        """This part of the tensor."""
        if self.index:
            return tensor.select(self.dim, self.start)
        return tensor.narrow(self.dim, self.start, self.stop - self.start)

    def put(self, tensor: Tensor, part: Tensor) -> Tensor:
        """A new tensor: ``tensor`` with this part replaced."""
        if self.index:
            return torch.select_scatter(tensor, part, self.dim, self.start)
        return torch.slice_scatter(tensor, part, self.dim, self.start, self.stop)

    def layout(self, layout: Layout) -> Layout:
        """The layout of the part, given that of the whole."""
        if layout.rows is not None:
            raise TargetError(f"slice [{self.key}]: a weight read as {layout} has no slices; target the whole of it")
        return layout.select(self.dim) if self.index else layout

    def whole(self, layout: Layout) -> Layout:
        """The layout of the whole, given that of the part."""
        return layout.stack(self.dim) if self.index else layout

    def overlaps(self, other: Slice | None) -> bool:
        """Whether the two share an element; None is the whole tensor."""
        if other is None or other.dim != self.dim:
            return True
        return self.start < other.stop and other.start < self.stop


def overlap(a: Slice | None, b: Slice | None) -> bool:
    """Whether two parts of one tensor (None: all of it) share an element."""
    return True if a is None else a.overlaps(b)


# The gates and projections that torch stacks along the output dim, in its order.
_LETTERS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str, str], ...] = (
    (nn.MultiheadAttention, r"in_proj_(weight|bias)", "qkv"),
    ((nn.LSTM, nn.LSTMCell), r"(weight|bias)_[ih]h(_l\d+(_reverse)?)?", "ifgo"),
    ((nn.GRU, nn.GRUCell), r"(weight|bias)_[ih]h(_l\d+(_reverse)?)?", "rzn"),
)


def letters_of(module: nn.Module | None, name: str, item: str = "") -> str:
    """The letters that name equal blocks of this parameter's output dim; empty where there are none.

    Without the module, as in a file, its kind is told from the parameter's name and the letter in question.
    """
    for types, pattern, letters in _LETTERS:
        fits = isinstance(module, types) if module is not None else item in letters
        if fits and re.fullmatch(pattern, name):
            return letters
    return ""


def split_pattern(pattern: str) -> tuple[str, tuple[str, ...]]:
    """A string target as (path, items in brackets).

    Example:
        >>> split_pattern("self_attn.in_proj_weight[q, v]")
        ('self_attn.in_proj_weight', ('q', 'v'))
    """
    # The brackets of a ModuleDict's key are followed by a dot.
    found = re.fullmatch(r"((?:.*\.)?[^\[\].]+|[^\[\]]+)(?:\[([^\[\]]*)\])?", pattern.strip())
    if found is None:
        raise TargetError(f"target {pattern!r}: not a path with at most one bracket, such as 'in_proj_weight[q,v]'")
    path, inside = found.groups()
    if inside is None:
        return path, ()
    items = tuple(item.strip() for item in inside.split(","))
    if not all(items):
        raise TargetError(f"target {pattern!r}: an empty slice; write names, as in '{path}[q,v]' or '{path}[0:8]'")
    return path, items


def resolve(item: str, module: nn.Module | None, name: str, shape: Sequence[int], layout: Layout) -> Slice:
    """The part of the parameter that ``item`` names.

    Raises:
        TargetError: the item names nothing here, or does not fit the shape.
    """
    if layout.out >= len(shape):
        raise TargetError(f"slice [{item}]: shape {tuple(shape)} has no output dim to cut; leave out the brackets")
    letters, size = letters_of(module, name, item), shape[layout.out]
    if len(item) == 1 and item in letters:
        return _block(item, letters.index(item), len(letters), size, layout)
    if found := re.fullmatch(r"(\d+)/(\d+)", item):
        k, n = int(found[1]), int(found[2])
        if not 1 <= k <= n:
            raise TargetError(f"slice [{item}]: blocks count from 1; allowed: 1/{n} to {n}/{n}")
        return _block(f"{k}/{n}", k - 1, n, size, layout)
    if found := re.fullmatch(r"(\d*):(\d*)", item):
        start, stop = int(found[1] or 0), int(found[2] or size)
        if not start < stop <= size:
            raise TargetError(
                f"slice [{item}] does not fit: the output dim has {size} rows; allowed: within [0:{size}]"
            )
        return Slice(f"{start}:{stop}", layout.out, start, stop)
    if re.fullmatch(r"\d+", item) and layout.batch:
        dim, index = layout.batch[0], int(item)
        if index >= shape[dim]:
            raise TargetError(f"slice [{item}]: there are {shape[dim]} experts; allowed: 0..{shape[dim] - 1}")
        return Slice(str(index), dim, index, index + 1, index=True)
    raise TargetError(
        f"slice [{item}]: not a part of this parameter; allowed: {_allowed(letters, size, shape, layout)}"
    )


def _block(key: str, position: int, count: int, size: int, layout: Layout) -> Slice:
    if size % count:
        raise TargetError(f"slice [{key}]: {size} output rows do not divide into {count} equal blocks")
    width = size // count
    return Slice(key, layout.out, position * width, (position + 1) * width)


def _allowed(letters: str, size: int, shape: Sequence[int], layout: Layout) -> str:
    forms = [f"[{','.join(letters)}]"] if letters else []
    forms += [f"equal blocks [k/n] of {size} rows", f"rows within [0:{size}]"]
    if layout.batch:
        forms.append(f"experts 0..{shape[layout.batch[0]] - 1} by index")
    return "; ".join(forms)
