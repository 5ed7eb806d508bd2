"""Putting adapters on a model, choosing which of them act, and taking them off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, nn

from . import slices, targets
from .catalogue import Catalogue, catalogue
from .errors import AttachError, LoraparamError, listed, nearest
from .freezing import freeze as freeze_base
from .freezing import unfreeze
from .guarded import stack_of
from .hosts import Site, groups, install, places_outside, refuse_sharded, release_hosts, remove, sites
from .layouts import Layout
from .managers import guard_managers
from .methods import Factors, Method
from .methods.base import is_number
from .plans import Plan, Row
from .plans import plan as make_plan
from .reading import dense_value
from .refusals import can_dequantize
from .sharding import is_spread, spread_factor, whole
from .snapshots import Acting, Snapshot, undone_on_error
from .stack import AdapterFactors, AdapterStack
from .suspension import refuse_suspended
from .targets import Targets


def attach(
    model: nn.Module,
    method: Method | Mapping[Any, Method],
    targets: Targets = targets.ALL_LINEAR,
    *,
    name: str = "default",
    exclude: Targets = (),
    freeze: bool = True,
    train: Targets = (),
    generator: Generator | None = None,
    layout: Layout | Mapping[Any, Layout] | None = None,
) -> Plan:
    """Put an adapter on parameters of a model, in place; its classes and forwards stay untouched.

    The new adapter acts at once, with weight 1, after those already there, and starts neutral: outputs are as
    before. Attaching under an existing name extends that adapter, at its weight and in its turn.

    Args:
        model: any module.
        method: a method for all targets, or {targets: method}; a later entry overrides an earlier one.
        targets: which parameters (see README, "Targets"); not with a mapping.
        name: the adapter's name: one path component.
        exclude: parameters to leave out; a module stands for everything in it.
        freeze: set ``requires_grad=False`` on every base parameter of the model that ``train`` does not match.
        train: base parameters left trainable; a module stands for everything in it. They are not in the adapter's
            file: what should be gets ``lp.Full()``.
        generator: makes the factors' start reproducible.
        layout: how to read the targets as matrices, where the module does not say.

    Returns:
        What was done: one row per target.

    Raises:
        TargetError, RankError: as ``plan``.
        AttachError: a parameter cannot be adapted, or carries an adapter of this name already.

    After any error the model is as it was.

    Example:
        >>> import loraparam as lp
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> print(lp.attach(model, lp.LoRA(r=2), "0"))
        target    shape   layout     method  r  parameters  rule
        0.weight  (6, 4)  (out, in)  LoRA    2          20  0
        1 target, 20 parameters
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        20
    """
    check_name(name)
    plan = make_plan(model, method, targets, exclude=exclude, layout=layout)
    attach_rows(model, plan, name, generator=generator, freeze=freeze, train=train)
    return plan


def attach_rows(
    model: nn.Module,
    plan: Plan,
    name: str,
    factors: Sequence[Factors] | None = None,
    *,
    generator: Generator | None = None,
    freeze: bool = True,
    train: Targets = (),
) -> None:
    """Carry out a plan, in place: with these factors, one dict per row, or with fresh ones."""
    refuse_suspended(model)
    known = catalogue(model)
    keep = _trainable(train, known)
    for row in plan:
        _refuse_half_tied(row)
        _refuse_duplicate(row, name)
    others = [entry for site in sites(model) for entry in site.stack.entries]
    last = max((other.turn for other in others), default=-1) + 1
    strength, turn = next(((other.strength, other.turn) for other in others if other.adapter == name), (1.0, last))
    given = [None] * len(plan) if factors is None else factors
    with torch.inference_mode(False):  # what is made in that mode could never be trained, nor switched outside of it
        entries = [_entry(row, name, values, generator) for row, values in zip(plan, given, strict=True)]
    with undone_on_error(Snapshot(model)):
        for row, entry in zip(plan, entries, strict=True):
            entry.turn = turn
            _stack_for(row).add(entry)
            entry.set_strength(strength)
        guard_managers(model)
        if freeze:
            freeze_base(known.unique(), keep)


def _trainable(train: Targets, known: Catalogue) -> set[int]:
    """The bases that ``train`` matches, by the identity of their leaf."""
    return {id(leaf) for pattern in _targets.patterns(train) for leaf in _targets.find_inside(pattern, known)}


def check_name(name: Any) -> None:
    """Refuse an adapter name that could not be a state-dict key and a file name."""
    bad = not isinstance(name, str) or not name or name in (".", "..") or any(c in name for c in "./\\\0:[]")
    if bad:
        raise AttachError(
            f"adapter name {name!r}; allowed: one path component without any of . / \\ : [ ] or NUL, such as 'style'"
        )
    if hasattr(AdapterStack(), name):
        raise AttachError(
            f"adapter name {name!r} is an attribute of the modules that hold adapters; use '{name}_1', say"
        )


def _refuse_half_tied(row: Row) -> None:
    """Raise where a tied parameter carries adapters at some of its places only: the others would not see new ones."""
    stacks = {place.path: stack_of(place.module, place.name) for place in row.leaf.places}
    if len({id(stack) for stack in stacks.values()}) > 1:
        carrying = listed(path for path, stack in stacks.items() if stack is not None)
        raise AttachError(
            f"{listed(stacks)} are one parameter, and the adapters on {carrying} came on before it was tied, or on a "
            "part of the model; lp.detach or lp.merge them, then attach on the whole model"
        )


def _refuse_duplicate(row: Row, name: str) -> None:
    assert row.place is not None
    stack = stack_of(row.place.module, row.place.name)
    for entry in stack.named(name) if stack is not None else ():
        if slices.overlap(entry.part, row.part):
            raise AttachError(
                f"{row.path!r} already carries adapter {name!r}; use another name=, or lp.detach(model, {name!r}) first"
            )


def _entry(row: Row, name: str, factors: Factors | None, generator: Generator | None) -> AdapterFactors:
    """A row's factors: the given ones, or fresh ones on top of the weight as it reads now."""
    assert row.place is not None
    with torch.no_grad():
        if factors is None:
            stored = dense_value(row.place.module, row.place.name)
            weight = whole(stored)
            dense = weight.dequantize().to(weight.dtype) if can_dequantize(weight) else weight
            part = dense if row.part is None else row.part.take(dense)
            try:
                factors = row.method.init(part, row.layout, generator=generator)
            except LoraparamError as error:
                raise error.at(row.path) from None
        else:
            base = row.leaf.base  # what it reads as would be all the adapters there, merged
            stored = base if base is not None else dense_value(row.place.module, row.place.name)
            dtypes = row.factor_dtypes
            factors = {key: value.to(stored.device, dtypes[key], copy=True) for key, value in factors.items()}
        if is_spread(stored):
            dims = row.method.dims() if row.part is None else {}
            factors = {k: spread_factor(v, dims.get(k, ()), stored, row.layout) for k, v in factors.items()}
    try:
        return AdapterFactors(name, row.method, row.layout, row.part, row.shape, factors)
    except AttachError as error:
        raise error.at(row.path) from None


def _stack_for(row: Row) -> AdapterStack:
    """The stack of a row's parameter, installed at all its places if it is new."""
    assert row.place is not None
    stack = stack_of(row.place.module, row.place.name)
    if stack is not None:
        return stack
    stack = AdapterStack(volatile=any(getattr(p.module, "max_norm", None) is not None for p in row.leaf.places))
    done: set[tuple[int, str]] = set()
    for place in [row.place, *row.leaf.places]:
        if (id(place.module), place.name) not in done:
            done.add((id(place.module), place.name))
            try:
                install(place.module, place.name, stack, alias=place is not row.place)
            except LoraparamError as error:
                raise error.at(place.path) from None
    return stack


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter, or all, off a model, in place, without folding it into the weights.

    Once the last is off, the same Parameter objects are back, with the same bits, the same ``requires_grad``
    flags and in the same order, under the original classes.

    Raises:
        AttachError: there is no adapter of this name; or ``model`` is a part of a model in which a tied weight
            has places outside of it.

    Example:
        >>> import loraparam as lp
        >>> model = nn.Linear(4, 6)
        >>> weight = model.weight
        >>> _ = lp.attach(model, lp.LoRA(r=2))
        >>> lp.detach(model)
        >>> model.weight is weight and type(model) is nn.Linear and weight.requires_grad
        True
    """
    refuse_suspended(model)
    check_known(model, name)
    with undone_on_error(Snapshot(model)):
        for group in groups(model):
            drop(group, [e for e in group[0].stack.entries if name in (None, e.adapter)], "detach")
        release(model)


def drop(group: list[Site], entries: list[AdapterFactors], action: str) -> None:
    """Take entries out of a stack, in place, and the stack off its tensor once it is empty."""
    stack = group[0].stack
    if not entries:
        return
    refuse_outside(group, action)
    for entry in entries:
        del stack._modules[entry.key]
    if not stack.entries:
        for site in group:
            remove(site.module, site.name)


def release(model: nn.Module) -> None:
    """Give the flags back and release the model's own methods, in place, once no adapter is left."""
    if not sites(model):
        unfreeze(model)
        release_hosts(model)


def refuse_outside(group: list[Site], action: str) -> None:
    """Raise where only some of a tied weight's places are in the model at hand, or FSDP has it in its care."""
    refuse_sharded(group)
    outside = places_outside(group)
    if outside:
        raise AttachError(
            f"{group[0].path!r} is tied with {outside} place{'s' * (outside > 1)} outside of this module, so "
            f"{action} cannot treat it alone; call lp.{action} on the whole model"
        )


def activate(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Choose which adapters act, in which order, at what weight, in place.

    Args:
        model: a model with adapters.
        weights: {adapter name: weight w}, in the order in which they act: W → first → second → …, each as
            W + w·(apply(W) − W). An adapter that is not named is off.

    Raises:
        AttachError: an unknown adapter name, or a weight that is not a finite number.

    Example:
        >>> import loraparam as lp
        >>> model = nn.Linear(4, 6)
        >>> _ = lp.attach(model, lp.LoRA(r=2), name="style")
        >>> _ = lp.attach(model, lp.DoRA(r=2), name="task")
        >>> lp.activate(model, {"task": 1.0, "style": 0.5})
    """
    refuse_suspended(model)
    if not isinstance(weights, Mapping):
        raise AttachError(f"activate got a {type(weights).__name__}; allowed: a mapping, such as {{'style': 1.0}}")
    stacks = list({id(site.stack): site.stack for site in sites(model)}.values())
    names = _names(stacks)
    for name, weight in weights.items():
        _check_among(names, name)
        if not is_number(weight):
            raise AttachError(f"adapter {name!r}: weight {weight!r}; allowed: a finite number")
    order, strengths = list(weights), {name: float(weight) for name, weight in weights.items()}
    with undone_on_error(Acting(stacks)):
        for stack in stacks:
            stack.reorder(order)
            for entry in stack.entries:
                entry.turn = order.index(entry.adapter) if entry.adapter in strengths else len(order)
                entry.set_strength(strengths.get(entry.adapter, 0.0))


def adapters(model: nn.Module) -> dict[str, dict[str, Method]]:
    """{adapter name: {target path: method}} of everything attached, found by walking the modules.

    Example:
        >>> import loraparam as lp
        >>> model = nn.Linear(4, 6)
        >>> _ = lp.attach(model, lp.Magnitude())
        >>> lp.adapters(model)
        {'default': {'weight': Magnitude(axis='out')}}
    """
    found: dict[str, dict[str, Method]] = {}
    for path, entry in entries_of(model):
        found.setdefault(entry.adapter, {})[path] = entry.method
    return found


def entries_of(model: nn.Module, name: str | None = None, *, one: bool = False) -> list[tuple[str, AdapterFactors]]:
    """(target path with its slice, entry) of one adapter, or of all unless it has to be ``one``.

    Raises:
        AttachError: there is no adapter of this name.
    """
    check_known(model, name, one=one)
    return [
        (group[0].path + entry.suffix, entry)
        for group in groups(model)
        for entry in group[0].stack.entries
        if name in (None, entry.adapter)
    ]


def check_known(model: nn.Module, name: str | None, *, one: bool = False) -> None:
    """Raise for the name of an adapter that is not on the model; None stands for all, unless it has to be one."""
    if not isinstance(model, nn.Module):
        raise AttachError(f"model is a {type(model).__name__}; allowed: a torch.nn.Module")
    if one or name is not None:
        _check_among(_names(site.stack for site in sites(model)), name)


def _names(stacks: Iterable[AdapterStack]) -> list[str]:
    """The adapters on some stacks, in the order in which they are met."""
    return list(dict.fromkeys(entry.adapter for stack in stacks for entry in stack.entries))


def _check_among(names: list[str], name: Any) -> None:
    if name not in names:
        known = f"attached: {listed(names)}" if names else "none is attached"
        raise AttachError(f"no adapter named {name!r}; {known}{nearest(str(name), names)}")


# ``attach`` takes an argument named targets, as the contract has it.
_targets = targets
