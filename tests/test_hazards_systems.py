"""Hazards of plain ``parametrize`` under compilers, torch.func and distributed training; see test_hazards.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed
from hazards import EXACT, adapted, factors_of, x
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import loraparam as lp

pytestmark = [
    # The compiler looks at .grad of every input, those that have none included.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning"),
]


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


# --- torch.compile, torch.fx, torch.export, torch.jit (S09, S10) --------------------------------------------


@pytest.fixture
def frames() -> Iterator[CompileCounter]:
    """A backend that runs eagerly and counts what was compiled."""
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


def test_twelve_equal_blocks_compile_as_often_as_without_adapters(frames: CompileCounter) -> None:
    """A class per module: each block is compiled anew, and past 8 compilation fails or silently stops."""
    counts = []
    for attach in (lambda model: None, lambda model: adapted(model, targets="linear")):
        torch._dynamo.reset()
        frames.clear()
        model = nn.Sequential(*[Block() for _ in range(12)])
        attach(model)
        expected = model(x())
        for block in model:
            block.compile(backend=frames, fullgraph=True)
        assert_close(model(x()), expected)
        counts.append(frames.frame_count)
    assert counts[1] == counts[0]


METHODS = {
    "LoRA": (lp.LoRA(r=2), "all-linear"),
    "DoRA": (lp.DoRA(r=2), "all-linear"),
    "Magnitude": (lp.Magnitude(), "all-linear"),
    "Full": (lp.Full(), "bias"),
    "slices": (lp.LoRA(r=1), "0.weight[1/2,2/2]"),
}


@pytest.mark.parametrize(("method", "targets"), METHODS.values(), ids=METHODS)
def test_compiled_in_one_graph_with_the_same_gradients(method, targets, frames: CompileCounter) -> None:
    """A property that evaluates a module is where a compiler is likely to break the graph."""
    model = adapted(two_layers(), method, targets)
    model(x()).pow(2).sum().backward()
    expected = model(x()), [factor.grad for factor in lp.parameters(model)]
    model.zero_grad()
    compiled = torch.compile(model, backend=frames, fullgraph=True)
    output = compiled(x())
    output.pow(2).sum().backward()
    assert_close((output, [factor.grad for factor in lp.parameters(model)]), expected)
    assert frames.frame_count == 1


def test_switching_and_weighing_adapters_recompiles_nothing(frames: CompileCounter) -> None:
    """A Python float or bool that the graph reads costs a recompilation at each new value."""
    model = adapted(two_layers(), targets="all-linear")
    compiled = torch.compile(model, backend=frames, fullgraph=True)
    for weights in ({"default": 1.0}, {"default": 0.5}, {"default": -2.0}, {}):
        lp.activate(model, weights)
        assert_close(compiled(x()), model(x()))
    lp.activate(model, {"default": 1.0})
    with lp.disabled(model):
        assert_close(compiled(x()), model(x()))
    assert_close(compiled(x()), model(x()))
    assert frames.frame_count == 1


def test_a_compiled_model_follows_attach_and_detach(frames: CompileCounter) -> None:
    """A compiled graph holds the weight as it was traced; guards must notice that it is computed now."""
    model = two_layers()
    compiled = torch.compile(model, backend=frames)
    for change in (lambda: None, lambda: adapted(model, targets="0"), lambda: lp.detach(model)):
        change()
        assert_close(compiled(x()), model(x()))


class Owner(nn.Module):
    """A module of the user's own, with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.weight)


def test_fx_still_traces_into_an_adapted_module() -> None:
    """The class says it is torch.nn's own, so fx takes the user's module for a leaf and does not look inside."""
    model = nn.Sequential(Owner())
    adapted(model, targets="0.weight")
    graph = torch.fx.symbolic_trace(model).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert torch.relu in called
    assert not [node for node in graph.nodes if node.op == "call_module" and node.target == "0"]


def test_export_and_trace_give_the_adapted_output() -> None:
    """Both see the weight through the property; what they record must be the computation, or the merged weight."""
    model = adapted(two_layers(), targets="all-linear").eval()
    assert_close(torch.export.export(model, (x(),)).module()(x()), model(x()))
    assert_close(torch.jit.trace(model, x())(x()), model(x()))


def test_an_adapted_model_scripts_inside_merged() -> None:
    """Scripting a parametrized module succeeds, and the script raises when it is called."""
    model = adapted(two_layers(), targets="all-linear")
    output = model(x())
    with lp.merged(model):
        scripted = torch.jit.script(model)
    assert_close(scripted(x()), output)


# --- torch.func --------------------------------------------------------------------------------------------


def test_functional_call_takes_the_models_own_state() -> None:
    """Its names are parametrize's; a permanent renaming of state_dict would break this."""
    model = adapted(two_layers(), targets="all-linear")
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    assert_close(torch.func.functional_call(model, state, (x(),)), model(x()), **EXACT)


def test_vmap_over_stacked_adapters_is_a_loop_over_them() -> None:
    """One batched run of many adapters needs the weight computed inside the transform."""
    models = [adapted(copy.deepcopy(two_layers()), targets="all-linear") for _ in range(3)]
    stacked, buffers = torch.func.stack_module_state(models)

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(models[0], (parameters, buffers), (x(),))

    outputs = torch.vmap(run)(stacked, buffers)
    assert_close(outputs, torch.stack([model(x()) for model in models]))


def test_jacobians_with_respect_to_factors_match_autograd() -> None:
    """Forward over the parametrization, with functorch's tensors in place of the factors."""
    model = adapted()
    factors = {name: tensor.detach() for name, tensor in model.named_parameters() if "default" in name}

    def run(factors: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, factors, (x(),)).sum()

    expected = torch.autograd.grad(model(x()).sum(), list(factors_of(model).values()))
    assert_close(list(torch.func.jacrev(run)(factors).values()), list(expected))


# --- devices -----------------------------------------------------------------------------------------------


def test_a_model_moved_to_meta_and_back_keeps_its_switches(frames: CompileCounter) -> None:
    """to_empty() leaves every buffer with arbitrary values: that of the strength, which a graph reads, too."""
    model = adapted()
    lp.activate(model, {"default": 0.5})
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    output = model(x())
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    assert_close(model(x()), output, **EXACT)
    assert_close(torch.compile(model, backend=frames)(x()), output)


def test_an_adapted_model_on_meta_runs_on_meta_inputs() -> None:
    """Shapes and memory are planned by running a model on the meta device."""
    model = adapted().to("meta")
    assert model(x().to("meta")).shape == (2, 4)


# --- distributed, in one process (S25, S26) ----------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A world of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def shard(model: nn.Module, mesh: DeviceMesh) -> Any:
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_flat(model: nn.Module, mesh: DeviceMesh) -> Any:
    return FullyShardedDataParallel(model, use_orig_params=True, device_mesh=mesh, device_id=torch.device("cpu"))


def replicate(model: nn.Module, mesh: DeviceMesh) -> Any:
    return DistributedDataParallel(model)


@pytest.mark.parametrize("distribute", [shard, shard_flat])
def test_attaching_to_a_sharded_model_is_refused_by_name(distribute, mesh: DeviceMesh) -> None:
    """Mixed Tensor and DTensor in some later operation, or a parameter group that points at a name now gone."""
    model = distribute(two_layers(), mesh)
    with pytest.raises(lp.AttachError, match="managed by FSDP; attach first"):
        lp.attach(model, lp.LoRA(r=2))


@pytest.mark.parametrize("distribute", [shard, shard_flat, replicate])
def test_an_adapted_model_distributes_with_the_same_output_and_gradients(distribute, mesh: DeviceMesh) -> None:
    """The parametrization must see whole tensors, and the factors must be among what is sharded and reduced."""
    model = adapted(two_layers(), targets="all-linear")
    model(x()).pow(2).sum().backward()
    expected = model(x()).detach(), [factor.grad.clone() for factor in lp.parameters(model)]
    model.zero_grad()
    model = distribute(model, mesh)
    output = model(x())
    output.pow(2).sum().backward()
    gradients = [whole(p.grad) for p in model.parameters() if p.requires_grad]
    assert_close((output.detach(), gradients), expected)


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "detach": lp.detach,
    "merge": lp.merge,
    "merged": lambda model: lp.merged(model).__enter__(),
    "detached": lambda model: lp.detached(model).__enter__(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_taking_adapters_off_a_sharded_model_is_refused_by_name(change, mesh: DeviceMesh) -> None:
    """It succeeds, and the next forward meets a DTensor where FSDP no longer gathers."""
    model = shard(adapted(two_layers(), targets="all-linear"), mesh)
    output = model(x()).detach()
    with pytest.raises(lp.AttachError, match="FSDP"):
        change(model)
    assert_close(model(x()).detach(), output)
