"""Writing (IA)³ for PEFT: one vector per layer, which rescales its output with the bias, or its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layouts import is_transformers_conv1d
from ..methods import IA3
from .bases import Base
from .content import Item
from .peft_saved import Depths
from .peft_wrappers import no_form


def scaled(items: Sequence[Item], base: Base | None) -> tuple[Depths, dict[str, Tensor], dict[str, Any]]:
    """The wrapped modules, tensors and config of an IA3 file.

    Raises:
        FormatError: PEFT cannot hold it.
    """
    if base is None or base.module("") is None:
        raise no_form(items[0], "the model is needed to know its layers and their biases")
    by_path = {item.parameter: item for item in items}
    tensors, forward, modules = {}, [], []
    transposed = []
    for item in items:
        module, _, name = item.parameter.rpartition(".")
        if name == "bias" and f"{module}.weight" in by_path:
            continue
        tensors[f"{module}.ia3_l"] = _vector(item, module, base, by_path.get(f"{module}.bias"))
        modules.append(module)
        forward += [module] if _axis(item) == "in" else []
        transposed.append(is_transformers_conv1d(base.module(module)))  # type: ignore[arg-type]
    config = {
        "peft_type": "IA3",
        "target_modules": modules,
        "feedforward_modules": forward,
        "fan_in_fan_out": all(transposed),
    }
    return dict.fromkeys(modules, 1), tensors, config


def _axis(item: Item) -> str:
    assert isinstance(item.method, IA3)
    return item.method.axis


def _vector(item: Item, module: str, base: Base, bias: Item | None) -> Tensor:
    layer, l = base.module(module), item.factors["scale"]
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    plain = isinstance(layer, kinds) or (layer is not None and is_transformers_conv1d(layer))
    outer = base.module(module.rpartition(".")[0])
    if not plain or not module or isinstance(outer, nn.MultiheadAttention) or not item.parameter.endswith(".weight"):
        raise no_form(item, "PEFT has IA3 for Linear, Conv2d, Conv3d and transformers' Conv1D only")
    if len(base.aliases(item.parameter)) > 1:
        raise no_form(item, "it is tied to another, and PEFT would adapt one of the two: untie them first")
    has_bias = f"{module}.bias" in base.names
    kernel = base.shape(item.parameter)[2:]
    if _axis(item) == "in":
        if bias is not None:
            raise no_form(bias, "PEFT rescales a bias together with its layer's output only")
        groups = getattr(layer, "groups", 1)
        per_channel = l.reshape(-1, torch.Size(kernel).numel())
        if groups > 1 or not bool((per_channel == per_channel[:, :1]).all()):
            raise no_form(item, "PEFT has one number per input channel, the same for all of its kernel, without groups")
        return per_channel[:, 0].reshape(1, -1, *[1] * len(kernel))
    if has_bias and (bias is None or not torch.equal(bias.factors["scale"].to(l), l)):
        raise no_form(item, "PEFT rescales the layer's bias by the same numbers; attach IA3 there, with equal values")
    return l.reshape(1, -1, *[1] * len(kernel)) if kernel else l.reshape(-1, 1)
