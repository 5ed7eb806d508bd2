"""The models that are measured, each with its input and with the same targets for loraparam and for PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and how one step of it is run.

    Attributes:
        name: of the row.
        about: the sizes, in words.
        model: makes the model, with fresh weights.
        x: makes its input: floats, which take gradients, or token ids.
        call: the model's output for it.
        targets: what ``lp.attach`` adapts.
        peft: what makes PEFT adapt the same, as arguments of its ``LoraConfig``.
        r: the rank.
        entry: where x is token ids, the module whose output takes gradients in a frozen model.
        rows: how many rows of input a target multiplies for each one of the others, by its last name.
        differs: of our "LoRA" and "DoRA", those of which PEFT's computes something else, and why.
        needs: packages besides torch.
    """

    name: str
    about: str
    model: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    call: Callable[[nn.Module, Tensor], Tensor]
    targets: Any
    peft: Mapping[str, Any]
    r: int = 16
    entry: str = ""
    rows: Mapping[str, float] = field(default_factory=dict)
    differs: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


def cases(*, tiny: bool) -> list[Case]:
    """All of them; ``tiny`` in sizes that run in moments."""
    # In the tiny sizes no activation is shaped as a weight: 37 tokens or images, and widths that are not 37.
    tokens = 37 if tiny else 512
    llamas = [(64, 37)] if tiny else [(1024, 512), (512, 512), (512, 32)]
    hidden = 64 if tiny else 512
    return [
        *(llama(hidden, tokens) for hidden, tokens in llamas),
        encoder(hidden, tokens),
        gpt2(hidden, tokens),
        tied(hidden // 2, 37 if tiny else 256, vocabulary=211 if tiny else 50_257),
        convolutions(8 if tiny else 128, images=5 if tiny else 8),
        *(mixtral(hidden // 2, tokens // 2 + 1, kind) for kind in ("eager", "grouped_mm")),
        # It copies an expert for each token.
        mixtral(hidden // 2, 19 if tiny else 32, "batched_mm"),
    ]


def _rank(width: int) -> int:
    return 16 if width >= 128 else 4


def _embedded(model: nn.Module, x: Tensor) -> Tensor:
    """A transformers model on embedded tokens."""
    output: Tensor = model(inputs_embeds=x).last_hidden_state
    return output


def _called(model: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = model(x)
    return output


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def llama(hidden: int, tokens: int) -> Case:
    """Four Llama layers, LoRA on all seven linears."""

    def model() -> nn.Module:
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(
            vocab_size=8,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=4,
            num_attention_heads=max(2, hidden // 64),
            use_cache=False,
        )
        return LlamaModel(config)

    return Case(
        name=f"llama {hidden}×{tokens}",
        about=f"4 Llama layers, hidden {hidden}, {tokens} tokens, all linears",
        model=model,
        x=partial(_floats, 1, tokens, hidden),
        call=_embedded,
        targets="all-linear",
        peft={"target_modules": LINEARS},
        r=_rank(hidden),
        needs=("transformers",),
    )


def encoder(hidden: int, tokens: int) -> Case:
    """torch's own TransformerEncoder, whose attention reads its projections itself."""

    def model() -> nn.Module:
        layer = nn.TransformerEncoderLayer(hidden, max(2, hidden // 64), 4 * hidden, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    return Case(
        name="encoder",
        about=f"nn.TransformerEncoder in train mode, 4 layers, width {hidden}, {tokens} tokens, all linears",
        model=model,
        x=partial(_floats, 1, tokens, hidden),
        call=_called,
        targets="all-linear",
        peft={"target_modules": ["self_attn", "linear1", "linear2"]},
        differs={"LoRA": "PEFT 0.21.2 adds the delta of a MultiheadAttention's out_proj twice"},
        r=_rank(hidden),
    )


def gpt2(hidden: int, tokens: int) -> Case:
    """GPT-2, whose Conv1D stores its weight (in, out)."""

    def model() -> nn.Module:
        from transformers import GPT2Config, GPT2Model

        config = GPT2Config(
            vocab_size=8,
            n_positions=tokens,
            n_embd=hidden,
            n_layer=4,
            n_head=max(2, hidden // 64),
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        return GPT2Model(config)

    return Case(
        name="gpt-2",
        about=f"GPT-2 from a config, 4 layers, width {hidden}, {tokens} tokens, all Conv1D",
        model=model,
        x=partial(_floats, 1, tokens, hidden),
        call=_embedded,
        targets="all-linear",
        peft={"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        r=_rank(hidden),
        needs=("transformers",),
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
        x=lambda: torch.randint(vocabulary, (1, tokens)),
        call=_called,
        targets="embed",
        peft={"target_modules": ["embed", "head"]},
        differs={"DoRA": "PEFT's has magnitudes for the head's rows, one a token, ours for the embedding's columns"},
        r=_rank(width),
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
        x=partial(_floats, images, width, 16, 16),
        call=_called,
        targets=nn.Conv2d,
        peft={"target_modules": ["0", "3", "6", "9"]},
        r=_rank(width),
    )


def mixtral(hidden: int, tokens: int, kind: str) -> Case:
    """Mixtral, whose experts are 3-D parameters that one of three functions multiplies."""

    def model() -> nn.Module:
        from transformers import MixtralConfig, MixtralModel

        config = MixtralConfig(
            vocab_size=8,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=max(2, hidden // 64),
            num_key_value_heads=max(2, hidden // 64),
            num_local_experts=8,
            num_experts_per_tok=2,
            use_cache=False,
        )
        model = MixtralModel(config)
        model.set_experts_implementation(kind)
        return model

    return Case(
        name=f"mixtral {kind}",
        about=f"Mixtral, 2 layers, hidden {hidden}, 8 experts of which 2 act, {tokens} tokens, attention and experts",
        model=model,
        x=partial(_floats, 1, tokens, hidden),
        call=_embedded,
        targets=["all-linear", "gate_up_proj", "down_proj"],
        peft={"target_modules": LINEARS[:4], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        r=_rank(hidden),
        rows={"gate_up_proj": 2, "down_proj": 2},
        needs=("transformers",),
    )
