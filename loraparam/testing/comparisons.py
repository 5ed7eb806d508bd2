"""How laws compare: to rounding, bit for bit, and everything that an undo must bring back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrize
from torch.testing import assert_close

# Relative to the largest element: rounding of the layer's own arithmetic, which may differ in order between a
# factored and a dense evaluation, over sums of up to a few hundred terms.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def brief(what: str) -> Callable[[str], str]:
    """torch's message of two tensors that differ, on one line: how many elements, by how much, where."""

    def shortened(text: str) -> str:
        lines = [line for line in text.splitlines() if line and not line.startswith(("Tensor-likes", "Greatest rel"))]
        return f"{what}: {'; '.join(lines)}"

    return shortened


def close(actual: Tensor, expected: Tensor, what: str, dtype: torch.dtype | None = None, slack: float = 0.0) -> None:
    """Compare to the tolerance of a dtype, relative to the largest expected element, plus ``slack``."""
    tolerance = TOLERANCE[dtype or actual.dtype]
    actual, expected = actual.detach(), expected.detach()
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    assert_close(
        actual.double(),
        expected.double(),
        rtol=0,
        atol=tolerance * max(scale, 1.0) + slack,
        equal_nan=False,
        msg=brief(what),
    )


def same(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Compare outputs to rounding."""
    assert len(actual) == len(expected), f"{what}: {len(actual)} outputs, not {len(expected)}"
    for a, e in zip(actual, expected, strict=True):
        close(a, e, what, e.dtype)


def identical(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Compare outputs bit for bit."""
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, rtol=0, atol=0, equal_nan=True, msg=brief(what))


def mark(layer: nn.Module) -> dict[str, Any]:
    """All that must come back: objects, bits, flags, order, keys, classes."""
    parameters = list(layer.named_parameters(remove_duplicate=False))
    return {
        "objects": [(name, parameter) for name, parameter in parameters],
        "bits": [parameter.detach().clone() for _, parameter in parameters],
        "flags": [parameter.requires_grad for _, parameter in parameters],
        "keys": list(layer.state_dict()),
        "classes": [type(module) for module in layer.modules()],
        "modes": [module.training for module in layer.modules()],
    }


def assert_mark(layer: nn.Module, before: dict[str, Any]) -> None:
    """What ``mark`` took before is so still."""
    after = mark(layer)
    names = [name for name, _ in before["objects"]]
    assert [name for name, _ in after["objects"]] == names, "parameter names or their order changed"
    moved = [n for (n, old), (_, new) in zip(before["objects"], after["objects"], strict=True) if old is not new]
    assert not moved, f"other Parameter objects at {moved}"
    for name, now, then in zip(names, after["bits"], before["bits"], strict=True):
        identical([now], [then], f"parameter {name!r}")
    for what in ("flags", "keys", "classes", "modes"):
        assert after[what] == before[what], f"{what} changed: {before[what]} -> {after[what]}"


def assert_classes(layer: nn.Module, plain: nn.Module, what: str) -> None:
    """The modules have the plain layer's classes; those of parametrize and FX are made for each module anew."""
    for (path, module), (_, expected) in zip(layer.named_modules(), plain.named_modules(), strict=True):
        own, want = type(module), type(expected)
        made = parametrize.is_parametrized(expected) or isinstance(expected, GraphModule)
        alike = made and own.__bases__ == want.__bases__
        assert own is want or alike, f"{what}: {path or 'the layer'} is a {own.__name__}, not a {want.__name__}"


def values(state: dict[str, Any]) -> list[Tensor]:
    """The tensors of a state dict, without extra state."""
    return [value for value in state.values() if isinstance(value, Tensor)]
