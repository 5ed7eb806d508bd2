"""What one adapted layer costs in Python: a 64×64 linear, whose arithmetic takes next to no time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .case import Case
from .measures import Pace, paired_microseconds
from .peers import DORA, LORA
from .variants import FLOOR, LORA_DENSE, PEFT_DORA, PEFT_LORA, Variant, compare

WIDTH, TOKENS = 64, 4
COMPARED = (LORA, PEFT_LORA, LORA_DENSE, DORA, PEFT_DORA)
KINDS = ("without grad", "with grad", "forward and backward")


def layer() -> Case:
    """One linear."""
    return Case(
        name="overhead",
        about=f"one nn.Linear({WIDTH}, {WIDTH}), {TOKENS} tokens",
        model=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH)),
        x=lambda: torch.randn(TOKENS, WIDTH).requires_grad_(),
        call=lambda model, x: model[0](x),  # type: ignore[index]
        targets="0",
        peft={"target_modules": ["0"]},
        r=8,
    )


def overhead(pace: Pace, *, calls_a_round: int) -> dict[str, dict[str, float]]:
    """Microseconds that a call takes beyond the plain frozen layer's: {kind: {variant: median over rounds}}."""
    case = layer()
    found = compare(case)
    x, grad = case.x(), torch.randn(TOKENS, WIDTH)
    result: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        calls = {name: _call(kind, case, variant, x, grad) for name, variant in found.variants.items()}
        with torch.no_grad() if kind == KINDS[0] else nullcontext():
            spent = paired_microseconds(calls, pace, calls_a_round=calls_a_round)
        result[kind] = {"plain": statistics.median(spent[FLOOR])}
        for name in COMPARED:
            if name in spent:
                beyond = [mine - plain for mine, plain in zip(spent[name], spent[FLOOR], strict=True)]
                result[kind][name] = statistics.median(beyond)
    return result


def _call(kind: str, case: Case, variant: Variant, x: Tensor, grad: Tensor) -> Callable[[], object]:
    linear, context = variant.model[0], variant.context  # type: ignore[index]
    forward = (lambda: linear(x)) if context is nullcontext else (lambda: _within(context, linear, x))
    return (lambda: forward().backward(grad)) if kind == KINDS[2] else forward


def _within(context: Callable[[], object], linear: nn.Module, x: Tensor) -> Tensor:
    with context():  # type: ignore[attr-defined]
        y: Tensor = linear(x)
    return y
