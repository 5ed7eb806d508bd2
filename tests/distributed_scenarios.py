"""What two processes do together; run by test_distributed.py.

Each scenario trains or saves an adapted model that is spread over both, and compares with one process alone on all of
the data.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_models import (
    EXACT,
    METHODS,
    TARGETS,
    TOKENS,
    Net,
    adapted,
    alone,
    base,
    gathered,
    loss_of,
    mlps,
    refused,
    same_factors,
    sgd,
    train,
)
from launching import Scenarios
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as activations
from torch.distributed.checkpoint import load as load_parts
from torch.distributed.checkpoint import save as save_parts
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import loraparam as lp

SCENARIOS = scenario = Scenarios()


def shard(model: Net, **options: Any) -> Any:
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


# --- replicated -------------------------------------------------------------------------------------------------


@scenario
def ddp(folder: Path) -> None:
    model = train(DistributedDataParallel(adapted()))
    same_factors(model, alone())
    if dist.get_rank() == 0:
        lp.save(model, folder / "ddp.safetensors")
    dist.barrier()
    loaded = base()
    lp.load(loaded, folder / "ddp.safetensors")  # the wrapper is not in its keys
    assert_close(lp.state_dict(loaded), lp.state_dict(model), **EXACT)


@scenario
def ddp_with_static_graph(folder: Path) -> None:
    same_factors(train(DistributedDataParallel(adapted(), static_graph=True)), alone())


# --- FSDP2 ------------------------------------------------------------------------------------------------------


@scenario
def fsdp2(folder: Path) -> None:
    model, expected = train(shard(adapted())), alone()
    same_factors(model, expected)
    assert all(hasattr(factor, "full_tensor") for factor in lp.parameters(model))
    assert_close(gathered(model.state_dict()), expected.state_dict())  # the frozen base as well


@scenario
def fsdp2_with_a_trained_base(folder: Path) -> None:
    model, expected = train(shard(adapted(freeze=False))), alone(adapted(freeze=False))
    assert_close(gathered(model.state_dict()), expected.state_dict())


@scenario
def fsdp2_of_single_layers(folder: Path) -> None:
    model = adapted()
    for block in model.blocks:
        fully_shard(block.linear1)
    same_factors(train(shard(model)), alone())


@scenario
def fsdp2_with_mixed_precision(folder: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, expected = train(shard(adapted(), mp_policy=policy)), alone()
    assert all(factor.dtype == torch.float32 for factor in lp.parameters(model))
    # bfloat16 has eight bits: three steps at this learning rate differ by a few of its roundings.
    same_factors(model, expected, rtol=0.1, atol=0.02)


@scenario
def fsdp2_of_a_bfloat16_base_with_float32_factors(folder: Path) -> None:
    model, expected = base().bfloat16(), base().bfloat16()
    for each in (model, expected):
        torch.manual_seed(1)
        lp.attach(each, TARGETS)
    assert {factor.dtype for factor in lp.parameters(model)} == {torch.float32}
    train(shard(model))
    assert {factor.dtype for factor in lp.parameters(model)} == {torch.float32}
    same_factors(model, alone(expected), rtol=0.1, atol=0.02)  # as above


@scenario
def fsdp2_with_cpu_offload(folder: Path) -> None:
    same_factors(train(shard(adapted(), offload_policy=CPUOffloadPolicy(pin_memory=False))), alone())


@scenario
def fsdp2_with_activation_checkpointing(folder: Path) -> None:
    model = adapted()
    activations.apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, nn.TransformerEncoderLayer))
    same_factors(train(shard(model)), alone())


@scenario
def fsdp2_compiled(folder: Path) -> None:
    model = adapted()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    same_factors(train(shard(model)), alone())


@scenario
def fsdp2_saves_an_adapter_from_shards(folder: Path) -> None:
    model, expected = train(shard(adapted())), alone()
    lp.save(model, folder / str(dist.get_rank()) / "shards.safetensors")
    dist.barrier()
    assert not (folder / "1").exists()  # the first process writes
    loaded = base()
    lp.load(loaded, folder / "0" / "shards.safetensors")
    same_factors(loaded, expected)
    sharded = shard(loaded)
    assert_close(gathered(lp.state_dict(sharded)), gathered(lp.state_dict(model)), **EXACT)
    # And whole factors go into shards.
    lp.load_state_dict(sharded, lp.state_dict(expected))
    assert_close(gathered(lp.state_dict(sharded)), lp.state_dict(expected), **EXACT)
    lp.load_state_dict(loaded := adapted(), lp.state_dict(sharded))
    assert_close(lp.state_dict(loaded), lp.state_dict(expected), **EXACT)


@scenario
def fsdp2_resumes_from_a_distributed_checkpoint(folder: Path) -> None:
    options = StateDictOptions(ignore_frozen_params=True, strict=False)

    def run() -> tuple[Any, torch.optim.Optimizer]:
        model = shard(adapted())
        return model, torch.optim.AdamW(lp.param_groups(model, 0.05, lr_ratio=4))

    model, optimizer = run()
    train(model, optimizer)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    assert all("lora" in key or "magnitude" in key or "diff" in key for key in parts["model"])
    save_parts(parts, checkpoint_id=folder / "parts")
    train(model, optimizer)

    resumed, optimizer = run()
    parts = dict(zip(("model", "optimizer"), get_state_dict(resumed, optimizer, options=options), strict=True))
    load_parts(parts, checkpoint_id=folder / "parts")
    loaded = {"model_state_dict": parts["model"], "optim_state_dict": parts["optimizer"]}
    set_state_dict(resumed, optimizer, **loaded, options=options)
    train(resumed, optimizer)
    assert_close(gathered(lp.state_dict(resumed)), gathered(lp.state_dict(model)), **EXACT)


@scenario
def fsdp2_loads_another_base(folder: Path) -> None:
    model, expected = shard(adapted()), adapted()
    other = base(seed=5).state_dict()
    full = StateDictOptions(full_state_dict=True, strict=False)
    # Gathered again, a weight may well lie in the same memory, as with CUDA's allocator.
    same_memory = mock.patch.object(Tensor, "data_ptr", return_value=0)
    with same_memory:
        loss_of(model, TOKENS[0])  # norms of the first base have been computed, and none may be kept
    names = {key.replace(".parametrizations", "").replace(".original", ""): key for key in model.state_dict()}
    set_model_state_dict(model, {names[key]: tensor for key, tensor in other.items()}, options=full)
    with same_memory:
        output = model(TOKENS[0])
    expected.load_state_dict(other)
    assert_close(output, expected(TOKENS[0]))


@scenario
def fsdp2_refuses_what_it_cannot_follow(folder: Path) -> None:
    model = adapted()
    for block in model.blocks:
        fully_shard(block)  # the layers inside keep their classes, and the head is not sharded at all
    output = model(TOKENS[0])
    changes = [lp.detach, lp.merge, lambda m: lp.merged(m).__enter__(), lp.base_state_dict]
    for change in changes:
        for part in (model, model.blocks[0], model.blocks[0].linear1):
            refused("managed by FSDP", change, part)
    for part, target in ((model, "linear1"), (model.blocks[0], "linear1"), (model.blocks[0].linear1, "weight")):
        refused("managed by FSDP; attach first", lp.attach, part, lp.LoRA(r=1), target, name="late")
    assert_close(model(TOKENS[0]), output, **EXACT)
    # After a forward the root's own parameters stay gathered, and look like any other.
    plain = shard(base())
    plain(TOKENS[0])
    refused("managed by FSDP; attach first", lp.attach, plain, lp.LoRA(r=1), "head")


@scenario
def fsdp2_switches_and_checks(folder: Path) -> None:
    model, expected = shard(adapted()), adapted()
    for each in (model, expected):
        lp.activate(each, {"default": 0.5})
        each.zero_grad()
    assert [str(row) for row in lp.check(model, TOKENS[0])] == [str(row) for row in lp.check(expected, TOKENS[0])]
    for block in (lp.disabled, lambda m: contextlib.nullcontext()):
        with block(model), block(expected):
            assert_close(model(TOKENS[0]), expected(TOKENS[0]))


# --- FSDP1 ------------------------------------------------------------------------------------------------------


def shard_flat(model: nn.Module) -> FullyShardedDataParallel:
    policy = ModuleWrapPolicy({nn.TransformerEncoderLayer})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


@scenario
def fsdp1(folder: Path) -> None:
    model, expected = train(shard_flat(adapted())), alone()
    refused("summon_full_params", lp.save, model, folder / "flat.safetensors")
    with FullyShardedDataParallel.summon_full_params(model):
        same_factors(model, expected)
        if dist.get_rank() == 0:
            lp.save(model, folder / "flat.safetensors")
    dist.barrier()
    lp.load(loaded := base(), folder / "flat.safetensors")
    same_factors(loaded, expected)
    for change in (lp.detach, lp.merge, lp.base_state_dict):
        refused("managed by FSDP", change, model)
    refused("managed by FSDP; attach first", lp.attach, shard_flat(base()), lp.LoRA(r=1), "head")


# --- tensor parallel --------------------------------------------------------------------------------------------


def fit(model: nn.Module) -> nn.Module:
    optimizer = sgd(model)
    for step in range(3):
        x = torch.linspace(-1, 1, 24).view(3, 8) + step
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()
    return model


@scenario
def tensor_parallel(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for name, method in METHODS.items():
        model, expected = mlps(mesh), mlps()
        lp.attach(model, method, "all-linear", generator=torch.Generator().manual_seed(dist.get_rank()))
        lp.attach(expected, method, "all-linear", generator=torch.Generator().manual_seed(0))
        same_factors(model, expected, **EXACT)  # the first process's draw holds
        fit(expected)
        same_factors(fit(model), expected)
        lp.save(model, folder / f"{name}.safetensors")
        dist.barrier()
        for loaded in (mlps(), mlps(mesh)):
            lp.load(loaded, folder / f"{name}.safetensors")
            same_factors(loaded, expected)
        x = torch.randn(3, 8, generator=torch.manual_seed(2))
        assert_close(loaded(x), expected(x))
        with lp.merged(loaded):
            assert_close(loaded(x), expected(x))
        lp.merge(loaded)
        assert_close(loaded(x), expected(x))
        before = model[0].up.parametrizations.weight.original
        lp.detach(model)
        assert model[0].up.weight is before


@scenario
def tensor_parallel_converts_after_a_forward(folder: Path) -> None:
    model, expected = mlps(init_device_mesh("cpu", (2,))), mlps()
    x = torch.randn(3, 8, generator=torch.manual_seed(2))
    for each in (model, expected):
        lp.attach(each, lp.DoRA(r=2), generator=torch.Generator().manual_seed(0))
        each(x)  # norms of the base are kept
        each.double()
    assert_close(model(x.double()), expected(x.double()))


@scenario
def tensor_parallel_factors_are_placed_like_the_weight(folder: Path) -> None:
    model = mlps(init_device_mesh("cpu", (2,)))
    lp.attach(model, {"all-linear": lp.DoRA(r=2), "0.down": lp.DoRA(r=2, axis="in"), "1.up": lp.Full()})
    found = {name: factor.placements for name, factor in lp.named_parameters(model)}
    assert found == {
        "0.up.weight.lora_A": (Replicate(),),
        "0.up.weight.lora_B": (Shard(0),),
        "0.up.weight.magnitude": (Shard(0),),
        "0.down.weight.lora_A": (Shard(1),),
        "0.down.weight.lora_B": (Replicate(),),
        "0.down.weight.magnitude": (Shard(0),),
        "1.up.weight.diff": (Shard(0),),
        "1.down.weight.lora_A": (Shard(1),),
        "1.down.weight.lora_B": (Replicate(),),
        "1.down.weight.magnitude": (Replicate(),),
    }


@scenario
def tensor_parallel_after_the_adapters_is_refused(folder: Path) -> None:
    model, mesh = mlps(), init_device_mesh("cpu", (2,))
    lp.attach(model, lp.LoRA(r=2))
    before = dict(model.named_parameters())
    refused("parallelize the model first, then attach", parallelize_module, model, mesh, {"*.up": ColwiseParallel()})
    with pytest.raises(RuntimeError, match="should be used to distribute leaf tensors"):  # torch's own
        parallelize_module(model, mesh, {"*.down": RowwiseParallel()})
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


if __name__ == "__main__":
    SCENARIOS.run()
