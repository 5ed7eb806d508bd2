"""LoRA-Torch: layers that put the merged weight in place before their forward, and subtract it afterwards."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import nn

from ..case import Case
from .base import Factors, PeerError, StateDicts, copy_into, places, replace


class LoRATorch(StateDicts):
    """Baijiong-Lin/LoRA-Torch, which is on no package index; it runs if it can be imported."""

    name = "LoRA-Torch"
    package = "loratorch"
    writes_base = True
    merges_in_eval = True

    def attach(self, model: nn.Module, case: Case, method: str) -> nn.Module:
        """Replace the layers."""
        lib = self.module()
        done: set[str] = set()
        for place in list(places(model, case)):
            path = _owner(model, place.module_path)
            if path in done:
                continue
            done.add(path)
            new = _layer(lib, model.get_submodule(path), case.r)
            if new is None:
                raise PeerError(f"has no layer for {type(place.module).__name__}.{place.name}")
            replace(model, path, new)
        return model

    def differs(self, case: Case, method: str) -> str:
        """Always, in the gradient that goes on to the layers below."""
        return super().differs(case, method) or "its gradient with respect to a layer's input uses W, not W + s·B·A"

    def fill(self, model: nn.Module, base: nn.Module, case: Case, factors: dict[str, Factors]) -> None:
        """A and B by the names it has for them; an embedding has them the other way round."""
        for place in places(base, case):
            layer: Any = model.get_submodule(_owner(model, place.module_path))
            own = place.factors(factors)
            if isinstance(place.module, nn.Conv2d):
                nn.init.normal_(layer.w_lora_B, std=0.02)
                continue
            if isinstance(place.module, nn.Embedding):
                own = {"lora_A": own["lora_B"].mT, "lora_B": own["lora_A"].mT}
            prefix = "w"
            if isinstance(layer, nn.MultiheadAttention):
                prefix = "o" if place.module_path.endswith("out_proj") else "qkv"
            copy_into((getattr(layer, f"{prefix}_{name}"), own[name]) for name in ("lora_A", "lora_B"))

    def after_step(self, model: nn.Module) -> None:
        """Registers the weights again."""
        self.module().register_model_param_after_backward(model)

    def merge(self, model: nn.Module) -> None:
        """``eval()``."""
        _each(model, self.module(), training=False)

    def unmerge(self, model: nn.Module) -> None:
        """``train()``."""
        _each(model, self.module(), training=True)


def _each(model: nn.Module, lib: Any, *, training: bool) -> None:
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        for module in model.modules():
            if isinstance(module, lib.layers.LoRALayer):
                module.train(training)  # type: ignore[attr-defined]


def _owner(model: nn.Module, path: str) -> str:
    """The layer to replace: for the projections of an attention, the attention."""
    parent = path.rpartition(".")[0]
    return parent if path and isinstance(model.get_submodule(parent), nn.MultiheadAttention) else path


def _layer(lib: Any, old: Any, r: int) -> nn.Module | None:
    """The library's layer in place of one, with its weights."""
    options: dict[str, Any] = {"r": r, "lora_alpha": r}
    new: Any = None
    if type(old) is nn.Linear:
        new = lib.Linear(old.in_features, old.out_features, bias=old.bias is not None, **options)
    elif type(old) is nn.Embedding:
        new = lib.Embedding(old.num_embeddings, old.embedding_dim, **options)
    elif type(old) is nn.Conv2d and old.kernel_size[0] == old.kernel_size[1]:
        geometry = {"stride": old.stride, "padding": old.padding, "bias": old.bias is not None}
        new = lib.Conv2d(old.in_channels, old.out_channels, old.kernel_size[0], **geometry, **options)
    elif type(old) is nn.MultiheadAttention and old._qkv_same_embed_dim:
        new = lib.MultiheadAttention(
            old.embed_dim, old.num_heads, dropout=old.dropout, batch_first=old.batch_first, **options
        )
    if new is None:
        return None
    new.to(next(old.parameters()).dtype)
    for name, parameter in old.named_parameters():
        parent, _, leaf = name.rpartition(".")
        setattr(new.get_submodule(parent), leaf, parameter)
    new.train(old.training)
    return new  # type: ignore[no-any-return]
