"""One model that is measured, with its input and the same targets for every library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and how one step of it is run.

    Attributes:
        name: of the row.
        about: the sizes, in words.
        model: makes the model, with fresh weights.
        x: makes its input: floats, which take gradients, or token ids.
        call: the model's output for it.
        targets: what ``lp.attach`` adapts.
        peft: what makes PEFT adapt the same, as arguments of its ``LoraConfig``.
        r: the rank.
        stacked: how many adapters act on each target.
        positions: how many rows of input a target multiplies.
        entry: where x is token ids, the module whose output takes gradients in a frozen model.
        rows: {pattern of paths: rows of input for each one of ``positions``}, where that is not 1.
        lookup: the targets are looked up in, which takes no multiplications.
        differs: of the variants, such as "PEFT LoRA", those that compute something else than ours, and why.
        needs: packages besides torch.
    """

    name: str
    about: str
    model: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    call: Callable[[nn.Module, Tensor], Tensor]
    targets: Any
    peft: Mapping[str, Any]
    r: int = 16
    stacked: int = 1
    positions: int = 1
    entry: str = ""
    rows: Mapping[str, float] = field(default_factory=dict)
    lookup: bool = False
    differs: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    def rows_at(self, path: str) -> float:
        """Rows of input at one target, for each one of ``positions``."""
        return next((rows for pattern, rows in self.rows.items() if fnmatchcase(path, pattern)), 1.0)


def called(model: nn.Module, x: Tensor) -> Tensor:
    """A model's output for one argument."""
    output: Tensor = model(x)
    return output


def floats(*shape: int) -> Callable[[], Tensor]:
    """Makes random input that takes gradients."""
    return partial(_floats, shape)


def _floats(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape).requires_grad_()


def ids(vocabulary: int, batch: int, tokens: int) -> Callable[[], Tensor]:
    """Makes random token ids."""
    return lambda: torch.randint(vocabulary, (batch, tokens))


def usual_rank(width: int) -> int:
    """16, or 4 in the tiny sizes."""
    return 16 if width >= 128 else 4
