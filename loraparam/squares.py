"""‖W‖² of frozen bases, which a norm of W + s·B·A needs at each read: computed once, until the base changes."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .forms import squared_norm
from .functional import Axis
from .layouts import Layout
from .sharding import in_fsdp

# {stack: {axis: (base, what it was like, ‖W‖²)}}; beside the modules, so that copies and pickles start without.
_squares: weakref.WeakKeyDictionary[nn.Module, dict[Axis, Any]] = weakref.WeakKeyDictionary()

# Stacks whose base FSDP gathers anew for each forward, under the same pointer and version.
_refilled: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def kept_squares(stack: nn.Module, base: Tensor, layout: Layout, axis: Axis) -> Tensor:
    """‖W‖² along an axis of the base of this stack."""
    if base.requires_grad or base.is_inference() or stack in _refilled:
        return squared_norm(layout.matrix(base), axis)
    # The version counts writes in place, the pointer tells a new storage, the reference a new tensor. It is no weak
    # one: torch does not swap tensors (as it does to convert DTensors) to which there are some.
    key = (base.data_ptr(), base._version, base.dtype, layout)
    kept = _squares.setdefault(stack, {})
    if axis not in kept or kept[axis][0] is not base or kept[axis][1] != key:
        if in_fsdp(stack, base):
            _refilled.add(stack)
        with torch.no_grad():
            kept[axis] = (base, key, squared_norm(layout.matrix(base), axis))
    squares: Tensor = kept[axis][2]
    return squares
