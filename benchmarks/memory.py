"""Peak resident memory of a few training steps, each variant in a process of its own.

As a program it is such a process: ``python -m benchmarks.memory '{"case": …, "variant": …, "sizes": …}'``.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .case import Case
from .cases import Sizes, suite
from .measures import step
from .peers import LIBRARIES, LORA, OURS, Library, PeerError, stir
from .steps import saved_limit
from .variants import FLOOR, FULL, Variant, adapted, frozen_base, missing, plain

STEPS = 3
ROOT = Path(__file__).resolve().parents[1]


def rows(sizes: Sizes, libraries: Iterable[Library], methods: Iterable[str]) -> list[dict[str, Any]]:
    """Each case that is measured, each variant in its own process."""
    methods = list(methods)
    found = []
    wanted = [FLOOR, FULL, *(lib.variant(m) for m in methods for lib in libraries if m in lib.methods)]
    for case in chosen(sizes):
        if missing(case.needs):
            continue
        results = {name: _in_a_fresh_process(case, name, sizes) for name in wanted}
        found.append(
            {
                "name": case.name,
                "peaks": {name: result["peak"] for name, result in results.items() if "peak" in result},
                "skipped": {name: result["skipped"] for name, result in results.items() if "skipped" in result},
                "limit": results[FLOOR]["limit"],
            }
        )
    return found


def chosen(sizes: Sizes) -> list[Case]:
    """The largest Llama stack, and the tied head."""
    cases = suite(sizes)
    largest = max(range(len(sizes.llama)), key=lambda i: (sizes.llama[i][0] * sizes.llama[i][1], -sizes.llama[i][2]))
    return [cases[largest], *(case for case in cases if case.name == "tied head")]


def _in_a_fresh_process(case: Case, variant: str, sizes: Sizes) -> dict[str, Any]:
    order = json.dumps({"case": case.name, "variant": variant, "sizes": sizes.as_json()})
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", order],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        raise RuntimeError(f"measuring {case.name}, {variant} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(case: Case, name: str) -> dict[str, Any]:
    """Bytes that this process holds at most during steps, beyond what it held before the model was made."""
    torch.manual_seed(0)
    before = _resident()["now"]
    base = frozen_base(case)
    x = case.x()
    result: dict[str, Any] = {}
    if name == FLOOR:
        adapters = OURS.attach(frozen_base(case), case, LORA).parameters()
        trained = sum(p.nbytes for p in adapters if p.requires_grad)
        # The base, the factors and their gradients, and what a step cannot but save.
        result["limit"] = sum(p.nbytes for p in base.parameters()) + 2 * trained + saved_limit(case, base, x)
    try:
        variant = _variant(case, base, name)
    except PeerError as reason:
        return {"skipped": str(reason)}
    del base
    with torch.no_grad():
        grad = torch.randn_like(case.call(variant.model, x))
    gc.collect()
    _forget_peak()
    for _ in range(STEPS):
        step(case, variant, x, grad)
        variant.model.zero_grad()
        x.grad = None
    return result | {"peak": _resident()["peak"] - before}


def _variant(case: Case, base: nn.Module, name: str) -> Variant:
    """One of a comparison's variants, alone. Its factors are what they start as: values take no memory."""
    if name in (FLOOR, FULL):
        return Variant(name, plain(base, case, name))
    library, method = next((lib, m) for lib in LIBRARIES for m in lib.methods if lib.variant(m) == name)
    model = adapted(base, case, library, method)
    if library is OURS:
        stir(model)
    return Variant(name, model, after=lambda: library.after_step(model))


def _resident() -> dict[str, int]:
    """What this process holds, and the most it has held, in bytes."""
    # getrusage's peak is inherited from the process that started this one; Linux has its own in /proc.
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "VmHWM"))}
        return {"now": kib["VmRSS"] * 1024, "peak": kib["VmHWM"] * 1024}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"now": peak, "peak": peak}


def _forget_peak() -> None:
    """Start again from what is held now, where the system allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main(order: str) -> None:
    """Carry out one order and print the result."""
    given = json.loads(order)
    sizes = Sizes(**{key: _tuples(value) for key, value in given["sizes"].items()})
    case = next(case for case in suite(sizes) if case.name == given["case"])
    sys.stdout.write(json.dumps(measure(case, given["variant"])) + "\n")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    main(sys.argv[1])
