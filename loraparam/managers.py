"""Model methods that work behind the layers' backs: transformers' tying, resizing and saving.

``tie_weights()`` assigns one layer's parameter to another and ``resize_token_embeddings()`` swaps embeddings. With
an adapted embedding both would fail half-way, with an error about something else. ``save_pretrained()`` would write
keys that ``from_pretrained()`` does not know, so that the reloaded layers start at random. While adapters are on
such a model its class is guarded as its layers' are: tying runs on the plain model, the others are refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from .errors import AttachError, listed
from .guarded import METHOD_GUARDS, plain_base
from .hosts import become_host, groups
from .stack import AdapterStack
from .suspension import plain

# {model: writes the folder that save_pretrained was given, or returns False}; a trainer's checkpoints take this way.
SAVERS: weakref.WeakKeyDictionary[nn.Module, Callable[..., bool]] = weakref.WeakKeyDictionary()


def guard_managers(model: nn.Module) -> None:
    """Guard the methods of every module with adapters inside that has them, in place."""
    for module in model.modules():
        if any(callable(getattr(type(module), name, None)) for name in METHOD_GUARDS) and groups(module):
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
    if not _managed(self):
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


def _save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """``save_pretrained``, refused where the file would have keys that ``from_pretrained`` does not know."""
    keys = kwargs.get("state_dict")
    ours = tuple(f"{path.rpartition('.')[0]}." for path, part in self.named_modules() if isinstance(part, AdapterStack))
    if not ours or (keys is not None and not any(key.startswith(ours) for key in keys)):
        return plain_base(type(self)).save_pretrained(self, save_directory, *args, **kwargs)  # type: ignore[attr-defined]
    if self in SAVERS and SAVERS[self](self, save_directory, **kwargs):
        return None
    raise AttachError(
        "save_pretrained() of a model with adapters would write keys that from_pretrained() does not know, and the "
        "reloaded layers would start at random; `with lp.merged(model):` (or lp.detached) save the plain model, "
        "lp.save(model, path) the adapter alone; for the checkpoints of a Trainer give it "
        "callbacks=[loraparam.integrations.transformers.AdapterCheckpoints()]"
    )


def _bindings(model: nn.Module) -> dict[str, int]:
    return {path: id(parameter) for path, parameter in model.named_parameters(remove_duplicate=False)}


METHOD_GUARDS.update(
    tie_weights=_tie_weights,
    resize_token_embeddings=_resize_token_embeddings,
    save_pretrained=_save_pretrained,
)
