"""Reading an adapted parameter: what the property of a guarded class does."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .catalogue import shown_value
from .effective import EffectiveWeight, Operand, make
from .execution import execution
from .lists import AdaptedList
from .stack import AdapterStack
from .watching import tell, watched


def read(module: nn.Module, name: str, plist: nn.Module) -> Tensor:
    """The value of an adapted parameter, as its property yields it: called by the property's getter alone."""
    try:
        value: Tensor = _evaluate(plist, name == "weight")
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


def _evaluate(plist: nn.Module, is_weight: bool) -> Any:
    """``plist()``, by a shorter way where a stack is all there is and nothing hooks into the call."""
    children = plist._modules
    stack: Any = next(iter(children.values()))
    base = plist._parameters.get("original")
    direct = (
        len(children) == 1
        and base is not None
        and type(plist) is AdaptedList
        and type(stack) is AdapterStack
        and not (plist._forward_pre_hooks or plist._forward_hooks or stack._forward_pre_hooks or stack._forward_hooks)
        and not _is_compiling()
    )
    if not direct:
        return plist()
    return stack.read_as(base, Operand if is_weight and _is_handed_over() else make)


# --- by whom ------------------------------------------------------------------------------------------------

_is_compiling = torch.compiler.is_compiling
_functions_enabled = torch._C._is_torch_function_enabled
_function_modes = torch._C._len_torch_function_stack
_linear = F.linear

# torch's own layer, unless somebody has replaced its forward with one that says more than F.linear(…, self.weight, …).
_forward = getattr(nn.Linear.forward, "__code__", None)
_HANDS_OVER = _forward if set(getattr(_forward, "co_names", ())) == {"F", "linear", "weight", "bias"} else None


def _is_handed_over() -> bool:
    """Whether the one who reads is the forward of ``nn.Linear``, and all it does is to call torch's own function."""
    reader = sys._getframe(3).f_back  # past this function, _evaluate, read and the property's getter
    return (
        reader is not None
        and reader.f_code is _HANDS_OVER
        and F.linear is _linear
        and _functions_enabled()
        and not _function_modes()
        and not watched()
    )
