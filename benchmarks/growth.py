"""How a step's cost grows with the rank, with the adapters stacked on a weight, with the targets, with the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .case import Case
from .cases import Sizes
from .cases_transformers import llama
from .measures import Pace
from .peers import LORA, OURS, PEFT
from .steps import train
from .variants import compare, missing

RANK = 16


def points(sizes: Sizes) -> Iterator[tuple[str, int, Case]]:
    """(what grows, how far, the case)."""
    hidden, tokens = sizes.growth
    rank = min(RANK, hidden // 4)

    def stack(**options: int) -> Case:
        return llama(hidden, tokens, **{"r": rank, "layers": 2, **options})  # type: ignore[arg-type]

    yield from (("rank", r, stack(r=r)) for r in sizes.ranks)
    yield from (("adapters", n, stack(stacked=n)) for n in sizes.stacks)
    yield from (("targets", 2 * n, stack(kinds=n)) for n in sizes.kinds)
    yield from (("batch", n, stack(batch=n)) for n in sizes.batches)


def rows(sizes: Sizes, pace: Pace) -> list[dict[str, Any]]:
    """Ours and PEFT's, LoRA only."""
    found = []
    for what, size, case in points(sizes):
        if missing(case.needs):
            return []
        record = train(compare(case, (OURS, PEFT), (LORA,), dense=False), pace)
        found.append({**record, "grows": what, "to": size, "name": f"{what} {size}"})
    return found
