"""torch's own linear layer reads no tensor, which takes longest to make; whoever could tell the difference does."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import loraparam as lp
from loraparam import effective
from loraparam.effective import EffectiveWeight
from loraparam.operations import products
from loraparam.testing.subjects import shake


def adapted(layer: nn.Module | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = layer or nn.Linear(4, 6)
    lp.attach(layer, lp.LoRA(r=2, init="gaussian"), "weight", **options)
    with torch.no_grad():
        for factor in lp.parameters(layer):
            factor.add_(torch.randn_like(factor))
    return layer


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each effective weight that is made a tensor."""
    made: list[int] = []
    new = EffectiveWeight.__new__
    monkeypatch.setattr(EffectiveWeight, "__new__", lambda *args: made.append(1) or new(*args))
    return made


def right(layer: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
    """Output and gradients are those of the merged weight, which a plain layer computes."""
    x = torch.randn(2, 3, 4, requires_grad=True)
    inputs = [x, *lp.parameters(layer)]
    y = run(x)
    found = [y, *torch.autograd.grad(y.sin().sum(), inputs)]
    with lp.execution("merged"):
        y = F.linear(x, layer.weight, layer.bias)
        expected = [y, *torch.autograd.grad(y.sin().sum(), inputs)]
    assert_close(found, expected)


class Inherits(nn.Linear):
    """A layer whose forward is torch's own."""


class Calls(nn.Linear):
    """A layer whose forward calls torch's own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Reads(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        assert isinstance(self.weight, Tensor)
        return F.linear(input, self.weight, self.bias)


@pytest.mark.parametrize("kind", [nn.Linear, Inherits, Calls])
def test_the_layer_of_torch_reads_no_tensor(kind: type[nn.Linear], made: list[int]) -> None:
    layer = adapted(kind(4, 6))
    right(layer, layer)
    assert not made


def test_a_forward_of_its_own_reads_a_tensor() -> None:
    layer = adapted(Reads(4, 6))
    right(layer, layer)


def test_everybody_else_reads_a_tensor() -> None:
    layer = adapted()
    assert type(layer.weight) is EffectiveWeight
    assert type(operator.attrgetter("weight")(layer)) is EffectiveWeight
    assert [type(weight) for weight in map(operator.attrgetter("weight"), [layer])] == [EffectiveWeight]


@pytest.mark.parametrize("worth", [True, False])
def test_an_adapted_bias_is_a_tensor(worth: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hand-written backward takes nothing else."""
    monkeypatch.setattr(products, "_worth_fusing", lambda x, form: worth)
    layer = adapted()
    lp.attach(layer, lp.Full(), "bias", name="bias")
    right(layer, layer)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("kind", [functools.partial(lp.DoRA, r=2), lp.Magnitude, lp.IA3])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_rows_of_a_slice_are_scaled_alone(kind: Callable[..., lp.Method], axis: str, weight: float) -> None:
    """The columns of a slice, too, are not those of the whole."""
    layer = nn.Linear(4, 6)
    lp.attach(layer, kind(axis=axis), ["weight[1/3]", "weight[3/3]"])
    shake(layer)
    lp.activate(layer, {"default": weight})
    right(layer, layer)


class Mode(TorchFunctionMode):
    """Asks about every tensor that passes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            assert all(isinstance(arg, Tensor) for arg in args)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_a_tensor() -> None:
    layer = adapted()
    with Mode():
        right(layer, layer)


def test_checkpointing_repeats_it_as_another_kind() -> None:
    """As under FSDP, which swaps parameters in between: what is saved does not depend on the kind of read."""
    layer = adapted()

    def run(x: Tensor) -> Tensor:
        with Mode():
            y: Tensor = checkpoint(lambda x: layer(x).sin(), x, use_reentrant=False)
        return y

    x = torch.randn(2, 4, requires_grad=True)
    inputs = [x, *lp.parameters(layer)]
    found = torch.autograd.grad(run(x).square().sum(), inputs)
    assert_close(found, torch.autograd.grad(layer(x).sin().square().sum(), inputs))


def test_where_torch_functions_are_off(made: list[int]) -> None:
    layer = adapted()

    def run(x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return layer(x)

    right(layer, run)
    assert made


class Written(torch.autograd.Function):
    """A linear layer as it is written by hand, in the place of torch's."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        return input @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).t() @ input.flatten(0, -2)


def test_a_replaced_function_gets_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed replaces it."""
    layer, linear, seen = adapted(), F.linear, []

    def replaced(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(type(weight))
        if type(weight) is not EffectiveWeight:
            return linear(input, weight, bias)
        y: Tensor = Written.apply(input, weight) + bias
        return y

    def run(x: Tensor) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(F, "linear", replaced)
            y: Tensor = layer(x)
        return y

    right(layer, run)
    assert seen[0] is EffectiveWeight


@pytest.mark.parametrize("which", ["base", "factor"])
def test_a_write_before_the_backward_is_found(which: str) -> None:
    """Where code bypasses torch functions, the gradient is that of the whole weight, as it was in the forward."""
    layer = adapted()
    y = Written.apply(torch.ones(2, 4), layer.weight)
    base = layer.parametrizations.weight.original
    with torch.no_grad():
        (base if which == "base" else next(lp.parameters(layer))).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation between its forward and its backward"):
        y.sum().backward()


def test_a_replaced_forward_gets_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        assert type(self.weight) is EffectiveWeight
        return F.linear(input, self.weight, self.bias)

    layer = adapted()
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", forward)
        y = layer(torch.ones(1, 4))
    assert_close(y, layer(torch.ones(1, 4)))


class Meters(torch.Tensor):
    """An input with a say in what functions do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not all(issubclass(cls, kind) or issubclass(kind, Tensor) for kind in types):
            return NotImplemented
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("which", ["the list", "the adapters"])
def test_a_hook_on_what_computes_the_weight_is_called(register: str, which: str) -> None:
    layer, calls = adapted(), []
    parametrizations = layer.parametrizations.weight
    hooked = parametrizations if which == "the list" else parametrizations[0]
    getattr(hooked, register)(lambda *args: calls.append(args))
    right(layer, layer)
    assert len(calls) == 2  # a read each of the layer and of the plain one beside it


def test_another_tensor_with_a_say() -> None:
    layer = adapted()
    y = layer(torch.ones(2, 4).as_subclass(Meters))
    assert_close(torch.Tensor(y), layer(torch.ones(2, 4)))


def test_what_does_not_run_on_the_parts_gets_the_tensor() -> None:
    layer = adapted(layout=lp.Layout(rows=12))
    right(layer, layer)


def test_it_can_be_traced_symbolically() -> None:
    """Where the layer itself is the root; inside of a model it is a leaf."""
    layer = adapted()
    traced = fx.symbolic_trace(layer)
    assert_close(traced(torch.ones(2, 4)), layer(torch.ones(2, 4)))


def test_a_check_is_told_of_it() -> None:
    layer = adapted()
    assert [(row.reads, row.factored, row.merged) for row in lp.check(layer, torch.ones(2, 4))] == [(1, 1, 0)]


@pytest.mark.parametrize("bias", [True, False])
def test_an_output_is_a_view_where_the_plain_layer_s_is(bias: bool) -> None:
    plain, layer = nn.Linear(4, 6, bias=bias), adapted(nn.Linear(4, 6, bias=bias))
    for shape in ((3, 4), (2, 3, 4)):
        assert layer(torch.randn(shape))._is_view() == plain(torch.randn(shape))._is_view()


def test_a_drop_in_layer_still_writes_through() -> None:
    layer = adapted()
    operand = effective.Operand(layer.weight._source, layer.bias)
    operand._base = base = layer.parametrizations.weight.original
    assert operand.tensor()._base is base
