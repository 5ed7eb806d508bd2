"""Reading an adapted parameter: what the property of a guarded class does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .catalogue import shown_value
from .effective import EffectiveWeight, tell, watched
from .execution import execution
from .lists import AdaptedList
from .stack import AdapterStack


def read(module: nn.Module, name: str, plist: nn.Module) -> Tensor:
    """The value of an adapted parameter, as its property yields it."""
    try:
        value = _evaluate(plist)
    except AttributeError as error:
        # Left alone it would surface as "module has no attribute 'weight'", and hasattr would say False.
        raise RuntimeError(f"computing the effective {name!r} of {type(module).__name__} failed: {error}") from error
    if watched():
        # Not the module itself: an RNN keeps the last weights it read, and would keep itself alive.
        site = (id(module), name)
        tell(site, "read")
        if isinstance(value, EffectiveWeight):
            value._site = site
        else:
            tell(site, "merged")
    return value


def dense_value(module: nn.Module, name: str) -> Tensor:
    """What reading a parameter yields, as a plain tensor, with nothing drawn or updated on the way."""
    with execution("merged"):
        return shown_value(module, name)


def _evaluate(plist: nn.Module) -> Tensor:
    """``plist()``, by a shorter way where a stack is all there is and nothing hooks into the call."""
    first, *others = plist._modules.values()
    original = plist._parameters.get("original")
    direct = (
        not others
        and original is not None
        and type(plist) is AdaptedList
        and type(first) is AdapterStack
        and not (plist._forward_pre_hooks or plist._forward_hooks or first._forward_pre_hooks or first._forward_hooks)
        and not torch.compiler.is_compiling()
    )
    value: Tensor = first.forward(original) if direct else plist()  # type: ignore[union-attr]
    return value
