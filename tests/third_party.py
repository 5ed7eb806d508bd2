"""Layers of transformers that hold weights in their own ways, as rows of the table of layers."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from loraparam.testing import LayerCase

SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "max_position_embeddings": 16,
    "head_dim": 4,
}


@st.composite
def transformers_conv1d(draw: st.DrawFn) -> LayerCase:
    """transformers' Conv1D: a linear layer whose weight is (in, out)."""
    from transformers.pytorch_utils import Conv1D

    out, in_ = draw(st.integers(2, 5)), draw(st.integers(2, 5))
    return LayerCase("transformers_conv1d", lambda: Conv1D(out, in_), lambda: (torch.randn(2, 3, in_),))


class ExpertBlock(nn.Module):
    """The expert module of a mixture, called as its parent does, with a fixed routing."""

    def __init__(self, experts: nn.Module, routed: bool) -> None:
        super().__init__()
        self.experts = experts
        self.routed = routed
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.normal_(std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x is (tokens, hidden)."""
        if not self.routed:
            return self.experts(x.repeat(4, 1))  # type: ignore[no-any-return]
        top = torch.stack([torch.arange(len(x)) % 4, (torch.arange(len(x)) + 1) % 4], dim=1)
        weights = torch.tensor([0.6, 0.4]).to(x).repeat(len(x), 1)
        return self.experts(x, top, weights)  # type: ignore[no-any-return]


def expert_block(kind: str, implementation: str) -> nn.Module:
    """The experts of a tiny mixture of this kind."""
    import transformers as T

    if kind == "mixtral":
        model: Any = T.MixtralModel._from_config(
            T.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **SIZES),
            experts_implementation=implementation,
        )
        return ExpertBlock(model.layers[0].mlp.experts, routed=True)
    if kind == "qwen3_moe":
        config: Any = T.Qwen3MoeConfig(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            **SIZES,
        )
        model = T.Qwen3MoeModel._from_config(config, experts_implementation=implementation)
        return ExpertBlock(model.layers[0].mlp.experts, routed=True)
    if kind == "gpt_oss":
        rope = {"rope_type": "default", "rope_theta": 1e4}
        options: dict[str, Any] = {"layer_types": ["full_attention"], "rope_parameters": rope, **SIZES}
        config = T.GptOssConfig(num_local_experts=4, num_experts_per_tok=2, **options)
        model = T.GptOssModel._from_config(config, experts_implementation=implementation)
        return ExpertBlock(model.layers[0].mlp.experts, routed=True)
    config = T.Llama4TextConfig(
        num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=8, interleave_moe_layer_step=1, **SIZES
    )
    return ExpertBlock(T.Llama4TextModel(config).layers[0].feed_forward.experts, routed=False)


@st.composite
def mixture(draw: st.DrawFn) -> LayerCase:
    """Expert stacks of Mixtral, Qwen3-MoE, GPT-OSS and Llama4, run by each of transformers' implementations."""
    kind = draw(st.sampled_from(["mixtral", "qwen3_moe", "gpt_oss", "llama4"]))
    implementation = draw(st.sampled_from(["eager", "batched_mm", "grouped_mm"]))
    # torch's grouped product knows no float64.
    dtypes = (torch.float32, torch.bfloat16) if implementation == "grouped_mm" else None
    return LayerCase("mixture", lambda: expert_block(kind, implementation), lambda: (torch.randn(4, 8),), dtypes)


THIRD_PARTY_LAYERS: dict[str, st.SearchStrategy[LayerCase]] = {
    "transformers_conv1d": transformers_conv1d(),
    "mixture": mixture(),
}
