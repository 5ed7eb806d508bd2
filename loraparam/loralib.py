"""A drop-in for ``import loralib as lora`` (loralib 0.1.2, https://github.com/microsoft/LoRA).

Layers, functions, attributes and checkpoints are loralib's; README, "From loralib and LoRA-Torch", says what differs.

Example:
    >>> import torch
    >>> import loraparam.loralib as lora
    >>> model = torch.nn.Sequential(
    ...     lora.Linear(4, 8, r=2), lora.MergedLinear(8, 9, r=2, enable_lora=[True, False, True])
    ... )
    >>> lora.mark_only_lora_as_trainable(model)
    >>> list(lora.lora_state_dict(model))
    ['0.lora_A', '0.lora_B', '1.lora_A', '1.lora_B']
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import dropins
from .dropins import LinearBase, block_flags, flat_layout
from .dropins import lora_state_dict as lora_state_dict
from .dropins import mark_only_lora_as_trainable as mark_only_lora_as_trainable
from .layouts import Layout


class LoRALayer(dropins.LoRALayer, factors=("lora_A", "lora_B")):
    """What loralib's layers have in common."""


class Embedding(LoRALayer, nn.Embedding):
    """``nn.Embedding`` with a LoRA: A (r, num_embeddings) starts at zero, B (embedding_dim, r) as N(0, 1)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: int = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        self._built(r, lora_alpha, merge_weights)
        self._adapt("", "weight", layout=Layout(out=1, lookup=True))


class Linear(LoRALayer, LinearBase):
    """``nn.Linear`` with a LoRA: A (r, in_features) starts as kaiming, B (out_features, r) at zero."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: int = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        self._built(r, lora_alpha, merge_weights)
        self._adapt("", "weight", dropout=lora_dropout, layout=self._transpose(fan_in_fan_out))


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
        lora_dropout: float = 0.0,
        enable_lora: list[bool] = [False],  # noqa: B006 - the original's default; never written
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        blocks = block_flags(enable_lora, out_features)
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        self.enable_lora = list(blocks)
        self._built(r, lora_alpha, merge_weights)
        self._adapt("", "weight", dropout=lora_dropout, layout=self._transpose(fan_in_fan_out), blocks=blocks)


class ConvLoRA(LoRALayer):
    """A convolution ``self.conv`` with a LoRA: A (r·k, in·k), B (out/groups·k, r·k), B·A read as the kernel.

    Conv3d has A (r·k, in·k²), and Conv1d B (out/groups, r·k), as in LoRA-Torch: loralib's own shapes do not fit there.
    """

    biases = ("conv.bias",)

    def __init__(
        self,
        conv_module: type[nn.Module],
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        r: int = 0,
        lora_alpha: int = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.conv = conv_module(in_channels, out_channels, kernel_size, **kwargs)
        self._built(r, lora_alpha, merge_weights)
        layout = flat_layout(self.conv, kernel_size)
        self._adapt("", "conv.weight", dropout=lora_dropout, layout=layout, width=kernel_size)

    def _reset_torch(self) -> None:
        self.conv.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """The convolution with its effective kernel."""
        y: Tensor = self.conv(x)
        return y

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A plain layer's checkpoint, and the second copy that loralib's latest source keeps.
        for name in ("weight", "bias"):
            if prefix + name in state_dict:
                state_dict.setdefault(f"{prefix}conv.{name}", state_dict.pop(prefix + name))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Conv2d(ConvLoRA):
    """``nn.Conv2d`` with a LoRA; see ``ConvLoRA``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv1d(ConvLoRA):
    """``nn.Conv1d`` with a LoRA; see ``ConvLoRA``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv3d(ConvLoRA):
    """``nn.Conv3d`` with a LoRA; see ``ConvLoRA``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d, *args, **kwargs)
