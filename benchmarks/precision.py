"""How exact a merged weight is, and whether a base is still itself after many cycles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import loraparam as lp

from .case import Case, called, floats
from .peers import LORA, OURS, Library, PeerError, by_target

WIDTH, R = 256, 8
SMALL = 1e-3  # of the weight's size: what a fine-tuning changes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def layer() -> Case:
    """One linear layer."""
    return Case(
        name="precision",
        about=f"one nn.Linear({WIDTH}, {WIDTH}), r={R}, a delta of {SMALL:g} of the weight",
        model=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)),
        x=floats(4, WIDTH),
        call=called,
        targets="0",
        peft={"target_modules": ["0"]},
        r=R,
    )


def rows(libraries: Iterable[Library], *, cycles: int) -> dict[str, Any]:
    """Errors of merged bfloat16 weights, and drift of bases in two dtypes, by library."""
    torch.manual_seed(0)
    case = layer()
    found: dict[str, Any] = {"about": case.about, "cycles": cycles, "merged": {}, "drift": {}, "skipped": {}}
    for library in libraries:
        _note(found, library, "merged", lambda library=library: _merged_error(case, library))
        for name, dtype in DTYPES.items():
            found["drift"].setdefault(name, {})
            _note(
                found,
                library,
                ("drift", name),
                lambda library=library, dtype=dtype: drift(case, library, dtype, cycles),
            )
    return found


def _note(found: dict[str, Any], library: Library, place: Any, measure: Callable[[], float]) -> None:
    """Write down a number, or why there is none."""
    kind, *inside = (place,) if isinstance(place, str) else place
    into = found[kind]
    for key in inside:
        into = into[key]
    try:
        into[library.name] = measure()
    except PeerError as reason:
        found["skipped"][f"{library.name}, {kind}"] = str(reason)
    except Exception as error:
        if library is OURS:
            raise
        found["skipped"][f"{library.name}, {kind}"] = f"{type(error).__name__}: {error}".splitlines()[0]


def _start(case: Case, dtype: torch.dtype) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """A base, and factors that every dtype holds exactly."""
    base = case.model().requires_grad_(False).to(dtype)
    ours = OURS.attach(copy.deepcopy(base), case, LORA)
    with torch.no_grad():
        for factor in lp.parameters(ours):
            factor.normal_()
        A, B = lp.parameters(ours)
        weight = base[0].weight  # type: ignore[index]
        B.mul_(SMALL * weight.float().norm() / (B @ A).norm())
        for factor in (A, B):
            factor.copy_(factor.to(torch.bfloat16))
    return base, by_target(ours)


def _filled(case: Case, library: Library, base: nn.Module, factors: dict[str, dict[str, Tensor]]) -> nn.Module:
    model = library.attach(copy.deepcopy(base), case, LORA)
    library.fill(model, base, case, factors)
    return model


def _merged_error(case: Case, library: Library) -> float:
    """A merged bfloat16 weight's distance from W + B·A in float64, over that of the exact value rounded once: 1 is the
    best that bfloat16 can hold."""
    base, factors = _start(case, torch.bfloat16)
    model = _filled(case, library, base, factors)
    library.merge(model)
    own = factors["0.weight"]
    exact = base[0].weight.double() + own["lora_B"].double() @ own["lora_A"].double()  # type: ignore[index]
    weight = _weight(model).double()
    return float((weight - exact).norm() / (exact.bfloat16().double() - exact).norm())


def drift(case: Case, library: Library, dtype: torch.dtype, cycles: int) -> float:
    """How far the base is from itself after merging and taking out again, or toggling, relative to its size.

    The factors change in between, as they do in training: what rounds the same way each time would stop drifting.
    """
    base, factors = _start(case, dtype)
    model = _filled(case, library, base, factors)
    grown = [(p, p.detach().clone()) for name, p in model.named_parameters() if "lora_" in name]
    draw = torch.Generator().manual_seed(0)
    before = base[0].weight.detach().clone()  # type: ignore[index]
    for _ in range(cycles):
        with torch.no_grad():
            for factor, first in grown:
                factor.copy_(first * float(0.5 + torch.rand((), generator=draw)))
        cycle(model, library)
    return float((_base(model) - before).double().norm() / before.double().norm())


def cycle(model: nn.Module, library: Library) -> None:
    """Merged and back: ours by its block, the others by their own pair of calls."""
    if library is OURS:
        with lp.merged(model):
            model.eval()
        model.train()
    else:
        library.merge(model)
        library.unmerge(model)


def _weight(model: nn.Module) -> Tensor:
    layer: Any = model[0]  # type: ignore[index]
    weight: Tensor = getattr(layer, "base_layer", layer).weight.detach()
    return weight


def _base(model: nn.Module) -> Tensor:
    layer: Any = model[0]  # type: ignore[index]
    if isinstance(lists := layer._modules.get("parametrizations"), nn.ModuleDict):
        base: Tensor = lists["weight"].original.detach()  # type: ignore[union-attr]
        return base
    return _weight(model)
