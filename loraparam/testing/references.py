"""The definition carried out in float64 on a plain layer: what adapted layers are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..catalogue import Place, catalogue, parametrized
from ..hosts import groups
from ..stack import AdapterFactors


@dataclass
class Reference:
    """A plain layer that carries effective weights computed from the method's definition, in float64.

    Attributes:
        layer: the plain layer.
        weights: {path: (effective weight in float64, the factors it was computed from)}.
    """

    layer: nn.Module
    weights: dict[str, tuple[Tensor, list[tuple[AdapterFactors, dict[str, Tensor]]]]]

    def factor_grads(self) -> dict[str, Tensor]:
        """{"<path>.<adapter key>.<factor>": gradient}, by the chain rule through the definition, after backward."""
        grads: dict[str, Tensor] = {}
        known = catalogue(self.layer)
        for path, (effective, entries) in self.weights.items():
            base = known.leaves[path].base
            assert base is not None
            grad: Tensor | None = base.grad
            upstream = torch.zeros_like(effective) if grad is None else grad.double()
            names = [(f"{path}.{entry.key}.{name}", t) for entry, own in entries for name, t in own.items()]
            found = torch.autograd.grad(effective, [t for _, t in names], upstream, allow_unused=True)
            for (key, tensor), own in zip(names, _or_none(found), strict=True):
                grads[key] = torch.zeros_like(tensor) if own is None else own
        return grads


def reference(plain: nn.Module, adapted: nn.Module, *, detach_norms: bool = False) -> Reference:
    """``plain`` with the effective weights of ``adapted``, its parameters requiring grad, in place.

    With ``detach_norms`` norms are constants in the backward pass.
    """
    weights = {}
    found = groups(adapted)
    for group in found:
        _take_off_others(catalogue(plain).place(group[0].path))
    known = catalogue(plain)
    for group in found:
        base = known.leaves[group[0].path].base
        assert base is not None
        effective: Tensor = base.detach().double()
        used = []
        for entry in group[0].stack.entries:
            own = {name: t.detach().double().requires_grad_() for name, t in entry.factors().items()}
            used.append((entry, own))
            part = effective if entry.part is None else entry.part.take(effective)
            method: Any = entry.method
            if detach_norms and differentiates_norm(method):
                method = replace(method, detach_norm=True)
            new = method.apply(part, own, entry.layout)
            new = part + entry.strength * (new - part)
            effective = new if entry.part is None else entry.part.put(effective, new)
        weights[group[0].path] = (effective, used)
        _replace(known.leaves[group[0].path].places, effective.detach().to(base.dtype))
    return Reference(plain, weights)


def differentiates_norm(method: Any) -> bool:
    """Whether a norm in it is no constant in the backward pass."""
    return not getattr(method, "detach_norm", True)


def _take_off_others(place: Place) -> None:
    """Give a weight under weight_norm or the like as one Parameter, in place: adapters act on what it yields."""
    module = place.module
    if place.name in parametrized(module):
        # Taking off deletes a property of the class, which torch shares between a module and its deepcopies.
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))
        parametrize.remove_parametrizations(module, place.name)


def _or_none(grads: Sequence[Any]) -> Sequence[Tensor | None]:
    """torch's annotation leaves out that ``allow_unused`` yields None."""
    return grads


def _replace(places: Sequence[Place], value: Tensor) -> None:
    """Put one new Parameter at all places of a parameter."""
    parameter = nn.Parameter(value)
    for place in places:
        place.module._parameters[place.name] = parameter
