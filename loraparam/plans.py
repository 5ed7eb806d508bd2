"""Deciding what ``attach`` would do: which parameters, with which method, read how, and by which rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import slices, targets
from .catalogue import Catalogue, Leaf, Place, catalogue, shown_value
from .errors import AttachError, LoraparamError, TargetError, listed, nearest
from .layouts import Layout, layout_of
from .methods import Factors, Method
from .refusals import refuse
from .slices import Slice
from .targets import Pattern, Targets


@dataclass(frozen=True)
class Row:
    """One target of a plan.

    Attributes:
        path: the parameter's path, with its slice: ``encoder.in_proj_weight[q]``.
        shape: of the parameter, or of the slice.
        method: what goes on it.
        num_params: trainable parameters the method adds here.
        rule: the pattern that decided.
        shared_with: the parameter's other paths, where it is tied or its module is used twice.
        layout: how it is read as a matrix.
    """

    path: str
    shape: tuple[int, ...]
    method: Method
    num_params: int
    rule: str
    shared_with: tuple[str, ...] = ()
    layout: Layout = field(default_factory=Layout)
    leaf: Leaf = field(repr=False, compare=False, default_factory=Leaf)
    place: Place | None = field(repr=False, compare=False, default=None)
    part: Slice | None = field(repr=False, compare=False, default=None)
    factor_shapes: Mapping[str, tuple[int, ...]] = field(repr=False, compare=False, default_factory=dict)
    factor_dtypes: Mapping[str, torch.dtype] = field(repr=False, compare=False, default_factory=dict)


@dataclass(frozen=True)
class Plan(Sequence[Row]):
    """What ``attach`` does or would do: a sequence of rows that prints as a table.

    Example:
        >>> print(plan(nn.Sequential(nn.Linear(4, 6)), __import__("loraparam").LoRA(r=2), "0"))
        target    shape   layout     method  r  parameters  rule
        0.weight  (6, 4)  (out, in)  LoRA    2          20  0
        1 target, 20 parameters
    """

    rows: tuple[Row, ...]

    @property
    def num_params(self) -> int:
        """Trainable parameters over all targets."""
        return sum(row.num_params for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __str__(self) -> str:
        shared = any(row.shared_with for row in self.rows)
        head = ["target", "shape", "layout", "method", "r", "parameters", "rule"] + ["shared with"] * shared
        lines = [head] + [
            [
                row.path,
                str(row.shape),
                str(row.layout) if row.layout.is_matrix(row.shape) else "-",
                type(row.method).__name__,
                str(getattr(row.method, "r", "-")),
                f"{row.num_params:,}",
                row.rule,
            ]
            + [", ".join(row.shared_with)] * shared
            for row in self.rows
        ]
        total = f"{len(self)} target{'s' * (len(self) != 1)}, {self.num_params:,} parameters"
        return f"{table(lines, right=(5,))}\n{total}"


def plan(
    model: nn.Module,
    method: Method | Mapping[Any, Method],
    targets: Targets = targets.ALL_LINEAR,
    *,
    exclude: Targets = (),
    layout: Layout | Mapping[Any, Layout] | None = None,
) -> Plan:
    """What ``attach`` with the same arguments would do. Changes nothing.

    Args:
        model: any module.
        method: a method for all targets, or {targets: method}; a later entry overrides an earlier one.
        targets: which parameters (see README, "Targets"); not with a mapping.
        exclude: parameters to leave out; a module stands for everything in it.
        layout: how to read the targets as matrices, where the module does not say: one layout for all, or
            {targets: layout}.

    Raises:
        TargetError: a pattern matches nothing, a slice does not fit, or a parameter cannot be adapted.
        RankError: a rank is out of range for its target.
    """
    if not isinstance(model, nn.Module):
        raise AttachError(f"model is a {type(model).__name__}; allowed: a torch.nn.Module")
    known = catalogue(model)
    layouts, trial = _layouts(layout, known), Trial()
    excluded = {id(leaf) for pattern in _patterns(exclude) for leaf in _targets.find_inside(pattern, known)}
    chosen: dict[int, list[Row]] = {}
    for pattern, its_method in _rules(method, targets):
        found = _targets.find(pattern, known)
        kept = [match for match in found if id(match.leaf) not in excluded]
        if not kept:
            paths = listed(match.place.path for match in found)
            raise TargetError(f"target {_targets.describe(pattern)!r} matches only what exclude= leaves out: {paths}")
        for match in kept:
            new = list(_rows(match, its_method, pattern, layouts.get(id(match.leaf)), trial))
            old = chosen.get(id(match.leaf), [])
            chosen[id(match.leaf)] = [r for r in old if not any(slices.overlap(r.part, n.part) for n in new)] + new
    return Plan(tuple(row for leaf in known.unique() for row in chosen.get(id(leaf), ())))


def _rules(method: Any, targets_: Targets) -> list[tuple[Pattern, Method]]:
    if isinstance(method, Mapping):
        if targets_ != _targets.ALL_LINEAR:
            raise TargetError(f"targets={targets_!r} beside a mapping; the mapping's keys are the targets")
        rules = [(pattern, value) for key, value in method.items() for pattern in _patterns(key)]
    else:
        rules = [(pattern, method) for pattern in _patterns(targets_)]
    if not rules:
        raise TargetError("no targets given; allowed: at least one pattern, such as 'all-linear'")
    for pattern, value in rules:
        if not isinstance(value, Method):
            raise AttachError(
                f"method {value!r} for target {_targets.describe(pattern)!r}; allowed: an instance of lp.Method, "
                "such as lp.LoRA(r=8)"
            )
    return rules


def _rows(match: targets.Match, method: Method, pattern: Pattern, layout: Layout | None, trial: Trial) -> Iterator[Row]:
    """The rows one match gives: one, or one for each slice."""
    leaf, place = match.leaf, match.place
    try:
        layout = _readable(leaf, place, layout)
        parts = [slices.resolve(item, place.module, place.name, leaf.shape, layout) for item in match.items]
    except LoraparamError as error:
        raise error.at(place.path) from None
    for i, part in enumerate(parts):
        if any(part.overlaps(other) for other in parts[:i]):
            raise TargetError(f"{place.path!r}: slice [{part.key}] overlaps another one in {pattern!r}")
    wanted: Sequence[Slice | None] = parts or (None,)
    for own in wanted:
        yield _row(leaf, place, own, method, layout, _targets.describe(pattern), trial)


def row_at(known: Catalogue, path: str, method: Method, layout: Layout | None, rule: str, trial: Trial) -> Row:
    """The row of one exact path, with at most one slice.

    Args:
        known: the model's parameters.
        path: the parameter's, with its slice in brackets.
        method, layout, rule: as they stand in the row.
        trial: one for all rows of a plan.

    Raises:
        TargetError: no such parameter or slice, or the method does not fit it.
        AttachError: the parameter cannot be adapted.
    """
    name, items = slices.split_pattern(path)
    if name not in known.leaves:
        raise TargetError(f"the model has no parameter {name!r}{nearest(name, known.leaves)}")
    if len(items) > 1:
        raise TargetError(f"{path!r}: one slice at a time")
    leaf, place = known.leaves[name], known.place(name)
    layout = _readable(leaf, place, layout)
    part = slices.resolve(items[0], place.module, place.name, leaf.shape, layout) if items else None
    return _row(leaf, place, part, method, layout, rule, trial)


class Trial:
    """What methods would add: each one's own ``init``, tried on the meta device, so the shapes stand in one place only.

    A model has many targets of few shapes, and a method on the meta device takes its time: each combination is tried
    once for a plan, or for a file. Never longer: methods are the user's, and may change.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Factors] = {}

    def factors(self, method: Method, weight: Tensor, layout: Layout) -> Factors:
        """A method's factors for a weight, both on the meta device."""
        try:
            hash(method)
        except TypeError:  # a method of the user's that holds what has no hash
            return _made(method, weight, layout)
        key = (method, weight.shape, weight.dtype, layout)
        if key not in self._known:
            self._known[key] = _made(method, weight, layout)
        return self._known[key]


def _made(method: Method, weight: Tensor, layout: Layout) -> Factors:
    """What a method's ``init`` makes, which a user wrote."""
    made: Any = method.init(weight, layout)
    if not isinstance(made, dict) or not all(isinstance(factor, Tensor) for factor in made.values()):
        what = type(made).__name__
        raise AttachError(f"{type(method).__name__}.init made a {what}; allowed: a dict of tensors, {{factor: tensor}}")
    return made


def _readable(leaf: Leaf, place: Place, layout: Layout | None) -> Layout:
    """How a parameter is read, once it is known that it can be adapted."""
    refuse(leaf, place)
    layout = layout or layout_of(place.module, place.name, leaf.shape)
    if leaf.shape:
        layout.sizes(leaf.shape)
    return layout


def _row(leaf: Leaf, place: Place, part: Slice | None, method: Method, layout: Layout, rule: str, trial: Trial) -> Row:
    path = place.path if part is None else f"{place.path}[{part.key}]"
    layout = layout if part is None else part.layout(layout)
    dtype = (leaf.base if leaf.base is not None else shown_value(place.module, place.name)).dtype
    weight = torch.empty(leaf.shape, dtype=dtype, device="meta")
    weight = weight if part is None else part.take(weight)
    try:
        factors = trial.factors(method, weight, layout)
    except LoraparamError as error:
        raise error.at(path) from None
    return Row(
        path=path,
        shape=tuple(weight.shape),
        method=method,
        num_params=sum(factor.numel() for factor in factors.values()),
        rule=rule,
        shared_with=tuple(other.path for other in leaf.places if other.path != place.path),
        layout=layout,
        leaf=leaf,
        place=place,
        part=part,
        factor_shapes={name: tuple(factor.shape) for name, factor in factors.items()},
        factor_dtypes={name: factor.dtype for name, factor in factors.items()},
    )


def _layouts(layout: Layout | Mapping[Any, Layout] | None, known: Catalogue) -> dict[int, Layout]:
    if layout is None:
        return {}
    if isinstance(layout, Layout):
        return {id(leaf): layout for leaf in known.unique()}
    given: Any = layout
    if not isinstance(given, Mapping) or not all(isinstance(value, Layout) for value in given.values()):
        raise TargetError(f"layout={layout!r}; allowed: an lp.Layout, or a mapping of targets to lp.Layout")
    return {
        id(match.leaf): value
        for key, value in layout.items()
        for pattern in _patterns(key)
        for match in _targets.find(pattern, known)
    }


def table(lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Lines of cells as aligned text, two spaces apart; the columns in ``right`` are flushed right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


# ``plan`` takes an argument named targets, as the contract has it.
_targets = targets
_patterns = targets.patterns
