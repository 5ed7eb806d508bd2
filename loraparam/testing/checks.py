"""Running the laws on a method, a layer or a model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ..layouts import Layout
from ..methods import IA3, DoRA, Full, LoRA, Magnitude, Method
from ..targets import ALL_LINEAR, Targets
from .laws import LAYER_LAWS, Law
from .method_laws import METHOD_LAWS, MethodLaw
from .strategies import layouts, weights
from .subjects import Subject

METHODS = (LoRA(r=1), DoRA(r=1), Magnitude(), IA3(), Full())


def laws() -> dict[str, str]:
    """{name: what it says} of every law, methods' first.

    Example:
        >>> laws()["neutral_start"]
        "Right after attaching, outputs are the plain layer's, to rounding."
    """
    return {law.__name__: (law.__doc__ or "").strip() for law in (*METHOD_LAWS, *LAYER_LAWS)}


def check_method(method: Method, *, max_examples: int = 30) -> None:
    """Check the laws of a method on weights, layouts and dtypes drawn by Hypothesis.

    Args:
        method: an instance; give it a rank of 1, which fits every weight drawn.
        max_examples: weights drawn per law.

    Raises:
        AssertionError: naming the law that is broken, with the smallest weight found.

    Example:
        >>> check_method(Magnitude(axis="in"), max_examples=5)
    """
    for law in METHOD_LAWS:
        run_method_law(law, method, max_examples)


def run_method_law(law: MethodLaw, method: Method, max_examples: int = 30) -> None:
    """Check one law of a method on drawn weights."""

    @hypothesis.settings(max_examples=max_examples, deadline=None, database=None)
    @hypothesis.given(layout_and_weight=layouts().flatmap(_with_weight))
    def holds(layout_and_weight: tuple[Layout, Tensor]) -> None:
        layout, weight = layout_and_weight
        with _naming(law.__name__, f"{method} on shape {tuple(weight.shape)}, {weight.dtype}, {layout}"):
            law(method, weight, layout)

    holds()


def _with_weight(layout: Layout) -> st.SearchStrategy[tuple[Layout, Tensor]]:
    return st.tuples(st.just(layout), weights(layout=layout))


def check_layer(
    make_layer: Callable[[], nn.Module],
    make_inputs: Callable[[], Sequence[Any]],
    *,
    methods: Sequence[Method] = METHODS,
    targets: Targets | None = None,
    dtypes: Sequence[torch.dtype | None] = (None,),
    only: Sequence[str] | None = None,
) -> None:
    """Check the laws of adapted layers on one layer, in training and in evaluation mode.

    Args:
        make_layer: builds the layer; called many times, each under the same seed.
        make_inputs: builds its positional arguments; likewise.
        methods: what to attach; a method that fits none of the parameters is skipped.
        targets: which parameters; default: all the method fits.
        dtypes: to cast the layer and its inputs to; None leaves them.
        only: names of laws, if not all.

    Raises:
        AssertionError: naming the law that is broken, the method, the dtype and the mode.
    """
    chosen = [law for law in LAYER_LAWS if only is None or law.__name__ in only]
    checked = 0
    for method in methods:
        subject = Subject(make_layer, make_inputs, method, targets)
        if targets is None and not subject.fitting():
            continue
        checked += 1
        for dtype in dtypes:
            for training in (True, False):
                _run(chosen, replace(subject, dtype=dtype, training=training))
    assert checked, "none of the methods fits a parameter of this layer"


def check_model(model: nn.Module, *inputs: Any, targets: Targets = ALL_LINEAR, method: Method | None = None) -> None:
    """Check the laws of adapted layers on a whole model, in its present mode. The model itself is not touched.

    Args:
        model: any module that can be deep-copied.
        inputs: its positional arguments.
        targets: which parameters.
        method: what to attach; default ``LoRA(r=1)``.

    Raises:
        AssertionError: naming the law that is broken.

    Example:
        >>> check_model(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4))
    """
    subject = Subject(
        lambda: copy.deepcopy(model), lambda: inputs, method or LoRA(r=1), targets, training=model.training
    )
    _run(LAYER_LAWS, subject)


def run_layer_law(law: Law, subject: Subject) -> None:
    """Check one law of adapted layers on a subject."""
    with _naming(law.__name__, str(subject)):
        law(subject)


def _run(chosen: Sequence[Law], subject: Subject) -> None:
    for law in chosen:
        run_layer_law(law, subject)


@contextlib.contextmanager
def _naming(law: str, subject: str) -> Iterator[None]:
    """Puts the law's name in front of its failure; any other error breaks the law too."""
    try:
        yield
    except hypothesis.errors.HypothesisException:
        raise
    except Exception as error:
        raise AssertionError(f"law {law!r} is broken by {subject}: {error}") from error
