"""Freezing the base while adapters train, and giving the flags back."""

from __future__ import annotations

from torch import nn

from .catalogue import Leaf, parametrized, walk
from .marks import FROZEN


def freeze(leaves: list[Leaf], keep: set[int]) -> None:
    """Set ``requires_grad=False`` on base parameters whose leaf is not in ``keep``, in place; noted at each owner."""
    for leaf in leaves:
        module, name = leaf.places[0].module, leaf.places[0].name
        originals = _originals(module, name)
        flags = [tensor.requires_grad for tensor in originals]
        if any(flags) and id(leaf) not in keep:
            for tensor in originals:
                tensor.requires_grad = False  # a lazy parameter has no requires_grad_()
            module.__dict__[FROZEN] = (*module.__dict__.get(FROZEN, ()), (name, flags))


def _originals(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameter of this name, or those from which a parametrization, or pruning, computes it."""
    plist = parametrized(module).get(name)
    if plist is None:
        # Not .get(): a script module's container has none.
        found = [module._parameters[key] for key in (name, f"{name}_orig") if key in module._parameters]
    else:
        found = list(plist._parameters.values())
    return [tensor for tensor in found if tensor is not None]


def unfreeze(model: nn.Module) -> None:
    """Undo ``freeze`` on every module of a model without adapters, in place."""
    for _, module in walk(model):
        for name, flags in module.__dict__.pop(FROZEN, ()):
            originals = _originals(module, name)
            if len(originals) != len(flags):  # parametrized, or taken away, since
                flags = [True] * len(originals)
            for tensor, flag in zip(originals, flags, strict=True):
                if flag:
                    tensor.requires_grad = True
