"""Running the laws on a method, a layer or a model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ..errors import LoraparamError, nearest
from ..layouts import Layout
from ..methods import IA3, DoRA, Full, LoRA, Magnitude, Method
from ..targets import ALL_LINEAR, Targets
from .comparisons import same
from .holders import ConvThenLinear
from .laws import LAYER_LAWS, Law
from .method_laws import METHOD_LAWS, MethodLaw
from .strategies import layouts, weights
from .subjects import Inputs, Subject

METHODS = (LoRA(r=1), DoRA(r=1), Magnitude(), IA3(), Full())


def laws() -> dict[str, str]:
    """{name: what it says} of every law, methods' first.

    Example:
        >>> laws()["neutral_start"]
        "Right after attaching, outputs are the plain layer's, to rounding."
    """
    return {law.__name__: (law.__doc__ or "").strip() for law in (*METHOD_LAWS, *LAYER_LAWS)}


def check_method(method: Method, *, max_examples: int = 30, only: Sequence[str] | None = None) -> None:
    """Check the laws of a method on drawn weights, layouts and dtypes, then all others on a small network.

    Args:
        method: an instance; give it a rank of 1, which fits every weight drawn.
        max_examples: weights drawn per law.
        only: names of laws, if not all.

    Raises:
        AssertionError: naming the law that is broken, with the smallest weight found.
        LoraparamError: there is no law of a name in ``only``.

    Example:
        >>> check_method(Magnitude(axis="in"), max_examples=5)
    """
    given: object = method
    if not isinstance(given, Method):
        raise LoraparamError(f"check_method takes a method, such as lp.LoRA(r=1), not {given!r}")
    names = _names(only, list(laws()))
    for law in METHOD_LAWS:
        if law.__name__ in names:
            run_method_law(law, method, max_examples)
    others = [law.__name__ for law in LAYER_LAWS if law.__name__ in names]
    if others:
        subject = attached(method)
        check_layer(subject.make_layer, subject.make_inputs, methods=[method], only=others)


def attached(method: Method) -> Subject:
    """The method on a small network, for the laws of adapted layers."""
    return Subject(ConvThenLinear, lambda: (torch.randn(2, 4, 3),), method)


def run_method_law(law: MethodLaw, method: Method, max_examples: int = 30) -> None:
    """Check one law of a method on drawn weights."""

    # One failure, the smallest, said shortly.
    phases = [phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.explain]

    @hypothesis.settings(
        max_examples=max_examples, deadline=None, database=None, report_multiple_bugs=False, phases=phases
    )
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
    make_inputs: Callable[[], Inputs],
    *,
    methods: Sequence[Method] = METHODS,
    targets: Targets | None = None,
    dtypes: Sequence[torch.dtype | None] = (None,),
    only: Sequence[str] | None = None,
) -> None:
    """Check the laws of adapted layers on one layer, in training and in evaluation mode.

    Args:
        make_layer: builds the layer; called many times, each under the same seed.
        make_inputs: builds its positional arguments, or a mapping of keyword arguments; likewise.
        methods: what to attach; a method that fits none of the parameters is skipped.
        targets: which parameters; default: all the method fits.
        dtypes: to cast the layer and its inputs to; None leaves them.
        only: names of laws, if not all.

    Raises:
        AssertionError: naming the law that is broken, the method, the dtype and the mode.
        LoraparamError: what the laws say nothing about: the plain layer cannot be built or run, or not twice alike;
            or none of the methods fits it; or there is no law of a name in ``only``.
    """
    if isinstance(make_layer, nn.Module):
        name = type(make_layer).__name__
        raise LoraparamError(f"check_layer takes a function that makes the layer, not a {name}; or use check_model")
    listed: object = methods
    if isinstance(listed, Method):
        raise LoraparamError(f"methods={listed!r}; allowed: a list, such as [{listed!r}]")
    _need_module(make_layer)
    chosen = _chosen(only)
    checked = 0
    for method in methods:
        subject = Subject(make_layer, make_inputs, method, targets)
        if targets is None and not subject.fitting():
            continue
        checked += 1
        for dtype in dtypes:
            for training in (True, False):
                _run(chosen, replace(subject, dtype=dtype, training=training))
    if not checked:
        raise LoraparamError("none of the methods fits a parameter of this layer; give methods= that do, as lp.Full()")


def check_model(
    model: nn.Module,
    *inputs: Any,
    keywords: Mapping[str, Any] | None = None,
    targets: Targets = ALL_LINEAR,
    exclude: Targets = (),
    method: Method | None = None,
    only: Sequence[str] | None = None,
) -> None:
    """Check the laws of adapted layers on a whole model, in its present mode. The model itself is not touched.

    Args:
        model: any module that can be deep-copied.
        inputs: its positional arguments.
        keywords: its keyword arguments, if it takes those instead.
        targets: which parameters.
        exclude: parameters to leave out, such as those that ``trains`` names because no gradient reaches them.
        method: what to attach; default ``LoRA(r=1)``.
        only: names of laws, if not all.

    Raises:
        AssertionError: naming the law that is broken.
        LoraparamError: what the laws say nothing about: no target, a plain model that cannot be run, or not twice
            alike; or inputs in both ways; or there is no law of a name in ``only``.

    Example:
        >>> check_model(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4))
    """
    if inputs and keywords:
        raise LoraparamError("check_model takes positional inputs or keywords=, not both")
    of: object = model
    if not isinstance(of, nn.Module):
        raise LoraparamError(f"check_model takes a model, not {of!r}")
    given = keywords if keywords is not None else inputs
    plain = Subject(lambda: copy.deepcopy(model), lambda: given, method or LoRA(r=1), targets)
    _run(_chosen(only), replace(plain, exclude=exclude, training=model.training))


def _need_module(make_layer: Callable[[], nn.Module]) -> None:
    """Refuse what makes no layer."""
    try:
        made: object = make_layer()
    except Exception as error:
        raise LoraparamError(f"the layer cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise LoraparamError(f"make_layer made a {type(made).__name__}; allowed: an nn.Module")


def _chosen(only: Sequence[str] | None) -> list[Law]:
    """The laws of adapted layers of these names."""
    names = _names(only, [law.__name__ for law in LAYER_LAWS])
    return [law for law in LAYER_LAWS if law.__name__ in names]


def _names(only: Sequence[str] | None, known: Sequence[str]) -> Sequence[str]:
    """The names given, or all; one that is not known is refused."""
    if isinstance(only, str):
        raise LoraparamError(f"only={only!r}; allowed: a list of names, such as [{only!r}]")
    for name in only or ():
        if name not in known:
            raise LoraparamError(f"no law named {name!r}{nearest(name, known)}")
    return known if only is None else only


def run_layer_law(law: Law, subject: Subject) -> None:
    """Check one law of adapted layers on a subject."""
    with _naming(law.__name__, subject):
        law(subject)


def _run(chosen: Sequence[Law], subject: Subject) -> None:
    _need_plain(subject)
    for law in chosen:
        run_layer_law(law, subject)


def _need_plain(subject: Subject) -> None:
    """Refuse a subject about which the laws say nothing, as something is wrong with nothing attached."""
    subject.plan()
    name = type(subject.plain()).__name__
    inputs: object = subject.make_inputs()
    if isinstance(inputs, Tensor):
        raise LoraparamError("inputs are a sequence of arguments, such as (x,), or a mapping; not a tensor")
    try:
        first, second = (subject.run(subject.plain()) for _ in range(2))
    except Exception as error:
        raise LoraparamError(f"{name} fails before anything is attached: {type(error).__name__}: {error}") from error
    if not first:
        raise LoraparamError(f"{name} has no output that is a floating-point tensor")
    try:
        same(second, first, "outputs of a second run")
    except AssertionError as error:
        raise LoraparamError(f"{name} differs from itself when built and run again under one seed: {error}") from error


@contextlib.contextmanager
def _naming(law: str, subject: object) -> Iterator[None]:
    """Puts the names of the law and its subject in front of a failure; any other error breaks the law too."""
    try:
        yield
    except hypothesis.errors.HypothesisException:
        raise
    except Exception as error:
        kind = "" if isinstance(error, AssertionError | LoraparamError) else f"{type(error).__name__}: "
        raise AssertionError(f"law {law!r} is broken by {subject}: {kind}{error}") from error
