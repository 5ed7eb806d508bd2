"""What is done to a model with very many targets: attaching, loading, switching and merging adapters."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .case import Case
from .cases import Sizes
from .cases_torch import many_linears
from .measures import Pace, no_collection
from .peers import OURS, Library, PeerError

BARE = "bare tensors"
ACTIONS = ("attach", "load", "switch", "merge")
SWITCHES = 5  # there and back, in one round


def rows(sizes: Sizes, libraries: Iterable[Library], pace: Pace) -> dict[str, Any]:
    """Milliseconds of each action and bytes of each file, by library: medians over rounds that interleave them."""
    case = many_linears(sizes.targets, sizes.width, sizes.rank)
    libraries = list(libraries)
    spent: dict[str, dict[str, list[float]]] = {action: {} for action in ACTIONS}
    found: dict[str, Any] = {"about": f"{case.about}, LoRA r={case.r}", "files": {}, "skipped": {}}
    for _ in range(pace.steps):
        for library in libraries:
            _one_round(library, case, pace, spent, found)
        for action, seconds in _bare(case, pace).items():
            spent[action].setdefault(BARE, []).append(seconds)
    found["files"][BARE] = 4 * sizes.targets * 2 * sizes.rank * sizes.width
    found["ms"] = {
        action: {name: statistics.median(seconds) * 1e3 for name, seconds in by_name.items()}
        for action, by_name in spent.items()
    }
    return found


def _one_round(
    library: Library, case: Case, pace: Pace, spent: dict[str, dict[str, list[float]]], found: dict[str, Any]
) -> None:
    """Every action once; one that fails, or that the library does not have, is named instead."""
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), case.model()
        steps: list[tuple[str, Callable[[], Any]]] = [
            ("attach", lambda: library.wrap(model, case)),
            ("save", lambda: library.save(held[0], folder)),
            ("load", lambda: library.load(other, case, folder)),
            ("add", lambda: library.add(held[0], case)),
            ("switch", lambda: _back_and_forth(library, held[0])),
            ("merge", lambda: library.merge(held[1])),
        ]
        held: list[nn.Module] = []  # the model after attaching, and after loading
        other = case.model()
        for action, call in steps:
            try:
                seconds, result = _timed(call, pace)
            except Exception as error:
                if library is OURS:
                    raise
                why = str(error) if isinstance(error, PeerError) else f"{type(error).__name__}: {error}"
                found["skipped"][f"{library.name}, {action}"] = why.splitlines()[0]
                if action in ("attach", "save", "load"):
                    return
                continue
            if action in ("attach", "load"):
                held.append(result)
            if action == "save":
                found["files"][library.name] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            elif action in spent and f"{library.name}, add" not in found["skipped"]:
                spent[action].setdefault(library.name, []).append(seconds / (2 * SWITCHES if action == "switch" else 1))


def _back_and_forth(library: Library, model: nn.Module) -> None:
    for _ in range(SWITCHES):
        library.switch(model, True)
        library.switch(model, False)


def _timed(call: Callable[[], Any], pace: Pace) -> tuple[float, Any]:
    with no_collection():
        start = pace.clock()
        result = call()
        return pace.clock() - start, result


def _bare(case: Case, pace: Pace) -> dict[str, float]:
    """The same without any library: making the factors, reading them from a file, W + B·A for each."""
    model = case.model()
    weights = [weight.detach() for weight in model.parameters()]

    def make() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [
            (nn.init.kaiming_uniform_(torch.empty(case.r, w.shape[1])), w.new_zeros(len(w), case.r)) for w in weights
        ]

    attach, factors = _timed(make, pace)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/factors.safetensors"
        save_file(
            {f"{i}.{name}": t for i, pair in enumerate(factors) for name, t in zip("AB", pair, strict=True)}, path
        )
        load, _ = _timed(lambda: load_file(path), pace)
    merge, _ = _timed(lambda: [torch.addmm(w, B, A) for w, (A, B) in zip(weights, factors, strict=True)], pace)
    return {"attach": attach, "load": load, "merge": merge}
