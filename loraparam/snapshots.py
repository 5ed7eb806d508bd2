"""The structure of a model at one moment, to return to: classes, dicts, flags; references, not copies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .marks import ALIAS, FROZEN, RECORD
from .stack import AdapterFactors, AdapterStack

# Plain attributes that attaching, or what a user does with a plain model, may replace.
_ATTRIBUTES = (
    RECORD,
    FROZEN,
    ALIAS,
    "_flat_weights",
    "_flat_weight_refs",
    "training",
    "_non_persistent_buffers_set",
    "unsafe",
)
_DICTS = ("_parameters", "_buffers", "_modules")


class Snapshot:
    """Remembers each module's class, own dicts and flags, and which storage each parameter points to.

    ``restore`` brings all of it back: the same Parameter objects in the same order, pointing to the same
    storage, so that converting the model (``.half()``, ``.to(device)``), swapping its layers or changing its
    flags is undone. Values written into a storage in place are not: no tensor is copied.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        self._modules = [(module, type(module), _members(module)) for module in modules]
        tensors = {
            id(t): t
            for m, _, _ in self._modules
            for t in [*m._parameters.values(), *m._buffers.values()]
            if t is not None
        }
        self._tensors = [(t, None if is_lazy(t) else t.detach(), t.requires_grad) for t in tensors.values()]
        grads = [(t, t.grad) for t in tensors.values() if t.is_leaf]
        self._grads = [(t, grad, None if grad is None else grad.detach()) for t, grad in grads]
        self._acting = _strengths(m for m, _, _ in self._modules if isinstance(m, AdapterFactors))

    def restore(self) -> None:
        """Bring the remembered structure back, in place."""
        for module, cls, members in self._modules:
            if type(module) is not cls:
                module.__class__ = cls
            for name in _DICTS:
                current = module.__dict__[name]
                current.clear()
                current.update(members[name])
            for name in _ATTRIBUTES:
                if name in members:
                    module.__dict__[name] = members[name]
                else:
                    module.__dict__.pop(name, None)
        for tensor, data, requires_grad in self._tensors:
            if data is not None and _moved(tensor, data):
                tensor.data = data
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad = requires_grad
        for tensor, grad, grad_data in self._grads:
            if grad is not None and grad_data is not None and _moved(grad, grad_data):
                grad.data = grad_data
            if tensor.grad is not grad:
                tensor.grad = grad
        _restore_strengths(self._acting)


def _members(module: nn.Module) -> dict[str, Any]:
    members: dict[str, Any] = {name: dict(module.__dict__[name]) for name in _DICTS}
    members.update({name: module.__dict__[name] for name in _ATTRIBUTES if name in module.__dict__})
    return members


def _moved(tensor: Tensor, data: Tensor) -> bool:
    """Whether a plain tensor was pointed at another storage, dtype or shape; subclasses are left alone."""
    if type(data) is not torch.Tensor or tensor.is_meta != data.is_meta:
        return type(data) is torch.Tensor
    if tensor.dtype != data.dtype or tensor.shape != data.shape or tensor.layout != data.layout:
        return True
    if data.layout != torch.strided:  # a sparse one has no storage of its own
        return tensor.device != data.device
    return tensor.data_ptr() != data.data_ptr()


class Acting:
    """Which entries of some stacks act, in which order and at what strength: all that switching adapters changes.

    A snapshot of the model would take longer than the switch.
    """

    def __init__(self, stacks: Iterable[AdapterStack]) -> None:
        self._orders = [(stack, dict(stack._modules)) for stack in stacks]
        self._acting = _strengths(entry for stack, _ in self._orders for entry in stack.entries)

    def restore(self) -> None:
        """Bring it back, in place."""
        for stack, order in self._orders:
            if list(stack._modules) != list(order):
                stack._modules.clear()
                stack._modules.update(order)
        _restore_strengths(self._acting)


_Strengths = list[tuple[AdapterFactors, int, float, int]]


def _strengths(entries: Iterable[AdapterFactors]) -> _Strengths:
    return [(entry, entry.turn, entry.strength, entry.holds) for entry in entries]


def _restore_strengths(acting: _Strengths) -> None:
    for entry, turn, strength, holds in acting:
        entry.turn = turn
        if (entry.strength, entry.holds) != (strength, holds):
            entry.set_strength(strength, holds - entry.holds)


@contextlib.contextmanager
def undone_on_error(before: Snapshot | Acting) -> Iterator[None]:
    """All or nothing: whatever is raised inside, what was remembered is back."""
    try:
        yield
    except BaseException:
        before.restore()
        raise
