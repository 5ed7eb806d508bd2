"""Whether a read yields a structured weight or a dense one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .errors import LoraparamError

_execution = ["factored"]


@contextlib.contextmanager
def execution(kind: str) -> Iterator[None]:
    """Inside: reads yield structured weights where possible ("factored", the default), or dense ones ("merged").

    Raises:
        LoraparamError: another kind.

    Example:
        >>> import loraparam as lp
        >>> model = torch.nn.Linear(4, 6)
        >>> _ = lp.attach(model, lp.LoRA(r=2))
        >>> with lp.execution("merged"):
        ...     type(model.weight).__name__
        'Tensor'
    """
    if kind not in ("factored", "merged"):
        raise LoraparamError(f"execution {kind!r}; allowed: 'factored', 'merged'")
    _execution.append(kind)
    try:
        yield
    finally:
        _execution.pop()


_mode = torch._C._get_dispatch_mode
_keys = torch._C._TorchDispatchModeKey
_TRACING = (_keys.FAKE, _keys.PROXY, _keys.FUNCTIONAL)
# By names of this module: a read asks at each layer, where each dictionary on the way to a name is out of the cache.
_is_compiling = torch.compiler.is_compiling
_transform = torch._C._functorch.peek_interpreter_stack
_trace = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_forward_ad = torch.autograd.forward_ad


def must_be_dense() -> bool:
    """Whether a read has to yield a plain tensor: asked for, or under a transform that needs one."""
    return (
        _execution[-1] == "merged"
        or _is_compiling()
        or _transform() is not None
        or _trace() is not None
        or _forward_ad._current_level >= 0
        or (_dispatch_modes() > 0 and any(_mode(kind) is not None for kind in _TRACING))
    )
