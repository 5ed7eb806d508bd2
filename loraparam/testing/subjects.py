"""What a law is checked on: a method on a layer or model, with everything needed to build it twice alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..adapters import attach
from ..catalogue import Leaf, catalogue
from ..errors import LoraparamError
from ..hosts import groups
from ..layouts import layout_of
from ..methods import Full, Method
from ..plans import Plan, plan
from ..targets import Targets
from .seeding import seed

Inputs = Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Subject:
    """One method on one layer.

    Attributes:
        make_layer: builds the plain layer; called under a fixed seed.
        make_inputs: builds its positional arguments, or a mapping of keyword arguments; likewise.
        method: what is attached.
        targets: to which parameters; None for all that the method fits.
        exclude: parameters left out of the targets.
        dtype: the layer and its floating-point inputs are cast to it; None leaves them.
        training: the layer's mode.
        widest: the widest dtype the layer runs in, for computing the truth.
        input_gradients: whether floating-point inputs require grad; some models refuse those that do.
        cycles: how often ``no_drift`` trains, merges and switches.
    """

    make_layer: Callable[[], nn.Module]
    make_inputs: Callable[[], Inputs]
    method: Method
    targets: Targets | None = None
    exclude: Targets = ()
    dtype: torch.dtype | None = None
    training: bool = True
    widest: torch.dtype = torch.float64
    input_gradients: bool = True
    cycles: int = 20

    def plain(self) -> nn.Module:
        """The layer with nothing attached, the same at each call."""
        seed(0)
        layer = self.make_layer().train(self.training)
        return layer if self.dtype is None else layer.to(self.dtype)

    def inputs(self) -> Inputs:
        """The inputs, the same at each call."""
        seed(1)
        given = self.make_inputs()
        leaves, spec = tree_flatten(dict(given) if isinstance(given, Mapping) else list(given))
        moved = [self._input(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs: Inputs = tree_unflatten(moved, spec)
        return inputs

    def _input(self, leaf: Tensor) -> Tensor:
        leaf = leaf.detach().clone()
        if not leaf.is_floating_point():
            return leaf
        return leaf.to(self.dtype or leaf.dtype).requires_grad_(self.input_gradients)

    def attach(self, layer: nn.Module, **options: Any) -> Plan:
        """Put the method on the targets."""
        return attach(layer, self.method, self._targets, exclude=self.exclude, **options)

    def plan(self) -> Plan:
        """What ``attach`` puts on the layer."""
        return plan(self.plain(), self.method, self._targets, exclude=self.exclude)

    def adapted(self, layer: nn.Module | None = None, **options: Any) -> nn.Module:
        """The layer with the method attached and factors moved away from their neutral start."""
        layer = self.plain() if layer is None else layer
        self.attach(layer, **options)
        shake(layer)
        return layer

    def run(self, layer: nn.Module, inputs: Inputs | None = None) -> list[Tensor]:
        """The floating-point tensors among the outputs, under a fixed seed."""
        inputs = self.inputs() if inputs is None else inputs
        seed(2)
        return tensors(layer(**inputs) if isinstance(inputs, Mapping) else layer(*inputs))

    def fitting(self) -> list[str]:
        """The paths of the parameters the method fits, each tied one once."""
        return [leaf.places[0].path for leaf in catalogue(self.plain()).unique() if self._fits(leaf)]

    @cached_property
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
