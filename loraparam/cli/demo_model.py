"""The demo's character-level language model, around an unmodified ``nn.TransformerEncoder``, and its training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .demo_data import VOCABULARY

WINDOW = 32  # characters the model sees
BATCH = 64  # windows per training step
WARM_UP = 20  # steps until the full learning rate
MEASURED = 512  # held-out windows a loss is measured on


class CharModel(nn.Module):
    """Predicts the next character. Nothing in it knows of adapters.

    Args:
        width: size of the hidden states.
        heads: attention heads.
        layers: encoder layers.
    """

    mask: Tensor

    def __init__(self, width: int = 96, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(WINDOW, width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True)
        # Nested tensors are for padded batches; there is no padding here.
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(WINDOW), persistent=False)
        # nn.Embedding's default, N(0, 1), drowns the difference between positions; smaller ones train much faster.
        nn.init.normal_(self.characters.weight, std=0.5)
        nn.init.normal_(self.positions.weight, std=0.1)

    def forward(self, text: Tensor) -> Tensor:
        """Scores of each next character, (batch, length, VOCABULARY), for characters (batch, length)."""
        length = text.shape[1]
        hidden = self.characters(text) + self.positions(torch.arange(length, device=text.device))
        hidden = self.encoder(hidden, mask=self.mask[:length, :length], is_causal=True)
        scores: Tensor = self.head(hidden)
        return scores


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    text: Tensor,
    steps: int,
    *,
    generator: torch.Generator,
    on_step: Callable[[], object],
) -> None:
    """Train ``model`` on random windows of ``text``, in place: warm up, then a cosine down to zero.

    Args:
        model: in train mode afterwards.
        optimizer: over what is to be trained; its learning rate is the highest.
        text: characters, (n,) uint8.
        steps: optimizer steps.
        generator: draws the windows.
        on_step: called after every step.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(text) - WINDOW, (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss(model, windows(text, starts)).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        on_step()


def windows(text: Tensor, starts: Tensor) -> Tensor:
    """``WINDOW`` characters and the one after, from each start, (len(starts), WINDOW + 1) int64."""
    return text[starts[:, None] + torch.arange(WINDOW + 1)].long()


def held_out_windows(text: Tensor, count: int = MEASURED) -> Tensor:
    """Up to ``count`` windows at equal distances over ``text``, the same ones at every call."""
    last = len(text) - WINDOW - 1
    return windows(text, torch.linspace(0, last, min(count, 1 + last // WINDOW)).long())


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy of every next character, in nats."""
    scores: Tensor = model(batch[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())


def measure(model: nn.Module, text: Tensor) -> float:
    """The loss on ``held_out_windows(text)``, in eval mode and without gradients, so on torch's fast path."""
    model.eval()
    with torch.no_grad():
        return loss(model, held_out_windows(text)).item()


@contextmanager
def reproducible(seed: int) -> Iterator[torch.Generator]:
    """Inside: seeded, on one thread. Afterwards: the caller's random state and thread count, as before.

    One thread because sums come out the same on any number of cores, and because matrices this small gain little from
    more: threads that wait for each other make the run slower on a busy machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield torch.Generator().manual_seed(seed)
    finally:
        torch.set_num_threads(threads)
