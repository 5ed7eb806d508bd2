"""What reading an adapted parameter yields: the base, taken through its active adapters in order.

``AdapterStack`` is the one parametrization a tensor gets, whatever number of adapters; each of its children
holds the factors of one adapter at one target. ``AdapterStack.forward`` is the only place where methods are
applied to weights; merging, disabling and state dicts are stated in terms of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .functional import compute_dtype
from .layouts import Layout
from .methods import Factors, Method
from .refusals import can_dequantize
from .slices import Slice


class AdapterFactors(nn.Module):
    """The factors of one adapter at one target: raw parameters of a leaf module.

    Not nested ``nn.Linear``s, which passes over "all linears" (quantizing, wrapping, initialising) would catch.

    Attributes:
        adapter: the adapter's name.
        method, layout, part: what is applied, how the target reads as a matrix, which slice it is.
        shape: of the target.
        strength: the weight w in W + w·(apply(W) − W); 0 is off.
        holds: how many ``disabled`` blocks are open around it.
    """

    _strength: Tensor

    def __init__(
        self,
        adapter: str,
        method: Method,
        layout: Layout,
        part: Slice | None,
        shape: tuple[int, ...],
        factors: Factors,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.adapter = adapter
        self.method = method
        self.layout = layout
        self.part = part
        self.strength = 1.0
        self.holds = 0
        self.names = tuple(factors)
        for name, factor in factors.items():
            self.register_parameter(name, nn.Parameter(factor))
        device = next(iter(factors.values())).device if factors else torch.device("cpu")
        # The number compiled code reads: changing a tensor's value recompiles nothing.
        self.register_buffer("_strength", torch.ones((), device=device), persistent=False)

    @property
    def key(self) -> str:
        """Its name in the stack: the adapter's name, and the slice in brackets."""
        return self.adapter + self.suffix

    @property
    def suffix(self) -> str:
        """The slice in brackets, or nothing."""
        return "" if self.part is None else f"[{self.part.key}]"

    @property
    def acting(self) -> float:
        """The strength in force: 0 inside ``disabled``."""
        return 0.0 if self.holds else self.strength

    def set_strength(self, strength: float | None = None, hold: int = 0) -> None:
        """Change the strength, or open (+1) or close (-1) a ``disabled`` block."""
        self.strength = self.strength if strength is None else strength
        self.holds += hold
        with torch.no_grad():
            self._strength.fill_(self.acting)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterFactors:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # .half() must not round the strength, .to_empty() must not lose it.
        self._strength = torch.full((), self.acting, dtype=torch.float32, device=self._strength.device)
        return self

    def factors(self) -> Factors:
        """The factors by name."""
        return {name: getattr(self, name) for name in self.names}

    def update(self, weight: Tensor, strength: float | Tensor, noisy: bool) -> Tensor:
        """The next weight of the stack: W + strength·(apply(W) − W) on this target's slice of it."""
        before = weight if self.part is None else self.part.take(weight)
        factors = self.factors()
        if noisy:
            factors = self.method.regularize(factors, self.layout)
        after = self.method.apply(before, factors, self.layout)
        if not (isinstance(strength, float) and strength == 1.0):
            after = before + strength * (after - before)
        return after if self.part is None else self.part.put(weight, after)

    def extra_repr(self) -> str:
        """The method, the strength, and the factors' shapes."""
        shapes = ", ".join(f"{name} {tuple(getattr(self, name).shape)}" for name in self.names)
        return f"{self.method}, strength={self.acting:g}, {shapes}"


class AdapterStack(nn.Module):
    """All adapters on one tensor, in the order in which they act.

    Registered once per tensor with ``torch.nn.utils.parametrize``; a tied tensor has the same stack at each
    of its places. Its children, keyed ``<adapter>`` or ``<adapter>[<slice>]``, are ``AdapterFactors``.

    Attributes:
        volatile: the layer writes into the weight it reads (an embedding with max_norm), so it is never
            given the base itself.
    """

    def __init__(self, volatile: bool = False) -> None:
        super().__init__()
        self.volatile = volatile

    @property
    def entries(self) -> list[AdapterFactors]:
        """The factors of each adapter and slice, in the order in which they act."""
        return list(self._modules.values())  # type: ignore[arg-type]

    def named(self, adapter: str) -> list[AdapterFactors]:
        """The entries of one adapter."""
        return [entry for entry in self.entries if entry.adapter == adapter]

    def add(self, entry: AdapterFactors) -> None:
        """Put an entry last."""
        entry.train(self.training)
        self._modules[entry.key] = entry

    def reorder(self, adapters: list[str]) -> None:
        """Let the named adapters act in this order, the others keeping their places after them."""
        rank = {name: i for i, name in enumerate(adapters)}
        ordered = sorted(self.entries, key=lambda entry: rank.get(entry.adapter, len(rank)))
        if ordered != self.entries:
            self._modules.clear()
            self._modules.update({entry.key: entry for entry in ordered})

    def forward(self, base: Tensor) -> Tensor:
        """The effective weight, shaped and typed as the base."""
        return self.compose(base, self.entries, noisy=self.training)

    def compose(self, base: Tensor, entries: list[AdapterFactors], *, noisy: bool = False) -> Tensor:
        """The base taken through these entries: W → first → second → …

        The whole chain is computed in float32 or wider, outside of autocast, and rounded once.
        """
        if torch.compiler.is_compiling():
            # Reading Python state would make each toggle and each new weight a recompilation.
            steps: list[tuple[AdapterFactors, float | Tensor]] = [(entry, entry._strength) for entry in entries]
        else:
            steps = [(entry, entry.acting) for entry in entries if entry.acting != 0]
        if not steps:
            return base.clone() if self.volatile else base
        with _no_autocast(base.device.type):
            weight = base.dequantize() if can_dequantize(base) else base
            weight = weight.to(compute_dtype(base.dtype))
            for entry, strength in steps:
                weight = entry.update(weight, strength, noisy)
            return weight.to(base.dtype)


def _no_autocast(device_type: str) -> Any:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


# Called with (module, parameter name) at each read of an adapted parameter, while ``watching``.
Watcher = Callable[[nn.Module, str], None]
_watchers: list[Watcher] = []


@contextlib.contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Inside: ``watcher`` is told of each read of an adapted parameter."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def read(module: nn.Module, name: str, plist: nn.Module) -> Tensor:
    """The value of an adapted parameter, as its property yields it."""
    for watcher in _watchers:
        watcher(module, name)
    try:
        value: Tensor = plist()
        return value
    except AttributeError as error:
        # Left alone it would surface as "module has no attribute 'weight'", and hasattr would say False.
        raise RuntimeError(f"computing the effective {name!r} of {type(module).__name__} failed: {error}") from error
