"""Models of plain torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Case, called, floats, ids, usual_rank

FLATTENED = "its factors of a k×k convolution make up an (out·k, in·k) matrix of rank r·k"
TWICE = "it adds both its adapters, the embedding's and the head's, to the one weight that they share"


def encoder(hidden: int, tokens: int, *, layers: int = 4) -> Case:
    """torch's own TransformerEncoder, whose attention reads its projections itself."""

    def model() -> nn.Module:
        layer = nn.TransformerEncoderLayer(hidden, max(2, hidden // 64), 4 * hidden, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    return Case(
        name="encoder",
        about=f"nn.TransformerEncoder in train mode, {layers} layers, width {hidden}, {tokens} tokens, all linears",
        model=model,
        x=floats(1, tokens, hidden),
        call=called,
        targets="all-linear",
        peft={"target_modules": ["self_attn", "linear1", "linear2"]},
        differs={"PEFT LoRA": "PEFT 0.21.2 adds the delta of a MultiheadAttention's out_proj twice"},
        r=usual_rank(hidden),
        positions=tokens,
    )


class TiedModel(nn.Module):
    """An embedding, a norm, and a head that is the embedding's weight."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.norm(self.embed(ids)))
        return logits


def tied(width: int, tokens: int, vocabulary: int) -> Case:
    """An embedding tied with a head: one adapter of ours, two of PEFT's."""
    return Case(
        name="tied head",
        about=f"embedding tied with the head, vocabulary {vocabulary}, width {width}, {tokens} tokens",
        model=lambda: TiedModel(vocabulary, width),
        x=ids(vocabulary, 1, tokens),
        call=called,
        targets="embed",
        peft={"target_modules": ["embed", "head"]},
        differs={
            "PEFT DoRA": "PEFT's has magnitudes for the head's rows, one a token, ours for the embedding's columns",
            **{f"{name} merged": TWICE for name in ("PEFT", "loralib", "LoRA-Torch")},
        },
        r=usual_rank(width),
        positions=tokens,
        entry="embed",
    )


def convolutions(width: int, images: int) -> Case:
    """A stack of 3×3 convolutions."""

    def model() -> nn.Module:
        layers = [(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU()) for _ in range(4)]
        return nn.Sequential(*(part for layer in layers for part in layer))

    return Case(
        name="convolutions",
        about=f"4 × (Conv2d 3×3, BatchNorm2d, GELU), width {width}, {images} images of 16×16",
        model=model,
        x=floats(images, width, 16, 16),
        call=called,
        targets=nn.Conv2d,
        peft={"target_modules": ["0", "3", "6", "9"]},
        differs={"loralib LoRA": FLATTENED, "LoRA-Torch LoRA": FLATTENED},
        r=usual_rank(width),
        positions=images * 16 * 16,
    )


class Embedded(nn.Module):
    """An embedding and a norm: what it costs to look up."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        """Normed embeddings."""
        y: Tensor = self.norm(self.embed(ids))
        return y


def embedding(vocabulary: int, width: int, tokens: int) -> Case:
    """A vocabulary of which a step sees a few rows."""
    return Case(
        name=f"embedding {vocabulary // 1000 or vocabulary}{'k' * (vocabulary >= 1000)}",
        about=f"embedding and norm, vocabulary {vocabulary}, width {width}, {tokens} tokens",
        model=lambda: Embedded(vocabulary, width),
        x=ids(vocabulary, 1, tokens),
        call=called,
        targets="embed",
        peft={"target_modules": ["embed"]},
        r=usual_rank(width),
        positions=tokens,
        entry="embed",
        lookup=True,
    )


class UNet(nn.Module):
    """Down, across and up again, with what the way down saw beside what comes up: 3×3 and 1×1 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.Conv2d(2 * width, width, 1)
        self.last = nn.Conv2d(2 * width, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for channels in (width, 2 * width, 2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Images of the same size."""
        high = F.silu(self.norms[0](self.first(x)))
        low = F.silu(self.norms[1](self.down(high)))
        low = F.silu(self.norms[2](self.middle(low)))
        up = F.silu(self.norms[3](F.interpolate(self.up(low), scale_factor=2.0)))
        y: Tensor = self.last(torch.cat([high, up], dim=1))
        return y


def unet(width: int, images: int, *, side: int) -> Case:
    """A small convolutional UNet."""
    return Case(
        name="unet",
        about=f"UNet of 5 convolutions, width {width} and {2 * width}, {images} images of {side}×{side}",
        model=lambda: UNet(width),
        x=floats(images, width, side, side),
        call=called,
        targets=nn.Conv2d,
        peft={"target_modules": ["first", "down", "middle", "up", "last"]},
        differs={"loralib LoRA": FLATTENED, "LoRA-Torch LoRA": FLATTENED},
        r=usual_rank(width),
        positions=images * side * side,
        rows={"down.*": 0.25, "middle.*": 0.25, "up.*": 0.25},
    )


def _first(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = model(x)[0]
    return output


def lstm(width: int, tokens: int, batch: int) -> Case:
    """torch's LSTM, whose kernel reads dense weights."""
    weights = [f"weight_{kind}_l{layer}" for layer in range(2) for kind in ("ih", "hh")]
    return Case(
        name="lstm",
        about=f"nn.LSTM, 2 layers, width {width}, {batch} × {tokens} tokens, all four weights",
        model=lambda: nn.Sequential(nn.LSTM(width, width, num_layers=2, batch_first=True)),
        x=floats(batch, tokens, width),
        call=_first,
        targets=weights,
        peft={"target_modules": [], "target_parameters": weights},
        r=usual_rank(width),
        positions=batch * tokens,
    )


def many_linears(count: int, width: int, r: int) -> Case:
    """A model of very many targets, for what grows with their number."""
    return Case(
        name=f"{count} linears",
        about=f"{count} × nn.Linear({width}, {width})",
        model=lambda: nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count))),
        x=floats(4, width),
        call=called,
        targets="all-linear",
        peft={"target_modules": r"\d+"},
        r=r,
        positions=4,
    )
