"""What the hazard tests share: small modules with adapters on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import loraparam as lp

# The same operations on the same bits.
EXACT = {"rtol": 0, "atol": 0}


def adapted(module: Any = None, method: lp.Method | None = None, targets: Any = "weight") -> Any:
    """A module, by default a Linear, with an adapter none of whose factors is zero."""
    module = nn.Linear(4, 4) if module is None else module
    lp.attach(module, method or lp.LoRA(r=2), targets)
    with torch.no_grad():
        for factor in lp.parameters(module):
            factor.normal_()
    return module


def factors_of(module: nn.Module) -> dict[str, Tensor]:
    return dict(lp.named_parameters(module))


def x() -> Tensor:
    return torch.linspace(-1, 1, 8).view(2, 4)
