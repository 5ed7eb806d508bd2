"""A model without its adapters for the time of a block, and exactly as before after it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator

from torch import nn

from .errors import AttachError
from .freezing import unfreeze
from .hosts import Site, groups, refuse_sharded, release_hosts, remove
from .snapshots import Snapshot

# Modules inside an open block, and the block's name.
_suspended: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def plain(model: nn.Module, block: str, fold: Callable[[list[Site]], None] | None = None) -> Iterator[None]:
    """Inside: the original classes, keys and parameters, with what ``fold`` made of each adapted tensor.

    Args:
        model: a model with or without adapters.
        block: the public name of the block, for the errors of what is refused inside.
        fold: called with the sites of each stack before it is taken off.
    """
    refuse_suspended(model, unless=block)
    found = groups(model)
    for group in found:
        refuse_sharded(group)
    before = Snapshot(model)
    inside = {module: block for module in model.modules() if module not in _suspended}
    try:
        for group in found:
            if fold is not None:
                fold(group)
            for site in group:
                remove(site.module, site.name)
        unfreeze(model)
        release_hosts(model)
        _suspended.update(inside)
        yield
    finally:
        for module in inside:
            _suspended.pop(module, None)
        before.restore()


def refuse_suspended(model: nn.Module, unless: str = "") -> None:
    """Raise inside an open block: what changes adapters there would be lost at its end.

    ``unless`` names the block that may be opened inside itself: the model is as plain there as it asks for.
    """
    if not isinstance(model, nn.Module):
        raise AttachError(f"model is a {type(model).__name__}; allowed: a torch.nn.Module")
    for module in model.modules() if _suspended else ():
        block = _suspended.get(module, unless)
        if block != unless:
            raise AttachError(f"the model is inside `with lp.{block}(model):`; leave that block first")
