"""Laws of state: dicts, files, checkpoints, copies."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import nn

from ..adapters import adapters, detach
from ..formats import load, save
from ..state import base_state_dict, load_state_dict, merged_state_dict, state_dict
from .comparisons import identical, same, values
from .seeding import seed
from .subjects import Subject


def state_round_trip(subject: Subject) -> None:
    """An adapter's state loads into a fresh adapter; base and merged states have the original keys."""
    layer = subject.adapted()
    fresh = subject.plain()
    subject.attach(fresh)
    load_state_dict(fresh, state_dict(layer))
    identical(list(state_dict(fresh).values()), list(state_dict(layer).values()), "factors after load_state_dict")
    plain = subject.plain()
    base = base_state_dict(layer)
    assert list(base) == list(plain.state_dict()), "keys of base_state_dict"
    identical(values(base), values(plain.state_dict()), "base_state_dict")
    plain.load_state_dict(merged_state_dict(layer))
    same(subject.run(plain), subject.run(layer), "outputs under merged_state_dict")


def original_checkpoint_loads(subject: Subject) -> None:
    """A checkpoint with the original keys loads strictly into the adapted layer, and keeps the factors."""
    seed(5)
    other = subject.make_layer()
    checkpoint = copy.deepcopy(other.state_dict())
    layer = subject.adapted()
    factors = {key: value.clone() for key, value in state_dict(layer).items()}
    layer.load_state_dict(checkpoint)
    cast = [v.to(w.dtype) for v, w in zip(values(checkpoint), values(base_state_dict(layer)), strict=True)]
    identical(values(base_state_dict(layer)), cast, "the base after loading a checkpoint")
    identical(list(state_dict(layer).values()), list(factors.values()), "the factors after loading a checkpoint")


def file_round_trip(subject: Subject) -> None:
    """An adapter's file loads into a plain layer: the same factors, the same outputs."""
    layer, fresh = subject.adapted(), subject.plain()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save(layer, path)
        plan = load(fresh, path)
    assert {row.path: row.method for row in plan} == adapters(layer)["default"], "targets or methods after load"
    identical(list(state_dict(fresh).values()), list(state_dict(layer).values()), "factors after load")
    identical(subject.run(fresh), subject.run(layer), "outputs after load")


def copies_are_independent(subject: Subject) -> None:
    """Deepcopies have the same outputs; detaching a copy leaves the original working."""
    _independent(subject, copy.deepcopy)


def pickles_are_independent(subject: Subject) -> None:
    """So do unpickled copies, where the plain layer itself can be pickled."""
    try:
        pickle.dumps(subject.plain())
    except (AttributeError, RuntimeError, TypeError, pickle.PicklingError):
        # Its class is local to a function, say, or torch's parametrize made it.
        return
    _independent(subject, lambda layer: pickle.loads(pickle.dumps(layer)))


def _independent(subject: Subject, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    layer = subject.adapted()
    # The first run is of a deepcopy: running a layer may write into it, an embedding with max_norm or a batch norm.
    outputs = subject.run(copy.deepcopy(layer))
    replica = duplicate(layer)
    identical(subject.run(replica), outputs, "outputs of a copy")
    detach(replica)
    identical(subject.run(layer), outputs, "outputs after detaching a copy")
