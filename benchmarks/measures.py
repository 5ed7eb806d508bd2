"""Times, bytes saved for backward, and tensors as large as a weight."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .case import Case
from .variants import FLOOR, Variant

WARM_UP, LEAST = 2, 3
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
        variant.after()
    return y


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often something is timed: ``steps`` rounds, or as many as start within ``seconds``, but ``LEAST``.

    Before them two rounds warm up; one where that one takes all the time.
    """

    steps: int = 21
    seconds: float = math.inf
    clock: Clock = time.perf_counter

    def rounds(self) -> Iterator[bool]:
        """Whether a round counts: those that warm up do not."""
        start = time.perf_counter()
        for i in range(-min(WARM_UP, self.steps), self.steps):
            late = time.perf_counter() - start >= self.seconds
            if not (late and (i >= LEAST or -WARM_UP < i < 0)):
                yield i >= 0


def times(case: Case, variants: Iterable[Variant], x: Tensor, grad: Tensor, pace: Pace) -> dict[str, list[float]]:
    """Seconds of a training step by variant."""
    variants = list(variants)
    return interleaved(
        {variant.name: partial(step, case, variant, x, grad) for variant in variants},
        pace,
        around={variant.name: partial(forget_gradients, variant, x) for variant in variants},
    )


def interleaved(
    actions: Mapping[str, Callable[[], object]], pace: Pace, *, around: Mapping[str, Callable[[], object]] | None = None
) -> dict[str, list[float]]:
    """Seconds by action, one a round; each round runs all of them once, in an order of its own.

    Args:
        actions: what is timed.
        pace: how often.
        around: what is called before and after an action, and not timed.
    """
    order, shuffle = list(actions.items()), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    with no_collection():
        for counts in pace.rounds():
            shuffle(order)
            for name, action in order:
                if around:
                    around[name]()
                start = pace.clock()
                action()
                spent = pace.clock() - start
                if around:
                    around[name]()
                if counts:
                    seconds[name].append(spent)
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


def ratio(seconds: Mapping[str, list[float]], name: str, over: str = FLOOR) -> dict[str, float]:
    """Of one variant's time to another's in the same round: median and quartiles over the rounds."""
    ratios = [mine / other for mine, other in zip(seconds[name], seconds[over], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": median, "low": low, "high": high}


def saved_bytes(case: Case, variant: Variant, x: Tensor) -> int:
    """Bytes that a forward keeps for its backward: each storage once, parameters and buffers not."""
    kept: list[Tensor] = []  # alive until counted, so that no two share an address

    def pack(tensor: Tensor) -> Tensor:
        # A result that its own operation saves would hold itself through the hook, out of the collector's sight.
        kept.append(tensor.detach())
        return kept[-1]

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
    calls: dict[str, Callable[[], object]], pace: Pace, *, calls_a_round: int
) -> dict[str, list[float]]:
    """Microseconds a call of each function, one block of calls a round."""

    def block(call: Callable[[], object]) -> None:
        for _ in range(calls_a_round):
            call()

    spent = interleaved({name: partial(block, call) for name, call in calls.items()}, pace)
    return {name: [seconds / calls_a_round * 1e6 for seconds in values] for name, values in spent.items()}
