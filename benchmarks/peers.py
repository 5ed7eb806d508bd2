"""PEFT's adapters on a copy of the same model, with the factors of ours."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import loraparam as lp

from .cases import Case


class PeerError(Exception):
    """Why a peer takes no part."""


def peft(base: nn.Module, case: Case, ours: nn.Module, *, dora: bool) -> nn.Module:
    """A copy of ``base`` under PEFT, injected: without the wrapper that would cost it some 100 µs a call.

    Raises:
        PeerError: PEFT is not installed, or refuses.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise PeerError("'peft' is not installed") from None
        try:
            config = LoraConfig(r=case.r, lora_alpha=case.r, lora_dropout=0.0, use_dora=dora, **case.peft)
            model: nn.Module = inject_adapter_in_model(config, copy.deepcopy(base)).train()
        except (ValueError, TypeError, NotImplementedError) as error:
            raise PeerError(f"PEFT refuses: {error}") from error
        _copy_factors(ours, model)
    return model


def _copy_factors(ours: nn.Module, peers: nn.Module) -> None:
    """Give each of PEFT's layers the factors that ours has there."""
    for path, factors in _by_target(ours).items():
        module_path, _, parameter = path.rpartition(".")
        _fill(_layer(peers, module_path, parameter), factors)
        for reader in _tied_readers(ours, path):
            # T = W + s·(B·A)ᵀ seen from the head: B and A change places.
            turned = {"lora_A": factors["lora_B"].mT, "lora_B": factors["lora_A"].mT}
            _fill(_layer(peers, reader, "weight"), turned)


def _by_target(ours: nn.Module) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, factor in lp.named_parameters(ours):
        path, _, name = key.rpartition(".")
        found.setdefault(path, {})[name] = factor.detach()
    return found


def _tied_readers(ours: nn.Module, path: str) -> list[str]:
    """The linear layers that read an embedding's weight."""
    embedding = ours.get_submodule(path.rpartition(".")[0])
    if not isinstance(embedding, nn.Embedding):
        return []
    shape = embedding.weight.shape
    linears = [(name, module) for name, module in ours.named_modules() if isinstance(module, nn.Linear)]
    return [name for name, module in linears if module.weight.shape == shape]


def _layer(peers: nn.Module, module_path: str, parameter: str) -> Any:
    """PEFT's layer that adapts a parameter: wrappers of single parameters are nested in each other."""
    layer: Any = peers
    for part in module_path.split("."):
        while part not in layer._modules:
            layer = layer.base_layer
        layer = layer._modules[part]
    while getattr(layer, "parameter_name", parameter) != parameter:
        layer = layer.base_layer
    return layer


def _fill(layer: Any, factors: dict[str, Tensor]) -> None:
    A, B = factors["lora_A"], factors["lora_B"]
    if A.dim() == 3:  # PEFT keeps E experts as (r·E, in), expert by expert, and (out, r·E), rank by rank
        A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    with torch.no_grad():
        for name, factor in (("A", A), ("B", B)):
            embeddings = getattr(layer, f"lora_embedding_{name}", None)
            if embeddings:
                embeddings["default"].copy_(factor)
            else:
                weight = getattr(layer, f"lora_{name}")["default"].weight
                weight.copy_(factor.view_as(weight))
        if "magnitude" in factors and "default" in getattr(layer, "lora_magnitude_vector", {}):
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude.copy_(factors["magnitude"].view_as(magnitude))


def disagreement(mine: Tensor, theirs: Tensor) -> float:
    """The length of the difference, relative to the whole."""
    return float((mine - theirs).norm() / mine.norm())
