"""What the tests of both drop-ins and of their files share: training, and the fixtures that the originals wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"


def input_for(layer: str, settings: dict[str, Any]) -> Tensor:
    """A batch for a layer of this class."""
    if layer == "Embedding":
        return torch.randint(settings["num_embeddings"], (4, 3))
    if layer.startswith("Conv"):
        return torch.randn(2, settings["in_channels"], *(6,) * int(layer[4]))
    return torch.randn(3, settings.get("in_features", settings.get("embed_dim")))


def moved(model: nn.Module, *also: str) -> nn.Module:
    """The model, with its factors away from their start, and what has one of these in its name."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if any(part in key for part in ("lora_", *also)):
                value.copy_(torch.randn(value.shape, generator=generator))
    return model


def leaf(tensor: Tensor) -> nn.Parameter:
    """A parameter of its own, with these values."""
    return nn.Parameter(tensor.detach().clone())


class Formula(nn.Module):
    """A plain layer called with W + s·f(A, B)."""

    def __init__(self, plain: nn.Module, scale: float, pairs: dict[str, tuple[nn.Parameter, nn.Parameter, Any]]):
        super().__init__()
        self.plain = plain.requires_grad_(False)
        self.scale = scale
        self.factors = nn.ParameterList([factor for A, B, _ in pairs.values() for factor in (A, B)])
        self.delta = {name: delta for name, (_, _, delta) in pairs.items()}

    def forward(self, *args: Tensor) -> Any:
        weights = {}
        for i, (name, delta) in enumerate(self.delta.items()):
            base = self.plain.get_parameter(name)
            weights[name] = base + self.scale * delta(self.factors[2 * i], self.factors[2 * i + 1])
        return torch.func.functional_call(self.plain, weights, args)


def train(model: nn.Module, batches: list[Tensor], *, eval_between: bool = False, after: Any = None) -> Tensor:
    """The losses of AdamW on whatever is trainable, one batch a step."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.05) if trainable else None
    losses = []
    for x in batches:
        if eval_between:
            model.eval()
            model(x)
        model.train()
        loss = (model(x) - 1).square().mean()
        losses.append(loss.detach())
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if after is not None:
            after(model)
    return torch.stack(losses)


class Case:
    """A file that an original wrote: the layer it came from, and what it makes of an input.

    Attributes:
        layer, settings: the class's name, and its arguments.
        base, expected: the tensors, as in the fixtures' README.
        state: what the original saved.
    """

    def __init__(self, folder: Path) -> None:
        spec = json.loads((folder / "spec.json").read_text())
        self.layer, self.settings = spec["layer"], {**spec["layer_kwargs"], **spec["lora_kwargs"]}
        self.file = folder / "lora.pt"
        self.base, self.expected = (load_file(folder / f"{name}.safetensors") for name in ("base", "expected"))
        self.state = torch.load(self.file, weights_only=True)

    def model(self, module: Any) -> nn.Module:
        """The layer of a library, as "layer", with the base's and the file's values."""
        model = nn.Module()
        model.layer = getattr(module, self.layer)(**self.settings)
        for state in (self.base, self.state):
            assert model.load_state_dict(state, strict=False).unexpected_keys == []
        return model

    def plain(self) -> nn.Module:
        """The model without LoRA, as the base has it."""
        settings = {k: v for k, v in self.settings.items() if k not in ("r", "lora_alpha", "enable_lora")}
        layer = getattr(nn, {"MergedLinear": "Linear"}.get(self.layer, self.layer))(**settings)
        if any(key.startswith("layer.conv.") for key in self.base):
            layer = nn.Sequential()
            layer.conv = nn.Conv2d(**settings)
        model = nn.Module()
        model.layer = layer
        model.load_state_dict(self.base)
        return model

    def hints(self) -> dict[str, Any]:
        """What a reader has to be told."""
        given = {"alpha": self.settings["lora_alpha"]}
        flags = self.settings.get("enable_lora")
        return {**given, "enable_lora": flags} if flags else given

    def output(self, model: nn.Module) -> Tensor:
        """What its layer makes of the fixture's input."""
        x = self.expected["input"]
        return model.layer(x, x, x)[0] if self.layer == "MultiheadAttention" else model.layer(x)


def cases(library: str) -> dict[str, Case]:
    """The fixtures of one library, by name."""
    return {folder.name: Case(folder) for folder in sorted((DATA / library).iterdir())}


FIXTURES = {(library, name): case for library in ("loralib", "loratorch") for name, case in cases(library).items()}
