"""Tensor parallelism within FSDP2, on four processes, two by two; run by test_distributed.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_models import EXACT, METHODS, gathered, mlps, refused, same_factors, sgd
from launching import Scenarios
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

import loraparam as lp

SCENARIOS = scenario = Scenarios()


def two_by_two() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))


def shard(model: nn.Module, mesh: DeviceMesh) -> Any:
    for block in model:
        fully_shard(block, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def fit(model: nn.Module, part: int | None = None) -> nn.Module:
    """Three steps on all rows, or on one half of them."""
    optimizer = sgd(model)
    for step in range(3):
        x = torch.linspace(-1, 1, 32).view(4, 8) + step
        optimizer.zero_grad()
        model(x if part is None else x.chunk(2)[part]).pow(2).mean().backward()
        optimizer.step()
    return model


@scenario
def tensor_parallel_in_fsdp2(folder: Path) -> None:
    mesh = two_by_two()
    for name, method in METHODS.items():
        model, expected = mlps(mesh["tensor"]), mlps()
        for each in (model, expected):
            lp.attach(each, method, generator=torch.Generator().manual_seed(0))
        shard(model, mesh)
        same_factors(model, expected, **EXACT)
        fit(expected)
        same_factors(fit(model, mesh.get_local_rank("data")), expected)
        assert all(factor.device_mesh.ndim == 2 for factor in lp.parameters(model))
        lp.save(model, folder / f"{name}.safetensors")
        dist.barrier()
        lp.load(loaded := mlps(), folder / f"{name}.safetensors")
        same_factors(loaded, expected)
        lp.load(again := mlps(mesh["tensor"]), folder / f"{name}.safetensors")
        x = torch.randn(3, 8, generator=torch.manual_seed(2))
        assert_close(shard(again, mesh)(x), expected(x))
        lp.load_state_dict(again, {key: 2 * value for key, value in lp.state_dict(expected).items()})
        assert_close(gathered(lp.state_dict(again)), {k: 2 * v for k, v in lp.state_dict(expected).items()}, **EXACT)
        refused("managed by FSDP", lp.detach, model)


if __name__ == "__main__":
    SCENARIOS.run()
