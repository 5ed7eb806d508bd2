"""Laws as pytest tests: one test id per subject and law."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import pytest

from ..errors import LoraparamError, nearest
from ..methods import Method
from .checks import attached, run_layer_law, run_method_law
from .laws import LAYER_LAWS, Law
from .method_laws import METHOD_LAWS
from .subjects import Subject


def parametrize(
    subjects: Mapping[str, Method | Subject | Callable[[], Subject]],
    *,
    without: Collection[str] = (),
    expected_failures: Mapping[str, Mapping[str, str]] | None = None,
) -> pytest.MarkDecorator:
    """Make one test for each subject and law of a test function that takes ``law`` and calls it.

    Args:
        subjects: {name: a method, for all laws; or a ``Subject``, for those of adapted layers; or a function that
            makes one, called in each test, so that collecting the tests builds nothing}.
        without: names of laws to leave out.
        expected_failures: {name: {law: reason}}. Such a test has to fail: it is an error once it passes.

    Raises:
        LoraparamError: a name in ``without`` or ``expected_failures`` that does not exist, or a reason that is empty.

    Example:
        >>> import loraparam as lp
        >>> from loraparam.testing import Subject
        >>> layer = Subject(lambda: nn.Linear(4, 3), lambda: (torch.randn(2, 4),), lp.LoRA(r=1))
        >>> @parametrize({"magnitude": lp.Magnitude(), "linear": layer})
        ... def test_laws(law):
        ...     law()
    """
    expected = expected_failures or {}
    names = [law.__name__ for law in (*METHOD_LAWS, *LAYER_LAWS)]
    _refuse_unknown("law", without, names)
    _refuse_unknown("subject", expected, list(subjects))
    params = []
    for name, subject in subjects.items():
        tests = _tests(subject)
        reasons = expected.get(name, {})
        _refuse_unknown(f"law of {name!r}", reasons, list(tests))
        for law, test in tests.items():
            if law not in without:
                params.append(pytest.param(test, id=f"{name}-{law}", marks=_marks(name, law, reasons.get(law))))
    return pytest.mark.parametrize("law", params)


def _tests(subject: Method | Subject | Callable[[], Subject]) -> dict[str, Callable[[], None]]:
    """{name of a law: the check of it on this subject}."""
    if isinstance(subject, Method):
        own = {law.__name__: partial(run_method_law, law, subject) for law in METHOD_LAWS}
        return own | _tests(attached(subject))
    return {law.__name__: partial(_run_layer_law, law, subject) for law in LAYER_LAWS}


def _run_layer_law(law: Law, subject: Subject | Callable[[], Subject]) -> None:
    run_layer_law(law, subject if isinstance(subject, Subject) else subject())


def _marks(name: str, law: str, reason: str | None) -> list[Any]:
    if reason is None:
        return []
    if not reason:
        raise LoraparamError(f"{name!r} is expected to fail {law!r} without a reason; give one")
    return [pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True)]


def _refuse_unknown(kind: str, given: Collection[str], known: list[str]) -> None:
    for name in given:
        if name not in known:
            raise LoraparamError(f"no {kind} named {name!r}{nearest(name, known)}")
