"""Laws of taking adapters off: for good, for the time of a block, by merging, after errors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import detach
from ..errors import AttachError
from ..merging import detached, disabled, merge, merged
from ..state import base_state_dict
from ..training import named_parameters
from .comparisons import assert_classes, assert_mark, identical, mark, same
from .subjects import Subject, project


def exact_undo(subject: Subject) -> None:
    """After training and detaching: the same Parameters, bits, flags, order, keys and classes."""
    layer = subject.plain()
    before = mark(layer)
    subject.adapted(layer)
    _step(subject, layer)
    with disabled(layer):
        subject.run(layer)
    detach(layer)
    assert_mark(layer, before)


def exact_blocks(subject: Subject) -> None:
    """``disabled`` and ``detached`` give base outputs bit for bit; ``merged`` the effective ones; all restore."""
    plain = subject.plain()
    keys = list(plain.state_dict())
    base = subject.run(plain)
    # Whether a weight requires grad decides between two ways of summing inside torch.
    frozen = subject.run(subject.plain().requires_grad_(False))
    outputs = subject.run(subject.adapted())
    layer = subject.adapted()
    before = mark(layer)
    for block, expected in ((detached, base), (merged, None), (disabled, frozen)):
        with block(layer):
            # A copy of what is plain inside: an embedding with max_norm writes into its own weight. ``disabled``, in
            # which the layer itself runs, and may move a batch norm's buffers, comes last.
            inside = layer if block is disabled else copy.deepcopy(layer)
            if expected is None:
                same(subject.run(inside), outputs, "outputs inside merged()")
            else:
                identical(subject.run(inside), expected, f"outputs inside {block.__name__}()")
            if block is not disabled:
                assert list(layer.state_dict()) == keys, f"keys in {block.__name__}()"
        assert_mark(layer, before)


def merge_keeps_outputs(subject: Subject) -> None:
    """After ``merge`` the layer is plain and its outputs are those of before."""
    layer = subject.adapted()
    before = subject.run(copy.deepcopy(layer))
    merge(layer)
    same(subject.run(layer), before, "outputs after merge")
    plain = subject.plain()
    assert list(layer.state_dict()) == list(plain.state_dict()), "keys after merge"
    assert_classes(layer, plain, "classes after merge")


def no_drift(subject: Subject) -> None:
    """Many cycles of steps, modes and blocks write nothing into the base."""
    layer = subject.adapted()
    before = [value.clone() for value in _parameters(base_state_dict(layer), layer)]
    for cycle in range(subject.cycles):
        layer.train(cycle % 2 == 0)
        with merged(layer) if cycle % 3 else disabled(layer):
            pass
        _step(subject, layer)
    identical(_parameters(base_state_dict(layer), layer), before, f"the base after {subject.cycles} cycles")


def all_or_nothing(subject: Subject) -> None:
    """Attaching what is attached already is refused, and changes nothing."""
    layer = subject.adapted()
    before = mark(layer)
    try:
        subject.attach(layer)
    except AttachError:
        assert_mark(layer, before)
    else:
        raise AssertionError("a second attach under the same name was not refused")


def _parameters(state: dict[str, Any], layer: nn.Module) -> list[Tensor]:
    """The parameters among a state's values; buffers move with training."""
    with detached(layer):
        names = [name for name, _ in layer.named_parameters(remove_duplicate=False)]
    return [state[name] for name in names]


def _step(subject: Subject, layer: nn.Module) -> None:
    """One step down the gradient on the factors, each moved by 1e-3 at most: no model diverges."""
    parameters = [parameter for _, parameter in named_parameters(layer)]
    outputs = subject.run(layer)
    grads = torch.autograd.grad(project(outputs), parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                parameter.sub_(1e-3 * torch.tanh(grad.nan_to_num()))
