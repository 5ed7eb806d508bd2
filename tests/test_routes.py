"""Every route by which a weight can be used gives the value and the gradients of the merged weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import loraparam as lp
from loraparam import fused
from loraparam.operations import products

METHODS = {
    "lora": lp.LoRA(r=2, alpha=3),
    "dora": lp.DoRA(r=2),
    "dora_in": lp.DoRA(r=2, axis="in", detach_norm=False),
    "magnitude": lp.Magnitude(),
    "ia3": lp.IA3(),
    "full": lp.Full(),
}


class Own(torch.autograd.Function):
    """A kernel that takes the weight, as Liger's and Apex's do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


@torch.jit.script
def scripted(x: Tensor, w: Tensor) -> Tensor:
    return torch.matmul(x, w.t()).relu()


def without_torch_function(x: Tensor, w: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return F.linear(x, w)


def without_torch_function_views(x: Tensor, w: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return x @ w.t() + x @ w[1:3].t().sum(-1, keepdim=True)


Route = Callable[[Tensor, Tensor], Tensor]

# name: (what is done with x (5, 4) and a weight (6, 4), whether it runs on the parts)
ROUTES: dict[str, tuple[Route, bool]] = {
    "linear": (lambda x, w: F.linear(x, w), True),
    "linear with bias": (lambda x, w: F.linear(x, w, torch.ones(6).to(x)), True),
    "linear on a vector": (lambda x, w: F.linear(x[0], w), True),
    "linear on 3 dims": (lambda x, w: F.linear(x.view(1, 5, 4), w), True),
    "matmul": (lambda x, w: torch.matmul(x, w.t()), True),
    "@ T": (lambda x, w: x @ w.T, True),
    "@ mT": (lambda x, w: x @ w.mT, True),
    "@ transpose": (lambda x, w: x @ w.transpose(-1, -2), True),
    "@ permute": (lambda x, w: x @ w.permute(1, 0), True),
    "weight @ x": (lambda x, w: w @ x.t(), True),
    "weight @ vector": (lambda x, w: w @ x[0], True),
    "mm": (lambda x, w: torch.mm(x, w.t()), True),
    "mv": (lambda x, w: torch.mv(w, x[0]), True),
    "addmm": (lambda x, w: torch.addmm(torch.ones(6).to(x), x, w.t()), True),
    "addmm scaled": (lambda x, w: torch.addmm(torch.ones(5, 6).to(x), x, w.t(), beta=0.5, alpha=2), True),
    "einsum": (lambda x, w: torch.einsum("ni,oi->no", x, w), True),
    "einsum over out": (lambda x, w: torch.einsum("no,oi->ni", x @ torch.ones(4, 6).to(x), w), True),
    "chunk": (lambda x, w: torch.cat([F.linear(x, part) for part in w.chunk(3)], -1), True),
    "split": (lambda x, w: torch.cat([F.linear(x, part) for part in w.split([2, 4])], -1), True),
    "rows": (lambda x, w: F.linear(x, w[1:4]), True),
    "narrow": (lambda x, w: F.linear(x, w.narrow(0, 2, 3)), True),
    "detach": (lambda x, w: F.linear(x, w.detach()) + F.linear(x, w), True),
    "to its own dtype": (lambda x, w: F.linear(x, w.to(x.dtype).contiguous()), True),
    "columns": (lambda x, w: F.linear(x[:, 1:3], w[:, 1:3]), False),
    "element": (lambda x, w: x * w[2, 1], False),
    "arithmetic": (lambda x, w: x @ (2 * w + 1).t(), False),
    "cat": (lambda x, w: F.linear(x, torch.cat([w, w])), False),
    "foreach": (lambda x, w: x @ torch._foreach_mul([w], 2.0)[0].t(), False),
    "conv1d": (lambda x, w: F.conv1d(x.view(5, 4, 1), w.unsqueeze(-1)), False),
    "bilinear": (lambda x, w: F.bilinear(x, x, w.view(6, 4, 1).expand(6, 4, 4)), False),
    "aten operator": (lambda x, w: torch.ops.aten.linear(x, w), False),
    "sdpa": (lambda x, w: F.scaled_dot_product_attention(x[None], w[None], w[None]), False),
    "data is a constant": (lambda x, w: F.linear(x, w.data) + F.linear(x, w), True),
    "own autograd.Function": (lambda x, w: Own.apply(x, w), True),
    "reentrant checkpoint": (lambda x, w: checkpoint(F.linear, x, w, use_reentrant=True), True),
    "checkpoint": (lambda x, w: checkpoint(F.linear, x, w, use_reentrant=False), True),
    "scripted": (lambda x, w: scripted(x, w), False),
    "torch function disabled": (without_torch_function, False),
    "views, torch function disabled": (without_torch_function_views, False),
}

# What runs on the parts and needs the merged weight, too: recomputation makes its argument a leaf of its own.
BOTH = {"reentrant checkpoint"}


class Use(nn.Module):
    """A weight of its own, used by one route."""

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        return self.route(x, self.weight)


def adapted(route: Route, method: lp.Method, train_base: bool) -> Use:
    torch.manual_seed(0)
    module = Use(route)
    lp.attach(module, method, "weight", freeze=not train_base)
    with torch.no_grad():
        for factor in lp.parameters(module):
            factor.add_(0.3 * torch.randn_like(factor))
    return module


def gradients(module: Use) -> list[Tensor]:
    """The output, and gradients of the input, the factors and the base."""
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = module(x)
    (y * torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))).sum().backward()
    trained = [p for p in module.parameters() if p.requires_grad]
    return [y.detach(), x.grad, *(p.grad for p in trained)]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("train_base", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("route", ROUTES)
def test_route(route: str, method: str, train_base: bool) -> None:
    """Values and gradients of input, factors and base equal those of merged execution."""
    function, _ = ROUTES[route]
    got = gradients(adapted(function, METHODS[method], train_base))
    with lp.execution("merged"):
        want = gradients(adapted(function, METHODS[method], train_base))
    for actual, expected in zip(got, want, strict=True):
        assert actual is not None
        assert_close(actual, expected, rtol=1e-9, atol=1e-10)  # float64, another order of sums


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("route", ROUTES)
def test_route_runs_where_it_should(route: str) -> None:
    """``check`` says which routes run on the parts."""
    function, factored = ROUTES[route]
    report = lp.check(adapted(function, METHODS["lora"], False), torch.randn(5, 4, dtype=torch.float64))
    row = report["weight"]
    assert (row.factored > 0, row.merged > 0) == (factored, route in BOTH or not factored)


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "zero_": lambda m: m.weight.zero_(),
    "copy_": lambda m: m.weight.copy_(torch.zeros(6, 4)),
    "init": lambda m: nn.init.normal_(m.weight),
    "init through a view": lambda m: nn.init.orthogonal_(m.weight),
    "setitem": lambda m: m.weight.__setitem__(0, 1.0),
    "+=": lambda m: m.weight.__iadd__(1),
    ".data =": lambda m: setattr(m.weight, "data", torch.zeros(6, 4)),
    "data_ptr": lambda m: m.weight.data_ptr(),
    "out=": lambda m: torch.add(torch.ones(6, 4), 1, out=m.weight),
    "requires_grad_": lambda m: m.weight.requires_grad_(False),
    "reset_parameters": lambda m: m.reset_parameters(),
    "aten": lambda m: torch.ops.aten.zero_(m.weight),
}


@pytest.mark.parametrize("write", WRITES)
def test_writes_are_refused(write: str) -> None:
    """What is written into a computed weight would vanish, so it raises with the way out."""
    layer = nn.Linear(4, 6)
    lp.attach(layer, lp.LoRA(r=2))
    before = lp.merged_state_dict(layer)["weight"]
    with torch.no_grad(), pytest.raises(lp.AttachError, match=r"lp\.detached"):
        WRITES[write](layer)
    assert_close(lp.merged_state_dict(layer)["weight"], before, rtol=0, atol=0)


def test_second_derivatives() -> None:
    """gradcheck and gradgradcheck hold through the factored linear, its fused backward and the fallback."""
    for large in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(3, 4).double()
        lp.attach(layer, lp.LoRA(r=1))
        x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

        def run(x: Tensor, A: Tensor, B: Tensor, large: bool = large, layer: nn.Module = layer) -> Tensor:
            if large:
                return fused.linear(x, layer.parametrizations.weight.original, layer.bias, None, A, B, 0.5)
            names = {"lora_A": A, "lora_B": B}
            state = {f"parametrizations.weight.0.default.{name}": t for name, t in names.items()}
            return torch.func.functional_call(layer, state, (x,))

        A, B = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 3), (4, 1)))
        assert torch.autograd.gradcheck(run, (x, A, B))
        assert torch.autograd.gradgradcheck(run, (x, A, B))


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("with_row", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_fused_linear_is_its_formula(scale: float, with_row: bool, with_bias: bool) -> None:
    """Value and all gradients, the weight's, the bias's and the row scales' included."""
    torch.manual_seed(0)
    shapes = [(2, 3, 4), (5, 4), (5,), (5,), (2, 4), (5, 2)]
    x, W, bias, row, A, B = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    tensors = [x, W, A, B] + [bias] * with_bias + [row] * with_row
    got = fused.linear(x, W, bias if with_bias else None, row if with_row else None, A, B, scale)
    want = (x @ W.t()) * (row if with_row else 1.0) + scale * (x @ A.t()) @ B.t() + (bias if with_bias else 0.0)
    assert_close(got, want)
    for actual, expected in zip(*(torch.autograd.grad(y.sin().sum(), tensors) for y in (got, want)), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_large_products_take_the_fused_path(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hand-written backward is used above its threshold, and agrees with merged execution."""
    calls = []
    linear = fused.linear
    monkeypatch.setattr(fused, "linear", lambda *args: calls.append(1) or linear(*args))
    layer = nn.Linear(512, 512)
    lp.attach(layer, METHODS[method])
    with torch.no_grad():
        for factor in lp.parameters(layer):
            factor.add_(0.1 * torch.randn_like(factor))
    x = torch.randn(256, 512, requires_grad=True)
    results = []
    for kind in ("factored", "merged"):
        with lp.execution(kind):
            results.append(torch.autograd.grad(layer(x).square().mean(), [x, *lp.parameters(layer)]))
    assert calls == [1]
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, rtol=1e-3, atol=1e-5)  # float32 sums of 512 terms
    layer(x[:255])  # its calls from Python cost more than it saves
    assert calls == [1]


@pytest.mark.parametrize("ratio", [1e-4, 1e-3, 1e-2])
def test_bfloat16_keeps_small_deltas(ratio: float) -> None:
    """A delta of 1e-3·|W| survives to 1 % in factored execution; a merged bfloat16 weight rounds most of it away."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 256, bias=False).to(torch.bfloat16)
    lp.attach(layer, lp.LoRA(r=4))
    stack = layer.parametrizations.weight[0].default
    with torch.no_grad():
        W, A = layer.parametrizations.weight.original.float(), stack.lora_A
        B = torch.randn(256, 4)
        stack.lora_B.copy_(B * ratio * W.norm() / (B @ A).norm())
        delta = stack.lora_B @ A
        x = torch.randn(4096, 256).to(torch.bfloat16)
        kept = {}
        for kind in ("factored", "merged"):
            with lp.execution(kind), lp.disabled(layer):
                base = layer(x).float()
            with lp.execution(kind):
                got = layer(x).float() - base
            # The share of the true difference that is found in the outputs.
            true = x.float() @ delta.t()
            kept[kind] = float((got * true).sum() / true.square().sum())
    assert kept["factored"] == pytest.approx(1.0, abs=0.01 if ratio >= 1e-3 else 0.1)


def test_no_graph_is_kept_and_no_cycle() -> None:
    """An effective weight dies with its last reference."""
    import gc
    import weakref

    layer = nn.Linear(4, 6)
    lp.attach(layer, lp.DoRA(r=2))
    gc.disable()
    try:
        weight = layer.weight
        gone = weakref.ref(weight)
        layer(torch.randn(2, 4)).sum().backward()
        del weight
        assert gone() is None
    finally:
        gc.enable()


def test_cached_norm_follows_the_base() -> None:
    """A DoRA's cached ‖W‖² is computed anew after each way of changing the base."""
    layer = nn.Linear(4, 6).double()
    lp.attach(layer, lp.DoRA(r=2))
    x = torch.randn(3, 4, dtype=torch.float64)
    base = layer.parametrizations.weight

    def another_on_the_same_storage() -> None:
        """Written as often as the one before it."""
        version = base.original._version
        base.original = nn.Parameter(base.original.data, requires_grad=False)
        while base.original._version < version:
            base.original.mul_(2)

    changes: list[Callable[[], Any]] = [
        lambda: layer.load_state_dict({"weight": torch.randn(6, 4), "bias": torch.randn(6)}),
        lambda: base.original.mul_(2),
        another_on_the_same_storage,
        lambda: setattr(base.original, "data", torch.randn(6, 4, dtype=torch.float64)),
        lambda: layer.load_state_dict(
            {"weight": torch.randn(6, 4).double(), "bias": torch.randn(6).double()}, assign=True
        ),
    ]
    for change in changes:
        with torch.no_grad():
            layer(x)
            change()
            with lp.execution("merged"):
                want = layer(x)
            assert_close(layer(x), want, rtol=1e-9, atol=1e-10)  # float64, another order of sums


# --- what is done with the output -------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("worth", [True, False])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_an_output_takes_what_is_done_in_place(shape: tuple[int, ...], worth: bool, bias: bool, monkeypatch) -> None:
    """As that of a plain layer does: it is no view, which a custom function may not return, and on which FSDP warns."""
    monkeypatch.setattr(products, "_worth_fusing", lambda x, form: worth)
    model, x = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.ReLU(inplace=True)), torch.randn(shape)
    lp.attach(model, lp.LoRA(r=2, init="gaussian"))
    # torch's own product with a bias returns one.
    assert not model[0](x)._is_view() or (bias and not worth)
    model(x).sum().backward()
    gradients = [factor.grad.clone() for factor in lp.parameters(model)]
    model.zero_grad()
    with lp.execution("merged"):
        model(x).sum().backward()
    assert_close(gradients, [factor.grad for factor in lp.parameters(model)])


class Products(TorchDispatchMode):
    """Notes the products of stacks of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.stacks.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "method", [lp.Magnitude(), lp.LoRA(r=2), lp.LoRA(r=2, dropout=0.5, dropout_on="input"), lp.DoRA(r=2)], ids=str
)
def test_attention_multiplies_all_tokens_at_once(method: lp.Method, autocast: bool) -> None:
    """A batch of one is strided inside of attention, where torch's product without a bias takes each token apart."""
    tokens = 7
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(1, tokens, 8)
    lp.attach(layer, method)
    with Products() as noted, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer(x, x, x, need_weights=False)
    assert tokens not in noted.stacks
