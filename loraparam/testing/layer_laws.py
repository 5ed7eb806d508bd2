"""The laws of an adapted layer or model. Each takes a subject and raises AssertionError where it is broken."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ..adapters import activate, detach
from ..errors import AttachError
from ..execution import execution
from ..hosts import groups
from ..merging import detached, disabled, effective_weight, merge, merged
from ..state import base_state_dict, load_state_dict, merged_state_dict, state_dict
from ..training import named_parameters
from .subjects import Reference, Subject, project, reference, shake, tensors

Law = Callable[[Subject], None]

# Relative to the largest element: rounding of the layer's own arithmetic, which may differ in order between a
# factored and a dense evaluation, over sums of up to a few hundred terms.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def close(actual: Tensor, expected: Tensor, what: str, dtype: torch.dtype | None = None, slack: float = 0.0) -> None:
    """Compare to the tolerance of a dtype, relative to the largest expected element, plus ``slack``."""
    tolerance = TOLERANCE[dtype or actual.dtype]
    actual, expected = actual.detach(), expected.detach()
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    assert_close(
        actual.double(),
        expected.double(),
        rtol=0,
        atol=tolerance * max(scale, 1.0) + slack,
        equal_nan=False,
        msg=lambda text: f"{what}: {text}",
    )


def same(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Compare outputs to rounding."""
    assert len(actual) == len(expected), f"{what}: {len(actual)} outputs, not {len(expected)}"
    for a, e in zip(actual, expected, strict=True):
        close(a, e, what, e.dtype)


def identical(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Compare outputs bit for bit."""
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def equivalence(subject: Subject) -> None:
    """Outputs and gradients (inputs', factors') are those of a plain layer carrying the effective weight.

    In factored and in merged execution.
    """
    for kind in ("factored", "merged"):
        with execution(kind):
            _equivalence(subject)


def _equivalence(subject: Subject) -> None:
    adapted = subject.adapted()
    plain = subject.plain().requires_grad_()
    expected = _reference_results(subject, reference(plain, adapted))
    results = _adapted_results(subject, adapted)
    assert results.keys() == expected.keys(), f"gradients arrived at {set(results) ^ set(expected)} in one of the two"
    dtype = subject.run(adapted)[0].dtype
    slack = dict.fromkeys(expected, 0.0)
    if dtype.itemsize < 4:
        # Two low-precision runs differ by both their roundings. So the truth is computed in float64, from weights
        # that are not rounded, and an error is allowed three times as large as the plain layer's own, relative to
        # the tensor's size and at its worst over all tensors: by luck the plain error of one may be small.
        wide = replace(subject, dtype=subject.widest)
        truth = _reference_results(wide, reference(subject.plain().to(subject.widest).requires_grad_(), adapted))
        worst = max(_largest(expected[key].double() - truth[key]) / max(_largest(truth[key]), 1.0) for key in truth)
        slack = {key: 3 * worst * max(_largest(truth[key]), 1.0) for key in truth}
        expected = truth
    for key, want in expected.items():
        close(results[key], want, key, dtype, slack[key])


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _adapted_results(subject: Subject, adapted: nn.Module) -> dict[str, Tensor]:
    """{what: tensor} of outputs, gradients of inputs, gradients of factors."""
    inputs = subject.inputs()
    results = _run_and_differentiate(subject, adapted, inputs)
    for group in groups(adapted):
        for entry in group[0].stack.entries:
            for name, factor in entry.factors().items():
                grad: Tensor | None = factor.grad
                key = f"gradient of {group[0].path}.{entry.key}.{name}"
                results[key] = torch.zeros_like(factor) if grad is None else grad
    return results


def _reference_results(subject: Subject, expected: Reference) -> dict[str, Tensor]:
    """The same, of a plain layer that carries the effective weights."""
    results = _run_and_differentiate(subject, expected.layer, subject.inputs())
    return results | {f"gradient of {key}": grad for key, grad in expected.factor_grads().items()}


def _run_and_differentiate(subject: Subject, layer: nn.Module, inputs: list[Any]) -> dict[str, Tensor]:
    outputs = subject.run(layer, inputs)
    project(outputs).backward()
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    for i, tensor in enumerate(tensors(inputs)):
        grad: Tensor | None = tensor.grad
        if grad is not None:
            results[f"gradient of input {i}"] = grad
    return results


def neutral_start(subject: Subject) -> None:
    """Right after attaching, outputs are the plain layer's, to rounding."""
    layer = subject.plain()
    before = subject.run(layer)
    layer = subject.plain()
    subject.attach(layer)
    same(subject.run(layer), before, "outputs right after attach")


def effect(subject: Subject) -> None:
    """Moving the factors moves the effective weights."""
    layer = subject.plain()
    plan = subject.attach(layer)
    before = {row.path: effective_weight(layer, row.path).detach() for row in plan}
    shake(layer)
    for path, weight in before.items():
        assert not torch.equal(effective_weight(layer, path), weight), f"{path}: moving its factors changes nothing"


def exact_undo(subject: Subject) -> None:
    """After training and detaching: the same Parameters, bits, flags, order, keys and classes."""
    layer = subject.plain()
    mark = _mark(layer)
    subject.adapted(layer)
    _step(subject, layer)
    with disabled(layer):
        subject.run(layer)
    detach(layer)
    _assert_mark(layer, mark)


def exact_blocks(subject: Subject) -> None:
    """``disabled`` and ``detached`` give base outputs bit for bit; ``merged`` the effective ones; all restore."""
    base = subject.run(subject.plain())
    # Whether a weight requires grad decides between two ways of summing inside torch.
    frozen = subject.run(subject.plain().requires_grad_(False))
    outputs = subject.run(subject.adapted())
    for block, expected in ((disabled, frozen), (detached, base), (merged, None)):
        layer = subject.adapted()
        mark = _mark(layer)
        with block(layer):
            # A copy of what is plain inside: an embedding with max_norm writes into its own weight.
            inside = layer if block is disabled else copy.deepcopy(layer)
            if expected is None:
                same(subject.run(inside), outputs, "outputs inside merged()")
            else:
                identical(subject.run(inside), expected, f"outputs inside {block.__name__}()")
            if block is not disabled:
                assert list(layer.state_dict()) == list(subject.plain().state_dict()), f"keys in {block.__name__}()"
        _assert_mark(layer, mark)


def merge_keeps_outputs(subject: Subject) -> None:
    """After ``merge`` the layer is plain and its outputs are those of before."""
    layer = subject.adapted()
    before = subject.run(copy.deepcopy(layer))
    merge(layer)
    same(subject.run(layer), before, "outputs after merge")
    plain = subject.plain()
    assert list(layer.state_dict()) == list(plain.state_dict()), "keys after merge"
    assert [type(m) for m in layer.modules()] == [type(m) for m in plain.modules()], "classes after merge"


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
    identical(_values(base), _values(plain.state_dict()), "base_state_dict")
    plain.load_state_dict(merged_state_dict(layer))
    same(subject.run(plain), subject.run(layer), "outputs under merged_state_dict")


def original_checkpoint_loads(subject: Subject) -> None:
    """A checkpoint with the original keys loads strictly into the adapted layer, and keeps the factors."""
    torch.manual_seed(5)
    other = subject.make_layer()
    checkpoint = {key: value.clone() for key, value in other.state_dict().items()}
    layer = subject.adapted()
    factors = {key: value.clone() for key, value in state_dict(layer).items()}
    layer.load_state_dict(checkpoint)
    cast = [v.to(w.dtype) for v, w in zip(checkpoint.values(), base_state_dict(layer).values(), strict=True)]
    identical(_values(base_state_dict(layer)), cast, "the base after loading a checkpoint")
    identical(list(state_dict(layer).values()), list(factors.values()), "the factors after loading a checkpoint")


def copies_are_independent(subject: Subject) -> None:
    """Deepcopies and pickles have the same outputs; detaching a copy leaves the original working."""
    layer = subject.adapted()
    outputs = subject.run(copy.deepcopy(layer))
    replica = copy.deepcopy(layer)
    identical(subject.run(copy.deepcopy(replica)), outputs, "outputs of a deepcopy")
    detach(replica)
    identical(subject.run(copy.deepcopy(layer)), outputs, "outputs after detaching a deepcopy")
    try:
        data = pickle.dumps(layer)
    except (AttributeError, pickle.PicklingError):
        # The plain layer's own class cannot be pickled either: it is local to a function.
        return
    identical(subject.run(pickle.loads(data)), outputs, "outputs of an unpickled copy")


def composition(subject: Subject) -> None:
    """Two adapters act in the activated order, each at its weight, as the definition says."""
    layer = subject.adapted(name="first")
    subject.attach(layer, name="second")
    shake(layer)
    activate(layer, {"second": 0.5, "first": 1.5})
    for group in groups(layer):
        assert [entry.adapter for entry in group[0].stack.entries] == ["second", "first"], "order after activate"
    expected = reference(subject.plain(), layer)
    for path, (weight, _) in expected.weights.items():
        base = effective_weight(layer, path)
        close(base, weight, f"{path} under two adapters", base.dtype)
    outputs = subject.run(layer)
    with execution("merged"):
        same(outputs, subject.run(layer), "factored outputs under two adapters")
    activate(layer, {})
    frozen = subject.plain().requires_grad_(False)
    identical(subject.run(layer), subject.run(frozen), "outputs with every adapter off")


def no_drift(subject: Subject) -> None:
    """Twenty cycles of steps, modes and blocks write nothing into the base."""
    layer = subject.adapted()
    before = [value.clone() for value in _parameters(base_state_dict(layer), layer)]
    for cycle in range(20):
        layer.train(cycle % 2 == 0)
        with merged(layer) if cycle % 3 else disabled(layer):
            pass
        _step(subject, layer)
    identical(_parameters(base_state_dict(layer), layer), before, "the base after 20 cycles")


def all_or_nothing(subject: Subject) -> None:
    """Attaching what is attached already is refused, and changes nothing."""
    layer = subject.adapted()
    mark = _mark(layer)
    try:
        subject.attach(layer)
    except AttachError:
        _assert_mark(layer, mark)
    else:
        raise AssertionError("a second attach under the same name was not refused")


LAYER_LAWS: tuple[Law, ...] = (
    equivalence,
    neutral_start,
    effect,
    exact_undo,
    exact_blocks,
    merge_keeps_outputs,
    state_round_trip,
    original_checkpoint_loads,
    copies_are_independent,
    composition,
    no_drift,
    all_or_nothing,
)


def _values(state: dict[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


def _parameters(state: dict[str, Any], layer: nn.Module) -> list[Tensor]:
    """The parameters among a state's values; buffers move with training."""
    with detached(layer):
        names = [name for name, _ in layer.named_parameters(remove_duplicate=False)]
    return [state[name] for name in names]


def _step(subject: Subject, layer: nn.Module) -> None:
    """One step of SGD on the factors."""
    parameters = [parameter for _, parameter in named_parameters(layer)]
    outputs = subject.run(layer)
    grads = torch.autograd.grad(project(outputs), parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                parameter.sub_(1e-3 * grad.nan_to_num())


def _mark(layer: nn.Module) -> dict[str, Any]:
    """All that must come back: objects, bits, flags, order, keys, classes."""
    parameters = list(layer.named_parameters(remove_duplicate=False))
    return {
        "objects": [(name, parameter) for name, parameter in parameters],
        "bits": [parameter.detach().clone() for _, parameter in parameters],
        "flags": [parameter.requires_grad for _, parameter in parameters],
        "keys": list(layer.state_dict()),
        "classes": [type(module) for module in layer.modules()],
        "modes": [module.training for module in layer.modules()],
    }


def _assert_mark(layer: nn.Module, before: dict[str, Any]) -> None:
    after = _mark(layer)
    names = [name for name, _ in before["objects"]]
    assert [name for name, _ in after["objects"]] == names, "parameter names or their order changed"
    moved = [n for (n, old), (_, new) in zip(before["objects"], after["objects"], strict=True) if old is not new]
    assert not moved, f"other Parameter objects at {moved}"
    identical(after["bits"], before["bits"], "parameters")
    for what in ("flags", "keys", "classes", "modes"):
        assert after[what] == before[what], f"{what} changed: {before[what]} -> {after[what]}"
