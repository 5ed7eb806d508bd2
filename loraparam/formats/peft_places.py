"""Which parameter a wrapper of PEFT's is for, and how the parameter is read.

A file names modules, not parameters. A module stands for its ``weight``; an ``nn.MultiheadAttention`` for
``in_proj_weight``; with ``target_parameters`` the wrappers of one module nest in its order of registration, the last
parameter outermost.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import FormatError, listed, nearest
from ..layouts import Layout
from .bases import Base
from .content import Prefix, relocate
from .peft_config import Config
from .peft_keys import Layer, Tensors


@dataclass(frozen=True)
class Spot:
    """A parameter that a wrapper is for.

    Attributes:
        parameter: its path in the model.
        layout: how PEFT reads it.
        shape: where the base is known.
        name: what PEFT matches its patterns against.
        twice: its delta is added twice by some versions.
    """

    parameter: str
    layout: Layout
    shape: tuple[int, ...] | None
    name: str
    twice: bool = False

    @property
    def module(self) -> str:
        """The path of the module it belongs to."""
        return self.parameter.rpartition(".")[0]

    @property
    def is_projection(self) -> bool:
        """Whether it is an attention's stacked projection."""
        return self.parameter.rpartition(".")[2] == "in_proj_weight"

    def sibling(self, name: str) -> str:
        """Another parameter of the same module."""
        return f"{self.module}.{name}" if self.module else name


class Places:
    """Finds the parameters of a file's wrappers."""

    def __init__(self, tensors: Tensors, config: Config, base: Base | None, prefix: Prefix) -> None:
        self.tensors, self.config, self.base, self.prefix = tensors, config, base, prefix
        self.own: dict[str, list[str]] = {}  # {module: its parameters}
        for path in base.names if base is not None else ():
            self.own.setdefault(path.rpartition(".")[0], []).append(path)

    def find(self, owner: str, layer: Layer, out: int, in_: int) -> Spot | None:
        """The parameter of one wrapper, whose factors are for a matrix (out, in); None outside of ``prefix``.

        Raises:
            FormatError: the model has none, it is tied to one that PEFT does not adapt, or the file alone does not say
                which it is.
        """
        spot = self._find(owner, layer, out, in_)
        # PEFT itself keeps tied embeddings together where it replaces rows.
        if spot is not None and self.base is not None and "tokens" not in layer.tensors:
            tied = [path for path in self.base.aliases(spot.parameter) if path != spot.parameter]
            if tied:
                raise self._error(
                    layer,
                    f"is for {spot.parameter!r} alone, which is one parameter with {listed(tied)} in this model; give "
                    "each a copy of its own first",
                )
        return spot

    def _find(self, owner: str, layer: Layer, out: int, in_: int) -> Spot | None:
        module = relocate(layer.path, self.prefix)
        if module is None:
            return None
        if self.config.parameters and "embedding_A" not in layer.tensors:
            spot = self._targeted(layer, module, out, in_)
            if spot is not None:
                return spot
        if layer.depth:
            raise self._error(
                layer, "is a wrapper inside another, which only target_parameters make; the config names none"
            )
        attention = f"{owner}.base_layer.out_proj" in self.tensors.layers
        parameter = f"{module}.{'in_proj_weight' if attention else 'weight'}".removeprefix(".")
        # Both of an attention's projections have the rank and alpha of the attention.
        twice = owner.endswith(".base_layer.out_proj")
        name = layer.path.removesuffix(".out_proj") if twice else layer.path
        return replace(self._spot(layer, parameter, out, in_), name=name, twice=twice)

    def _spot(self, layer: Layer, parameter: str, out: int, in_: int) -> Spot:
        if "embedding_A" in layer.tensors or "tokens" in layer.tensors:
            layout = Layout(out=1, lookup=True)
        else:
            layout = self._layout(layer, parameter, out, in_)
        return Spot(parameter, layout, self.shape_of(layer, parameter), layer.path)

    def shape_of(self, layer: Layer, parameter: str) -> tuple[int, ...] | None:
        """The base's shape; an error where the base has no such parameter."""
        if self.base is None:
            return None
        if parameter not in self.base.names:
            near = nearest(parameter, self.base.names)
            raise self._error(layer, f"is for {parameter!r}, which the model does not have{near}")
        return self.base.shape(parameter)

    def _layout(self, layer: Layer, parameter: str, out: int, in_: int) -> Layout:
        flag = int(self.config.fan_in_fan_out)
        if self.base is None or parameter not in self.base.names:
            return Layout(out=flag)
        layout = self.base.layout(parameter)
        if layout is not None:
            return layout
        ways = _ways(self.base.shape(parameter), out, in_)
        if len(ways) == 2:
            # PEFT saves the flag as its last layer needed it, so that a file for both kinds says either.
            ways = {flag} | self._seen
            if len(ways) == 2:
                raise self._error(layer, f"is for the square {parameter!r}, of a Linear or a Conv1D: give the model")
        return Layout(out=next(iter(ways), flag))

    @functools.cached_property
    def _seen(self) -> set[int]:
        """The output dims of the weights, among those of a checkpoint, whose shape tells."""
        assert self.base is not None
        found = set()
        for layer in self.tensors.layers.values():
            A, B = layer.tensors.get("A"), layer.tensors.get("B")
            path = f"{relocate(layer.path, self.prefix)}.weight"
            if A is not None and B is not None and A.dim() == B.dim() == 2 and path in self.base.names:
                ways = _ways(self.base.shape(path), B.shape[0], A.shape[1])
                found |= ways if len(ways) == 1 else set()
        return found

    def _targeted(self, layer: Layer, module: str, out: int, in_: int) -> Spot | None:
        """The parameter that ``target_parameters`` name, where they name one of this module."""
        if self.base is None:
            if layer.depth or any(_may_be_in(target, layer.path) for target in self.config.parameters):
                raise self._error(layer, "may be for any of target_parameters; the base model is needed to tell")
            return None
        found = []
        for path in self.own.get(module, ()):
            name = f"{layer.path}.{path.rpartition('.')[2]}"
            ends = any(name.endswith("." + target) for target in self.config.parameters)
            if (name in self.config.parameters or ends) and len(self.base.shape(path)) in (2, 3):
                found.append((path, name))
        if not found:
            return None
        if not self.base.ordered and len(found) > 1:
            found = [pair for pair in found if _read_as(self.base.shape(pair[0]), out, in_)]
            if len(found) != 1:
                raise self._error(layer, "is for one of several parameters whose order only the model tells")
            path, name = found[0]
        elif layer.depth < len(found):
            path, name = found[-1 - layer.depth]
        else:
            raise self._error(
                layer, f"is one of more wrappers than target_parameters name here: {listed(n for _, n in found)}"
            )
        return Spot(path, self._parameter_layout(layer, path, out, in_), self.base.shape(path), name)

    def _parameter_layout(self, layer: Layer, path: str, out: int, in_: int) -> Layout:
        """(out, in) as it stands, or a stack that ``is_transposed`` says is (E, in, out)."""
        assert self.base is not None
        shape, module = self.base.shape(path), self.base.module(path.rpartition(".")[0])
        if len(shape) == 2:
            return Layout()
        if module is not None:
            return Layout(out=1 + bool(getattr(module, "is_transposed", False)), batch=(0,))
        ways = _read_as(shape, out, in_)
        if len(ways) > 1:
            raise self._error(layer, f"fits {path!r} as (E, out, in) and as (E, in, out); the model is needed to tell")
        return ways[0] if ways else Layout(out=1, batch=(0,))

    def _error(self, layer: Layer, what: str) -> FormatError:
        return FormatError(f"{self.tensors.place!r}: {layer.key!r} {what}")


def _ways(shape: Sequence[int], out: int, in_: int) -> set[int]:
    """The dims of a matrix that may be the output, for a size (out, in) of which -1 is unknown."""
    if len(shape) != 2:
        return {0}
    return {i for i in (0, 1) if out in (-1, shape[i]) and in_ in (-1, shape[1 - i])}


def _may_be_in(target: str, module: str) -> bool:
    """Whether a target may be a parameter of a module."""
    owner = target.rpartition(".")[0]
    return not owner or owner == module or module.endswith("." + owner) or owner.endswith("." + module)


def _read_as(shape: Sequence[int], out: int, in_: int) -> list[Layout]:
    """The ways to read a parameter as one matrix, or one per expert, of this size."""
    if len(shape) == 2:
        return [Layout()] * (tuple(shape) == (out, in_))
    return [Layout(out=i, batch=(0,)) for i in (1, 2) if (shape[i], shape[3 - i]) == (out, in_)]
