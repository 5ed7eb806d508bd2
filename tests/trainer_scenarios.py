"""transformers' Trainer and accelerate on two processes, compared with one alone; run by test_distributed.py."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import test_trainer as single
import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from distributed_models import EXACT, gathered
from launching import Scenarios
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import Trainer

import loraparam as lp
from loraparam.integrations.transformers import AdapterCheckpoints

SCENARIOS = scenario = Scenarios()
# Without dropout, which each process draws for itself.
TARGETS = {"q_proj": lp.LoRA(r=2), "v_proj": lp.DoRA(r=2), "norm": lp.Full()}


def adapted() -> Any:
    model = single.llama()
    lp.attach(model, TARGETS)
    return model


def arguments(folder: Path, **options: Any) -> Any:
    # At Adam's own epsilon, rounding decides the steps of factors whose gradient is near zero.
    backend = "gloo" if dist.is_initialized() else None
    args = single.arguments(folder, adam_epsilon=1e-3, ddp_backend=backend, **options)
    if args.fsdp:
        shard_on_cpus()
    return args


def trainer(model: nn.Module, args: Any, **options: Any) -> Trainer:
    rows = {"train_dataset": single.ROWS, "eval_dataset": single.ROWS[:2]}
    return Trainer(model, args, **rows, **options, callbacks=[AdapterCheckpoints()])


def train_alone(folder: Path) -> None:
    """What one process makes of the whole batches."""
    model = adapted()
    trainer(model, arguments(folder / "alone", per_device_train_batch_size=4)).train()


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """accelerate on these processes."""
    rank = str(dist.get_rank())
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "-", "MASTER_PORT": "0"}
    # FSDP1 offloads to the CPU by a copy and frees the original; on the CPU they are the same memory.
    stays = mock.patch.object(FlatParamHandle, "to_cpu", return_value=contextlib.nullcontext())
    with mock.patch.dict(os.environ, here), stays:
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()  # it remembers the data loaders of Trainers that still live


def shard_on_cpus() -> None:
    """Have accelerate heed its FSDP plugin, which it does not on CPUs.

    It asks for the kind of machine (accelerate/state.py), and on CPUs replicates without a word. That one answer is
    changed here; all that follows is its own, and FSDP's.
    """
    state = PartialState()
    state.distributed_type, state.device = DistributedType.MULTI_GPU, torch.device("cpu")


def same(folder: Path, other: Path, **tolerance: float) -> None:
    """Adapters from two files."""
    states = []
    for each in (folder, other):
        lp.load(model := single.llama(), each / "adapters" / "default.safetensors")
        states.append(lp.state_dict(model))
    assert_close(*states, **tolerance)


# --- Trainer ----------------------------------------------------------------------------------------------------


@scenario
def trainer_under_ddp(folder: Path) -> None:
    with processes():
        run = trainer(adapted(), arguments(folder / "ddp"))
        run.train()
        assert isinstance(run.model_wrapped, DistributedDataParallel)
        same(folder / "ddp" / "checkpoint-4", folder / "alone" / "checkpoint-4")
        resumed = trainer(adapted(), arguments(folder / "ddp again"))
        resumed.train(resume_from_checkpoint=str(folder / "ddp" / "checkpoint-2"))
        same(folder / "ddp again" / "checkpoint-4", folder / "ddp" / "checkpoint-4", **EXACT)


def sharded(folder: Path, *, version: int = 2, bf16: bool = False, **config: Any) -> None:
    """A Trainer's checkpoints, resuming, and the best model's reload, under FSDP."""
    config = {"version": version, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **config}
    if version == 1:
        config["sync_module_states"] = False  # it asks for an accelerator
    options: dict[str, Any] = {"fsdp": True, "fsdp_config": config, "bf16": bf16}
    folder, alone = folder / f"{version} {bf16} {config['state_dict_type']}", folder / "alone"
    # bfloat16 has eight bits: four steps differ by a few of its roundings.
    tolerance = {"rtol": 0.1, "atol": 0.02} if bf16 else {}
    with processes():
        run = trainer(adapted(), arguments(folder / "whole", **options))
        run.train()
        assert isinstance(run.model_wrapped, FSDPModule if version == 2 else FullyShardedDataParallel)
        for step in ("checkpoint-2", "checkpoint-4"):
            same(folder / "whole" / step, alone / step, **tolerance)
        lp.load(loaded := single.llama(), folder / "whole" / "checkpoint-4" / "adapters" / "default.safetensors")
        assert_close(whole_factors(run.model), lp.state_dict(loaded), **EXACT)
        resume(folder, options)
        best(folder, options)


def resume(folder: Path, options: dict[str, Any]) -> None:
    # Of FSDP1 the Trainer does not restore the optimizer as it was, with or without adapters: the weights are compared.
    last = 4 if options["fsdp_config"]["version"] == 2 else 2
    resumed = trainer(adapted(), arguments(folder / "resumed", max_steps=last, **options))
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    lp.load(loaded := single.llama(), folder / "whole" / f"checkpoint-{last}" / "adapters" / "default.safetensors")
    assert_close(whole_factors(resumed.model), lp.state_dict(loaded), **EXACT)


def best(folder: Path, options: dict[str, Any]) -> None:
    scores = iter([0.1, 0.9, 0.2, 0.3])
    each = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "metric_for_best_model": "score"}
    args = arguments(folder / "best", load_best_model_at_end=True, **each, **options)
    run = trainer(adapted(), args, compute_metrics=lambda prediction: {"score": next(scores)})
    run.train()
    assert run.state.best_model_checkpoint == str(folder / "best" / "checkpoint-2")
    lp.load(loaded := single.llama(), folder / "best" / "checkpoint-2" / "adapters" / "default.safetensors")
    assert_close(whole_factors(run.model), lp.state_dict(loaded), **EXACT)
    if options["fsdp_config"]["version"] == 2 and not options["bf16"]:
        prompt, how = single.ROWS[0]["input_ids"][None], {"max_new_tokens": 4, "do_sample": False}
        assert_close(run.model.eval().generate(prompt, **how), loaded.eval().generate(prompt, **how), **EXACT)


def whole_factors(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, FSDPModule):
        return gathered(lp.state_dict(model))
    with FullyShardedDataParallel.summon_full_params(model):
        return {key: value.clone() for key, value in lp.state_dict(model).items()}


@scenario
def trainer_under_fsdp2_with_whole_states(folder: Path) -> None:
    sharded(folder, state_dict_type="FULL_STATE_DICT")


@scenario
def trainer_under_fsdp2_with_states_in_parts(folder: Path) -> None:
    more = {"activation_checkpointing": True, "cpu_ram_efficient_loading": True}
    sharded(folder, state_dict_type="SHARDED_STATE_DICT", **more)


@scenario
def trainer_under_fsdp2_with_mixed_precision(folder: Path) -> None:
    sharded(folder, state_dict_type="FULL_STATE_DICT", bf16=True)


@scenario
def trainer_under_fsdp1_with_whole_states(folder: Path) -> None:
    sharded(folder, version=1, state_dict_type="FULL_STATE_DICT", activation_checkpointing=True)
    # What wraps the layers is in the way of no key.
    kept = load_file(folder / "1 False FULL_STATE_DICT" / "whole" / "checkpoint-4" / "model.safetensors")
    assert kept.keys() == single.trained_state(adapted()).keys()


@scenario
def trainer_under_fsdp1_with_states_in_parts(folder: Path) -> None:
    sharded(folder, version=1, state_dict_type="SHARDED_STATE_DICT")


@scenario
def trainer_of_a_model_loaded_in_parts(folder: Path) -> None:
    if dist.get_rank() == 0:
        single.llama().save_pretrained(folder / "model")
    dist.barrier()
    with processes():
        model = transformers.LlamaForCausalLM.from_pretrained(folder / "model", tp_plan="auto")
        lp.attach(model, TARGETS)
        assert any(placement.is_shard() for factor in lp.parameters(model) for placement in factor.placements)
        # Both processes see each batch; the Trainer cannot resume such a model, and asks for this.
        args = arguments(folder / "parts", per_device_train_batch_size=4, save_only_model=True)
        shard_on_cpus()
        trainer(model, args).train()
    same(folder / "parts" / "checkpoint-4", folder / "alone" / "checkpoint-4")
    kept = load_file(folder / "parts" / "checkpoint-4" / "model.safetensors")
    assert {key: value.shape for key, value in kept.items()} == {
        key: value.shape for key, value in single.trained_state(adapted()).items()
    }


# --- accelerate -------------------------------------------------------------------------------------------------


def accelerated(rows: slice, *, start: Path | None = None, end: Path | None = None) -> Any:
    """Train on this process's half of each two rows, two steps' gradients at a time, under FSDP2."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True, backend="gloo")
    shard_on_cpus()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, transformer_cls_names_to_wrap=["LlamaDecoderLayer"], auto_wrap_policy="transformer_based_wrap"
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)
    model = adapted()
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    if start is not None:
        accelerator.load_state(str(start))
    for row in single.ROWS[rows][dist.get_rank() :: 2]:
        with accelerator.accumulate(model):
            accelerator.backward(model(row["input_ids"][None], labels=row["labels"][None]).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(lp.parameters(model), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    if end is not None:
        accelerator.save_state(str(end))
    return accelerator.unwrap_model(model)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(lp.param_groups(model, 0.05, lr_ratio=4), eps=1e-3)


@scenario
def accelerate_under_fsdp2(folder: Path) -> None:
    with processes():
        model = accelerated(slice(8), end=folder / "ended")
        assert isinstance(model, FSDPModule)
        accelerated(slice(4), end=folder / "state")
        resumed = accelerated(slice(4, 8), start=folder / "state")
        assert_close(gathered(lp.state_dict(resumed)), gathered(lp.state_dict(model)), **EXACT)
        lp.save(model, folder / "accelerated.safetensors")
        dist.barrier()
    expected = adapted()
    optimizer = optimizer_of(expected)
    for start in (0, 4):
        rows = torch.stack([row["input_ids"] for row in single.ROWS[start : start + 4]])
        expected(rows, labels=rows).loss.backward()
        nn.utils.clip_grad_norm_(lp.parameters(expected), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    lp.load(loaded := single.llama(), folder / "accelerated.safetensors")
    assert_close(lp.state_dict(loaded), lp.state_dict(expected))


if __name__ == "__main__":
    SCENARIOS.run()
