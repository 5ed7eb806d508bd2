"""What a law is checked on: a method on a layer or model, with everything needed to build it twice alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..adapters import attach
from ..catalogue import Leaf, Place, catalogue
from ..errors import LoraparamError
from ..hosts import groups
from ..layouts import layout_of
from ..methods import Full, Method
from ..plans import Plan
from ..stack import AdapterFactors
from ..targets import Targets


@dataclass(frozen=True)
class Subject:
    """One method on one layer.

    Attributes:
        make_layer: builds the plain layer; called under a fixed seed.
        make_inputs: builds its positional arguments; likewise.
        method: what is attached.
        targets: to which parameters; None for all that the method fits.
        dtype: the layer and its floating-point inputs are cast to it; None leaves them.
        training: the layer's mode.
        widest: the widest dtype the layer runs in, for computing the truth.
    """

    make_layer: Callable[[], nn.Module]
    make_inputs: Callable[[], Sequence[Any]]
    method: Method
    targets: Targets | None = None
    dtype: torch.dtype | None = None
    training: bool = True
    widest: torch.dtype = torch.float64

    def plain(self) -> nn.Module:
        """The layer with nothing attached, the same at each call."""
        torch.manual_seed(0)
        layer = self.make_layer().train(self.training)
        return layer if self.dtype is None else layer.to(self.dtype)

    def inputs(self) -> list[Any]:
        """The inputs, the same at each call, floating-point ones requiring grad."""
        torch.manual_seed(1)
        leaves, spec = tree_flatten(list(self.make_inputs()))
        moved = [self._input(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs: list[Any] = tree_unflatten(moved, spec)
        return inputs

    def _input(self, leaf: Tensor) -> Tensor:
        leaf = leaf.detach().clone()
        if not leaf.is_floating_point():
            return leaf
        return leaf.to(self.dtype or leaf.dtype).requires_grad_()

    def attach(self, layer: nn.Module, **options: Any) -> Plan:
        """Put the method on the targets."""
        return attach(layer, self.method, self._targets(), **options)

    def adapted(self, layer: nn.Module | None = None, **options: Any) -> nn.Module:
        """The layer with the method attached and factors moved away from their neutral start."""
        layer = self.plain() if layer is None else layer
        self.attach(layer, **options)
        shake(layer)
        return layer

    def run(self, layer: nn.Module, inputs: Sequence[Any] | None = None) -> list[Tensor]:
        """The floating-point tensors among the outputs, under a fixed seed."""
        inputs = self.inputs() if inputs is None else inputs
        torch.manual_seed(2)
        return tensors(layer(*inputs))

    def fitting(self) -> list[str]:
        """The paths of the parameters the method fits, each tied one once."""
        return [leaf.places[0].path for leaf in catalogue(self.plain()).unique() if self._fits(leaf)]

    def _targets(self) -> Targets:
        return self.targets if self.targets is not None else [re.compile(re.escape(path)) for path in self.fitting()]

    def _fits(self, leaf: Leaf) -> bool:
        place = leaf.places[0]
        if isinstance(self.method, Full):
            return True
        try:
            weight = torch.empty(leaf.shape, device="meta")
            self.method.init(weight, layout_of(place.module, place.name, leaf.shape))
        except LoraparamError:
            return False
        return True

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        return f"{type(self.plain()).__name__}, {self.method}, {self.dtype or 'own dtype'}, {mode}"


def tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors in nested outputs."""
    values = list(outputs.values()) if isinstance(outputs, dict) else outputs
    leaves, _ = tree_flatten(values)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def shake(layer: nn.Module) -> None:
    """Move every factor to a fixed random place, in place."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for group in groups(layer):
            for entry in group[0].stack.entries:
                for factor in entry.factors().values():
                    noise = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
                    factor.add_(0.3 * noise.to(factor))


def project(outputs: Sequence[Tensor]) -> Tensor:
    """A scalar on which every output bears."""
    generator = torch.Generator().manual_seed(4)
    terms = [(out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum() for out in outputs]
    return torch.stack(terms).sum()


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


def reference(plain: nn.Module, adapted: nn.Module) -> Reference:
    """``plain`` with the effective weights of ``adapted``, its parameters requiring grad, in place."""
    weights = {}
    known = catalogue(plain)
    for group in groups(adapted):
        place = known.place(group[0].path)
        base = place.module._parameters[place.name]
        assert base is not None
        effective: Tensor = base.detach().double()
        used = []
        for entry in group[0].stack.entries:
            own = {name: t.detach().double().requires_grad_() for name, t in entry.factors().items()}
            used.append((entry, own))
            part = effective if entry.part is None else entry.part.take(effective)
            new = entry.method.apply(part, own, entry.layout)
            new = part + entry.strength * (new - part)
            effective = new if entry.part is None else entry.part.put(effective, new)
        weights[group[0].path] = (effective, used)
        _replace(known.leaves[group[0].path].places, effective.detach().to(base.dtype))
    return Reference(plain, weights)


def _or_none(grads: Sequence[Any]) -> Sequence[Tensor | None]:
    """torch's annotation leaves out that ``allow_unused`` yields None."""
    return grads


def _replace(places: Sequence[Place], value: Tensor) -> None:
    """Put one new Parameter at all places of a parameter."""
    parameter = nn.Parameter(value)
    for place in places:
        place.module._parameters[place.name] = parameter
