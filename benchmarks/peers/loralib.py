"""loralib: layers to write a model with. Existing models are adapted here by replacing their layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..case import Case
from .base import Factors, PeerError, StateDicts, copy_into, places, replace


class Loralib(StateDicts):
    """microsoft/LoRA."""

    name = "loralib"
    package = "loralib"

    def attach(self, model: nn.Module, case: Case, method: str) -> nn.Module:
        """Replace the layers; merging at ``eval()`` comes with ``wrap``."""
        return self._replaced(model, case, merge_weights=False)

    def _replaced(self, model: nn.Module, case: Case, *, merge_weights: bool) -> nn.Module:
        lib = self.module()
        for place in list(places(model, case)):
            new = _layer(lib, place.module, case.r, merge_weights)
            if new is None:
                raise PeerError(f"has no layer for {type(place.module).__name__}.{place.name}")
            replace(model, place.module_path, new)
        return model

    def fill(self, model: nn.Module, base: nn.Module, case: Case, factors: dict[str, Factors]) -> None:
        """A and B are as ours, except for convolutions, whose matrix has another shape."""
        for place in places(base, case):
            layer: Any = model.get_submodule(place.module_path)
            if not isinstance(place.module, nn.Conv2d):
                own = place.factors(factors)
                copy_into((getattr(layer, name), own[name]) for name in ("lora_A", "lora_B"))
            else:
                nn.init.normal_(layer.lora_B, std=0.02)

    def wrap(self, model: nn.Module, case: Case) -> nn.Module:
        """Layers that merge at ``eval()``."""
        return self._replaced(model, case, merge_weights=True)

    def merge(self, model: nn.Module) -> None:
        """``eval()``, for layers with ``merge_weights``."""
        _set_mode(model, self.module(), training=False)

    def unmerge(self, model: nn.Module) -> None:
        """``train()``."""
        _set_mode(model, self.module(), training=True)


def _set_mode(model: nn.Module, lib: Any, *, training: bool) -> None:
    for module in model.modules():
        if isinstance(module, lib.layers.LoRALayer):
            module.merge_weights = True
            module.train(training)


def _layer(lib: Any, old: nn.Module, r: int, merge_weights: bool) -> nn.Module | None:
    """The library's layer in place of one, with its weights."""
    options: dict[str, Any] = {"r": r, "lora_alpha": r, "merge_weights": merge_weights}
    new: Any = None
    if type(old) is nn.Linear:
        new = lib.Linear(old.in_features, old.out_features, bias=old.bias is not None, **options)
    elif type(old).__name__ == "Conv1D":
        inputs, outputs = old.weight.shape  # type: ignore[misc, union-attr]
        new = lib.Linear(inputs, outputs, fan_in_fan_out=True, **options)
    elif type(old) is nn.Embedding:
        new = lib.Embedding(old.num_embeddings, old.embedding_dim, **options)
    elif type(old) is nn.Conv2d and old.kernel_size[0] == old.kernel_size[1]:
        geometry = {"stride": old.stride, "padding": old.padding, "bias": old.bias is not None}
        new = lib.Conv2d(old.in_channels, old.out_channels, old.kernel_size[0], **geometry, **options)
    if new is None:
        return None
    holder = getattr(new, "conv", new)
    holder.weight = old.weight
    if getattr(old, "bias", None) is not None:
        holder.bias = old.bias
    return new.train(old.training) or new  # its train() returns nothing
