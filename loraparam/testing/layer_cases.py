"""What a strategy of layers draws: a layer and its inputs, shown as a reader would write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

# Not one, which `weights()` draws: a row of a single element may cancel, and then shows nothing but rounding.
SIZE = st.integers(2, 5)
N_BATCH = st.integers(1, 3)


@dataclass(frozen=True, repr=False)
class LayerCase:
    """A layer to put adapters on.

    Attributes:
        name: its row in the table.
        make_layer: builds it.
        make_inputs: builds its positional arguments.
        dtypes: those that the plain layer itself runs in; None for all.
        strided: whether its weights are stored with the dims in another order, so that they are not contiguous.
        dtype: what it and its inputs have been cast to; None for their own.
    """

    name: str
    make_layer: Callable[[], nn.Module]
    make_inputs: Callable[[], Sequence[Any]]
    dtypes: tuple[torch.dtype, ...] | None = None
    strided: bool = False
    dtype: torch.dtype | None = None

    def __repr__(self) -> str:
        with torch.random.fork_rng(devices=[]):
            layer = " ".join(repr(self.make_layer()).split())
            inputs = [tuple(x.shape) if isinstance(x, Tensor) else x for x in self.make_inputs()]
        dtype = f", {self.dtype}" if self.dtype is not None else ""
        return f"{layer} on {', '.join(map(str, inputs))}{', strided' * self.strided}{dtype}"


def varied(cases: st.SearchStrategy[LayerCase]) -> st.SearchStrategy[LayerCase]:
    """Cases of which some have weights that are not contiguous."""
    return st.builds(_with_strides, st.booleans(), cases)


def _with_strides(strided: bool, case: LayerCase) -> LayerCase:
    if not strided:
        return case

    def make_layer() -> nn.Module:
        layer = case.make_layer()
        for parameter in layer.parameters():
            if parameter.dim() >= 2:
                parameter.data = parameter.data.transpose(0, -1).contiguous().transpose(0, -1)
        return layer

    return replace(case, make_layer=make_layer, strided=True)


def cast(dtype: torch.dtype | None, case: LayerCase) -> LayerCase:
    """The case in a dtype, where the plain layer runs in it; its inputs as well."""
    if dtype is None or (case.dtypes is not None and dtype not in case.dtypes):
        return case

    def make_inputs() -> Sequence[Any]:
        inputs = case.make_inputs()
        return [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]

    return replace(case, make_layer=lambda: case.make_layer().to(dtype), make_inputs=make_inputs, dtype=dtype)
