"""Adapter files that kohya's scripts, LyCORIS and diffusers wrote, with the base each is for and what it must mean.

Each folder of tests/data holds ``spec.json`` (how to build the base, and what the file changes), ``base.safetensors``,
``expected.safetensors`` ("merged/<parameter>", "comfy/<parameter>" where ComfyUI differs, "input" and "output" of the
tool's own forward) and the adapter file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
FAMILIES = ("kohya", "lycoris", "diffusers")
CASES = sorted(f"{family}/{folder.name}" for family in FAMILIES for folder in (DATA / family).iterdir())


@dataclass(frozen=True)
class Case:
    """One file."""

    folder: Path
    spec: dict[str, Any]
    expected: dict[str, Tensor]

    @property
    def file(self) -> Path:
        path: Path = self.folder / self.spec["files"][0]
        return path

    @property
    def base_file(self) -> Path:
        return self.folder / "base.safetensors"

    def wanted(self, kind: str = "merged") -> dict[str, Tensor]:
        """{parameter: its effective value}."""
        start = f"{kind}/"
        return {key[len(start) :]: value for key, value in self.expected.items() if key.startswith(start)}


def case(name: str) -> Case:
    folder = DATA / name
    spec = json.loads((folder / "spec.json").read_text())
    return Case(folder, spec, load_file(folder / "expected.safetensors"))


class Toy(nn.Module):
    """Modules under dotted names, called one after the other."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.steps = list(spec["forward"])
        for name, (kind, arguments) in spec["modules"].items():
            parent: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(leaf, getattr(nn, kind)(**arguments))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            if step in ("relu", "flatten"):
                x = torch.relu(x) if step == "relu" else x.flatten(1)
            else:
                x = self.get_submodule(step)(x)
        return x


def build(spec: dict[str, Any]) -> nn.Module:
    """A base from its spec, with random weights; several parts become children of one module."""
    if "kind" not in spec:
        return nn.ModuleDict({name: build(part) for name, part in spec.items()})
    if spec["kind"] == "toy":
        return Toy(spec)
    if spec["kind"] == "hf":
        import transformers

        kind = getattr(transformers, spec["cls"])
        return kind(kind.config_class(**spec["config"]))  # type: ignore[no-any-return]
    import diffusers

    return getattr(diffusers, spec["cls"])(**spec["config"])  # type: ignore[no-any-return]


def base_of(case: Case) -> nn.Module:
    """The base, with the weights the file is for."""
    model = build(case.spec["base"])
    own = set(model.state_dict())
    # CLIP's text encoder had one more level before transformers 5.
    state = {
        key if key in own else key.replace(".text_model.", "."): value
        for key, value in load_file(case.base_file).items()
    }
    model.load_state_dict(state, strict=False)
    return model.eval()
