"""Compiled, exported, traced and transformed models agree with eager ones, and do not recompile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import loraparam as lp

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

METHODS = [lp.LoRA(r=2), lp.DoRA(r=2), lp.Magnitude()]


class Block(nn.Module):
    """A residual block, for compiling region by region."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(self.norm(x)))


def adapted(blocks: int, *methods: lp.Method) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(blocks)))
    for i, method in enumerate(methods):
        lp.attach(model, method, name=f"a{i}")
    with torch.no_grad():
        for factor in lp.parameters(model):
            factor.add_(0.1 * torch.randn_like(factor))
    return model


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *lp.parameters(model)])]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_whole_graph_forward_and_backward(method: lp.Method) -> None:
    """fullgraph=True, outputs and gradients as in eager mode."""
    torch._dynamo.reset()
    model = adapted(2, method)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for got, want in zip(gradients(model, compiled), gradients(model, model), strict=True):
        assert_close(got, want, rtol=1e-4, atol=1e-5)  # float32, another order of sums


def test_toggling_and_rescaling_recompile_nothing() -> None:
    """Which adapters act, and how much, are tensors to compiled code; disabling is too."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, x = adapted(2, lp.LoRA(r=2), lp.DoRA(r=1)), torch.randn(3, 6)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(x)
    for weights in ({"a0": 0.5, "a1": 1.0}, {"a1": 1.0}, {"a0": 2.0}, {}):
        lp.activate(model, weights)
        assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)  # float32, another order of sums
    with lp.disabled(model):
        compiled(x)
    assert counter.frame_count == 1


@pytest.mark.parametrize("method", METHODS[:2], ids=repr)
def test_identical_blocks_share_their_code(method: lp.Method) -> None:
    """Twelve blocks, each compiled by itself, are compiled three times at most."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, x = adapted(12, method), torch.randn(3, 6)
    expected = model(x)
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    y = model(x)
    y.sum().backward()
    assert_close(y, expected, rtol=1e-4, atol=1e-5)  # float32, another order of sums
    assert counter.frame_count <= 3


@pytest.mark.parametrize("train", [True, False])
def test_attention(train: bool) -> None:
    """An encoder layer compiles whole, in training and in evaluation."""
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(train)
    lp.attach(layer, lp.LoRA(r=2, init="gaussian"))
    x = torch.randn(2, 3, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)  # float32, another order of sums


def test_export_and_trace() -> None:
    """torch.export and jit.trace of an adapted model."""
    model, x = adapted(2, lp.DoRA(r=2)).eval(), torch.randn(3, 6)
    expected = model(x)
    exported = torch.export.export(model, (x,)).module()
    traced = torch.jit.trace(model, (x,), check_trace=False)
    for got in (exported(x), traced(x)):
        assert_close(got, expected, rtol=1e-4, atol=1e-5)  # float32, another order of sums


def test_a_batch_of_adapters_in_one_call() -> None:
    """vmap over stacked factors equals a loop; so do per-sample gradients."""
    layer = nn.Linear(4, 6)
    lp.attach(layer, lp.LoRA(r=2))
    A, B, x = torch.randn(5, 2, 4), torch.randn(5, 6, 2), torch.randn(5, 3, 4)
    prefix = "parametrizations.weight.0.default."

    def run(a: Tensor, b: Tensor, sample: Tensor) -> Any:
        return torch.func.functional_call(layer, {prefix + "lora_A": a, prefix + "lora_B": b}, (sample,))

    looped = torch.stack([run(*one) for one in zip(A, B, x, strict=True)])
    assert_close(torch.func.vmap(run)(A, B, x), looped, rtol=1e-4, atol=1e-5)  # float32, another order of sums
    grads = torch.func.vmap(torch.func.grad(lambda a, b, s: run(a, b, s).square().sum()))(A, B, x)
    for got, a, b, sample in zip(grads, A, B, x, strict=True):
        a = a.clone().requires_grad_()
        (want,) = torch.autograd.grad(run(a, b, sample).square().sum(), a)
        assert_close(got, want, rtol=1e-4, atol=1e-4)  # float32, another order of sums


def test_autocast_keeps_the_layers_dtype() -> None:
    """Under autocast an adapted layer has the dtype of a plain one; factors keep their gradients in float32."""
    layer, plain = nn.Linear(4, 6), nn.Linear(4, 6)
    lp.attach(layer, lp.LoRA(r=2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(3, 4))
        assert y.dtype == plain(torch.randn(3, 4)).dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(factor.grad.dtype == torch.float32 for factor in lp.parameters(layer))


KINDS = {"linear": nn.Linear(40, 3), "conv": nn.Conv1d(40, 3, 1), "transposed": nn.ConvTranspose1d(40, 3, 1)}


@pytest.mark.parametrize("layer", KINDS.values(), ids=KINDS)
def test_input_dropout(layer: nn.Module) -> None:
    """dropout_on="input" drops elements of what the low-rank path sees, in training only, and keeps the mean."""
    layer = copy.deepcopy(layer)
    lp.attach(layer, lp.LoRA(r=2, dropout=0.5, dropout_on="input"), "weight")
    with torch.no_grad():
        for factor in lp.parameters(layer):
            factor.normal_()
    x = torch.ones(20_000, 40) if isinstance(layer, nn.Linear) else torch.ones(20_000, 40, 1)
    with torch.no_grad():
        dropped = layer(x)
        expected = layer.eval()(x)
    assert dropped.unique(dim=0).shape[0] > 1000
    # 20,000 samples of a spread of about 20: standard error 0.15, and five of them.
    assert_close(dropped.mean(0), expected.mean(0), rtol=0, atol=0.75)


@pytest.mark.parametrize("layer", KINDS.values(), ids=KINDS)
def test_each_adapter_drops_inputs_of_its_own(layer: nn.Module) -> None:
    """Two that undo each other do so only where nothing is dropped, or in the mean."""
    layer = copy.deepcopy(layer)
    method, x = lp.LoRA(r=2, dropout=0.5, dropout_on="input", init="gaussian"), torch.ones(5000, 40)
    x = x if isinstance(layer, nn.Linear) else x.unsqueeze(-1)
    plain = layer(x).detach()
    for name, sign in (("one", 1), ("other", -1)):
        lp.attach(layer, method, "weight", name=name, generator=torch.Generator().manual_seed(0))
        nn.init.constant_(lp.state_dict(layer, name)["weight.lora_B"], sign)
    assert_close(layer.eval()(x), plain)
    dropped = layer.train()(x).detach() - plain
    assert dropped.unique(dim=0).shape[0] > 1000
    # Each row is a sum of 160 numbers ±2·A, A of std 0.5: a spread of 13 at most, of the mean 0.2; five of them.
    assert_close(dropped.mean(0), torch.zeros_like(dropped[0]), rtol=0, atol=1.0)


def test_input_dropout_under_dora_keeps_the_norm_whole() -> None:
    """The norm is that of the undropped weight."""
    layer = nn.Linear(6, 4)
    lp.attach(layer, lp.DoRA(r=2, dropout=0.5, dropout_on="input"))
    x = torch.randn(5, 6)
    assert_close(layer(x), layer.eval()(x))  # B = 0: nothing to drop yet


def test_quantized_base_runs_in_its_own_kernel() -> None:
    """A torchao int8 weight: its product beside the factors', gradients exact."""
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    lp.attach(model, {"0": lp.LoRA(r=2, init="gaussian"), "1": lp.DoRA(r=2)})
    with torch.no_grad():
        for factor in lp.parameters(model):
            factor.add_(0.1 * torch.randn_like(factor))
    x = torch.randn(5, 64)
    results = {}
    for kind in ("factored", "merged"):
        with lp.execution(kind):
            y = model(x)
            results[kind] = [y.detach(), *torch.autograd.grad(y.square().sum(), list(lp.parameters(model)))]
    for got, want in zip(results["factored"], results["merged"], strict=True):
        assert_close(got, want, rtol=1e-3, atol=1e-3)  # the kernel sums in another order
