"""Convolutions on the parts of their kernel: the merged kernel's values and gradients, with little kept."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import loraparam as lp
from loraparam import fused_conv
from loraparam.operations import convolutions

IN, OUT = 3, 4
PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
METHODS = [
    lp.LoRA(r=2, alpha=3),
    lp.DoRA(r=2, detach_norm=False),
    lp.DoRA(r=1),
    lp.Magnitude(),
    lp.LoRA(r=1, dropout=0.5),
]


@st.composite
def layers(draw: Any) -> nn.Module:
    """A convolution with every option that torch's have."""
    dims, transposed = draw(st.sampled_from([1, 2, 3])), draw(st.booleans())
    stride, kernel, groups = (
        draw(st.sampled_from([1, 2])),
        draw(st.sampled_from([1, 2, 3])),
        draw(st.sampled_from([1, 1, 3])),
    )
    options = {
        "padding": draw(st.sampled_from([0, 1] if transposed or stride > 1 else [0, 1, "same"])),
        "dilation": draw(st.sampled_from([1, 2])),
        "bias": draw(st.booleans()),
        "groups": groups,
    }
    if transposed:
        options["output_padding"] = draw(st.integers(0, stride - 1))
    kind = (TRANSPOSED if transposed else PLAIN)[dims]
    layer = kind(3 * IN, 3 * OUT, kernel, stride=stride, **options).double()
    return layer.to(memory_format=torch.channels_last) if dims == 2 and draw(st.booleans()) else layer


def randomized(layer: nn.Module, methods: list[lp.Method], freeze: bool) -> nn.Module:
    torch.manual_seed(0)
    for i, method in enumerate(methods):
        lp.attach(layer, method, "weight", name=f"a{i}", freeze=freeze)
    with torch.no_grad():
        for factor in lp.parameters(layer):
            factor.add_(0.3 * torch.randn_like(factor))
    return layer


def sample(layer: nn.Module, batched: bool) -> Tensor:
    space = (7, 6, 5)[: layer.weight.dim() - 2]
    return torch.randn((2, 3 * IN, *space) if batched else (3 * IN, *space), dtype=torch.float64, requires_grad=True)


def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, the gradients of all that takes one, and those of the sum of their squares."""
    torch.manual_seed(1)  # the same dropout
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y = layer(x)
    first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, materialize_grads=True)
    return [y, *first, *second]


@given(
    layer=layers(),
    methods=st.lists(st.sampled_from(METHODS), min_size=1, max_size=2),
    freeze=st.booleans(),
    batched=st.booleans(),
    worth=st.booleans(),
)
def test_it_is_the_merged_kernel_s(
    layer: nn.Module, methods: list[lp.Method], freeze: bool, batched: bool, worth: bool
) -> None:
    randomized(layer, methods, freeze)
    x = sample(layer, batched)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolutions, "_worth_fusing", lambda x, form: worth)
        found = results(layer, x)
        with torch.no_grad():
            torch.manual_seed(1)
            found.append(layer(x))
    with lp.execution("merged"):
        expected = results(layer, x)
    for actual, wanted in zip(found, [*expected, expected[0]], strict=True):
        assert_close(actual, wanted, rtol=1e-6, atol=1e-8)  # second derivatives are sums of some thousand terms


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_row_scales_of_groups(kind: Any) -> None:
    layer = randomized(kind(6, 4, 3, groups=2).double(), [lp.DoRA(r=2)], True)
    assert [(row.factored, row.merged) for row in lp.check(layer, torch.randn(2, 6, 5, 5).double())] == [(1, 0)]
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    found = results(layer, x)
    with lp.execution("merged"):
        assert_close(found, results(layer, x))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_no_images_are_fine(kind: Any) -> None:
    layer = randomized(kind(IN, OUT, 3), [lp.LoRA(r=2)], True)
    assert layer(torch.empty(0, IN, 5, 5)).shape[:2] == (0, OUT)
    with torch.no_grad():
        assert layer(torch.empty(0, IN, 5, 5)).shape[:2] == (0, OUT)


@pytest.mark.parametrize("function", [F.conv2d, F.conv_transpose2d])
def test_options_as_functions_take_them(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number, or a tuple of one, for all dims of space."""
    monkeypatch.setattr(convolutions, "_worth_fusing", lambda x, form: True)
    transposed = function is F.conv_transpose2d
    layer = randomized((TRANSPOSED if transposed else PLAIN)[2](IN, OUT, 3).double(), [lp.LoRA(r=2)], True)
    x = torch.randn(2, IN, 6, 5, dtype=torch.float64)
    found = []
    for kind in ("factored", "merged"):
        with lp.execution(kind):
            y = function(x, layer.weight, None, 2, (1,))
            found.append([y, *torch.autograd.grad(y.sin().sum(), lp.parameters(layer))])
    assert_close(*found)


@pytest.mark.parametrize("with_row", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_its_backward(with_row: bool, transposed: bool) -> None:
    """gradcheck and gradgradcheck, of the kernel, the bias and the row scales as well."""
    torch.manual_seed(0)
    shapes = [(2, 2, 4, 3), (3, 2, 2, 2), (3,), (3,), (1, 2, 2, 2), (3, 1)]
    x, W, bias, row, A, B = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    options = fused_conv.Options((2, 1), (1, 0), (1, 2), (1, 0) if transposed else (0, 0), transposed)

    def run(*tensors: Tensor) -> Tensor:
        x, W, bias, A, B, *row = tensors
        return fused_conv.convolution(x, W, bias, row[0] if row else None, A, B, 0.5, options)

    tensors = (x, W, bias, A, B, row) if with_row else (x, W, bias, A, B)
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_large_ones_take_the_hand_written_backward(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = fused_conv.convolution
    monkeypatch.setattr(fused_conv, "convolution", lambda *args: calls.append(1) or run(*args))
    layer = randomized(kind(64, 64, 3, padding=1), [lp.LoRA(r=2)], True)
    layer(torch.randn(4, 64, 32, 32))
    assert calls == [1]
    layer(torch.randn(4, 64, 8, 8))
    with torch.no_grad():
        layer(torch.randn(4, 64, 32, 32))
    assert calls == [1]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("worth", [True, False])
def test_an_output_takes_what_is_done_in_place(worth: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a plain layer does: it is no view, which a custom function may not return."""
    monkeypatch.setattr(convolutions, "_worth_fusing", lambda x, form: worth)
    layer = randomized((TRANSPOSED if transposed else PLAIN)[2](IN, OUT, 2).double(), [lp.DoRA(r=1)], True)
    x = torch.randn(2, IN, 4, 4, dtype=torch.float64)
    assert not layer(x)._is_view()
    layer(x).relu_().sum().backward()
    gradients = [factor.grad.clone() for factor in lp.parameters(layer)]
    layer.zero_grad()
    with lp.execution("merged"):
        layer(x).relu_().sum().backward()
    assert_close(gradients, [factor.grad for factor in lp.parameters(layer)])


def test_little_is_kept_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The input and the thin product: no kernel but the layer's own, no second output."""
    monkeypatch.setattr(convolutions, "_worth_fusing", lambda x, form: True)
    layer, kept = randomized(nn.Conv2d(IN, OUT, 3, padding=1), [lp.LoRA(r=2)], True), []
    own = {parameter.data_ptr() for parameter in layer.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(2, IN, 5, 5, requires_grad=True))
    assert sorted(kept) == [(2, 2, 5, 5), (2, IN, 5, 5)]
