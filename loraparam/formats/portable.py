"""What other tools' formats can hold: whole parameters, s folded into B, one rank.

s·B·A is the same numbers in every reader once s is part of B and alpha = r; a pair is padded with zero rows and
columns, and slices of one parameter are stacked into one pair, without changing B·A.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import slices
from ..errors import FormatError, LoraparamError
from ..functional import row_norm
from ..layouts import Layout
from ..methods import BlockLoRA, DoRA, Full, LoRA
from ..methods.lowrank import LowRank
from ..plans import Trial
from ..slices import Slice
from .bases import Base
from .content import Content, Item, difference


def part_of(item: Item, base: Base | None) -> Slice | None:
    """The slice an item is for; None for the whole parameter.

    Raises:
        FormatError: it does not fit, or the shape it would be cut from is not known.
    """
    if item.part is None:
        return None
    shape = item.shape
    if shape is None and base is not None and item.parameter in base.names:
        shape = base.shape(item.parameter)
    if shape is None:
        raise FormatError(f"{item.path!r}: the base is needed to know the shape it is a part of")
    owner, _, name = item.parameter.rpartition(".")
    module = base.module(owner) if base is not None else None
    try:
        return slices.resolve(item.part, module, name, shape, item.layout)
    except LoraparamError as error:
        raise FormatError(f"{item.path!r}: {error}") from None


def refuse_misshapen(content: Content, base: Base | None) -> None:
    """Refuse factors of other shapes than their method has for the parameter's, as far as that is known.

    Raises:
        FormatError: there are such, or the base's parameter is of another shape than the file says, or two targets
            share elements of one.
    """
    _refuse_overlap(content, base)
    trial = Trial()
    for item in content.items:
        at = f"{content.source!r}, target {item.path!r}"
        shape = item.shape
        if base is not None and item.parameter in base.names:
            shape = tuple(base.shape(item.parameter))
            if item.shape is not None and item.shape != shape:
                raise FormatError(f"{at}: is for shape {item.shape}; the base has {shape}")
        wanted = _shapes(item, shape, base, at, trial)
        found = {key: tuple(factor.shape) for key, factor in item.factors.items()}
        if wanted is not None and found != wanted:
            kind = type(item.method).__name__
            raise FormatError(f"{at}: factors of shapes {found}; a {kind} on shape {shape} has {wanted}")


def _refuse_overlap(content: Content, base: Base | None) -> None:
    targets: dict[str, list[tuple[Item, Slice | None]]] = {}
    for item in content.items:
        sized = item.part is None or item.shape is not None or (base is not None and item.parameter in base.names)
        part = part_of(item, base) if sized else None
        for other, its_part in targets.setdefault(item.parameter, []):
            # Of two slices of what has no known shape nobody can tell.
            if None in (item.part, other.part) or (part and its_part and part.overlaps(its_part)):
                raise FormatError(
                    f"{content.source!r}: targets {other.path!r} and {item.path!r} share elements of one parameter; "
                    "keep one of them"
                )
        targets[item.parameter].append((item, part))


def _shapes(
    item: Item, shape: tuple[int, ...] | None, base: Base | None, at: str, trial: Trial
) -> dict[str, tuple[int, ...]] | None:
    """{factor: its shape} of an item on a parameter of this shape; None where neither file nor base say enough."""
    if shape is None:
        return None
    try:
        if shape:
            item.layout.sizes(shape)
        own, layout = torch.empty(shape, device="meta"), item.layout
        if item.part is not None:
            part = part_of(replace(item, shape=shape), base)
            assert part is not None
            own, layout = part.take(own), part.layout(layout)
        return {key: tuple(factor.shape) for key, factor in trial.factors(item.method, own, layout).items()}
    except LoraparamError as error:
        raise FormatError(f"{at}: {error}") from None


def pair(item: Item) -> tuple[Tensor, Tensor]:  # (*batch, r, in), (*batch, out, r)
    """A low-rank item's A and B with s folded into B, in float32 at least."""
    assert isinstance(item.method, LowRank)
    A, B = item.factors["lora_A"], item.factors["lora_B"]
    dtype = torch.promote_types(A.dtype, torch.float32)
    # Folded in float64: B·s is then rounded once.
    return A.to(dtype), (B.double() * item.method.scale).to(dtype)


def padded(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The pair at rank ``r``: zero rows below A, zero columns beside B."""
    more = r - A.shape[-2]
    assert more >= 0
    return torch.nn.functional.pad(A, (0, 0, 0, more)), torch.nn.functional.pad(B, (0, more))


def at_most_full_rank(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same B·A at rank min(out, in), where the pair's rank is larger; else the pair itself.

    Other tools train and store such pairs (r = 64 on a classifier of 2 classes); ours end at min(out, in).
    """
    r, in_, out = A.shape[-2], A.shape[-1], B.shape[-2]
    if r <= min(out, in_):
        return A, B
    # As for all that is computed of a pair: a product rounded to 16 bits would be another one.
    wide = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    delta = (B.double() @ A.double()).to(wide)
    eye = torch.eye(min(out, in_), dtype=wide).expand(*A.shape[:-2], -1, -1)
    return (delta, eye.contiguous()) if out <= in_ else (eye.contiguous(), delta)


def joined(content: Content, base: Base | None) -> list[Item]:
    """The content's items with the slices of each parameter joined into one item for all of it, in plain factors.

    Raises:
        FormatError: slices that one pair cannot express.
    """
    groups: dict[str, list[Item]] = {}
    for item in content.items:
        groups.setdefault(item.parameter, []).append(item)
    return [_on_matrix(group[0], base) if group[0].part is None else _join(group, base) for group in groups.values()]


def plain(item: Item) -> Item:
    """A ``BlockLoRA`` as the ``LoRA`` that does the same; any other item as it is."""
    if not isinstance(item.method, BlockLoRA):
        return item
    factors = item.method.plain(item.factors)
    r = factors["lora_A"].shape[-2]
    return replace(item, method=LoRA(r=r, alpha=item.method.scale * r), factors=factors)


def _on_matrix(item: Item, base: Base | None) -> Item:
    """Stacked blocks as one pair, and a pair on a weight read flat as one on the matrix that others see."""
    item = plain(item)
    if item.layout.rows is None or not isinstance(item.method, LoRA) or item.shape is None:
        return item
    A, B = pair(item)
    layout = (base.layout(item.parameter) if base is not None else None) or Layout()
    delta = layout.matrix(item.layout.tensor(B.double() @ A.double(), item.shape)).to(A.dtype)
    # Of full rank, most likely: a flat kernel's rows are other rows.
    A, B = at_most_full_rank(delta.contiguous(), torch.eye(delta.shape[0], dtype=delta.dtype))
    return replace(item, method=LoRA(r=A.shape[0]), factors={"lora_A": A, "lora_B": B}, layout=layout)


def _join(items: list[Item], base: Base | None) -> Item:
    first = items[0]
    parts = [part for item in items if (part := part_of(item, base)) is not None]
    shape = first.shape or (base.shape(first.parameter) if base is not None else None)
    assert shape is not None  # part_of has needed it
    kinds = {type(item.method) for item in items}
    if kinds == {Full}:
        diff = torch.zeros(shape, dtype=first.factors["diff"].dtype)
        for item, part in zip(items, parts, strict=True):
            diff = part.put(diff, item.factors["diff"])
        return replace(first, path=first.parameter, method=Full(), factors={"diff": diff}, shape=shape)
    rows_only = all(not isinstance(item.method, DoRA) or item.method.axis == "out" for item in items)
    if kinds <= {LoRA, DoRA} and rows_only and all(item.layout == first.layout for item in items):
        return _join_low_rank(items, parts, shape, base)
    names = ", ".join(sorted(f"{item.path!r}: {type(item.method).__name__}" for item in items))
    raise FormatError(f"{names}: slices that cannot be written as one low-rank pair for {first.parameter!r}")


def _join_low_rank(items: Sequence[Item], parts: Sequence[Slice], shape: Sequence[int], base: Base | None) -> Item:
    layout, parameter = items[0].layout, items[0].parameter
    batch, out, in_ = layout.sizes(shape)
    by_expert = [i for i, part in enumerate(parts) if part.index]
    if by_expert and len(by_expert) < len(parts):
        raise FormatError(f"{parameter!r}: slices by expert and by rows; write them as one or the other")
    pairs = [pair(item) for item in items]
    if by_expert:
        r = max(A.shape[-2] for A, _ in pairs)
        dtype = pairs[0][0].dtype
        A, B = torch.zeros(*batch, r, in_, dtype=dtype), torch.zeros(*batch, out, r, dtype=dtype)
        for part, (A_i, B_i) in zip(parts, pairs, strict=True):
            A[part.start], B[part.start] = padded(A_i, B_i, r)
    else:
        A = torch.cat([A_i for A_i, _ in pairs], -2)
        B = torch.zeros(*batch, out, A.shape[-2], dtype=A.dtype)
        column = 0
        for part, (_, B_i) in zip(parts, pairs, strict=True):
            B[..., part.start : part.stop, column : column + B_i.shape[-1]] = B_i
            column += B_i.shape[-1]
    r = A.shape[-2]
    factors = {"lora_A": A, "lora_B": B}
    if all(type(item.method) is LoRA for item in items):
        return Item(parameter, LoRA(r=r), factors, layout, tuple(shape))
    factors["magnitude"] = _lengths(items, parts, shape, base)
    return Item(parameter, DoRA(r=r), factors, layout, tuple(shape), items[0].fingerprint)


def _lengths(items: Sequence[Item], parts: Sequence[Slice], shape: Sequence[int], base: Base | None) -> Tensor:
    """The magnitude of all rows: that of a slice's DoRA, and the row's own length where there is none."""
    layout, parameter = items[0].layout, items[0].parameter
    if base is None:
        raise FormatError(f"{parameter!r}: a DoRA on some slices; the base is needed for the lengths of the other rows")
    weight = layout.matrix(base.tensor(parameter).double())
    for item, part in zip(items, parts, strict=True):
        if type(item.method) is LoRA:
            own = part.take(base.tensor(parameter).double())
            new = item.method.apply(own, {k: v.double() for k, v in item.factors.items()}, part.layout(layout))
            weight = layout.matrix(part.put(layout.tensor(weight, shape), new))
    lengths = row_norm(weight, "out")
    for item, part in zip(items, parts, strict=True):
        if isinstance(item.method, DoRA):
            if part.index:
                lengths[part.start] = item.factors["magnitude"].double()
            else:
                lengths[..., part.start : part.stop] = item.factors["magnitude"].double()
    return lengths.to(items[0].factors["lora_A"].dtype)


def replacements(content: Content, base: Base | None) -> list[Item]:
    """The parameters that the content replaces, as differences from the base.

    Raises:
        FormatError: there is no base, or it has another shape.
    """
    if base is not None:
        return [difference(path, value, base, content.source) for path, value in content.replaced.items()]
    for path in content.replaced:
        raise FormatError(
            f"{content.source!r} replaces {path!r} as a whole; the base is needed to write the difference"
        )
    return []


def common_rank(pairs: Iterable[tuple[Tensor, Tensor]]) -> int:
    """The largest rank among pairs, which readers without per-module ranks need everywhere."""
    return max(A.shape[-2] for A, _ in pairs)


def trained(content: Content) -> str:
    """For a file's header, where readers pass over it: what each pair's scale was before it was folded into B."""
    settings = {
        item.path: {"r": item.method.r, "alpha": item.method.alpha, "rslora": item.method.rslora}
        for item in content.items
        if isinstance(item.method, LowRank)
    }
    return json.dumps(settings)
