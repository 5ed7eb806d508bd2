"""One case: the time of its training step and of its forward, the bytes it saves, whether all compute the same."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import loraparam as lp

from .case import Case
from .measures import Pace, forget_gradients, interleaved, ratio, saved_bytes, step, times
from .peers import DORA, LORA, OURS, Library, PeerError, by_target
from .variants import FLOOR, FULL, LORA_DENSE, MERGED_AWAY, Comparison, Variant, compare, copied, limits

TOLERANCE = 1e-3  # in float32, after all layers
MERGED = "merged"  # what a library's LoRA is called once it is folded into the weights


def train(found: Comparison, pace: Pace) -> dict[str, Any]:
    """Measure the training steps.

    Raises:
        RuntimeError: a peer computes something else, and nobody has said why.
    """
    case = found.case
    x = case.x()
    with torch.no_grad():
        grad = torch.randn_like(case.call(found.variants[FLOOR].model, x))
    far = _agreement(found, partial(_output_and_gradient, case, x=x, grad=grad), found.differs)
    saved = {name: saved_bytes(case, variant, x) for name, variant in found.variants.items()}
    seconds = times(case, found.variants.values(), x, grad, pace)
    return _record(found, seconds) | {
        "limits": limits(case).step,
        "saved": saved,
        "saved_limit": saved_limit(case, found.base, x),
        "agreement": far,
    }


def _record(found: Comparison, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """What every kind of row has."""
    return {
        "name": found.case.name,
        "about": found.case.about,
        "r": found.case.r,
        "rounds": len(seconds[FLOOR]),
        "floor_ms": statistics.median(seconds[FLOOR]) * 1e3,
        "ratios": {name: ratio(seconds, name) for name in seconds if name != FLOOR},
        "over": {name: ratio(seconds, ours, name) for name, ours in pairs(seconds).items()},
        "differs": {name: why for name, why in found.differs.items() if name in seconds},
        "skipped": found.skipped,
    }


def pairs(names: Iterable[str]) -> dict[str, str]:
    """{a peer's variant: ours of the same method}, such as "PEFT LoRA" and "LoRA"."""
    names = list(names)
    kinds = {name: name.rpartition(" ")[2] for name in names if " " in name}
    own = {LORA: LORA, DORA: DORA, MERGED: f"{OURS.name} {MERGED}"}
    found = {name: own[kind] for name, kind in kinds.items() if kind in own}
    return {name: ours for name, ours in found.items() if ours in names and name != ours and name != LORA_DENSE}


def saved_limit(case: Case, base: nn.Module, x: Tensor) -> int:
    """What LoRA cannot but save for backward: what the frozen model saves, the inputs of the adapted layers, which is
    what a step that trains their weights saves, and x·Aᵀ."""
    model = copied(base, share=False)
    thin = 0.0
    for row in lp.plan(model, lp.LoRA(r=case.r), case.targets):
        parameter = model.get_parameter(row.path)
        parameter.requires_grad_(True)
        thin += case.rows_at(row.path) * case.positions * case.r * case.stacked * parameter.element_size()
    return saved_bytes(case, Variant("trained", model), x) + int(thin)


def _agreement(
    found: Comparison, outcome: Callable[[Variant], list[Tensor]], differs: dict[str, str]
) -> dict[str, float]:
    """How far each peer's outcome is from ours with the same factors.

    Raises:
        RuntimeError: too far, and no reason is known: comparing the times of the two would mean nothing.
    """
    far: dict[str, float] = {}
    for theirs, ours in pairs(found.variants).items():
        if found.case.stacked > 1:  # each with factors of its own
            continue
        both = zip(*(outcome(found.variants[name]) for name in (ours, theirs)), strict=True)
        far[theirs] = max(disagreement(mine, other) for mine, other in both)
        if not (far[theirs] <= TOLERANCE or theirs in differs):
            raise RuntimeError(f"{found.case.name}: {ours} and {theirs} differ by {far[theirs]:.1e}")
    return far


def disagreement(mine: Tensor, theirs: Tensor) -> float:
    """The length of the difference, relative to the whole."""
    return float((mine - theirs).norm() / mine.norm())


def _output_and_gradient(case: Case, variant: Variant, *, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The output, and x's gradient where x has one."""
    forget_gradients(variant, x)
    found = [step(case, variant, x, grad).detach()]
    if x.grad is not None:
        found.append(x.grad)
    forget_gradients(variant, x)
    return found


def infer(found: Comparison, libraries: Iterable[Library], pace: Pace) -> dict[str, Any]:
    """Measure forwards in evaluation mode, without gradients: with the adapters on, and folded into the weights."""
    case = found.case
    kept = [name for name in found.variants if name not in (FULL, MERGED_AWAY, LORA_DENSE)]
    shown = Comparison(case, found.base, {name: found.variants[name] for name in kept}, {}, dict(found.differs))
    factors = by_target(found.variants[LORA].model)
    for library in libraries:
        _add_merged(shown, library, factors)
        if library.merges_in_eval:
            shown.variants.pop(library.variant(LORA), None)
    for variant in shown.variants.values():
        variant.model.eval()
    x = case.x().detach()
    forwards = {name: partial(_forward, case, variant, x) for name, variant in shown.variants.items()}
    far = _agreement(shown, lambda variant: [_forward(case, variant, x)], shown.differs)
    seconds = interleaved(forwards, pace)
    return _record(shown, seconds) | {"limits": limits(case).forward | {MERGED: 1.0}, "agreement": far}


def _add_merged(shown: Comparison, library: Library, factors: dict[str, dict[str, Tensor]]) -> None:
    name = f"{library.name} {MERGED}"
    try:
        # Some write into the base: a copy of its own.
        model = library.attach(copy.deepcopy(shown.base), shown.case, LORA)
        library.fill(model, shown.base, shown.case, factors)
        library.merge(model)
    except PeerError as reason:
        shown.skipped[name] = str(reason)
        return
    except Exception as error:
        if library is OURS:
            raise
        shown.skipped[name] = f"merging fails: {error}"
        return
    shown.add(name, model)
    differs = shown.case.differs
    if why := differs.get(name) or differs.get(library.variant(LORA)):
        shown.differs[name] = why


def _forward(case: Case, variant: Variant, x: Tensor) -> Tensor:
    with torch.no_grad(), variant.context():
        return case.call(variant.model, x)


def measure(case: Case, libraries: Iterable[Library], methods: Iterable[str], pace: Pace) -> list[dict[str, Any]]:
    """Both rows of a case: its training step and its forward, and what measuring them took."""
    libraries, start = list(libraries), time.perf_counter()
    found = compare(case, libraries, methods, dense=False)
    rows = [train(found, pace) | {"kind": "train"}, infer(found, libraries, pace) | {"kind": "infer"}]
    del found
    gc.collect()  # LyCORIS's modules are part of cycles; the next case needs the room
    return [row | {"seconds": time.perf_counter() - start} for row in rows]
