"""State dicts: of an adapter alone, of the base under its original keys, and of the merged model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapters import entries_of
from .errors import StateError, listed, nearest
from .finite import all_finite
from .merging import detached, merged
from .sharding import is_spread, spread, whole


class Incompatible(NamedTuple):
    """What ``load_state_dict`` did not find, and did not know; both empty with ``strict=True``."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """One adapter's factors: {"<parameter path>.<factor>": tensor}, with the slice in brackets after the path.

    The tensors are the factors' own, detached, as in ``Module.state_dict``.

    Raises:
        AttachError: there is no adapter of this name.

    Example:
        >>> import loraparam as lp
        >>> model = nn.Linear(4, 6)
        >>> _ = lp.attach(model, lp.LoRA(r=2))
        >>> list(lp.state_dict(model))
        ['weight.lora_A', 'weight.lora_B']
    """
    return {
        f"{path}.{factor}": tensor
        for path, entry in entries_of(model, name, one=True)  # keys do not tell adapters apart
        for factor, tensor in entry.values().items()
    }


def load_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], name: str = "default", strict: bool = True
) -> Incompatible:
    """Copy factors into an adapter that is attached, in place: everything, or nothing.

    Args:
        model: a model with the adapter ``name``.
        state: as ``state_dict`` returns it.
        name: the adapter's name.
        strict: missing and unexpected keys are errors; otherwise they are returned.

    Raises:
        AttachError: there is no adapter of this name.
        StateError: a key is missing or unexpected (strict), or a tensor has another shape, is not
            floating-point, or is not finite. Nothing has been copied then.
    """
    own = state_dict(model, name)
    given: object = state
    if not isinstance(given, Mapping):
        raise StateError(f"state is a {type(given).__name__}; allowed: a mapping of keys to tensors, as lp.state_dict")
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    if strict and (missing or unexpected):
        parts = [f"missing {listed(missing)}"] * bool(missing) + [f"unexpected {listed(unexpected)}"] * bool(unexpected)
        hint = nearest(str(unexpected[0]), own) if unexpected else ""
        raise StateError(f"adapter {name!r}: {'; '.join(parts)}{hint}; strict=False loads what fits")
    matching = {key: state[key] for key in own if key in state}
    for key, tensor in matching.items():
        check_factor(key, tensor, own[key].shape, own[key].dtype)
    before = {key: own[key].clone() for key in matching}
    try:
        _copy(matching, own)
    except BaseException:
        _copy(before, own)
        raise
    return Incompatible(missing, unexpected)


def _copy(values: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, value in values.items():
            own = into[key]
            own.copy_(spread(whole(value), own) if is_spread(own) else whole(value))


def check_factor(key: str, tensor: Any, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Refuse a tensor that cannot be the factor at ``key``, of this shape and dtype."""
    if not isinstance(tensor, Tensor):
        raise StateError(f"{key!r} is a {type(tensor).__name__}; allowed: a tensor of shape {tuple(shape)}")
    if tensor.shape != torch.Size(shape):
        raise StateError(f"{key!r} has shape {tuple(tensor.shape)}; the model takes {tuple(shape)}")
    if not tensor.is_floating_point():
        raise StateError(f"{key!r} has dtype {tensor.dtype}; allowed: a floating-point dtype")
    if tensor.is_meta or tensor.layout != torch.strided:
        kind = "meta" if tensor.is_meta else str(tensor.layout)
        raise StateError(f"{key!r} is a {kind} tensor; allowed: a dense one with values")
    # As it will be kept: a float64 of 1e300 is infinite in float32.
    if not all_finite(tensor.to(dtype)):
        raise StateError(f"{key!r} holds NaN or infinity; a finite tensor is needed")


def base_state_dict(model: nn.Module) -> dict[str, Any]:
    """The model's state under its original keys and with its base values, as if nothing were attached.

    Example:
        >>> import loraparam as lp
        >>> model = nn.Linear(4, 6)
        >>> _ = lp.attach(model, lp.LoRA(r=2))
        >>> list(lp.base_state_dict(model))
        ['weight', 'bias']
    """
    with detached(model):
        state: dict[str, Any] = model.state_dict()
    return state


def merged_state_dict(model: nn.Module) -> dict[str, Any]:
    """The model's state under its original keys, with effective values.

    Example:
        >>> import loraparam as lp
        >>> model = nn.Linear(4, 6)
        >>> _ = lp.attach(model, lp.LoRA(r=2))
        >>> torch.equal(lp.merged_state_dict(model)["weight"], model.weight)
        True
    """
    with merged(model):
        state: dict[str, Any] = model.state_dict()
    return state
