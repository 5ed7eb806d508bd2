"""A drop-in for ``import loratorch as lora`` (LoRA-Torch, https://github.com/Baijiong-Lin/LoRA-Torch).

Layers, functions, attributes and checkpoints are its own; README, "From loralib and LoRA-Torch", says what differs.

Example:
    >>> import torch
    >>> import loraparam.loratorch as lora
    >>> layer = lora.MultiheadAttention(8, 2, enable_lora=["q", "v", "o"], r=2)
    >>> lora.mark_only_lora_as_trainable(layer)
    >>> list(lora.lora_state_dict(layer))
    ['o_lora_A', 'o_lora_B', 'qv_lora_A', 'qv_lora_B']
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

from torch import Tensor, nn

from . import dropins
from .dropins import LinearBase, block_flags, flat_layout
from .dropins import lora_state_dict as lora_state_dict
from .dropins import mark_only_lora_as_trainable as mark_only_lora_as_trainable
from .errors import LoraparamError
from .layouts import Layout
from .methods import BlockLoRA


class LoRALayer(dropins.LoRALayer, factors=("w_lora_A", "w_lora_B")):
    """What LoRA-Torch's layers have in common."""


class Embedding(LoRALayer, nn.Embedding):
    """``nn.Embedding`` with a LoRA: A (r, embedding_dim) starts at zero, B (num_embeddings, r) as N(0, 1)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, r: int = 0, lora_alpha: int = 1, **kwargs: Any) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        self._built(r, lora_alpha)
        self._adapt("w_", "weight", layout=Layout(lookup=True))


class Linear(LoRALayer, LinearBase):
    """``nn.Linear`` with a LoRA: A (r, in_features) starts as kaiming, B (out_features, r) at zero."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: int = 1,
        fan_in_fan_out: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        self._built(r, lora_alpha)
        self._adapt("w_", "weight", layout=self._transpose(fan_in_fan_out))


class MergedLinear(LoRALayer, LinearBase):
    """``nn.Linear`` with a LoRA of its own on each block of output features that ``enable_lora`` switches on.

    With n of m blocks on: A (r·n, in_features), B (n·out_features/m, r), block after block.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: int = 1,
        enable_lora: list[bool] = [False],  # noqa: B006 - the original's default; never written
        fan_in_fan_out: bool = False,
        **kwargs: Any,
    ) -> None:
        blocks = block_flags(enable_lora, out_features)
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        self.enable_lora = list(blocks)
        self._built(r, lora_alpha)
        self._adapt("w_", "weight", layout=self._transpose(fan_in_fan_out), blocks=blocks)


class _Conv(LoRALayer):
    """A convolution with a LoRA: A (r·k, in·k), B (out/groups·k, r·k), B·A read as the kernel.

    Conv3d has A (r·k, in·k²), Conv1d B (out/groups, r·k).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)
        self._built(r, lora_alpha)
        self._adapt("w_", "weight", layout=flat_layout(self, kernel_size), width=kernel_size)


class Conv1d(_Conv, nn.Conv1d):
    """``nn.Conv1d`` with a LoRA: A (r·k, in·k), B (out/groups, r·k)."""


class Conv2d(_Conv, nn.Conv2d):
    """``nn.Conv2d`` with a LoRA: A (r·k, in·k), B (out/groups·k, r·k)."""


class Conv3d(_Conv, nn.Conv3d):
    """``nn.Conv3d`` with a LoRA: A (r·k, in·k²), B (out/groups·k, r·k)."""


_QKV = ("q", "k", "v")
# Each pair that some choice of letters makes.
_STEMS = ("o", *("".join(letters) for n in (1, 2, 3) for letters in combinations(_QKV, n)))
_PAIRS = tuple(f"{stem}_lora_{side}" for stem in _STEMS for side in "AB")


class MultiheadAttention(LoRALayer, nn.MultiheadAttention, factors=_PAIRS):
    """``nn.MultiheadAttention`` with a LoRA on the projections whose letters are in ``enable_lora``.

    q, k and v have one pair on ``in_proj_weight``, named by their letters: ``qv_lora_A`` (r, E) and ``qv_lora_B``
    (3E, r), of which the rows of the letters act. With ``kdim`` or ``vdim`` each has a pair of its own. o is
    ``o_lora_A``, ``o_lora_B``.

    LoRA-Torch adapts q, k and v alike, whichever of them are enabled. A checkpoint of such a layer, in which rows of
    other letters are not zero, is read as what it was: from then on all rows act.
    """

    biases = ("in_proj_bias", "out_proj.bias")

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        enable_lora: list[str] = ["q", "k", "v", "o"],  # noqa: B006 - the original's default; never written
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        if not set(enable_lora) <= {*_QKV, "o"}:
            raise LoraparamError(f"enable_lora={enable_lora!r}; allowed: a list of letters out of 'q', 'k', 'v', 'o'")
        nn.MultiheadAttention.__init__(self, embed_dim, num_heads, **kwargs)
        self._built(r, lora_alpha)
        self._on = tuple(letter in enable_lora for letter in _QKV)
        letters = [letter for letter in _QKV if letter in enable_lora]
        if "o" in enable_lora:
            self._adapt("o_", "out_proj.weight")
        if not self._qkv_same_embed_dim:
            for letter in letters:
                self._adapt(f"{letter}_", f"{letter}_proj_weight")
        elif letters:
            self._adapt("".join(letters) + "_", "in_proj_weight", blocks=self._on, shared=True)
        elif r > 0:
            # LoRA-Torch has a pair here that never acts: zeros, kept for their keys.
            for name, shape in (("_lora_A", (r, embed_dim)), ("_lora_B", (3 * embed_dim, r))):
                self.register_buffer(name, self.in_proj_weight.new_zeros(shape))

    def _reset_torch(self) -> None:
        nn.MultiheadAttention._reset_parameters(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for stem, entry in self._entries().items():
            B = state_dict.get(f"{prefix}{stem}lora_B")
            if isinstance(entry.method, BlockLoRA) and entry.method.shared and isinstance(B, Tensor):
                others = [block for block, on in zip(B.chunk(3), self._on, strict=False) if not on]
                everywhere = any(bool(block.any()) for block in others)
                entry.method = replace(entry.method, blocks=(True,) * 3 if everywhere else self._on)
        super()._load_from_state_dict(state_dict, prefix, *args)


def register_model_param_after_backward(model: nn.Module) -> None:
    """Do nothing: here weights stay parameters of the model through forward and backward.

    LoRA-Torch needs the call after each backward, to put back what its forward took away. Calls in existing code may
    stay.

    Example:
        >>> register_model_param_after_backward(nn.Linear(2, 2))
    """


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many of a model's parameters are trainable; ``lp.summary`` says more.

    Example:
        >>> print_trainable_parameters(Linear(3, 4, r=1, bias=False))
        trainable params: 7 || all params: 19 || trainable%: 36.84
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in model.parameters())
    percent = 100 * trained / every
    print(f"trainable params: {trained} || all params: {every} || trainable%: {percent:.2f}")  # noqa: T201
