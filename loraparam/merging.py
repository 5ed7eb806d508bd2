"""Folding adapters into weights: for good, for the time of a block, or as a state dict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import slices
from .adapters import check_known, drop, entries_of, refuse_outside, release
from .catalogue import Place, at_rest, catalogue, parametrized
from .errors import AttachError, LoraparamError, TargetError, nearest
from .finite import all_finite
from .guarded import stack_of
from .hosts import Site, groups
from .layouts import Layout, layout_of
from .reading import dense_value
from .snapshots import Acting, Snapshot, undone_on_error
from .stack import AdapterFactors, AdapterStack
from .suspension import plain, refuse_suspended


def merge(model: nn.Module, name: str | None = None) -> None:
    """Fold one adapter, or all that act, into the weights, in place, and take the parametrization off.

    The new weights are new Parameters: the old tensors are not written. With ``name=None`` the model is plain
    afterwards; adapters that were switched off are gone. With a name, the other adapters stay on top of the new
    base, which is allowed where that changes nothing: the adapter acts first, or all before it on the same
    elements are additive, as it is.

    Raises:
        AttachError: an unknown or inactive name; a result that would differ; a tied weight of which only some
            places are in ``model``; a weight under spectral_norm, which cannot hold the merged value.

    Example:
        >>> import loraparam as lp
        >>> model, x = nn.Linear(4, 6), torch.ones(1, 4)
        >>> _ = lp.attach(model, lp.LoRA(r=2, init="gaussian"))
        >>> y = model(x)
        >>> lp.merge(model)
        >>> torch.equal(model(x), y) and type(model) is nn.Linear
        True
    """
    refuse_suspended(model)
    check_known(model, name)
    found = groups(model)
    for group in found:
        refuse_outside(group, "merge")
        _refuse_held(group)
        if name is not None:
            _refuse_unequal(group, name)
    with undone_on_error(Snapshot(model)):
        for group in found:
            entries = group[0].stack.entries
            folded = entries if name is None else group[0].stack.named(name)
            if folded:
                _fold(group, folded)
                drop(group, folded, "merge")
        release(model)


def _refuse_held(group: list[Site]) -> None:
    for entry in group[0].stack.entries:
        if entry.holds:
            raise AttachError(f"adapter {entry.adapter!r} is inside `with lp.disabled(model):`; leave that block first")


def _refuse_unequal(group: list[Site], name: str) -> None:
    """Raise where folding this adapter first, with the others on top, would give another weight."""
    earlier: list[AdapterFactors] = []
    for entry in group[0].stack.entries:
        if entry.adapter != name:
            earlier += [entry] if entry.acting else []
            continue
        if not entry.acting:
            raise AttachError(f"adapter {name!r} is switched off; lp.activate it first, or lp.detach it")
        for other in earlier:
            commute = entry.method.additive and other.method.additive
            if not commute and slices.overlap(entry.part, other.part):
                raise AttachError(
                    f"{group[0].path!r}: {name!r} acts after {other.adapter!r}, and {type(other.method).__name__} then "
                    f"{type(entry.method).__name__} do not commute; lp.merge(model, {other.adapter!r}) first, or "
                    "lp.merge(model) for all"
                )


def _fold(group: list[Site], entries: list[AdapterFactors]) -> None:
    """Give a tensor's places a new base that holds these entries, in place."""
    site = group[0]
    plist = parametrized(site.module)[site.name]
    _refuse_torn(group)
    with torch.inference_mode(False), torch.no_grad():  # a weight made in that mode could never be trained, or adapted
        try:
            values = _folded(plist, site.stack, entries)
        except LoraparamError as error:
            raise error.at(site.path) from None
        for key, value in values.items():
            old = plist._parameters[key]
            assert old is not None
            _check_finite(value, site.path)
            new = nn.Parameter(value, requires_grad=old.requires_grad)
            for other in group:
                parametrized(other.module)[other.name]._parameters[key] = new


def _refuse_torn(group: list[Site]) -> None:
    """Raise where places that were tied when the adapter came on hold different values now."""
    first, *others = ((site.path, parametrized(site.module)[site.name]._parameters) for site in group)
    for path, originals in others:
        for key, tensor in originals.items():
            kept = first[1].get(key)
            same = tensor is kept or (tensor is not None and kept is not None and torch.equal(tensor, kept))
            if not same:
                raise AttachError(
                    f"{first[0]!r} and {path!r} were tied when the adapter came on and are not now; lp.detach, tie "
                    "them or not, and attach again"
                )


def _check_finite(value: Tensor, path: str) -> None:
    if not all_finite(value):
        raise AttachError(
            f"{path!r}: the merged weight is not finite; its base or its factors (lp.state_dict) hold NaN or infinity, "
            "or grew too large: load good ones, or lp.detach"
        )


def _folded(
    plist: parametrize.ParametrizationList, stack: AdapterStack, entries: list[AdapterFactors]
) -> dict[str, Tensor]:
    """The new originals of a parametrization list, such that the rest of it yields the merged weight."""
    children: list[nn.Module] = list(plist._modules.values())
    before = children[: next(i for i, child in enumerate(children) if child is stack)]
    originals: list[Tensor] = [t for t in plist._parameters.values() if t is not None]
    if not before:
        merged = stack.compose(originals[0], entries).detach()
        return {"original": merged.clone() if merged.data_ptr() == originals[0].data_ptr() else merged}
    with at_rest(before):
        merged = stack.compose(_chain(before, originals), entries).detach()
        new = _inverse(before, merged)
        # The other parametrization may not reach the merged weight: spectral_norm divides it by its norm.
        if not new or not torch.allclose(_chain(before, new), merged, rtol=1e-4, atol=1e-6):
            names = " and ".join(type(child).__name__.strip("_") for child in before)
            raise AttachError(
                f"{names} on the same weight cannot hold the merged value; take it off first with "
                "torch.nn.utils.parametrize.remove_parametrizations after lp.detach, or keep the adapters on"
            )
        return dict(zip([k for k, t in plist._parameters.items() if t is not None], new, strict=True))


def _chain(modules: list[nn.Module], originals: list[Tensor]) -> Tensor:
    """What these parametrizations make of the originals."""
    value: Tensor = modules[0](*originals)
    for module in modules[1:]:
        value = module(value)
    return value


def _inverse(modules: list[nn.Module], value: Tensor) -> list[Tensor]:
    """The originals these parametrizations would take for a value; empty where one has no ``right_inverse``."""
    inverse: Any = value
    for module in reversed(modules):
        right_inverse: Any = getattr(module, "right_inverse", None)
        if right_inverse is None:
            return []
        inverse = right_inverse(inverse)
    return [inverse] if isinstance(inverse, Tensor) else list(inverse)


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Inside: a plain model with effective weights; after it: exactly as before.

    Plain means the original classes, keys and order of parameters, so the block is the place for
    ``save_pretrained``, export, quantizing or scripting. A tied weight stays tied.

    Raises:
        AttachError: inside ``detached``; a weight that spectral_norm would not let hold the merged value.

    Example:
        >>> import loraparam as lp
        >>> model = nn.Linear(4, 6)
        >>> _ = lp.attach(model, lp.LoRA(r=2))
        >>> with lp.merged(model):
        ...     print(type(model).__name__, list(model.state_dict()))
        Linear ['weight', 'bias']
    """
    with plain(model, "merged", lambda group: _fold(group, group[0].stack.entries)):
        yield model


@contextlib.contextmanager
def detached(model: nn.Module) -> Iterator[nn.Module]:
    """Inside: a plain model with the base weights, the very same Parameters; after it: exactly as before.

    Raises:
        AttachError: inside ``merged``.

    Example:
        >>> import loraparam as lp
        >>> model = nn.Linear(4, 6)
        >>> weight = model.weight
        >>> _ = lp.attach(model, lp.LoRA(r=2))
        >>> with lp.detached(model):
        ...     print(model.weight is weight)
        True
    """
    with plain(model, "detached"):
        yield model


@contextlib.contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Iterator[nn.Module]:
    """Inside: one adapter, or all, act as identity: the base model's outputs, bit for bit.

    The adapters stay on, so this is cheap enough for each step, as for a DPO reference model. Blocks nest.

    Raises:
        AttachError: there is no adapter of this name.

    Example:
        >>> import loraparam as lp
        >>> model, x = nn.Linear(4, 6), torch.ones(1, 4)
        >>> y = model(x)
        >>> _ = lp.attach(model, lp.LoRA(r=2))
        >>> with lp.disabled(model):
        ...     print(torch.equal(model(x), y))
        True
    """
    refuse_suspended(model)
    held = [entry for _, entry in entries_of(model, name)]
    with undone_on_error(Acting(group[0].stack for group in groups(model))):
        for entry in held:
            entry.set_strength(hold=+1)
    try:
        yield model
    finally:
        for entry in held:
            entry.set_strength(hold=-1)


def effective_weight(model: nn.Module, path: str) -> Tensor:
    """The weight a layer reads, dense and differentiable, without dropout.

    Args:
        model: a model with or without adapters.
        path: a parameter's path, with or without a slice: ``encoder.in_proj_weight[q]``.

    Raises:
        TargetError: no such parameter, or slice of it.

    Example:
        >>> import loraparam as lp
        >>> model = nn.Linear(4, 6)
        >>> _ = lp.attach(model, lp.LoRA(r=2))
        >>> torch.equal(lp.effective_weight(model, "weight"), model.weight)
        True
    """
    check_known(model, None)
    name, items = slices.split_pattern(path)
    known = catalogue(model)
    if name not in known.leaves:
        raise TargetError(f"no parameter {name!r}{nearest(name, known.leaves)}")
    place = known.place(name)
    weight = dense_value(place.module, place.name)
    if not items:
        return weight
    if len(items) > 1:
        raise TargetError(f"{path!r}: one slice at a time, such as '{name}[{items[0]}]'")
    try:
        return slices.resolve(items[0], place.module, place.name, weight.shape, _layout_at(place, weight)).take(weight)
    except LoraparamError as error:
        raise error.at(name) from None


def _layout_at(place: Place, weight: Tensor) -> Layout:
    """How the parameter is read: as its adapters read it, or as its module says."""
    stack = stack_of(place.module, place.name)
    entries = stack.entries if stack is not None else []
    return entries[0].whole_layout if entries else layout_of(place.module, place.name, weight.shape)
