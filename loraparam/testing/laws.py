"""All laws of adapted layers, in the order in which they are checked."""

from __future__ import annotations

from collections.abc import Callable

from .layer_laws import (
    compiled_equals_eager,
    composition,
    effect,
    equivalence,
    finite_differences,
    neutral_start,
    trains,
)
from .state_laws import (
    copies_are_independent,
    file_round_trip,
    original_checkpoint_loads,
    pickles_are_independent,
    state_round_trip,
)
from .subjects import Subject
from .undo_laws import all_or_nothing, exact_blocks, exact_undo, merge_keeps_outputs, no_drift

Law = Callable[[Subject], None]

LAYER_LAWS: tuple[Law, ...] = (
    equivalence,
    finite_differences,
    neutral_start,
    effect,
    trains,
    composition,
    exact_undo,
    exact_blocks,
    merge_keeps_outputs,
    no_drift,
    all_or_nothing,
    state_round_trip,
    file_round_trip,
    original_checkpoint_loads,
    copies_are_independent,
    pickles_are_independent,
    compiled_equals_eager,
)
