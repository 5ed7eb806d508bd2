"""Adapter content on the tensors of a checkpoint, with the checks and the arithmetic of a model in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..catalogue import Leaf
from ..errors import FormatError, LoraparamError, nearest
from ..formats import read_content
from ..formats.bases import Base, FileBase, ModelBase
from ..formats.content import Content, Item, difference, refuse_misfit, refuse_other_base, refuse_overlap
from ..formats.portable import part_of, refuse_misshapen
from ..formats.streams import DTYPES
from ..methods import IA3, DoRA, Factors, Full, LoRA, Magnitude
from ..methods.base import is_number
from ..plans import Row
from ..stack import AdapterFactors, Step, apply_steps

BLOCK = 1 << 20  # elements of a weight that are updated at a time

BaseLike = str | os.PathLike[str] | nn.Module


def base_at(base: BaseLike) -> Base:
    """A model, or the checkpoint at a path, as a base.

    Raises:
        FormatError: no such checkpoint, or not a readable one.
    """
    return ModelBase(base) if isinstance(base, nn.Module) else FileBase(Path(base))


def adapter_at(path: PathLike, base: Base | None, format: str | None, hints: Mapping[str, Any]) -> Content:
    """An adapter file's content, with factors of the shapes that its methods have.

    Raises:
        FormatError: the file is damaged, or does not fit the base.
    """
    content = read_content(path, base, format=format, **hints)
    refuse_misshapen(content, base)
    return content


PathLike = str | os.PathLike[str]
# One file, several, or {file: weight}.
Adapters = PathLike | Sequence[PathLike] | Mapping[PathLike, float]


def weighted(adapters: Adapters, weights: Sequence[float] | None) -> list[tuple[Path, float]]:
    """Adapter files and their weights, in order.

    Raises:
        LoraparamError: none at all, weights for another number of them, or one that is no finite number.
    """
    if isinstance(adapters, Mapping):
        pairs = list(adapters.items())
        if weights is not None:
            raise LoraparamError("weights= beside a mapping of adapters to weights; give one of them")
    else:
        paths = [adapters] if isinstance(adapters, (str, os.PathLike)) else list(adapters)
        weights = [1.0] * len(paths) if weights is None else list(weights)
        if len(weights) != len(paths):
            raise LoraparamError(f"{len(weights)} weights for {len(paths)} adapters; give one each")
        pairs = list(zip(paths, weights, strict=True))
    if not pairs:
        raise LoraparamError("no adapter given; allowed: one or more")
    for path, weight in pairs:
        if not is_number(weight):
            raise LoraparamError(f"{os.fspath(path)!r}: weight {weight!r}; allowed: a finite number")
    return [(Path(path), float(weight)) for path, weight in pairs]


@dataclass(frozen=True)
class Target:
    """One item of an adapter, known to fit its base.

    Attributes:
        row: what it is and where it goes.
        item: what the file said.
        entry: its factors, ready to act.
        weight: the strength w in W + w·(apply(W) − W).
        source: the adapter's file.
    """

    row: Row
    item: Item = field(repr=False)
    entry: AdapterFactors = field(repr=False)
    weight: float
    source: str

    @property
    def step(self) -> Step:
        """As ``apply_steps`` takes it."""
        return self.entry, self.weight, self.entry.factors()


def fit(content: Content, base: Base, weight: float = 1.0) -> list[Target]:
    """An adapter's items on a base; replaced parameters become ``Full`` deltas.

    Raises:
        FormatError: a parameter that the base has not, another shape, factors that do not fit, overlapping slices.
    """
    leaves: dict[str, Leaf] = {}
    found = []
    changes = [difference(path, value, base, content.source) for path, value in content.replaced.items()]
    for item in [*content.items, *changes]:
        row = _row(item, base, content.source, leaves.setdefault(item.parameter, Leaf()))
        refuse_misfit(row, item, content.source)
        factors = {key: value.to(row.factor_dtypes[key]) for key, value in item.factors.items()}
        entry = AdapterFactors("default", item.method, row.layout, row.part, row.shape, factors)
        found.append(Target(row, item, entry.requires_grad_(False), weight, content.source))
    refuse_overlap([target.row for target in found], content.source)
    return found


def _row(item: Item, base: Base, source: str, leaf: Leaf) -> Row:
    if item.parameter not in base.names:
        raise FormatError(
            f"{source!r} adapts {item.parameter!r}; the base has no such parameter"
            f"{nearest(item.parameter, base.names)} (of tied parameters a checkpoint may hold one only)"
        )
    shape = base.shape(item.parameter)
    if item.shape is not None and tuple(item.shape) != shape:
        raise FormatError(f"{source!r} adapts {item.parameter!r} of shape {tuple(item.shape)}; the base has {shape}")
    dtype = dtype_at(base, item.parameter)
    weight = torch.empty(shape, dtype=dtype, device="meta")
    try:
        if shape:
            item.layout.sizes(shape)
        part = part_of(replace(item, shape=shape), base)
        own, layout = (weight, item.layout) if part is None else (part.take(weight), part.layout(item.layout))
        factors = item.method.init(own, layout)
    except LoraparamError as error:
        raise FormatError(f"{source!r}, target {item.path!r}: {error}") from None
    return Row(
        path=item.path,
        shape=tuple(own.shape),
        method=item.method,
        num_params=sum(factor.numel() for factor in item.factors.values()),
        rule=source,
        layout=layout,
        leaf=leaf,
        part=part,
        factor_shapes={name: tuple(factor.shape) for name, factor in factors.items()},
        factor_dtypes={name: factor.dtype for name, factor in factors.items()},
    )


def dtype_at(base: Base, path: str) -> torch.dtype:
    """A parameter's dtype.

    Raises:
        FormatError: one that holds no weights an adapter could be added to.
    """
    if isinstance(base, FileBase):
        name = base.dtype(path)
        if name not in DTYPES:
            raise FormatError(
                f"{path!r} has dtype {name}; allowed: {', '.join(DTYPES)}. Give a checkpoint that is not quantized"
            )
        return DTYPES[name]
    return base.tensor(path).dtype


def by_parameter(targets: Sequence[Target]) -> dict[str, list[Target]]:
    """The targets of each parameter, in order."""
    found: dict[str, list[Target]] = {}
    for target in targets:
        found.setdefault(target.item.parameter, []).append(target)
    return found


def check_bases(weight: Tensor, targets: Sequence[Target]) -> None:
    """Refuse a weight that is not the one a DoRA or Magnitude was trained on."""
    for target in targets:
        refuse_other_base(target.row, weight, target.item.fingerprint, target.source)


def update(weight: Tensor, targets: Sequence[Target], *, block: int = BLOCK) -> Tensor:
    """The weight with its adapters folded in, computed as ``lp.merge`` computes it; ``weight`` may be overwritten.

    A weight of more than ``block`` elements goes through in blocks of output rows where every method treats each row
    by itself, so that float32 copies of it never exist as a whole. The products of a block may round otherwise than
    those of the whole: by some units in the last place of float32, before the result is rounded to the weight's dtype.
    """
    steps = [target.step for target in targets]
    with torch.no_grad():
        dim = None if weight.numel() <= block else _row_dim(targets)
        if dim is None:
            return apply_steps(weight, steps, noisy=False)
        rows = max(1, block * weight.shape[dim] // weight.numel())
        for start in range(0, weight.shape[dim], rows):
            length = min(rows, weight.shape[dim] - start)
            part = weight.narrow(dim, start, length)
            own = [(entry, w, _rows(entry, factors, start, length)) for entry, w, factors in steps]
            part.copy_(apply_steps(part, own, noisy=False))
        return weight


# {method: the dim of each factor that runs over output rows}; only these treat each row by itself.
_ROWS: Mapping[type, Mapping[str, int]] = {
    LoRA: {"lora_B": -2},
    DoRA: {"lora_B": -2, "magnitude": -1},
    IA3: {"scale": -1},
    Magnitude: {"magnitude": -1},
    Full: {},
}


def _row_dim(targets: Sequence[Target]) -> int | None:
    """The dim of the weight whose indices all methods treat one by one; None where there is none."""
    layouts = {target.row.layout for target in targets}
    if any(layout.rows is not None for layout in layouts):  # read flat: its rows are those of no dim
        return None
    methods = [target.item.method for target in targets]
    by_row = all(type(method) in _ROWS and getattr(method, "axis", "out") == "out" for method in methods)
    return next(iter(layouts)).out if by_row and len(layouts) == 1 and _whole(targets) else None


def _whole(targets: Sequence[Target]) -> bool:
    return all(target.row.part is None for target in targets)


def _rows(entry: AdapterFactors, factors: Factors, start: int, length: int) -> Factors:
    """The factors of some output rows."""
    if isinstance(entry.method, Full):
        return {"diff": factors["diff"].narrow(entry.layout.out, start, length)}
    dims = _ROWS[type(entry.method)]
    return {key: f.narrow(dims[key], start, length) if key in dims else f for key, f in factors.items()}


def change(item: Item, base: Base | None) -> Tensor:
    """What an item adds to its target, dense, in float64: shaped as the parameter, or as the slice of it.

    Raises:
        FormatError: the method's difference depends on the base (DoRA, Magnitude, …), and there is none.
    """
    if base is None and not item.method.additive:
        raise FormatError(
            f"{item.path!r}: what a {type(item.method).__name__} adds depends on the base weight; give the base"
        )
    shape = base.shape(item.parameter) if base is not None and item.parameter in base.names else item.shape
    if shape is None:
        raise FormatError(f"{item.path!r}: the file does not say its shape; give the base")
    part = part_of(replace(item, shape=tuple(shape)), base)
    layout = item.layout if part is None else part.layout(item.layout)
    if item.method.additive:
        weight = torch.zeros(shape, dtype=torch.float64)
    else:
        assert base is not None
        weight = base.tensor(item.parameter).double()
    own = weight if part is None else part.take(weight)
    with torch.no_grad():
        return item.method.apply(own, {key: value.double() for key, value in item.factors.items()}, layout) - own
