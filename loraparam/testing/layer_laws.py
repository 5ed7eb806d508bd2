"""Laws of adapters while they act: outputs, gradients, training, composition, compilation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapters import activate
from ..check import check
from ..execution import execution
from ..hosts import groups
from ..reading import dense_value
from ..training import named_parameters
from .comparisons import TOLERANCE, close, identical, same
from .references import Reference, differentiates_norm, reference
from .seeding import seed
from .subjects import Inputs, Subject, project, shake, tensors


def equivalence(subject: Subject) -> None:
    """Outputs and gradients (inputs', factors') are those of a plain layer carrying the effective weight.

    In factored and in merged execution.
    """
    found = {}
    for kind in ("factored", "merged"):
        with execution(kind):
            adapted = subject.adapted()
            found[kind] = _adapted_results(subject, adapted)
    dtype, other = (results["output 0"].dtype for results in found.values())
    assert dtype == other, f"outputs are {dtype} in factored execution, {other} in merged"
    expected, slack = _truth(subject, adapted, dtype)
    for results in found.values():
        odd = set(results) ^ set(expected)
        assert not odd, f"gradients arrived at {odd} in one of the two"
        for key, want in expected.items():
            close(results[key], want, key, dtype, slack[key])


def _truth(subject: Subject, adapted: nn.Module, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What a plain layer gives that carries the effective weights, and how far off ``dtype`` may be beyond rounding."""
    expected = _reference_results(subject, reference(subject.plain().requires_grad_(), adapted))
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
    elif any(differentiates_norm(entry.method) for group in groups(adapted) for entry in group[0].stack.entries):
        # The gradient along a row does not change its direction: the norm takes that part away again, which for rows
        # of one element is all of it, and leaves the rounding of what was there before.
        before = _reference_results(subject, reference(subject.plain().requires_grad_(), adapted, detach_norms=True))
        slack = {key: TOLERANCE[dtype] * _largest(before[key]) for key in expected}
    return expected, slack


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


def _run_and_differentiate(subject: Subject, layer: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
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
    subject.attach(layer)
    before = _effective(layer)
    shake(layer)
    for path, weight in _effective(layer).items():
        # A bias that starts at zero stays there, whatever it is multiplied with.
        zero = not subject.method.additive and not bool(before[path].any())
        assert zero or not torch.equal(weight, before[path]), f"{path}: moving its factors changes nothing"


def _effective(layer: nn.Module) -> dict[str, Tensor]:
    """{path: the dense effective weight} of each adapted parameter."""
    first = [group[0] for group in groups(layer)]
    return {site.path: dense_value(site.module, site.name).detach() for site in first}


def composition(subject: Subject) -> None:
    """Two adapters act in the activated order, each at its weight, as the definition says."""
    layer = subject.adapted(name="first")
    subject.attach(layer, name="second")
    shake(layer)
    activate(layer, {"second": 0.5, "first": 1.5})
    for group in groups(layer):
        assert [entry.adapter for entry in group[0].stack.entries] == ["second", "first"], "order after activate"
    expected = reference(subject.plain(), layer)
    for path, weight in _effective(layer).items():
        close(weight, expected.weights[path][0], f"{path} under two adapters", weight.dtype)
    outputs = subject.run(layer)
    with execution("merged"):
        same(outputs, subject.run(layer), "factored outputs under two adapters")
    activate(layer, {})
    frozen = subject.plain().requires_grad_(False)
    identical(subject.run(layer), subject.run(frozen), "outputs with every adapter off")


def trains(subject: Subject) -> None:
    """Gradient arrives at every target, and one optimizer step moves the factors and nothing else."""
    layer = subject.adapted()
    inputs = subject.inputs()
    positional, keywords = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    check(layer, *positional, **keywords)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    factors = dict(named_parameters(layer))
    optimizer = torch.optim.AdamW(factors.values(), lr=0.1)
    project(subject.run(layer)).backward()
    optimizer.step()
    kept = {id(factor) for factor in factors.values()}
    for name, parameter in layer.named_parameters():
        if id(parameter) not in kept:
            identical([parameter], [before[name]], f"{name} after a step on the factors")
        elif parameter.grad is not None and bool(parameter.grad.any()):
            assert not torch.equal(parameter, before[name]), f"{name}: a step does not move it"


def finite_differences(subject: Subject) -> None:
    """In float64, the factors' gradients are those of finite differences, where the plain layer's own are."""
    subject = replace(subject, dtype=torch.float64)
    exact = subject.method.exact_gradient and subject.widest == torch.float64
    if not exact or not _gradcheck(subject, subject.plain().requires_grad_()):
        return
    assert _gradcheck(subject, subject.adapted()), "gradients are not those of finite differences"


def _gradcheck(subject: Subject, layer: nn.Module) -> bool:
    """``torch.autograd.gradcheck``, which moves the parameters in place, along random directions."""
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    function = lambda *_: project(subject.run(layer))  # noqa: E731
    seed(9)
    return torch.autograd.gradcheck(function, parameters, fast_mode=True, raise_exception=False)


def compiled_equals_eager(subject: Subject) -> None:
    """Under ``torch.compile`` outputs and factors' gradients are the eager ones, to rounding."""
    layer = subject.adapted()
    eager = _adapted_results(subject, layer)
    layer = subject.adapted()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about what it compiles
        layer.compile(backend="aot_eager")
        results = _adapted_results(subject, layer)
    torch._dynamo.reset()
    dtype = eager["output 0"].dtype
    for key, want in eager.items():
        close(results[key], want, f"{key}, compiled", dtype)
