"""What is compared: copies of one model, each trained in another way."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn

import loraparam as lp

from . import peers
from .cases import Case

FLOOR, MERGED_AWAY, FULL = "frozen", "after merge", "full"
LORA, LORA_DENSE, PEFT_LORA = "LoRA", "LoRA merged", "PEFT LoRA"
DORA, PEFT_DORA = "DoRA", "PEFT DoRA"
NAMES = (FLOOR, LORA, PEFT_LORA, LORA_DENSE, FULL, DORA, PEFT_DORA, MERGED_AWAY)


Context = Callable[[], AbstractContextManager[None]]


@dataclass
class Variant:
    """One way to train a model.

    Attributes:
        name: one of NAMES.
        model: ready to run, in train mode.
        context: what it runs in.
    """

    name: str
    model: nn.Module
    context: Context = nullcontext


@dataclass
class Comparison:
    """All variants of a case, from the same weights, and why some are missing."""

    case: Case
    variants: dict[str, Variant] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, model: nn.Module, context: Context = nullcontext) -> None:
        """One more."""
        self.variants[name] = Variant(name, model, context)


def missing(packages: tuple[str, ...]) -> str:
    """Why a case cannot run, or nothing."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            return f"{package!r} is not installed"
    return ""


def compare(case: Case) -> Comparison:
    """Every variant of a case that can be built."""
    found = Comparison(case)
    base = case.model().train().requires_grad_(False)
    found.add(FLOOR, _fed(copy.deepcopy(base), case))
    found.add(LORA, _adapted(base, case, lp.LoRA(r=case.r)))
    found.add(LORA_DENSE, found.variants[LORA].model, lambda: lp.execution("merged"))
    found.add(DORA, _adapted(base, case, lp.DoRA(r=case.r)))
    found.add(FULL, copy.deepcopy(base).requires_grad_(True))
    merged = _adapted(base, case, lp.LoRA(r=case.r))
    lp.merge(merged)
    found.add(MERGED_AWAY, _fed(merged.requires_grad_(False), case))
    for name, ours in ((PEFT_LORA, LORA), (PEFT_DORA, DORA)):
        try:
            found.add(name, peers.peft(base, case, found.variants[ours].model, dora=ours == DORA))
        except peers.PeerError as reason:
            found.skipped[name] = str(reason)
    return found


def _adapted(base: nn.Module, case: Case, method: lp.Method) -> nn.Module:
    """A copy with adapters, none of whose factors is zero."""
    model = copy.deepcopy(base)
    lp.attach(model, method, case.targets)
    for factor in lp.parameters(model):
        if not factor.any():
            nn.init.normal_(factor, std=0.02)
    return model


def _fed(model: nn.Module, case: Case) -> nn.Module:
    """A frozen model through whose layers a gradient still has to go, to what the ids are embedded as."""
    if case.entry:

        def take_gradient(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output.requires_grad_()

        model.get_submodule(case.entry).register_forward_hook(take_gradient)
    return model


def limit(case: Case) -> float:
    """What LoRA's floating-point operations alone allow, over the frozen model's in the same layers.

    A frozen layer multiplies twice by its weight, x·Wᵀ and g·W; LoRA adds six thin products, two in the forward
    and four in the backward: 1 + 1.5·r·(in + out)/(in·out) for one layer. Here the sums over all layers.
    """
    thin = full = 0.0
    for row in lp.plan(case.model(), lp.LoRA(r=case.r), case.targets):
        rows = case.rows.get(row.path.rpartition(".")[2], 1)
        _, out, in_ = row.layout.sizes(row.shape)
        thin += rows * 1.5 * case.r * (in_ + out)
        full += rows * in_ * out
    return 1 + thin / full


def weight_shapes(case: Case) -> set[tuple[int, ...]]:
    """The shapes of the adapted weights and of their transposes; of stacks of experts also one expert's."""
    shapes: set[tuple[int, ...]] = set()
    for row in lp.plan(case.model(), lp.LoRA(r=case.r), case.targets):
        batch, out, in_ = row.layout.sizes(row.shape)
        shapes |= {tuple(row.shape), (out, in_), (in_, out), (*batch, out, in_), (*batch, in_, out)}
    return shapes
