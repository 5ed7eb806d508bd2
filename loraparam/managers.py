"""Model methods that replace weights behind the layers' backs: transformers' tying and resizing.

``tie_weights()`` assigns one layer's parameter to another and ``resize_token_embeddings()`` swaps embeddings. With
an adapted embedding both would fail half-way, with an error about something else. While adapters are on such a
model its class is guarded as its layers' are: tying runs on the plain model, resizing is refused.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import AttachError, listed
from .guarded import METHOD_GUARDS, plain_base
from .hosts import become_host, groups
from .suspension import plain


def guard_managers(model: nn.Module) -> None:
    """Guard the methods of every module that has them, in place, where embeddings or tied weights are adapted."""
    for module in model.modules():
        if any(callable(getattr(type(module), name, None)) for name in METHOD_GUARDS) and _managed(module):
            become_host(module)


def _managed(model: Any) -> list[str]:
    """The paths of adapted weights that the model's methods would replace: embeddings, heads, tied weights."""
    ends = [_end(model, "get_input_embeddings"), _end(model, "get_output_embeddings")]
    return [
        group[0].path
        for group in groups(model)
        if len(group) > 1 or isinstance(group[0].module, nn.Embedding) or any(s.module in ends for s in group)
    ]


def _end(model: Any, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def _tie_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``tie_weights`` on the plain model: right where it changes nothing, refused where it would."""
    if not groups(self):
        return plain_base(type(self)).tie_weights(self, *args, **kwargs)  # type: ignore[attr-defined]
    with plain(self, "detached"):
        before = _bindings(self)
        result = plain_base(type(self)).tie_weights(self, *args, **kwargs)  # type: ignore[attr-defined]
        changed = [path for path, parameter in _bindings(self).items() if before.get(path) != parameter]
    if changed:
        raise AttachError(
            f"tie_weights() would replace {listed(changed)} while adapters are on the model; lp.detach or lp.merge "
            "first, tie, then attach"
        )
    return result


def _resize_token_embeddings(self: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """``resize_token_embeddings``, refused while an embedding or a tied weight carries adapters."""
    adapted = _managed(self)
    if new_num_tokens is not None and adapted:
        raise AttachError(
            f"resize_token_embeddings() would replace {listed(adapted)}, which carries adapters of the old size; "
            "lp.detach or lp.merge first, resize, then attach"
        )
    return plain_base(type(self)).resize_token_embeddings(self, new_num_tokens, *args, **kwargs)  # type: ignore[attr-defined]


def _bindings(model: nn.Module) -> dict[str, int]:
    return {path: id(parameter) for path, parameter in model.named_parameters(remove_duplicate=False)}


METHOD_GUARDS.update(tie_weights=_tie_weights, resize_token_embeddings=_resize_token_embeddings)
