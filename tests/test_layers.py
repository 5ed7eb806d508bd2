"""The laws of adapted layers: every layer x every method x dtype x mode, shapes and options drawn."""

from __future__ import annotations

import pytest
import torch
from cases import LAYERS, METHODS
from hypothesis import given, settings
from hypothesis import strategies as st

from loraparam.testing import LayerCase
from loraparam.testing.laws import LAYER_LAWS, compiled_equals_eager, equivalence
from loraparam.testing.subjects import Subject

# Vectors have no matrix form: only Full fits them.
ONLY_FULL = {"norm"}
PRODUCT = [(layer, method) for layer in LAYERS for method in METHODS if layer not in ONLY_FULL or method == "full"]


def subjects(layer: str, method: str, dtypes: tuple[torch.dtype, ...]) -> st.SearchStrategy[Subject]:
    """Draws a subject of one row of layers and one of methods."""

    def build(case: LayerCase, method: object, dtype: torch.dtype, training: bool) -> Subject:
        dtype = dtype if case.dtypes is None or dtype in case.dtypes else case.dtypes[0]
        widest = torch.float64 if case.dtypes is None else case.dtypes[0]
        return Subject(case.make_layer, case.make_inputs, method, dtype=dtype, training=training, widest=widest)

    return st.builds(build, LAYERS[layer], METHODS[method], st.sampled_from(dtypes), st.booleans())


@pytest.mark.parametrize(("layer", "method"), PRODUCT)
def test_equivalence(layer: str, method: str) -> None:
    """Outputs and all gradients are those of a plain layer that carries the effective weight."""

    @settings(max_examples=12)
    @given(subject=subjects(layer, method, (torch.float64, torch.float32, torch.bfloat16)))
    def holds(subject: Subject) -> None:
        equivalence(subject)

    holds()


@pytest.mark.parametrize(("layer", "method"), PRODUCT)
def test_laws(layer: str, method: str) -> None:
    """Neutral start, undo, blocks, merge, state, copies, composition, drift: all other laws, on two draws."""

    @settings(max_examples=2)
    @given(subject=subjects(layer, method, (torch.float64, torch.float32)))
    def holds(subject: Subject) -> None:
        for law in LAYER_LAWS:
            if law not in (equivalence, compiled_equals_eager):
                law(subject)

    holds()


@pytest.mark.parametrize("layer", LAYERS)
def test_compiled(layer: str) -> None:
    """Compiled layers agree with eager ones, on one draw."""

    @settings(max_examples=1)
    @given(subject=subjects(layer, "full" if layer in ONLY_FULL else "lora", (torch.float32,)))
    def holds(subject: Subject) -> None:
        compiled_equals_eager(subject)

    holds()
