"""What is compared: copies of one model, each trained in another way."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn

import loraparam as lp

from .case import Case
from .peers import DORA, LORA, MAGNITUDE, OURS, PEFT, Library, PeerError, by_target, stir

FLOOR, MERGED_AWAY, FULL, LORA_DENSE = "frozen", "after merge", "full", "LoRA merged"
PEFT_LORA, PEFT_DORA = PEFT.variant(LORA), PEFT.variant(DORA)

Context = Callable[[], AbstractContextManager[None]]


def _nothing() -> None:
    """After most steps."""


@dataclass
class Variant:
    """One way to train a model.

    Attributes:
        name: FLOOR, FULL, a method for ours, or a library and a method.
        model: ready to run, in train mode.
        context: what it runs in.
        after: what has to be called after each backward.
    """

    name: str
    model: nn.Module
    context: Context = nullcontext
    after: Callable[[], None] = _nothing


@dataclass
class Comparison:
    """All variants of a case, from the same weights, and why some are missing.

    Attributes:
        base: the frozen model that they are copies of; most share its weights with it.
        differs: {variant: why it computes something else than ours}.
    """

    case: Case
    base: nn.Module
    variants: dict[str, Variant] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    differs: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, model: nn.Module, **options: Callable[..., object]) -> None:
        """One more."""
        self.variants[name] = Variant(name, model, **options)  # type: ignore[arg-type]

    def attempt(self, library: Library, method: str) -> None:
        """One more, of a library, or the reason why not; a peer gets the factors of ours."""
        name = library.variant(method)
        ours = self.variants.get(method)
        try:
            model = adapted(self.base, self.case, library, method)
            if library is OURS:
                stir(model)
            elif ours is not None and self.case.stacked == 1:
                library.fill(model, self.base, self.case, by_target(ours.model))
        except PeerError as reason:
            self.skipped[name] = str(reason)
            return
        self.add(name, model, after=lambda: library.after_step(model))
        if library is not OURS and (why := library.differs(self.case, method)):
            self.differs[name] = why


def missing(packages: tuple[str, ...]) -> str:
    """Why a case cannot run, or nothing."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            return f"{package!r} is not installed"
    return ""


def frozen_base(case: Case) -> nn.Module:
    """The model that all variants are copies of."""
    return case.model().train().requires_grad_(False)


def adapted(base: nn.Module, case: Case, library: Library, method: str) -> nn.Module:
    """A copy under a library's adapters.

    Raises:
        PeerError: the library is not there, or cannot.
    """
    model = library.attach(copied(base, share=not library.writes_base), case, method)
    model.train()  # that of some libraries' layers returns nothing
    return model


def copied(base: nn.Module, *, share: bool = True) -> nn.Module:
    """A copy, with the same weights, or with its own."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in base.parameters()} if share else {})


def plain(base: nn.Module, case: Case, name: str) -> nn.Module:
    """The model without adapters: FLOOR, FULL, or MERGED_AWAY."""
    if name == FULL:
        return copied(base, share=False).requires_grad_(True)
    model = copied(base)
    if name == MERGED_AWAY:
        lp.attach(model, lp.LoRA(r=case.r, init="gaussian"), case.targets)
        lp.merge(model)
    return fed(model.requires_grad_(False), case)


def compare(
    case: Case,
    libraries: Iterable[Library] = (OURS, PEFT),
    methods: Iterable[str] = (LORA, DORA),
    *,
    dense: bool = True,
) -> Comparison:
    """Every variant of a case that can be built; with ``dense``, also LoRA on dense weights, and after merging."""
    found = Comparison(case, frozen_base(case))
    found.add(FLOOR, plain(found.base, case, FLOOR))
    found.add(FULL, plain(found.base, case, FULL))
    for method in methods:
        for library in libraries:
            if method in library.methods:
                found.attempt(library, method)
    if dense:
        found.add(LORA_DENSE, found.variants[LORA].model, context=lambda: lp.execution("merged"))
        found.add(MERGED_AWAY, plain(found.base, case, MERGED_AWAY))
    return found


def fed(model: nn.Module, case: Case) -> nn.Module:
    """A frozen model through whose layers a gradient still has to go, to what the ids are embedded as."""
    if case.entry:

        def take_gradient(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output.requires_grad_()

        model.get_submodule(case.entry).register_forward_hook(take_gradient)
    return model


@dataclass(frozen=True)
class Limits:
    """What arithmetic alone allows, of a step or a forward over the frozen model's in the same layers; None where
    the frozen model does not multiply.

    Attributes:
        step: by method, and FULL.
        forward: by method.
    """

    step: dict[str, float | None]
    forward: dict[str, float | None]


def limits(case: Case) -> Limits:
    """Sums over the adapted layers.

    A frozen layer multiplies twice by its weight, x·Wᵀ and g·W; LoRA adds six thin products, two in the forward
    and four in the backward: 1 + 1.5·r·(in + out)/(in·out) for one layer. DoRA adds the norm of W + s·B·A, by the
    factored way that forms no B·A (README.md). Full fine-tuning adds gᵀ·x.
    """
    thin = norms = full = 0.0
    for row in lp.plan(case.model(), lp.LoRA(r=case.r), case.targets):
        rows = case.rows_at(row.path) * case.positions
        batch, out, in_ = row.layout.sizes(row.shape)
        thin += rows * case.r * (in_ + out)
        norms += math.prod(batch) * case.r * (in_ * out + case.r * (in_ + out))
        full += rows * in_ * out
    if case.lookup:
        return Limits(dict.fromkeys((LORA, DORA, MAGNITUDE, FULL)), dict.fromkeys((LORA, DORA, MAGNITUDE)))
    stacked = case.stacked * thin
    step = {LORA: 1 + 1.5 * stacked / full, DORA: 1 + (3 * stacked + norms) / (2 * full), MAGNITUDE: 1.0, FULL: 1.5}
    forward = {LORA: 1 + stacked / full, DORA: 1 + (stacked + norms) / full, MAGNITUDE: 1.0}
    return Limits(dict(step), dict(forward))


def weight_shapes(case: Case) -> set[tuple[int, ...]]:
    """The shapes of the adapted weights and of their transposes; of stacks of experts also one expert's."""
    shapes: set[tuple[int, ...]] = set()
    for row in lp.plan(case.model(), lp.LoRA(r=case.r), case.targets):
        batch, out, in_ = row.layout.sizes(row.shape)
        shapes |= {tuple(row.shape), (out, in_), (in_, out), (*batch, out, in_), (*batch, in_, out)}
    return shapes
