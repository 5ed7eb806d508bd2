"""Hazards of plain ``parametrize`` in particular layers, in gradients and in precision; see test_hazards.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hazards import EXACT, adapted, factors_of, x
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import loraparam as lp

# --- refused by name (S22, S27) ----------------------------------------------------------------------------


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(4, 4)


def integer() -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return model


def offloaded() -> nn.Module:
    """As accelerate's cpu_offload leaves a layer at rest."""
    model = nn.Linear(4, 4, device="meta")
    model._hf_hook = object()
    return model


class NeedsTag(nn.Linear):
    def __init_subclass__(cls, *, tag: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)


REFUSED = {
    "sparse gradients": (lambda: nn.Embedding(4, 4, sparse=True), "sparse=True"),
    "inference mode": (in_inference_mode, "inference mode"),
    "lazy": (lambda: nn.LazyLinear(4), "not initialised yet"),
    "meta": (offloaded, "meta device"),
    "integers": (integer, r"torch\.int8"),
    "old weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), r"parametrizations\.weight_norm"),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), r"parametrizations\.spectral_norm"),
    "prune": (lambda: nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), r"prune\.remove"),
    "a class that takes no subclass": (lambda: NeedsTag(4, 4), "NeedsTag cannot be subclassed"),
    "a script module": (lambda: torch.jit.script(nn.Linear(4, 4)), "script module"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_would_fail_late_or_silently_is_refused_by_name(make, reason: str) -> None:
    """Some fail in the backward, some with an obscure error and the weight gone, some compute garbage."""
    model = nn.Sequential(nn.Linear(4, 4), make())
    before = [(type(m), [id(p) for p in m.parameters()]) for m in model.modules()]
    flags, keys = [p.requires_grad for p in model.parameters()], [name for name, _ in model.named_parameters()]
    for target in (["0.weight", "1.weight"], [lambda path, module, name: "weight" in name]):
        with pytest.raises(lp.AttachError, match=rf"1\.weight.*{reason}"):
            lp.attach(model, lp.LoRA(r=2), target)
    assert [(type(m), [id(p) for p in m.parameters()]) for m in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [name for name, _ in model.named_parameters()] == keys


def test_a_script_module_elsewhere_in_the_model_is_left_alone() -> None:
    """Its containers of parameters and modules lack half of what a dict has: walking over it fails obscurely."""
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    base = model(x())
    flags = [p.requires_grad for p in model.parameters()]
    adapted(model, targets="0.weight")
    output = model(x())
    with lp.merged(model):
        assert_close(model(x()), output)
    lp.detach(model)
    assert_close(model(x()), base, **EXACT)
    assert [p.requires_grad for p in model.parameters()] == flags


# --- embeddings (S21) --------------------------------------------------------------------------------------


def test_padding_tokens_send_no_gradient_to_any_factor() -> None:
    """Looked up in factored form, the padding row still trains the factor it is multiplied with."""
    model = adapted(nn.Embedding(6, 4, padding_idx=0))
    model(torch.tensor([0, 0])).sum().backward()
    assert_close([f.grad for f in lp.parameters(model)], [torch.zeros_like(f) for f in lp.parameters(model)], **EXACT)
    model(torch.tensor([0, 3])).sum().backward()
    assert all(factor.grad.abs().max() > 0 for factor in lp.parameters(model))


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_does_not_write_into_the_base(layer) -> None:
    """max_norm renormalises the tensor it is given: a temporary with adapters on, the base with adapters off."""
    model, ids = layer(6, 4, max_norm=0.5), torch.tensor([[1, 2], [3, 3]])
    plain = copy.deepcopy(model)
    bits = model.weight.detach().clone()
    adapted(model)
    base = model.parametrizations.weight.original
    model(ids)
    assert_close(base.detach(), bits, **EXACT)
    with lp.disabled(model):
        assert_close(model(ids), plain(ids))
        assert_close(base.detach(), bits, **EXACT)
    lp.activate(model, {})
    assert_close(model(ids), plain(ids))
    assert_close(base.detach(), bits, **EXACT)


# --- recurrent layers (S23) --------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_follow_their_factors_step_by_step(layer) -> None:
    """They keep a list of their weights: a stale one computes with yesterday's factors, or an old graph."""
    model = adapted(layer(4, 4, num_layers=2, bidirectional=True), targets=layer)
    inputs, optimizer = x().unsqueeze(1), torch.optim.SGD(lp.parameters(model), lr=0.1)
    outputs = []
    for _ in range(3):
        output = model(inputs)[0]
        with lp.merged(model):
            assert_close(model(inputs)[0], output)
        outputs.append(output.detach())
        optimizer.zero_grad()
        output.pow(2).sum().backward()
        assert all(factor.grad.abs().max() > 0 for factor in lp.parameters(model))
        optimizer.step()
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_a_recurrent_layer_is_whole_again_after_conversion_and_detach() -> None:
    """After .to() the list holds effective weights with a graph, and keeps them when the adapter is gone."""
    model = nn.LSTM(4, 4)
    plain, inputs = copy.deepcopy(model).double(), x().unsqueeze(1).double()
    adapted(model, targets=nn.LSTM)
    model.double()
    copy.deepcopy(model)
    lp.detach(model)
    assert all(
        weight is getattr(model, name)
        for weight, name in zip(model._flat_weights, model._flat_weights_names, strict=True)
    )
    assert_close(model(inputs)[0], plain(inputs)[0], **EXACT)


# --- where parameters live ---------------------------------------------------------------------------------


def test_a_module_used_twice_is_adapted_once() -> None:
    """Walking every path and registering at each stacks two adapters on one weight."""
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer)
    (row,) = lp.attach(model, lp.LoRA(r=2))
    assert (row.path, row.shared_with) == ("0.weight", ("1.weight",))
    assert len(list(lp.parameters(model))) == 2
    lp.detach(model)
    assert type(layer) is nn.Linear


class WithSlots(nn.Linear):
    __slots__ = ("note",)


def test_lists_dicts_slots_and_compiled_modules_take_adapters() -> None:
    """Parameters live in more places than in layers as attributes."""
    model = nn.Module()
    model.list = nn.ParameterList([nn.Parameter(torch.randn(4, 4))])
    model.dict = nn.ParameterDict({"a": nn.Parameter(torch.randn(4, 4))})
    model.slots = WithSlots(4, 4)
    model.slots.note = "kept"
    model.compiled = torch.compile(nn.Linear(4, 4), backend="eager")
    lp.attach(model, lp.LoRA(r=2), ["list.0", "dict.a", "slots", "compiled"])
    with torch.no_grad():
        for factor in lp.parameters(model):
            factor.fill_(1)
    assert_close(model.list[0] - model.list.parametrizations["0"].original, torch.full((4, 4), 2.0))
    assert_close(model.dict["a"] - model.dict.parametrizations["a"].original, torch.full((4, 4), 2.0))
    assert copy.deepcopy(model).slots.note == "kept"
    output = model.compiled(x())
    lp.detach(model)
    assert (output - model.compiled(x())).abs().max() > 0.1
    assert list(model.state_dict())[:2] == ["list.0", "dict.a"]
    assert model.slots.note == "kept"


def test_an_optimizer_made_before_attaching_still_trains_what_is_left_trainable() -> None:
    """The base must stay the same Parameter object, or the optimizer trains a tensor that nobody reads."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lp.attach(model, lp.LoRA(r=2), freeze=False)
    base, bias = model.parametrizations.weight.original.detach().clone(), model.bias.detach().clone()
    model(x()).pow(2).sum().backward()
    optimizer.step()
    lp.detach(model)
    assert not torch.equal(model.weight, base)
    assert not torch.equal(model.bias, bias)


# --- precision and zero rows (S15, S17, S24) ---------------------------------------------------------------


def test_dora_of_a_zero_row_is_zero_with_finite_gradients() -> None:
    """0/0 at padding rows and zero-initialised layers: NaN in the output and in every gradient."""
    model = nn.Linear(4, 4)
    nn.init.zeros_(model.weight)
    lp.attach(model, lp.DoRA(r=2))
    inputs = x().requires_grad_()
    assert_close(model(inputs), model.bias.detach().expand(2, 4))
    model(inputs).pow(2).sum().backward()
    assert all(factor.grad.isfinite().all() for factor in lp.parameters(model))
    assert inputs.grad.isfinite().all()


@pytest.mark.parametrize("method", [lp.LoRA(r=2), lp.DoRA(r=2)], ids=["LoRA", "DoRA"])
def test_autocast_does_not_touch_the_effective_weight(method: lp.Method) -> None:
    """B·A inside autocast is computed in bfloat16 even for float32 factors: an error of 0.4 % of the delta."""
    model = adapted(method=method)
    expected = model.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(model.weight, expected, **EXACT)
        attached = adapted(method=method)
        assert {factor.dtype for factor in lp.parameters(attached)} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    """Without the cast the parametrization raises, or the layer's dtype changes; rounding B·A loses more still."""
    model = adapted(nn.Linear(64, 64, dtype=dtype))
    factors = factors_of(model)
    assert {factor.dtype for factor in factors.values()} == {torch.float32}
    assert model.weight.dtype == dtype
    W = model.parametrizations.weight.original.detach()
    expected = (W.double() + factors["weight.lora_B"].double() @ factors["weight.lora_A"].double()).to(dtype)
    # Computed in float32 first, a sum just between two numbers of the narrow dtype may round to the other one.
    changed = (model.weight != expected).float().mean()
    assert changed < 0.01
    assert_close(model.weight.detach(), expected)


# --- gradients (S18) ---------------------------------------------------------------------------------------


class LinearFunction(torch.autograd.Function):
    """As fused kernels are written: the weight goes straight into a custom Function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


@torch.jit.script
def scripted(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.t()


def below_torch_function(x: Tensor, w: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return x @ w.t()


ROUTES = {
    "autograd.Function": LinearFunction.apply,
    "reentrant checkpoint": lambda x, w: checkpoint(F.linear, x, w, use_reentrant=True),
    "checkpoint": lambda x, w: checkpoint(F.linear, x, w, use_reentrant=False),
    "torch.jit.script": scripted,
    "DisableTorchFunctionSubclass": below_torch_function,
    "torch.ops.aten": lambda x, w: torch.ops.aten.mm(x, torch.ops.aten.t(w)),
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "cat": lambda x, w: x @ torch.cat([w[:2], w[2:]]).T,
    "foreach": lambda x, w: x @ torch._foreach_mul([w], 1.0)[0].t(),
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("method", [lp.LoRA(r=2), lp.DoRA(r=2)], ids=["LoRA", "DoRA"])
def test_no_route_through_the_weight_loses_a_gradient(route, method) -> None:
    """A lazily merged weight that bypasses __torch_function__ loses its factors' gradients without an error."""
    model = adapted(method=method)
    inputs = [x().requires_grad_(), x().requires_grad_()]
    expected = torch.autograd.grad(F.linear(inputs[0], model.weight).pow(2).sum(), [inputs[0], *lp.parameters(model)])
    route(inputs[1], model.weight).pow(2).sum().backward()
    got = [inputs[1].grad, *(factor.grad for factor in lp.parameters(model))]
    assert_close(got, list(expected))
