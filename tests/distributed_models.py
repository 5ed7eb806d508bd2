"""The models that processes spread over themselves, their training, and one process alone to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing import assert_close

import loraparam as lp

EXACT = {"rtol": 0, "atol": 0}
TOKENS = torch.randint(7, (3, 4, 5), generator=torch.manual_seed(1))  # steps, batch, length


class Net(nn.Module):
    """An embedding, two blocks with attention, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2)])
        self.head = nn.Linear(8, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


TARGETS = {
    "in_proj_weight[q,v]": lp.LoRA(r=2),
    "linear1": lp.DoRA(r=2),
    "linear2": lp.LoRA(r=3, alpha=1),
    "norm1": lp.Full(),
    "embed": lp.LoRA(r=2),
}


def base(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def adapted(**options: Any) -> Net:
    model = base()
    lp.attach(model, TARGETS, **options)
    return model


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.roll(1, 1).flatten())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, whole_batch: bool = False) -> nn.Module:
    """Three steps, on this process's half of each batch, or on all of it."""
    optimizer = optimizer or sgd(model)
    for tokens in TOKENS:
        optimizer.zero_grad()
        loss_of(model, tokens if whole_batch else tokens.chunk(2)[dist.get_rank()]).backward()
        optimizer.step()
    return model


def alone(model: nn.Module | None = None) -> Any:
    """The same training in one process."""
    return train(model or adapted(), whole_batch=True)


def gathered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for key, tensor in state.items()}


def same_factors(model: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    assert_close(gathered(lp.state_dict(model)), lp.state_dict(expected), **tolerance)


def refused(message: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(lp.AttachError, match=message):
        function(*args, **kwargs)


class Mlp(nn.Module):
    """Attention-like: parted by output, then by input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def mlps(mesh: DeviceMesh | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Mlp(), Mlp())
    if mesh is not None:
        parallelize_module(model, mesh, {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()})
    return model


METHODS = {
    "lora": lp.LoRA(r=2, init="gaussian"),
    "dora": lp.DoRA(r=2, init="gaussian"),
    "dora of inputs": lp.DoRA(r=2, axis="in", detach_norm=False),
    "magnitude": lp.Magnitude(),
    "ia3 of inputs": lp.IA3(axis="in"),
    "full": lp.Full(),
}
