"""Checkpoints and adapter files for the tests of tools: a model of many layers, on disk in one file or in shards."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import loraparam as lp
from loraparam.formats import read_content
from loraparam.formats.content import Item
from loraparam.testing.subjects import shake
from loraparam.tools.fitting import change


class Many(nn.Module):
    """Every layout a checkpoint may hold, a buffer, and a tensor that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 6)
        self.linear = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(6, 2)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose1d(4, 6, 3)
        self.experts = nn.ParameterDict({"gate": nn.Parameter(torch.randn(3, 5, 4))})
        self.norm = nn.BatchNorm1d(6)


TARGETS: dict[Any, lp.Method] = {
    "tokens": lp.LoRA(r=2, alpha=3),
    "linear": lp.DoRA(r=3, rslora=True),
    "attention.in_proj_weight[q,v]": lp.LoRA(r=2),
    "attention.out_proj": lp.Magnitude(),
    "conv": lp.DoRA(r=2, axis="in"),
    "up": lp.LoRA(r=3),
    "experts.gate": lp.LoRA(r=2, alpha=1),
    "norm.weight": lp.Full(),
}


def many(dtype: torch.dtype = torch.float32, seed: int = 0) -> Many:
    """The model, the same for the same seed."""
    torch.manual_seed(seed)
    return Many().to(dtype)


def adapted(model: nn.Module, targets: Any = TARGETS, name: str = "default") -> nn.Module:
    """The model with an adapter that has an effect, in place."""
    lp.attach(model, targets, name=name)
    shake(model)
    return model


def save_checkpoint(state: dict[str, Tensor], path: Path, *, shards: int = 0) -> Path:
    """A checkpoint: one file, or a directory with this many shards, their index, and files beside them."""
    metadata = {"format": "pt", "made by": "a test"}
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    if not shards:
        save_file(state, path, metadata)
        return path
    path.mkdir()
    names = {key: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, key in enumerate(state)}
    for name in sorted(set(names.values())):
        save_file({key: state[key] for key in state if names[key] == name}, path / name, metadata)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text('{"model_type": "many"}')
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    (path / "pytorch_model.bin").write_bytes(b"old weights")
    return path


def content(path: Path) -> dict[str, bytes]:
    """What a file or directory holds: everything in it, hidden files too."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def items(path: Path) -> dict[str, Item]:
    """What an adapter file says, by target."""
    return {item.path: item for item in read_content(path, None).items}


def deltas(path: Path) -> dict[str, Tensor]:
    """What an adapter file adds to each weight, by target."""
    return {name: change(item, None) for name, item in items(path).items()}


class Interrupted(BaseException):
    """What ``failing_at`` raises: no code may catch it."""


@contextmanager
def failing_at(n: int) -> Iterator[list[int]]:
    """Inside, the n-th audited call that touches files (open, rename, remove, mkdir) raises instead; counts them."""
    count = [0]

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == n:
                raise Interrupted
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename", "fsync", "mkdir"):
            patch.setattr(os, name, failing(getattr(os, name)))
        patch.setattr("builtins.open", failing(open))
        yield count


def every_interruption(call: Callable[[], Any], check: Callable[[], Any]) -> int:
    """Interrupt ``call`` at its first, second, … touch of files until it comes through; ``check`` after each."""
    for n in range(1, 200):
        with failing_at(n) as count:
            try:
                call()
            except Interrupted:
                pass
            else:
                assert count[0] < n, "an interruption was swallowed"
                return n - 1
        check()
    raise AssertionError("it never came through")
