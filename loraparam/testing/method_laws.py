"""The laws of a method by itself: pure functions of tensors. Each takes (method, weight, layout)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.testing import assert_close

from ..forms import Form
from ..functional import compute_dtype
from ..layouts import Layout
from ..methods import Factors, Method
from .comparisons import brief, close

MethodLaw = Callable[[Method, Tensor, Layout], None]


def moved(method: Method, weight: Tensor, layout: Layout) -> Factors:
    """Factors away from their neutral start, the same at each call."""
    generator = torch.Generator().manual_seed(6)
    factors = method.init(weight, layout, generator=torch.Generator().manual_seed(7))
    return {
        name: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)
        for name, t in factors.items()
    }


def neutral(method: Method, weight: Tensor, layout: Layout) -> None:
    """``apply`` with fresh factors gives the weight back, to rounding."""
    close(method.apply(weight, method.init(weight, layout), layout), weight, "apply with fresh factors")


def keeps_form(method: Method, weight: Tensor, layout: Layout) -> None:
    """``apply`` keeps shape, dtype and finiteness, and writes into none of its arguments."""
    factors = moved(method, weight, layout)
    before = [t.clone() for t in (weight, *factors.values())]
    effective = method.apply(weight, factors, layout)
    assert effective.shape == weight.shape, f"apply made shape {tuple(effective.shape)} of {tuple(weight.shape)}"
    assert effective.dtype == weight.dtype, f"apply made {effective.dtype} of {weight.dtype}"
    assert bool(torch.isfinite(effective).all()), "apply made a non-finite weight of finite arguments"
    for now, then in zip((weight, *factors.values()), before, strict=True):
        assert_close(now, then, rtol=0, atol=0, msg="apply wrote into its arguments")


def deterministic(method: Method, weight: Tensor, layout: Layout) -> None:
    """The same generator gives the same factors, and ``apply`` the same weight, bit for bit."""
    first, second = (method.init(weight, layout, generator=torch.Generator().manual_seed(8)) for _ in range(2))
    for name in first:
        assert_close(first[name], second[name], rtol=0, atol=0, msg=f"{name}: another start from the same generator")
    factors = moved(method, weight, layout)
    once, twice = (method.apply(weight, factors, layout) for _ in range(2))
    assert_close(once, twice, rtol=0, atol=0, msg="apply is not deterministic")


def factors_are_trainable(method: Method, weight: Tensor, layout: Layout) -> None:
    """Fresh factors are leaf tensors on the weight's device, float32 or wider, and need only its shape."""
    factors = method.init(weight, layout)
    shapes = method.init(torch.empty_like(weight, device="meta"), layout)
    assert factors.keys() == shapes.keys(), "init names other factors for a weight on the meta device"
    for name, factor in factors.items():
        assert factor.device == weight.device, f"{name}: on {factor.device}, the weight on {weight.device}"
        assert factor.grad_fn is None, f"{name}: not a leaf"
        assert factor.dtype == compute_dtype(weight.dtype), f"{name}: {factor.dtype} for a weight in {weight.dtype}"
        assert factor.shape == shapes[name].shape, f"{name}: its shape depends on the weight's values"


def every_factor_acts(method: Method, weight: Tensor, layout: Layout) -> None:
    """``apply`` uses each factor, of which there is at least one: a gradient reaches it."""
    factors = {name: t.requires_grad_() for name, t in moved(method, weight, layout).items()}
    assert factors, "init makes no factors, so nothing would train"
    effective = method.apply(weight, factors, layout)
    assert effective.requires_grad, f"apply gives no gradient to any of its factors: {', '.join(factors)}"
    found = torch.autograd.grad(effective.sum(), list(factors.values()), allow_unused=True)
    for name, grad in zip(factors, found, strict=True):
        assert grad is not None, f"{name}: apply gives it no gradient"


def right_gradients(method: Method, weight: Tensor, layout: Layout) -> None:
    """First derivatives agree with finite differences, unless the method says it replaces them."""
    weight = weight.double()
    factors = moved(method, weight, layout)
    # At a zero row a norm has no derivative.
    rows = layout.matrix(weight)
    if method.exact_gradient and bool((rows.norm(dim=-1) > 0).all() and (rows.norm(dim=-2) > 0).all()):
        names = ["weight", *factors]
        tensors = [t.requires_grad_() for t in (weight.clone(), *factors.values())]

        def function(W: Tensor, *values: Tensor) -> Tensor:
            return method.apply(W, dict(zip(names[1:], values, strict=True)), layout)

        for name, tensor in zip(names, tensors, strict=True):
            # One at a time, so that the failure names it.
            inputs = [t if t is tensor else t.detach() for t in tensors]
            right = torch.autograd.gradcheck(function, inputs, raise_exception=False)
            assert right, f"the gradient of {name} is not that of finite differences"


def factored_is_apply(method: Method, weight: Tensor, layout: Layout) -> None:
    """Where the method has a structured form, that has the values and the gradients of ``apply``."""
    if not layout.is_matrix(weight.shape):
        return
    weight = weight.double()
    names, tensors = zip(*{"weight": weight, **moved(method, weight, layout)}.items(), strict=True)
    own, dense = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    form = method.factored(Form(own[0], layout), dict(zip(names[1:], own[1:], strict=True)))
    if form is None:
        return
    effective = method.apply(dense[0], dict(zip(names[1:], dense[1:], strict=True)), layout)
    structured = form.tensor()
    assert structured.shape == effective.shape, f"shape {tuple(structured.shape)}, not {tuple(effective.shape)}"
    close(structured, effective, "the structured form's value")
    upstream = torch.randn(effective.shape, generator=torch.Generator().manual_seed(5), dtype=effective.dtype)
    found, expected = (
        torch.autograd.grad(result, inputs, upstream, allow_unused=True, materialize_grads=True)
        for result, inputs in ((structured, own), (effective, dense))
    )
    for name, got, want in zip(names, found, expected, strict=True):
        close(got, want, f"the structured form's gradient of {name}")


def finite_gradients(method: Method, weight: Tensor, layout: Layout) -> None:
    """No gradient is NaN or infinite, zero rows included."""
    weight = weight.detach().clone().requires_grad_()
    factors = {name: t.requires_grad_() for name, t in moved(method, weight.detach(), layout).items()}
    fresh = {name: t.requires_grad_() for name, t in method.init(weight.detach(), layout).items()}
    for values in (factors, fresh):
        method.apply(weight, values, layout).double().square().sum().backward()
        for name, tensor in {"weight": weight, **values}.items():
            ok = tensor.grad is None or bool(torch.isfinite(tensor.grad).all())
            assert ok, f"the gradient of {name} is not finite"


def layout_is_only_a_view(method: Method, weight: Tensor, layout: Layout) -> None:
    """Reading a weight through its layout equals reading the matrices themselves."""
    if not layout.is_matrix(weight.shape):
        return
    plain = Layout(out=len(layout.batch), batch=tuple(range(len(layout.batch))), lookup=layout.lookup)
    matrix = layout.matrix(weight)
    factors = moved(method, weight, layout)
    # A factor shaped as the weight itself, as Full's, is read through the layout too; odd sizes tell it.
    odd = torch.empty((2, 3, 5, 7)[: weight.dim()], device="meta")
    alike = {name for name, t in method.init(odd, layout).items() if t.shape == odd.shape}
    own = {name: layout.matrix(t) if name in alike else t for name, t in factors.items()}
    expected = layout.tensor(method.apply(matrix, own, plain), weight.shape)
    assert_close(method.apply(weight, factors, layout), expected, rtol=0, atol=0, msg=brief("through the layout"))


def batches_are_independent(method: Method, weight: Tensor, layout: Layout) -> None:
    """On a stack of matrices the method does to each what it does to one."""
    if len(layout.batch) != 1:
        return
    dim = layout.batch[0]
    factors = moved(method, weight, layout)
    effective = method.apply(weight, factors, layout)
    single = method.init(weight.select(dim, 0), layout.select(dim))
    for index in range(weight.shape[dim]):
        # A factor without the batch dim is shared by the whole stack.
        own = {n: t if t.shape == single[n].shape else t[index] for n, t in factors.items()}
        one = method.apply(weight.select(dim, index), own, layout.select(dim))
        close(effective.select(dim, index), one, f"matrix {index} of a stack")


def rounded_once(method: Method, weight: Tensor, layout: Layout) -> None:
    """In bfloat16 the result is the exact one, rounded."""
    low = weight.to(torch.bfloat16)
    factors = {name: t.float() for name, t in moved(method, weight.float(), layout).items()}
    exact = method.apply(low.double(), {name: t.double() for name, t in factors.items()}, layout)
    # Half a unit of bfloat16's 8 bits, and float32 arithmetic on the way to it.
    rounded = method.apply(low, factors, layout).double()
    assert_close(rounded, exact, rtol=2**-8, atol=1e-5, msg=brief("apply in bfloat16"))


def additive_as_declared(method: Method, weight: Tensor, layout: Layout) -> None:
    """Where a method says it is additive, apply(W) − W does not depend on W."""
    if method.additive:
        weight = weight.double()
        factors = moved(method, weight, layout)
        here = method.apply(weight, factors, layout) - weight
        there = method.apply(2 * weight + 1, factors, layout) - (2 * weight + 1)
        close(there, here, "the difference on another weight")


def config_round_trip(method: Method, weight: Tensor, layout: Layout) -> None:
    """A method is rebuilt from its config."""
    assert type(method)(**method.config()) == method, "type(method)(**method.config()) is another method"


METHOD_LAWS: tuple[MethodLaw, ...] = (
    neutral,
    keeps_form,
    deterministic,
    factors_are_trainable,
    every_factor_acts,
    right_gradients,
    factored_is_apply,
    finite_gradients,
    layout_is_only_a_view,
    batches_are_independent,
    rounded_once,
    additive_as_declared,
    config_round_trip,
)
