"""loraparam itself, asked the same questions as its peers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import loraparam as lp

from ..case import Case
from .base import MAGNITUDE, METHODS, Factors, Library, copy_into

FILE = "adapter.safetensors"


class Ours(Library):
    """This library."""

    name = "loraparam"
    package = "loraparam"
    methods = tuple(METHODS)

    def variant(self, method: str) -> str:
        """Ours go by the method's name."""
        return method

    def attach(self, model: nn.Module, case: Case, method: str) -> nn.Module:
        """``lp.attach``, once for each adapter of a stack."""
        make = METHODS[method]
        for i in range(case.stacked):
            adapter = make() if method == MAGNITUDE else make(r=case.r)  # type: ignore[call-arg]
            lp.attach(model, adapter, case.targets, name=f"adapter{i}")
        return model

    def fill(self, model: nn.Module, base: nn.Module, case: Case, factors: dict[str, Factors]) -> None:
        """By key."""
        own = lp.named_parameters(model)
        copy_into((factor, factors[key.rpartition(".")[0]][key.rpartition(".")[2]]) for key, factor in own)

    def save(self, model: nn.Module, folder: Path) -> None:
        """``lp.save``."""
        lp.save(model, folder / FILE, name="adapter0")

    def load(self, model: nn.Module, case: Case, folder: Path) -> nn.Module:
        """``lp.load``."""
        lp.load(model, folder / FILE, name="adapter0")
        return model

    def add(self, model: nn.Module, case: Case) -> None:
        """A second ``lp.attach``."""
        lp.attach(model, lp.LoRA(r=case.r), case.targets, name="second")

    def switch(self, model: nn.Module, second: bool) -> None:
        """``lp.activate``."""
        lp.activate(model, {"second" if second else "adapter0": 1.0})

    def merge(self, model: nn.Module) -> None:
        """``lp.merge``, which folds for good; ``cycle`` is the kind that comes back."""
        lp.merge(model)


def by_target(model: nn.Module) -> dict[str, Factors]:
    """The factors of our one adapter, by target."""
    found: dict[str, Factors] = {}
    for key, factor in lp.named_parameters(model):
        path, _, name = key.rpartition(".")
        found.setdefault(path, {})[name] = factor.detach()
    return found


def stir(model: nn.Module) -> None:
    """Give factors that start at zero small values, in place."""
    with torch.no_grad():
        for factor in lp.parameters(model):
            if not factor.any():
                nn.init.normal_(factor, std=0.02)
