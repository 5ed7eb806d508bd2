"""Sample files that PEFT wrote, and their base models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
CASES = sorted(folder.name for folder in (DATA / "peft").iterdir())
MALFORMED = sorted(folder.name for folder in (DATA / "malformed").iterdir() if folder.is_dir())


class Experts(nn.Module):
    """A stack of gated feed-forward experts, each of which sees every input."""

    def __init__(self, num_experts: int, dim: int, hidden: int, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shapes = [(2 * hidden, dim), (dim, hidden)]
        sizes = [(num_experts, *(shape[::-1] if is_transposed else shape)) for shape in shapes]
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.empty(size)) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        for gate_up, down in zip(self.gate_up_proj, self.down_proj, strict=True):
            gate_up, down = (w if self.is_transposed else w.T for w in (gate_up, down))
            gate, up = (x @ gate_up).chunk(2, -1)
            total = total + (F.silu(gate) * up) @ down
        return total


class Chain(nn.Module):
    """Modules under dotted names, run one after the other."""

    def __init__(self, modules: dict[str, tuple[str, dict[str, Any]]], forward: list[str]) -> None:
        super().__init__()
        self.steps = forward
        for name, (kind, settings) in modules.items():
            parent: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(leaf, (Experts if kind == "Experts" else getattr(nn, kind))(**settings))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            if step.startswith("mha:"):
                x = self.get_submodule(step[4:])(x, x, x, need_weights=False)[0]
            elif step == "flatten":
                x = x.flatten(1)
            else:
                x = torch.relu(x) if step == "relu" else self.get_submodule(step)(x)
        return x


@dataclass(frozen=True)
class Case:
    """One sample: what its file changes, the input, and what PEFT computed from it."""

    folder: Path
    spec: dict[str, Any]
    merged: dict[str, Tensor]
    input: Tensor
    output: Tensor

    def model(self) -> nn.Module:
        """The base model, with its weights, in eval mode."""
        base = self.spec["base"]
        if base["kind"] == "toy":
            model: nn.Module = Chain(base["modules"], base["forward"])
        else:
            import transformers

            kind = getattr(transformers, base["cls"])
            config = kind.config_class(**base["config"])
            config._attn_implementation = "eager"
            model = kind(config)
        model.load_state_dict(load_file(self.folder / "base.safetensors"), strict=False)
        if base["kind"] == "hf":
            model.tie_weights()
        return model.eval()


def case(name: str) -> Case:
    """A sample by name."""
    folder = DATA / "peft" / name
    expected = load_file(folder / "expected.safetensors")
    merged = {key.removeprefix("merged/"): value for key, value in expected.items() if key.startswith("merged/")}
    spec = json.loads((folder / "spec.json").read_text())
    return Case(folder, spec, merged, expected["input"], expected["output"])
