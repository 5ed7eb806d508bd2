"""Small models for writing PEFT's format, and what PEFT itself makes of a directory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft_files import Chain, Experts
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def chain(**modules: nn.Module) -> nn.Module:
    """Modules by name, run one after the other; two underscores in a name stand for a dot."""
    model = Chain({}, [name.replace("__", ".") for name in modules])
    for name, module in modules.items():
        *path, leaf = name.split("__")
        parent: nn.Module = model
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, module)
    return model


class Attention(nn.Module):
    """Self-attention and a head."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **settings)
        self.head, self.width = nn.Linear(8, 3), self.attn.kdim

    def forward(self, x: Tensor) -> Tensor:
        other = x[..., : self.width]
        return self.head(self.attn(x, other, other, need_weights=False)[0])


class Tied(nn.Module):
    """A language model's two ends with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.tokens(ids)))


def language_model(kind: str, **settings: Any) -> nn.Module:
    """A model of transformers, about as small as it can be."""
    sizes = {"vocab_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"hidden_size": 8, "intermediate_size": 12, "max_position_embeddings": 32}
    if kind == "GPT2":
        sizes = {"vocab_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 32}
    config = getattr(transformers, f"{kind}Config")(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0, **settings)
    model: nn.Module = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: chain(a=nn.Linear(6, 10), b=nn.Linear(10, 4, bias=False), norm=nn.LayerNorm(4)), (3, 6)),
    "embedding": (lambda: chain(tokens=nn.Embedding(11, 6), head=nn.Linear(6, 3)), ()),
    "convolutions": (
        lambda: chain(one=nn.Conv1d(4, 6, 2), head=nn.Conv1d(6, 3, 1, bias=False)),
        (2, 4, 5),
    ),
    "2d": (lambda: chain(two=nn.Conv2d(4, 6, (3, 2), stride=2, padding=1)), (2, 4, 5, 5)),
    "3d": (lambda: chain(three=nn.Conv3d(2, 3, 2)), (2, 2, 4, 4, 4)),
    "groups": (lambda: chain(two=nn.Conv2d(4, 6, 3, groups=2), one=nn.Conv2d(6, 9, 1, groups=3)), (2, 4, 5, 5)),
    "statistics": (lambda: chain(a=nn.Linear(6, 4), norm=nn.BatchNorm1d(4)), (3, 6)),
    "transposed": (lambda: chain(c=Conv1D(9, 6), a=nn.Linear(9, 9)), (3, 6)),
    "attention": (Attention, (2, 4, 8)),
    "wide attention": (lambda: Attention(kdim=4, vdim=4), (2, 4, 8)),
    "experts": (lambda: chain(a=nn.Linear(6, 6), experts=Experts(3, 6, 5)), (3, 6)),
    "experts, transposed": (lambda: chain(a=nn.Linear(6, 6), experts=Experts(3, 6, 5, is_transposed=True)), (3, 6)),
    "like names": (
        lambda: chain(q=nn.Linear(6, 6), net__q=nn.LayerNorm(6), net__k=nn.Linear(6, 6), k=nn.LayerNorm(6)),
        (3, 6),
    ),
    "Llama": (lambda: language_model("Llama", tie_word_embeddings=False), ()),
    "Mixtral": (lambda: language_model("Mixtral", num_local_experts=3, num_experts_per_tok=2), ()),
    "GLM": (
        lambda: language_model(
            "Glm4Moe",
            head_dim=4,
            n_routed_experts=3,
            num_experts_per_tok=2,
            first_k_dense_replace=0,
            moe_intermediate_size=8,
        ),
        (),
    ),
    "GPT2": (lambda: language_model("GPT2"), ()),
}


def base_and_input(name: str) -> tuple[nn.Module, Tensor]:
    """A model of ``MODELS`` in eval mode, and an input for it."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.5)
    return model, torch.randn(shape) if shape else torch.randint(0, 11, (2, 5))


def output(model: nn.Module, x: Tensor) -> Tensor:
    """What a model computes, without gradients."""
    with torch.no_grad():
        result = model(x)
    return getattr(result, "logits", result)


def in_peft(base: nn.Module, folder: Path) -> nn.Module:
    """A copy of the base with the adapter that PEFT reads from a directory; nothing may be missing or left over."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Merging is not supported", UserWarning)
        # Linear and Conv1D in one file: PEFT sets the flag for each layer, and says so.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        model: nn.Module = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    return model
