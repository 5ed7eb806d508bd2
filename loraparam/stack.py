"""The modules that hold an adapter's factors, and how a base is taken through them.

``AdapterStack`` is the one parametrization a tensor gets, whatever number of adapters; each of its children
holds the factors of one adapter at one target. ``apply_steps`` is the only place where methods are applied to
weights; merging, disabling and state dicts are stated in terms of it, and structured execution is checked
against it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import operations as operations  # fills the handlers of EffectiveWeight
from .effective import Source, make
from .errors import AttachError, LoraparamError
from .execution import must_be_dense
from .forms import Form
from .functional import Axis, autocasts, compute_dtype
from .layouts import Layout
from .methods import Factors, Method
from .refusals import can_dequantize
from .slices import Slice
from .squares import kept_squares

# One adapter acting at one target: (its entry, its strength, the factors as this read sees them).
Step = tuple["AdapterFactors", float | Tensor, Factors]


class AdapterFactors(nn.Module):
    """The factors of one adapter at one target: raw parameters of a leaf module.

    Not nested ``nn.Linear``s, which passes over "all linears" (quantizing, wrapping, initialising) would catch.

    Attributes:
        adapter: the adapter's name.
        method, layout, part: what is applied, how the target reads as a matrix, which slice it is.
        shape: of the target.
        strength: the weight w in W + w·(apply(W) − W); 0 is off.
        turn: its adapter's place in the order of all on the model, for targets that the adapter gets later.
        holds: how many ``disabled`` blocks are open around it.
    """

    _strength: Tensor
    _stacked: frozenset[str] | None = None

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
        self.turn = 0
        self.holds = 0
        self.names = tuple(factors)
        self.shapes = {name: factor.shape for name, factor in factors.items()}
        for name, factor in factors.items():
            try:
                self.register_parameter(name, nn.Parameter(factor))
            except (KeyError, TypeError, RuntimeError) as error:  # a method of the user's
                reason = error.args[0]
                raise AttachError(
                    f"factor {name!r} of {type(method).__name__} cannot be a parameter: {reason}"
                ) from None
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
    def whole_layout(self) -> Layout:
        """The layout of the whole parameter, of which this may be a slice."""
        return self.layout if self.part is None else self.part.whole(self.layout)

    @property
    def acting(self) -> float:
        """The strength in force: 0 inside ``disabled``."""
        return 0.0 if self.holds else self.strength

    def stacked(self) -> frozenset[str]:
        """Of a stack along the first dim: which factors have a part for each matrix. Any other is shared by all."""
        if self._stacked is None:
            single = self.method.init(torch.empty(self.shape[1:], device="meta"), self.layout.select(0))
            self._stacked = frozenset(name for name, shape in self.shapes.items() if single[name].shape != shape)
        return self._stacked

    def set_strength(self, strength: float | None = None, hold: int = 0) -> None:
        """Change the strength, or open (+1) or close (-1) a ``disabled`` block."""
        self.strength = self.strength if strength is None else strength
        self.holds += hold
        self._strength.fill_(self.acting)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterFactors:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # .half() must not round the strength, .to_empty() must not lose it.
        self._strength = torch.full((), self.acting, dtype=torch.float32, device=self._strength.device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.holds:  # a copy made inside ``disabled`` has no block around it
            self.holds = 0
            self._buffers = dict(self._buffers)
            self._strength = torch.full_like(self._strength, self.strength)

    def factors(self) -> Factors:
        """The factors by name."""
        own = self._parameters
        if len(own) == len(self.names):
            return dict(own)  # type: ignore[arg-type]
        # Sharded training puts plain tensors in the parameters' place.
        return {name: own[name] if name in own else getattr(self, name) for name in self.names}  # type: ignore[misc]

    def values(self) -> Factors:
        """The factors without gradients, as state dicts have them.

        Raises:
            AttachError: FSDP1 shows them in its flat form.
        """
        values = {name: factor.detach() for name, factor in self.factors().items()}
        for name, value in values.items():
            if value.shape != self.shapes[name] and value.dim() < 2:
                raise AttachError(
                    f"{name!r} is sharded by FSDP: here it has shape {tuple(value.shape)} instead of "
                    f"{tuple(self.shapes[name])}; inside `with FullyShardedDataParallel.summon_full_params(model):` "
                    "it is whole"
                )
        return values

    def seen(self, noisy: bool) -> Factors:
        """The factors as one read sees them: in training, after dropout."""
        return self.method.regularize(self.factors(), self.layout) if noisy else self.factors()

    def update(self, weight: Tensor, strength: float | Tensor, factors: Factors) -> Tensor:
        """The next weight of the stack: W + strength·(apply(W) − W) on this target's slice of it."""
        before = weight if self.part is None else self.part.take(weight)
        after = self.method.apply(before, factors, self.layout)
        if not (isinstance(strength, float) and strength == 1.0):
            after = before + strength * (after - before)
        return after if self.part is None else self.part.put(weight, after)

    def extend(self, form: Form, strength: float, factors: Factors) -> Form | None:
        """``update`` on a weight in structured form; None where the result has none."""
        if self.part is not None:
            if self.part.index:
                return None
            form = replace(form, window=(self.part.start, self.part.stop))
        after = self.method.factored(form, factors)
        if after is not None and strength != 1.0:
            after = after.blend(form, strength)
        return after if after is None or after.window is None else replace(after, window=None)

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
        writable: a drop-in layer's, where writing the weight writes the base, which ``.data`` shows in training.
    """

    def __init__(self, volatile: bool = False) -> None:
        super().__init__()
        self.volatile = volatile
        self.writable = False

    @property
    def entries(self) -> list[AdapterFactors]:
        """The factors of each adapter and slice, in the order in which they act."""
        return list(self._modules.values())  # type: ignore[arg-type]

    def named(self, adapter: str) -> list[AdapterFactors]:
        """The entries of one adapter."""
        return [entry for entry in self.entries if entry.adapter == adapter]

    def add(self, entry: AdapterFactors) -> None:
        """Put an entry in its turn: last, unless it extends an adapter that acts before others."""
        entry.train(self.training)
        later = {other.key: other for other in self.entries if other.turn > entry.turn}
        for key in later:
            del self._modules[key]
        self._modules[entry.key] = entry
        self._modules.update(later)

    def reorder(self, adapters: list[str]) -> None:
        """Let the named adapters act in this order.

        Nothing moves where they do already: compiled code is specialised on the order, not on what is active.
        """
        rank = {name: i for i, name in enumerate(adapters)}
        acting = [rank[entry.adapter] for entry in self.entries if entry.adapter in rank]
        if acting == sorted(acting):
            return
        ordered = sorted(self.entries, key=lambda entry: rank.get(entry.adapter, len(rank)))
        self._modules.clear()
        self._modules.update({entry.key: entry for entry in ordered})

    def forward(self, base: Tensor) -> Tensor:
        """The effective weight, shaped and typed as the base."""
        weight: Tensor = self.read_as(base, make)
        return weight

    def read_as(self, base: Tensor, kind: Callable[[Source, Tensor], Any]) -> Any:
        """The effective weight: the base where nothing acts, a dense tensor where it must be one, else of this kind."""
        if must_be_dense():
            return self.compose(base, self.entries, noisy=self.training)
        steps = _acting(self.entries, self.training)
        if not steps:
            return base.clone() if self.volatile else base
        weight = kind(Head(self, base, steps, self.training), base)
        if self.writable:
            weight._base = base
        return weight

    def compose(self, base: Tensor, entries: list[AdapterFactors], *, noisy: bool = False) -> Tensor:
        """The base taken through these entries, densely: W → first → second → …"""
        steps = self._steps(entries, noisy)
        if not steps:
            return base.clone() if self.volatile else base
        return apply_steps(base, steps, noisy)

    def _steps(self, entries: list[AdapterFactors], noisy: bool) -> list[Step]:
        """What acts now. Compiled code reads the strength's tensor: Python state would recompile at each change."""
        if torch.compiler.is_compiling():
            return [(entry, entry._strength, entry.seen(noisy)) for entry in entries]
        return _acting(entries, noisy)


def _acting(entries: list[AdapterFactors], noisy: bool) -> list[Step]:
    return [(entry, entry.strength, entry.seen(noisy)) for entry in entries if entry.strength != 0 and not entry.holds]


def apply_steps(base: Tensor, steps: Sequence[Step], noisy: bool) -> Tensor:
    """The chain of ``apply``s: in float32 or wider, outside of autocast, rounded once."""
    with _no_autocast(base):
        weight = base.dequantize() if can_dequantize(base) else base
        weight = weight.to(compute_dtype(base.dtype))
        for entry, strength, factors in steps:
            if noisy and entry.method.needs_input:
                raise LoraparamError(
                    f"{entry.method} in training drops elements of the layer's input, which a dense weight cannot "
                    'express, and this operation needs one; use dropout_on="weight", or eval()'
                )
            weight = entry.update(weight, strength, factors)
        return weight.to(base.dtype)


class Head:
    """The source of a whole effective weight: a base and the steps that act on it."""

    def __init__(self, stack: AdapterStack, base: Tensor, steps: Sequence[Step], noisy: bool) -> None:
        self._stack, self._base, self._steps, self.noisy = stack, base, steps, noisy
        self.tensors = [base, *(factor for _, _, factors in steps for factor in factors.values())]

    def dense(self, tensors: Sequence[Tensor]) -> Tensor:
        """The merged weight of these tensors."""
        base, *rest = tensors
        queue = iter(rest)
        steps = [(entry, strength, {name: next(queue) for name in own}) for entry, strength, own in self._steps]
        return apply_steps(base, steps, self.noisy)

    def form(self) -> Form | None:
        """The steps' structured form; None where one of them has none."""
        layout, base = self._layout(), self._base
        if layout is None or self._stack.volatile:
            return None
        squares = functools.partial(kept_squares, self._stack, base, layout)
        return _extended(Form(base, layout, noisy=self.noisy, squares=squares), self._steps)

    def take(self, index: int | Tensor) -> Form | None:
        """The form of one expert, or of several: a loop over experts must not normalise the whole stack each time."""
        layout, base = self._layout(), self._base
        whole = all(entry.part is None for entry, _, _ in self._steps)
        if layout is None or layout.batch != (0,) or not whole:
            return None
        if isinstance(index, Tensor) and (len(index) >= len(base) or all(e.method.additive for e, _, _ in self._steps)):
            form = self.form()  # as many matrices as there are, or nothing to normalise
            return None if form is None else form.take(index)
        steps: list[Step] = []
        for e, strength, own in self._steps:
            stacked = e.stacked()
            steps.append((e, strength, {name: t[index] if name in stacked else t for name, t in own.items()}))
        own_layout = layout.select(0) if isinstance(index, int) else layout

        def squares(axis: Axis) -> Tensor:
            return kept_squares(self._stack, base, layout, axis)[index]

        return _extended(Form(base[index], own_layout, noisy=self.noisy, squares=squares), steps)

    def _layout(self) -> Layout | None:
        """The layout that all steps read the whole weight by."""
        layout = self._steps[0][0].layout
        for entry, _, _ in self._steps:
            if (entry.layout is not layout and entry.layout != layout) or (entry.part is not None and entry.part.index):
                return None
        return layout


def _extended(form: Form | None, steps: Sequence[Step]) -> Form | None:
    """A form taken through the steps, outside of autocast."""
    if form is not None and autocasts(form.weight):
        with _no_autocast(form.weight):
            return _extended(form, steps)
    for entry, strength, factors in steps:
        if form is None:
            return None
        form = entry.extend(form, strength, factors)  # type: ignore[arg-type]
    return form


def _no_autocast(tensor: Tensor) -> Any:
    return torch.autocast(tensor.device.type, enabled=False) if autocasts(tensor) else contextlib.nullcontext()
