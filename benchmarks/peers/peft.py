"""PEFT: layers of its own around those of the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..case import Case
from .base import DORA, LORA, Factors, Library, PeerError, places


class Peft(Library):
    """huggingface/peft. For steps its layers are injected, without the wrapper that costs some 100 µs a call."""

    name = "PEFT"
    package = "peft"
    methods = (LORA, DORA)

    def attach(self, model: nn.Module, case: Case, method: str) -> nn.Module:
        """``inject_adapter_in_model``, once for each adapter of a stack."""
        peft = self.module()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                for i in range(case.stacked):
                    model = peft.inject_adapter_in_model(self._config(case, method), model, f"adapter{i}")
            except (ValueError, TypeError, NotImplementedError) as error:
                raise PeerError(f"PEFT refuses: {error}") from error
        if case.stacked > 1:
            for layer in _layers(model):
                layer.set_adapter([f"adapter{i}" for i in range(case.stacked)])
        return model

    def _config(self, case: Case, method: str) -> Any:
        return self.module().LoraConfig(
            r=case.r, lora_alpha=case.r, lora_dropout=0.0, use_dora=method == DORA, **case.peft
        )

    def fill(self, model: nn.Module, base: nn.Module, case: Case, factors: dict[str, Factors]) -> None:
        """Each of PEFT's layers."""
        with torch.no_grad():
            for place in places(base, case):
                _fill(_layer(model, place.module_path, place.name), place.factors(factors))

    def wrap(self, model: nn.Module, case: Case) -> nn.Module:
        """``get_peft_model``."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped: nn.Module = self.module().get_peft_model(model, self._config(case, LORA))
        return wrapped

    def save(self, model: nn.Module, folder: Path) -> None:
        """``save_pretrained``."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(str(folder))  # type: ignore[operator]

    def load(self, model: nn.Module, case: Case, folder: Path) -> nn.Module:
        """``from_pretrained``."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: nn.Module = self.module().PeftModel.from_pretrained(model, str(folder))
        return loaded

    def add(self, model: nn.Module, case: Case) -> None:
        """``add_adapter``."""
        model.add_adapter("second", self._config(case, LORA))  # type: ignore[operator]

    def switch(self, model: nn.Module, second: bool) -> None:
        """``set_adapter``."""
        model.set_adapter("second" if second else "default")  # type: ignore[operator]

    def merge(self, model: nn.Module) -> None:
        """``merge``, layer by layer, as ``merge_adapter`` does."""
        for layer in _layers(model):
            layer.merge()

    def unmerge(self, model: nn.Module) -> None:
        """``unmerge``, layer by layer."""
        for layer in _layers(model):
            layer.unmerge()


def _layers(model: nn.Module) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    yield from [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _layer(model: nn.Module, module_path: str, parameter: str) -> Any:
    """PEFT's layer that adapts a parameter: wrappers of single parameters are nested in each other."""
    layer: Any = model
    for part in module_path.split("."):
        while part not in layer._modules:
            layer = layer.base_layer
        layer = layer._modules[part]
    while getattr(layer, "parameter_name", parameter) != parameter:
        layer = layer.base_layer
    return layer


def _fill(layer: Any, factors: Factors) -> None:
    A, B = factors["lora_A"], factors["lora_B"]
    if A.dim() == 3:  # PEFT keeps E experts as (r·E, in), expert by expert, and (out, r·E), rank by rank
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    for name, factor in (("A", A), ("B", B)):
        own = getattr(layer, f"lora_embedding_{name}", None) or getattr(layer, f"lora_{name}")
        weight = _only(own)
        weight.copy_(factor.view_as(weight))
    if "magnitude" in factors and getattr(layer, "lora_magnitude_vector", {}):
        magnitude = _only(layer.lora_magnitude_vector)
        magnitude.copy_(factors["magnitude"].view_as(magnitude))


def _only(by_adapter: Any) -> Tensor:
    """The one adapter's tensor."""
    (held,) = by_adapter.values()
    weight: Tensor = held if isinstance(held, Tensor) else held.weight
    return weight
