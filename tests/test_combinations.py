"""Two things that each work alone, together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plans import randomize, unchanged
from test_state import EXACT, tied
from torch import Tensor, nn

import loraparam as lp

# --- a part of a model, and the whole of it ---------------------------------------------------------------------


@pytest.mark.parametrize("target", ["0", "1"])
def test_a_weight_that_carries_adapters_at_one_of_its_places_takes_no_more(target: str) -> None:
    model = nn.Sequential(*tied(), nn.Linear(5, 5))
    lp.attach(model[1], lp.LoRA(r=2))
    match = r"'0\.weight', '1\.weight' are one parameter, and the adapters on '1\.weight' .*lp\.detach or lp\.merge"
    with unchanged(model), pytest.raises(lp.AttachError, match=match):
        lp.attach(model, lp.LoRA(r=2), [target, "2"], name="second")
    lp.detach(model[1])
    with unchanged(model):
        lp.attach(model, lp.LoRA(r=2), target)
        lp.detach(model)


def test_a_weight_that_is_tied_to_an_adapted_one_later_takes_no_more() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    lp.attach(model, lp.LoRA(r=2), "1")
    model[0].weight = model[1].parametrizations.weight.original
    with unchanged(model), pytest.raises(lp.AttachError, match=r"'1\.weight' came on before it was tied"):
        lp.attach(model, lp.LoRA(r=2), "0", name="second")


# --- inference mode ---------------------------------------------------------------------------------------------


def test_what_came_on_in_inference_mode_trains_and_is_switched(tmp_path: Path) -> None:
    model, x = nn.Linear(4, 4), torch.ones(1, 4)
    saved = nn.Linear(4, 4)
    saved.load_state_dict(model.state_dict())
    lp.attach(saved, lp.DoRA(r=1))
    randomize(saved)
    lp.save(saved, tmp_path / "saved.safetensors")
    with torch.inference_mode():
        lp.attach(model, lp.DoRA(r=1), name="fresh")
        lp.load(model, tmp_path / "saved.safetensors", name="loaded")
        torch.testing.assert_close(model(x), saved(x))
    lp.activate(model, {"loaded": 0.5, "fresh": 1.0})
    model(x).sum().backward()
    assert all(factor.grad is not None for factor in lp.parameters(model))


def test_what_was_merged_in_inference_mode_is_adapted_and_trained_again() -> None:
    model, x = nn.Linear(4, 4), torch.ones(1, 4, requires_grad=True)
    lp.attach(model, lp.LoRA(r=1))
    with torch.inference_mode():
        lp.merge(model)
    lp.attach(model, lp.LoRA(r=1))
    model(x).sum().backward()
    assert x.grad is not None


def test_check_runs_backward_in_inference_mode_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    lp.attach(model, {"0": lp.DoRA(r=1), "1": lp.LoRA(r=1)})
    x = torch.ones(2, 4)
    with unchanged(model), torch.inference_mode():
        report = lp.check(model, x)
    assert {row.gradient for row in report} <= {"arrived", "zero"}


# --- names and slices -------------------------------------------------------------------------------------------


def test_a_module_whose_name_has_brackets(tmp_path: Path) -> None:
    model, x = nn.ModuleDict({"a[0]": nn.Linear(4, 4), "b": nn.Linear(4, 4)}), torch.ones(1, 4)
    lp.attach(model, lp.LoRA(r=1), ["a[0].weight[1/2]", "b"])
    randomize(model)
    lp.save(model, tmp_path / "saved.safetensors")
    before = model["a[0]"](x)
    lp.detach(model)
    assert [row.path for row in lp.load(model, tmp_path / "saved.safetensors")] == ["a[0].weight[1/2]", "b.weight"]
    torch.testing.assert_close(model["a[0]"](x), before, **EXACT)
    assert lp.effective_weight(model, "a[0].weight").shape == (4, 4)


def test_a_number_has_no_slices() -> None:
    model = nn.ParameterList([torch.tensor(1.0)])
    match = r"'0': slice \[0:1\]: shape \(\) has no output dim to cut; leave out the brackets"
    with unchanged(model), pytest.raises(lp.TargetError, match=match):
        lp.attach(model, lp.Full(), "0[0:1]")


# --- several adapters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [False, True])
def test_an_adapter_that_gets_more_targets_keeps_its_turn(ordered: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lp.attach(model, lp.LoRA(r=1), "0", name="first")
    lp.attach(model, lp.DoRA(r=1), "1", name="second")
    if ordered:  # no target has both: the order stands on no stack
        lp.activate(model, {"second": 1.0, "first": 1.0})
    lp.attach(model, lp.LoRA(r=1), "1", name="first")
    lp.attach(model, lp.DoRA(r=1), "0", name="second")
    lp.attach(model, lp.IA3(), name="third")
    randomize(model)
    before = {path: lp.effective_weight(model, path) for path in ("0.weight", "1.weight")}
    names = ("second", "first", "third") if ordered else ("first", "second", "third")
    lp.activate(model, dict.fromkeys(names, 1.0))
    for path, weight in before.items():
        torch.testing.assert_close(lp.effective_weight(model, path), weight, **EXACT)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, path: lp.state_dict(model, None),
        lambda model, path: lp.load_state_dict(model, {}, None, strict=False),
        lambda model, path: lp.save(model, path, name=None),
    ],
)
def test_one_state_or_file_takes_one_adapter(call: Callable[[nn.Module, Path], Any], tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    lp.attach(model, lp.LoRA(r=1), name="style")
    lp.attach(model, lp.LoRA(r=1), name="task")
    with unchanged(model), pytest.raises(lp.AttachError, match="no adapter named None; attached: 'style', 'task'"):
        call(model, tmp_path / "never.safetensors")
    assert not list(tmp_path.iterdir())


# --- layouts that no module has -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [lp.Layout(), lp.Layout(out=2), lp.Layout(out=0, batch=(1,)), lp.Layout(rows=12)])
@pytest.mark.parametrize("method", [lp.LoRA(r=1), lp.Magnitude(), lp.IA3(axis="in")])
@pytest.mark.parametrize(
    "product",
    [
        lambda weight, x: torch.einsum("hoi,bi->bho", weight, x),
        lambda weight, x: torch.einsum("bi,hoi->bho", x, weight),
        lambda weight, x: torch.bmm(x.expand(3, -1, -1), weight.mT),
        lambda weight, x: weight @ x.T.expand(3, -1, -1),
        lambda weight, x: torch.baddbmm(torch.ones(()), x.expand(3, -1, -1), weight.mT),
        lambda weight, x: nn.functional.linear(x, weight[1]),
    ],
)
def test_products_of_a_stack_that_is_read_in_another_way(product: Any, method: lp.Method, layout: lp.Layout) -> None:
    model, x = nn.ParameterList([torch.randn(3, 4, 6)]), torch.randn(2, 6)
    lp.attach(model, method, "0", layout=layout)
    randomize(model)
    # The same products in another order.
    torch.testing.assert_close(product(model[0], x), product(lp.effective_weight(model, "0"), x), rtol=1e-5, atol=1e-5)


def test_a_matrix_that_is_read_as_a_stack_of_vectors() -> None:
    layer, tokens = nn.Embedding(6, 6), torch.tensor([1, 2])
    lp.attach(layer, lp.IA3(), "weight", layout=lp.Layout(out=1, batch=(0,)))
    randomize(layer)
    weight = lp.effective_weight(layer, "weight")
    torch.testing.assert_close(layer(tokens), weight[tokens])
    torch.testing.assert_close(nn.functional.linear(torch.eye(6), layer.weight), weight.T)


# --- autocast ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [lp.LoRA(r=1), lp.DoRA(r=1), lp.Magnitude(), lp.IA3(axis="in")])
@pytest.mark.parametrize(
    ("shape", "run"),
    [
        ((4, 4), lambda weight, x: nn.functional.linear(x, weight, torch.ones(4))),
        ((4, 4), lambda weight, x: nn.functional.linear(x, weight)),
        ((4, 4), lambda weight, x: x @ weight),
        ((4, 4), lambda weight, x: torch.addmm(torch.ones(4), x, weight)),
        ((4, 4), lambda weight, x: torch.einsum("oi,bi->bo", weight, x)),
        ((4, 4), lambda weight, x: torch.einsum("oi,oi->oi", weight, x)),
        ((2, 4, 4), lambda weight, x: torch.baddbmm(torch.ones(2, 4, 4), x.expand(2, -1, -1), weight)),
        ((4, 4, 1, 1), lambda weight, x: nn.functional.conv2d(x[..., None, None], weight, torch.ones(4))),
        ((4, 4, 1), lambda weight, x: nn.functional.conv_transpose1d(x[..., None], weight, torch.ones(4))),
    ],
)
def test_autocast_gives_the_dtype_of_the_plain_product(shape: tuple[int, ...], run: Any, method: lp.Method) -> None:
    model, x = nn.ParameterList([torch.randn(shape)]), torch.randn(4, 4)
    layout = lp.Layout(out=1) if len(shape) == 3 and shape[-1] == 1 else lp.Layout() if len(shape) == 4 else None
    lp.attach(model, method, "0", layout=layout)
    randomize(model)
    with torch.autocast("cpu", torch.bfloat16):
        # Products of four numbers around 1, in bfloat16.
        torch.testing.assert_close(run(model[0], x), run(lp.effective_weight(model, "0"), x), rtol=0.03, atol=0.1)


# --- what else is in the model ----------------------------------------------------------------------------------


class Graph(nn.Module):
    """A layer on a graph: its adjacency is a sparse buffer, one of its parameters is sparse."""

    def __init__(self, sparse: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.gain = nn.Parameter(sparse(torch.eye(3)))
        self.register_buffer("adjacency", sparse(torch.eye(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.adjacency @ self.linear(x)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("sparse", [Tensor.to_sparse, Tensor.to_sparse_csr])
def test_sparse_tensors_beside_the_targets(sparse: Callable[[Tensor], Tensor]) -> None:
    model, x = Graph(sparse), torch.ones(3, 4)
    before = model(x)
    lp.attach(model, lp.DoRA(r=1))
    lp.check(model, x)
    randomize(model)
    after, held = model(x), [*model.parameters(), *model.buffers()]
    with lp.merged(model):
        torch.testing.assert_close(model(x), after)
        model.double()
    torch.testing.assert_close(model(x), after, **EXACT)
    assert all(a is b for a, b in zip(held, [*model.parameters(), *model.buffers()], strict=True))
    assert model.gain.dtype == torch.float32
    torch.testing.assert_close(
        lp.base_state_dict(model)["linear.weight"], model.linear.parametrizations.weight.original
    )
    with pytest.raises(lp.AttachError, match=r"'gain': its layout is torch\.sparse_(coo|csr); allowed: a dense tensor"):
        lp.attach(model, lp.LoRA(r=1), "gain", name="second")
    lp.detach(model)
    torch.testing.assert_close(model(x), before, **EXACT)
    assert model.gain.requires_grad


def test_a_lazy_module_beside_the_targets() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3)), torch.ones(1, 4)
    lp.attach(model, lp.LoRA(r=1), "0")
    with lp.merged(model):
        assert isinstance(model[1], nn.LazyLinear)
    assert not model[1].weight.requires_grad
    model(x)
    lp.attach(model, lp.LoRA(r=1), "1", name="second")
    lp.detach(model)
    assert type(model[1]) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())
