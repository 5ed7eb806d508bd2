"""What both files of tests of loralib's drop-in are about: layers, and a model of them."""

from __future__ import annotations

from typing import Any

import loralib as original
import torch
from torch import Tensor, nn

import loraparam.loralib as lora

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("Linear", {"in_features": 5, "out_features": 6, "r": 4, "lora_alpha": 3}),
    "linear, no bias, rank above both": ("Linear", {"in_features": 5, "out_features": 3, "r": 7, "bias": False}),
    "linear, dropout": ("Linear", {"in_features": 5, "out_features": 6, "r": 2, "lora_dropout": 0.5}),
    "linear, fan_in_fan_out": ("Linear", {"in_features": 5, "out_features": 6, "r": 2, "fan_in_fan_out": True}),
    "linear, not merging": ("Linear", {"in_features": 5, "out_features": 6, "r": 2, "merge_weights": False}),
    "linear, r=0": ("Linear", {"in_features": 5, "out_features": 6, "fan_in_fan_out": True}),
    "merged": (
        "MergedLinear",
        {"in_features": 5, "out_features": 9, "r": 2, "lora_alpha": 3, "enable_lora": [True, False, True]},
    ),
    "merged, all, dropout, transposed": (
        "MergedLinear",
        {
            "in_features": 5,
            "out_features": 9,
            "r": 2,
            "lora_dropout": 0.3,
            "enable_lora": [True, True, True],
            "fan_in_fan_out": True,
        },
    ),
    "merged, r=0": ("MergedLinear", {"in_features": 5, "out_features": 9, "enable_lora": [True, False, True]}),
    "embedding": ("Embedding", {"num_embeddings": 7, "embedding_dim": 5, "r": 3, "lora_alpha": 2}),
    "embedding, padding": ("Embedding", {"num_embeddings": 7, "embedding_dim": 2, "r": 3, "padding_idx": 1}),
    "conv": ("Conv2d", {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "r": 2, "lora_alpha": 3, "groups": 2}),
    "conv, rank above both": (
        "Conv2d",
        {"in_channels": 3, "out_channels": 6, "kernel_size": 3, "r": 8, "stride": 2, "bias": False},
    ),
    "conv, r=0": ("Conv2d", {"in_channels": 4, "out_channels": 6, "kernel_size": 3}),
    "conv1d, kernel 1": ("Conv1d", {"in_channels": 3, "out_channels": 6, "kernel_size": 1, "r": 2, "lora_alpha": 3}),
}


def both(case: str) -> tuple[nn.Module, nn.Module]:
    """loralib's layer and ours, from the same seed."""
    name, settings = LAYERS[case]
    made = []
    for library in (original, lora):
        torch.manual_seed(0)
        made.append(getattr(library, name)(**settings))
    return made[0], made[1]


class Model(nn.Module):
    """As in loralib's README: some layers replaced, others not."""

    def __init__(self, lib: Any, r: int = 2) -> None:
        super().__init__()
        self.embed = lib.Embedding(11, 8, r=r)
        self.qkv_proj = lib.MergedLinear(8, 24, r=r, enable_lora=[True, False, True], lora_alpha=4)
        self.norm = nn.LayerNorm(24)
        self.conv = lib.Conv2d(1, 2, 3, r=r, padding=1)
        self.head = lib.Linear(48, 3, r=r)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.qkv_proj(self.embed(x)))
        return self.head(self.conv(hidden.unsqueeze(1)).flatten(1).view(len(x), -1, 48).mean(1))


def make(library: Any) -> nn.Module:
    torch.manual_seed(0)
    return Model(library)
