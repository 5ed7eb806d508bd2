"""Tensors that are spread over processes: those of tensor parallelism (DTensor), and those FSDP has in its care.

Under tensor parallelism a parameter stays what it is, in parts: adapters go on it, and their factors are parted
like it. FSDP swaps parameters while the model runs and remembers them by module and name: adapters have to be on
before it comes, and stay on.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from .errors import AttachError
from .layouts import Layout


def is_spread(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: one that has parts on several processes."""
    kind = type(tensor)
    return kind is not Tensor and kind is not nn.Parameter and hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process that has a part must call this."""
    if not is_spread(tensor):
        return tensor
    parts: Any = tensor
    mesh = parts.device_mesh.device_type
    # Parts that are offloaded to the CPU cannot be gathered there by a backend for accelerators.
    gathered: Tensor = parts.full_tensor() if mesh == parts.device.type else parts.to(mesh).full_tensor()
    return gathered.to(tensor.device)


def spread(tensor: Tensor, like: Any, placements: Any = None) -> Tensor:
    """A whole tensor in parts on the processes of another: by the other's dims, or as ``placements`` says."""
    where = like.placements if placements is None else placements
    parted: Tensor = _tensor_module().distribute_tensor(tensor, like.device_mesh, where)
    return parted


def spread_factor(factor: Tensor, dims: Sequence[str], weight: Any, layout: Layout) -> Tensor:
    """A factor, in parts where the weight is in parts along the same dim, and elsewhere whole on every process.

    Args:
        factor: all of it; that of the first process counts.
        dims: what the factor's last dims run along: "out" or "in" of the weight, or "".
        weight: the parameter, a DTensor.
        layout: of the weight.
    """
    module = _tensor_module()
    along = {dim: i for i, dim in enumerate(layout.batch)}
    sides = {"out": layout.out}
    rest = [dim for dim in range(weight.dim()) if dim not in (*layout.batch, layout.out)]
    if len(rest) == 1:  # of several dims the input is a flattening, whose parts would interleave
        sides["in"] = rest[0]
    first = factor.dim() - len(dims)
    along.update({sides[side]: first + i for i, side in enumerate(dims) if side in sides})
    if factor.shape == weight.shape:
        along = {dim: dim for dim in range(weight.dim())}
    parts = [along.get(placement.dim) if placement.is_shard() else None for placement in weight.placements]
    return spread(factor, weight, [module.Replicate() if dim is None else module.Shard(dim) for dim in parts])


def one_writes(tensors: Iterable[Tensor]) -> bool:
    """Whether this process is to write what all have gathered: the first, where tensors are in parts."""
    if not any(is_spread(tensor) for tensor in tensors):
        return True
    first: bool = sys.modules["torch.distributed"].get_rank() == 0
    return first


def _tensor_module() -> Any:
    # Not imported: that takes a second, and where there is a DTensor it has been.
    return sys.modules["torch.distributed.tensor"]


@contextlib.contextmanager
def unflattened(model: nn.Module, *, everywhere: bool) -> Iterator[bool]:
    """Parameters as they were before FSDP1 flattened them, to be read; every process must enter this.

    Args:
        model: FSDP1's, or any other, which stays as it is.
        everywhere: on each process, and not on the first alone.

    Yields:
        Whether they can be read on this process.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    wrappers = module.FullyShardedDataParallel.fsdp_modules(model) if module else []
    if not wrappers:
        yield True
        return
    # In host memory, layer by layer: a device need not have room for all of the model.
    offload = wrappers[0].compute_device.type != "cpu"
    summon = wrappers[0].summon_full_params
    with summon(model, writeback=False, rank0_only=not everywhere, offload_to_cpu=offload):
        yield everywhere or sys.modules["torch.distributed"].get_rank() == 0


def in_fsdp(module: nn.Module, *tensors: Any) -> bool:
    """Whether a parameter, of this module and perhaps computed from these tensors, is in FSDP's care."""
    if any(getattr(t, "_fsdp_flattened", False) for t in tensors):
        return True
    return any(module is part for wrapper in _wrappers() for part in wrapper.modules())


def refuse_fsdp(module: nn.Module, *tensors: Any) -> None:
    """Raise where adapters would be taken off, or folded into, what FSDP has in its care."""
    if in_fsdp(module, *tensors):
        raise AttachError(
            "it is managed by FSDP, which would go on with the parameters it knows; save the adapter with lp.save, and "
            "load it into a model that is not sharded"
        )


def _wrappers() -> Iterator[nn.Module]:
    """Every module that ``fully_shard`` was called on, wherever it is: a part of a model does not know of its whole."""
    composable = sys.modules.get("torch.distributed._composable_state")
    for module in list(getattr(composable, "_module_state_mapping", ())):
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            yield module
