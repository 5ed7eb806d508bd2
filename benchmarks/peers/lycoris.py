"""LyCORIS: modules beside the model, whose forwards replace those of its layers."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..case import Case
from .base import DORA, LORA, Factors, Library, PeerError, copy_into, places

FILE = "adapter.safetensors"
FIRST, SECOND = "benchmark_network", "benchmark_second"  # the networks are no part of the model


class Lycoris(Library):
    """KohakuBlueleaf/LyCORIS: its LoCon. LoRA on the activations (``bypass_mode``), its faster way; DoRA on weights."""

    name = "LyCORIS"
    package = "lycoris"
    methods = (LORA, DORA)

    def module(self) -> ModuleType:
        """Quietly: it logs to stdout."""
        module = super().module()
        logging.getLogger("LyCORIS").setLevel(logging.ERROR)
        return module

    def attach(self, model: nn.Module, case: Case, method: str) -> nn.Module:
        """One module a target."""
        lib = self.module()
        made_here = []
        for place in list(places(model, case)):
            if place.name != "weight" or type(place.module) not in (nn.Linear, nn.Conv2d):
                raise PeerError(f"has no module for {type(place.module).__name__}.{place.name}")
            dora = method == DORA
            made = lib.LoConModule(
                place.module_path.replace(".", "_"),
                place.module,
                1.0,
                case.r,
                case.r,
                weight_decompose=dora,
                bypass_mode=not dora,
            )
            made.train(place.module.training)
            made.apply_to()
            place.module.add_module("lycoris", made)  # so that the model has its parameters
            made_here.append(made)
        model.__dict__[FIRST] = made_here
        return model

    def fill(self, model: nn.Module, base: nn.Module, case: Case, factors: dict[str, Factors]) -> None:
        """Up is B, down is A."""
        for made, place in zip(_modules(model), places(base, case), strict=True):
            own = place.factors(factors)
            pairs = [(made.lora_down.weight, own["lora_A"]), (made.lora_up.weight, own["lora_B"])]
            pairs += [(made.dora_scale, own["magnitude"])] if made.wd else []
            copy_into(iter(pairs))

    def _network(self, model: nn.Module, case: Case) -> Any:
        lib = self.module()
        lib.LycorisNetwork.apply_preset({"target_module": ["Linear"], "target_name": []})
        return lib.create_lycoris(
            model, 1.0, linear_dim=case.r, linear_alpha=case.r, algo="lora", bypass_mode=True, warn_on_unmatched=False
        )

    def wrap(self, model: nn.Module, case: Case) -> nn.Module:
        """``create_lycoris``."""
        network = self._network(model, case)
        network.apply_to()
        model.__dict__[FIRST] = network
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """``save_weights``."""
        model.__dict__[FIRST].save_weights(str(folder / FILE), None, {})

    def load(self, model: nn.Module, case: Case, folder: Path) -> nn.Module:
        """``create_lycoris_from_weights``."""
        network, _ = self.module().create_lycoris_from_weights(1.0, str(folder / FILE), model)
        network.apply_to()
        model.__dict__[FIRST] = network
        return model

    def add(self, model: nn.Module, case: Case) -> None:
        """A second network on the same layers."""
        network = self._network(model, case)
        network.apply_to()
        model.__dict__[SECOND] = network

    def switch(self, model: nn.Module, second: bool) -> None:
        """``set_multiplier``, of both networks."""
        model.__dict__[FIRST].set_multiplier(float(not second))
        model.__dict__[SECOND].set_multiplier(float(second))

    def merge(self, model: nn.Module) -> None:
        """``restore``, then ``merge_to``."""
        with torch.no_grad():
            for made in _modules(model):
                made.restore()
                made.merge_to(1.0)

    def unmerge(self, model: nn.Module) -> None:
        """``merge_to`` with the opposite sign."""
        with torch.no_grad():
            for made in _modules(model):
                made.merge_to(-1.0)


def _modules(model: nn.Module) -> list[Any]:
    network = model.__dict__[FIRST]
    found: list[Any] = network if isinstance(network, list) else network.loras
    return found
