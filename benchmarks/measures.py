"""Times, bytes saved for backward, and tensors as large as a weight."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .cases import Case
from .variants import FLOOR, Variant

WARM_UP = 2
Clock = Callable[[], float]


def forget_gradients(variant: Variant, x: Tensor) -> None:
    """As an optimizer's ``zero_grad`` does."""
    x.grad = None
    for parameter in variant.model.parameters():
        parameter.grad = None


def step(case: Case, variant: Variant, x: Tensor, grad: Tensor) -> Tensor:
    """A forward and a backward from ``grad``; no loss, which would be the same for all. Returns the output."""
    with variant.context():
        y = case.call(variant.model, x)
        y.backward(grad)
    return y


def times(
    case: Case, variants: Iterable[Variant], x: Tensor, grad: Tensor, *, steps: int, clock: Clock
) -> dict[str, list[float]]:
    """Seconds by variant, one a round; each round runs all of them once, in an order of its own."""
    order, shuffle = list(variants), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {variant.name: [] for variant in order}
    with no_collection():
        for i in range(-WARM_UP, steps):
            shuffle(order)
            for variant in order:
                forget_gradients(variant, x)
                start = clock()
                step(case, variant, x, grad)
                if i >= 0:
                    seconds[variant.name].append(clock() - start)
                forget_gradients(variant, x)
            gc.collect()
    return seconds


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection inside, which would hit whoever happens to run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def ratio(seconds: dict[str, list[float]], name: str, over: str = FLOOR) -> dict[str, float]:
    """Of one variant's time to another's in the same round: median and quartiles over the rounds."""
    ratios = [mine / other for mine, other in zip(seconds[name], seconds[over], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": median, "low": low, "high": high}


def saved_bytes(case: Case, variant: Variant, x: Tensor) -> int:
    """Bytes that a forward keeps for its backward: each storage once, parameters and buffers not."""
    kept: list[Tensor] = []  # alive until counted, so that no two share an address

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with variant.context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = case.call(variant.model, x)
    own = {_address(tensor) for tensor in (*variant.model.parameters(), *variant.model.buffers())}
    sizes = {_address(tensor): tensor.untyped_storage().nbytes() for tensor in kept}
    del y
    return sum(size for address, size in sizes.items() if address not in own)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Temporaries(TorchDispatchMode):
    """Counts the tensors that come to be inside it in one of some shapes; views and results in place do not.

    Attributes:
        made: by operation.
    """

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes
        self.made: dict[str, int] = {}

    @property
    def count(self) -> int:
        """Over all operations."""
        return sum(self.made.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_address(tensor) for tensor in _plain((args, kwargs))}
        for tensor in _plain(result):
            if tuple(tensor.shape) in self.shapes and _address(tensor) not in given:
                self.made[str(func)] = self.made.get(str(func), 0) + 1
        return result


def _plain(tree: Any) -> list[Tensor]:
    """The tensors in it that have memory of their own."""
    return [leaf for leaf in tree_leaves(tree) if type(leaf) in (Tensor, nn.Parameter)]


def temporaries(case: Case, variant: Variant, x: Tensor, grad: Tensor, shapes: set[tuple[int, ...]]) -> dict[str, int]:
    """Tensors of these shapes that one step makes, by operation. The first step may fill caches: the second counts."""
    for _ in range(2):
        forget_gradients(variant, x)
        with Temporaries(shapes) as counter:
            step(case, variant, x, grad)
    forget_gradients(variant, x)
    return counter.made


def paired_microseconds(
    calls: dict[str, Callable[[], object]], *, rounds: int, calls_a_round: int, clock: Clock
) -> dict[str, list[float]]:
    """Microseconds a call of each function, one block of calls a round."""
    order, shuffle = list(calls.items()), random.Random(0).shuffle
    found: dict[str, list[float]] = {name: [] for name in calls}
    with no_collection():
        for i in range(-WARM_UP, rounds):
            shuffle(order)
            for name, call in order:
                start = clock()
                for _ in range(calls_a_round):
                    call()
                if i >= 0:
                    found[name].append((clock() - start) / calls_a_round * 1e6)
            gc.collect()
    return found
