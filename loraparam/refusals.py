"""What cannot be adapted, and why: found before anything is changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .catalogue import Leaf, Place, shown_value
from .errors import AttachError
from .sharding import in_fsdp


def refuse(leaf: Leaf, place: Place) -> None:
    """Raise where adapting this parameter would fail late, obscurely or silently.

    Raises:
        AttachError: naming the reason and the way out; the caller adds the path.
    """
    if leaf.outdated:
        raise AttachError(f"its module recomputes it before each forward with {leaf.outdated}")
    for other in leaf.places:
        _refuse_module(other.module)
        if in_fsdp(other.module, leaf.base):
            raise AttachError("it is managed by FSDP; attach first, then shard the adapted model")
    if leaf.base is None:
        if not torch.is_tensor(shown_value(place.module, place.name)):
            raise AttachError("its parametrization yields no tensor")
        return
    _refuse_tensor(leaf.base)


def _refuse_module(module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise AttachError(
            "it belongs to a script module, whose code is fixed; adapt the model, then script a merged copy"
        )
    if getattr(module, "sparse", False) and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        raise AttachError("sparse=True: a sparse gradient cannot pass through an adapter; set module.sparse = False")


def _refuse_tensor(tensor: Tensor) -> None:
    kind = type(tensor)
    if kind.__module__.startswith("bitsandbytes."):
        raise AttachError(
            f"it is bitsandbytes' {kind.__name__}: the layer's forward passes that very object, with its scales, to a "
            "kernel, and a computed weight cannot stand in; quantize with torchao (Int8WeightOnlyConfig) instead, or "
            "load the model unquantized"
        )
    if is_lazy(tensor):
        raise AttachError("it is not initialised yet; run one forward of the lazy module first")
    if tensor.layout != torch.strided:
        raise AttachError(f"its layout is {tensor.layout}; allowed: a dense tensor")
    if tensor.is_meta:
        raise AttachError("it is on the meta device and has no values; load the weights first, or turn offloading off")
    if tensor.is_inference():
        raise AttachError(
            "it was made in inference mode and cannot take part in autograd; build or load the model outside of "
            "torch.inference_mode()"
        )
    if not tensor.is_floating_point() and not can_dequantize(tensor):
        raise AttachError(
            f"its dtype is {tensor.dtype}; allowed: a floating-point tensor, or a quantized one with dequantize()"
        )


def can_dequantize(tensor: Tensor) -> bool:
    """Whether the tensor is of a quantized subclass (torchao's, say) that yields its values."""
    kind = type(tensor)
    return kind is not nn.Parameter and kind is not Tensor and kind.dequantize is not Tensor.dequantize
