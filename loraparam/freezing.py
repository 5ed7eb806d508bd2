"""Freezing the base while adapters train, and giving the flags back."""

from __future__ import annotations

from torch import nn

from .catalogue import Leaf, parametrized, walk

# On each module: the names of its own parameters that attach() froze.
_FROZEN = "_loraparam_frozen"


def freeze(leaves: list[Leaf], keep: set[int]) -> None:
    """Set ``requires_grad=False`` on base parameters whose leaf is not in ``keep``, in place; noted at each owner."""
    for leaf in leaves:
        module, name = leaf.places[0].module, leaf.places[0].name
        trained = [tensor for tensor in _originals(module, name) if tensor.requires_grad]
        if trained and id(leaf) not in keep:
            for tensor in trained:
                tensor.requires_grad_(False)
            module.__dict__[_FROZEN] = (*module.__dict__.get(_FROZEN, ()), name)


def _originals(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameter of this name, or those from which a parametrization computes it."""
    plist = parametrized(module).get(name)
    found = plist._parameters.values() if plist is not None else [module._parameters.get(name)]
    return [tensor for tensor in found if tensor is not None]


def unfreeze(model: nn.Module) -> None:
    """Undo ``freeze`` on every module of a model without adapters, in place."""
    for _, module in walk(model):
        for name in module.__dict__.pop(_FROZEN, ()):
            for tensor in _originals(module, name):
                tensor.requires_grad_(True)
