"""Registering the operations that run on the parts of an effective weight, and what they share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..effective import HANDLERS, KEYWORDS, EffectiveWeight, Operand
from ..forms import Form
from ..functional import autocasts
from ..refusals import can_dequantize
from ..sharding import is_spread
from ..watching import tell

Handler = TypeVar("Handler", bound=Callable[..., Any])


def implements(*functions: Any) -> Callable[[Handler], Handler]:
    """Register a handler for torch functions."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(functions, handler))
        parameters = inspect.signature(handler).parameters.values()
        named = frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        KEYWORDS[handler] = None if any(p.kind is p.VAR_KEYWORD for p in parameters) else named
        return handler

    return register


def form_of(weight: Any, *, drops: bool = False, flat: bool = False) -> Form | None:
    """A tensor's structured form, if it has one that the operation can use; its batch dims come first.

    ``drops``: the operation sees the layer's input and can drop its elements. ``flat``: it knows what to do where the
    factors' rows and columns are not the weight's outputs and inputs.
    """
    if not isinstance(weight, (EffectiveWeight, Operand)):
        return None
    form = weight.form()
    if form is None or (not drops and form.drops_input) or (not flat and form.layout.rows is not None):
        return None
    batch = form.layout.batch
    if not batch:
        return form
    # Behind the batch dims there may be vectors, where nothing is multiplied.
    return form if batch == tuple(range(len(batch))) and form.weight.dim() >= 2 + len(batch) else None


def ran(weight: EffectiveWeight | Operand) -> None:
    """Say that an operation ran on the parts."""
    if weight._site is not None:
        tell(weight._site, "factored")


_ORDINARY = (nn.Parameter, Tensor)


def same_kind(x: Tensor, weight: Tensor) -> bool:
    """Whether two tensors multiply as they are: ordinary ones of one dtype."""
    ordinary = type(weight) in _ORDINARY or not (can_dequantize(weight) or is_spread(weight))
    return weight.dtype is x.dtype and ordinary and not autocasts(x)


def seen(x: Tensor, form: Form, dtype: torch.dtype) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, float | Tensor]]]:
    """(input, (A, B, s)) of the low-rank path: all terms at once, or each on its own draw of dropped inputs."""
    for part in (replace(form, terms=(term,)) for term in form.terms) if form.drops_input else (form,):
        pair = part.factors(dtype)
        if pair is not None:
            yield F.dropout(x, part.terms[0].dropout) if form.drops_input else x, pair
