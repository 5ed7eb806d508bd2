"""Multi-head attention with effective weights as projections."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch.nn.functional as F

from .registry import implements


@functools.cache
def _attention_body() -> Any:
    """``F.multi_head_attention_forward``'s own code, with its guard against tensor subclasses answering no.

    The function is a composite in Python: past the guard, its ``linear``, ``chunk`` and ``split`` calls arrive here.
    """
    function = F.multi_head_attention_forward
    scope = {**function.__globals__, "has_torch_function": lambda tensors: False}
    body = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


@implements(F.multi_head_attention_forward)
def attention(*args: Any, **kwargs: Any) -> Any:
    """Attention, whose projections run on the parts."""
    return _attention_body()(*args, **kwargs)
