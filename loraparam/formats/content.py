"""Adapter content: what an adapter file says, in one form for all formats.

A format's module has

- ``NAME``, and ``HINTS``, the keyword arguments its ``read`` takes beyond ``base``;
- ``recognises(path) -> bool``, told from the file's keys, never from a config alone;
- ``read(path, base, **hints) -> Content``; ``base`` may be None, where the file alone must do;
- ``write(path, content, base, **options)``; ``OPTIONS`` names the keyword arguments.

``read`` checks everything the file alone can show. ``attach_content`` checks it against a model, then attaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..adapters import attach_rows, entries_of
from ..catalogue import Catalogue
from ..errors import FormatError, LoraparamError, StateError, listed, nearest
from ..finite import all_finite
from ..layouts import Layout
from ..methods import Factors, Full, Method
from ..methods.base import is_number
from ..methods.lowrank import LowRank
from ..plans import Plan, Row, Trial, row_at
from ..refusals import can_dequantize
from ..sharding import whole
from ..slices import overlap
from ..state import check_factor
from .bases import Base, ModelBase


@dataclass(frozen=True)
class Item:
    """What an adapter says about one parameter, or one slice of it.

    Attributes:
        path: the parameter's dotted path, with its slice in brackets.
        method: the method, with the hyperparameters as far as the file knows them.
        factors: in the method's own shapes, on the CPU.
        layout: how the whole parameter reads as a matrix.
        shape: of the whole parameter, where it is known.
        fingerprint: of the base it was trained on, where that matters and is known.
    """

    path: str
    method: Method
    factors: Factors = field(repr=False)
    layout: Layout = field(default_factory=Layout)
    shape: tuple[int, ...] | None = None
    fingerprint: list[float] | None = field(default=None, repr=False)

    @property
    def parameter(self) -> str:
        """The path without the slice."""
        above, dot, last = self.path.rpartition(".")  # a ModuleDict's key may have brackets
        return above + dot + last.partition("[")[0]

    @property
    def part(self) -> str | None:
        """What stands in the brackets; None for the whole parameter."""
        inside = self.path.rpartition(".")[2].partition("[")[2]
        return inside.removesuffix("]") if inside else None


@dataclass(frozen=True)
class Content:
    """One adapter.

    Attributes:
        source: the file or model it comes from, for messages.
        items: one per target.
        replaced: {parameter path: its new value}, for what is stored whole: biases, norms, heads.
        metadata: of the file's header, strings to strings.
    """

    source: str
    items: tuple[Item, ...]
    replaced: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)


def content_of(model: nn.Module, name: str) -> Content:
    """An adapter that is on a model.

    Raises:
        StateError: a factor is not finite.
    """
    base = ModelBase(model)
    items = []
    for path, entry in entries_of(model, name):
        factors = {key: whole(factor).cpu() for key, factor in entry.values().items()}
        for key, factor in factors.items():
            if not all_finite(factor):
                raise StateError(
                    f"'{path}.{key}' holds NaN or infinity, which no reader would take; the adapter has diverged"
                )
        item = Item(path, entry.method, factors, entry.whole_layout)
        weight = None if entry.method.additive else base.known.leaves[item.parameter].base
        items.append(replace(item, shape=base.shape(item.parameter), fingerprint=fingerprint(weight)))
    return Content(f"adapter {name!r}", tuple(items))


def attach_content(model: nn.Module, content: Content, name: str, *, check_base: bool = True) -> Plan:
    """Attach an adapter, in place, once all of it is known to fit; replaced parameters become ``Full`` deltas.

    Raises:
        FormatError: it does not fit the model.
        AttachError: a target carries an adapter of this name already.
    """
    base = ModelBase(model)
    items = [
        *content.items,
        *(difference(path, value, base, content.source) for path, value in content.replaced.items()),
    ]
    trial = Trial()
    rows = [_row(base.known, item, content.source, trial) for item in items]
    refuse_overlap(rows, content.source)
    for row, item in zip(rows, items, strict=True):
        refuse_misfit(row, item, content.source)
        if check_base:
            refuse_other_base(row, row.leaf.base, item.fingerprint, content.source)
    plan = Plan(tuple(rows))
    attach_rows(model, plan, name, [item.factors for item in items])
    return plan


def refuse_unusable(content: Content) -> None:
    """Refuse what nothing computes with: NaN, infinities, integers, and a scale that makes s·B infinite.

    Raises:
        FormatError: there are such.
    """
    values = {f"{item.path}.{key}": factor for item in content.items for key, factor in item.factors.items()}
    for path, value in {**values, **content.replaced}.items():
        try:
            # Nothing computes in 8 bits.
            check_factor(path, value, value.shape, value.dtype if value.dtype.itemsize > 1 else torch.float32)
        except StateError as error:
            raise FormatError(f"{content.source!r}: {error}") from None
    for item in content.items:
        B = item.factors.get("lora_B")
        if not isinstance(item.method, LowRank) or B is None or not B.numel():
            continue
        largest = max(abs(float(bound)) for bound in torch.aminmax(B))
        if not largest * abs(item.method.scale) <= torch.finfo(torch.promote_types(B.dtype, torch.float32)).max:
            raise FormatError(
                f"{content.source!r}, target {item.path!r}: the scale {item.method.scale:g} makes s·B infinite, whose "
                f"largest element is {largest:g}"
            )


def difference(path: str, value: Tensor, base: Base, source: str) -> Item:
    """A parameter's new value as what it adds to the base.

    Raises:
        FormatError: no such parameter, or another shape.
    """
    if path not in base.names:
        raise FormatError(f"{source!r} replaces {path!r}; the model has no such parameter{nearest(path, base.names)}")
    shape = base.shape(path)
    if tuple(value.shape) != shape:
        raise FormatError(f"{source!r} replaces {path!r} by shape {tuple(value.shape)}; the model takes {shape}")
    weight = base.tensor(path)
    # In float64 the rounding of W + (V - W) is that of the sum alone.
    diff = (value.double() - weight.double()).to(torch.promote_types(weight.dtype, torch.float32))
    return Item(path, Full(), {"diff": diff}, base.layout(path) or Layout(), shape)


def _row(known: Catalogue, item: Item, source: str, trial: Trial) -> Row:
    """The target as a row of a plan for this model."""
    try:
        return row_at(known, item.path, item.method, item.layout, source, trial)
    except LoraparamError as error:
        raise FormatError(f"{source!r}, target {item.path!r}: {error}") from None


def refuse_overlap(rows: list[Row], source: str) -> None:
    """Two targets of the file may be one parameter here, where it is tied."""
    first: dict[int, list[Row]] = {}
    for row in rows:
        for other in first.setdefault(id(row.leaf), []):
            if overlap(row.part, other.part):
                raise FormatError(
                    f"{source!r}: targets {other.path!r} and {row.path!r} are one parameter of this model; load "
                    "into a model in which they are not tied"
                )
        first[id(row.leaf)].append(row)


def refuse_misfit(row: Row, item: Item, source: str) -> None:
    """Refuse factors that are not what the row's method makes for its target."""
    try:
        missing = [f"{row.path}.{factor}" for factor in row.factor_shapes if factor not in item.factors]
        unexpected = [f"{row.path}.{factor}" for factor in item.factors if factor not in row.factor_shapes]
        if missing or unexpected:
            parts = [f"missing {listed(missing)}"] * bool(missing) + [f"unexpected {listed(unexpected)}"] * bool(
                unexpected
            )
            raise StateError("; ".join(parts))
        for factor, tensor in item.factors.items():
            check_factor(f"{row.path}.{factor}", tensor, row.factor_shapes[factor], row.factor_dtypes[factor])
    except StateError as error:
        raise FormatError(f"{source!r}: {error}") from None


def fingerprint(weight: Tensor | None) -> list[float] | None:
    """The norm of a weight and eight of its elements: tells another base, and survives a change of dtype."""
    if weight is None or weight.numel() == 0:
        return None
    weight = whole(weight.detach())
    flat = (weight.dequantize() if can_dequantize(weight) else weight).reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, 8, dtype=torch.float64).long().to(flat.device)
    # By blocks: a float32 copy of the whole would be the largest tensor around.
    norms = [torch.linalg.vector_norm(b.float() if b.dtype.itemsize < 4 else b) for b in flat.split(1 << 22)]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return [float(norm), *(float(value) for value in flat[index])]


def is_fingerprint(value: Any) -> TypeGuard[list[float]]:
    """Whether a file's value may be one."""
    return isinstance(value, list) and len(value) == 9 and all(map(is_number, value))


def refuse_other_base(row: Row, weight: Tensor | None, saved: list[float] | None, source: str) -> None:
    """Refuse a whole base weight that is not the one the factors were trained on."""
    # A slice's factors depend on the slice alone, but the whole weight tells another base as well.
    now = None if saved is None else fingerprint(weight)
    if saved is None or now is None:
        return
    # 1 % of the typical element covers a change of dtype down to bfloat16 (0.4 %).
    typical = now[0] / max(1, weight.numel() if weight is not None else 1) ** 0.5
    close = abs(saved[0] - now[0]) <= 0.01 * now[0] + 1e-12
    close = close and all(
        abs(a - b) <= 0.01 * max(abs(b), typical) + 1e-12 for a, b in zip(saved[1:], now[1:], strict=True)
    )
    if not close:
        raise FormatError(
            f"{source!r}, target {row.path!r}: trained as {type(row.method).__name__} on another base weight "
            f"(norm {saved[0]:.6g}, here {now[0]:.6g}), on which it means something else; load the right base, or "
            "pass check_base=False"
        )


Prefix = str | Mapping[str, str] | None


def as_mapping(prefix: Any, what: str) -> Mapping[str, str]:
    """A ``prefix`` of a caller's, once it is known to be a mapping of strings."""
    if isinstance(prefix, Mapping) and all(isinstance(text, str) for pair in prefix.items() for text in pair):
        return prefix
    raise FormatError(f"prefix={prefix!r}; allowed: a string, or a mapping of {what}")


def relocate(path: str, prefix: Prefix) -> str | None:
    """Where a file's module path stands in the model; None for what ``prefix`` does not select.

    Args:
        path: a dotted path, as the file has it.
        prefix: the part of the file to load, whose name is dropped; or {part of the file: module path}.

    Raises:
        FormatError: ``prefix`` is neither.

    Example:
        >>> relocate("unet.mid.to_q", "unet"), relocate("text_encoder.q_proj", "unet")
        ('mid.to_q', None)
        >>> relocate("unet.mid.to_q", {"unet": "pipe.unet"})
        'pipe.unet.mid.to_q'
    """
    if prefix is None:
        return path
    given = as_mapping({prefix: ""} if isinstance(prefix, str) else prefix, "the file's prefixes to module paths")
    for old in sorted(given, key=len, reverse=True):
        start = old.rstrip(".")
        if not start or path == start or path.startswith(start + "."):
            rest = path[len(start) :].lstrip(".")
            return ".".join(part for part in (given[old].rstrip("."), rest) if part)
    return None
