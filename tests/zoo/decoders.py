"""Decoders of text."""

from __future__ import annotations

from typing import Any

from .entry import DECODER, ENDLESS, HIDDEN, VOCABULARY, Entry, prompt, transformer

_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": HIDDEN, "n_layer": 2, "n_head": 2}
_NEO: dict[str, Any] = {
    "attention_types": [[["global", "local"], 1]],
    "window_size": 4,
    "num_layers": 2,
    "num_heads": 2,
}
_OPT: dict[str, Any] = {"ffn_dim": 32, "word_embed_proj_dim": 8}
_NO_HEAD_DIM = {key: value for key, value in DECODER.items() if key != "head_dim"}
_GEMMA3N: dict[str, Any] = {
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 4,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "altup_num_inputs": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "intermediate_size": [32, 32],
    "activation_sparsity_pattern": [0.0, 0.0],
}


def _decoder(name: str, cls: str, sizes: dict[str, Any] | None = None, **options: Any) -> Entry:
    build = transformer(cls, **(DECODER if sizes is None else sizes))
    return Entry(name, build, prompt, generates=options.pop("generates", True), **options)


_CLAMPED = "in training mode the forward clamps this weight in place, which an adapter would lose: refused by name"

DECODERS = [
    _decoder("llama", "LlamaForCausalLM", deep=True),
    _decoder("gpt2", "GPT2LMHeadModel", {**_GPT2, **ENDLESS}, deep=True),
    _decoder("qwen3", "Qwen3ForCausalLM"),
    _decoder("gemma2", "Gemma2ForCausalLM"),
    _decoder("gemma3", "Gemma3ForCausalLM"),
    _decoder(
        "gemma3n",
        "Gemma3nForCausalLM",
        {**DECODER, **_GEMMA3N},
        exclude={"prediction_coefs": _CLAMPED},
    ),
    _decoder("phi3", "Phi3ForCausalLM"),
    _decoder("gpt-neox", "GPTNeoXForCausalLM"),
    _decoder("gpt-neo", "GPTNeoForCausalLM", {**DECODER, **_NEO}),
    _decoder("gptj", "GPTJForCausalLM", {**_GPT2, **ENDLESS, "rotary_dim": 4}),
    _decoder("opt", "OPTForCausalLM", {**DECODER, **_OPT}),
    _decoder("bloom", "BloomForCausalLM", {**DECODER, "n_layer": 2, "n_head": 2}),
    _decoder(
        "mpt", "MptForCausalLM", {**ENDLESS, "vocab_size": VOCABULARY, "d_model": 16, "n_heads": 2, "n_layers": 2}
    ),
    _decoder("falcon", "FalconForCausalLM", _NO_HEAD_DIM),
    _decoder("olmo2", "Olmo2ForCausalLM"),
    _decoder("apertus", "ApertusForCausalLM"),
    _decoder("diffllama", "DiffLlamaForCausalLM"),
    _decoder("image-gpt", "ImageGPTForCausalImageModeling", _GPT2, generates=False),
    _decoder("modernbert-decoder", "ModernBertDecoderForCausalLM"),
]

_MOE: dict[str, Any] = {**DECODER, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_MOE |= {"moe_intermediate_size": 24, "decoder_sparse_step": 1, "mlp_only_layers": []}
_DEEPSEEK: dict[str, Any] = {
    **DECODER,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
}
_DBRX: dict[str, Any] = {
    **ENDLESS,
    "d_model": HIDDEN,
    "n_heads": 2,
    "n_layers": 1,
    "max_seq_len": 32,
    "vocab_size": VOCABULARY,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
}
_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
_SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 16}


def _mixture(name: str, cls: str, sizes: dict[str, Any] = _MOE, also: tuple[str, ...] = _EXPERTS, **o: Any) -> Entry:
    return _decoder(name, cls, sizes, also=also, **o)


MIXTURES = [
    _mixture("mixtral", "MixtralForCausalLM", deep=True),
    _mixture("qwen3-moe", "Qwen3MoeForCausalLM", deep=True),
    _mixture("gpt-oss", "GptOssForCausalLM", {**_MOE, "layer_types": ["full_attention"] * 2}, deep=True),
    _mixture(
        "llama4",
        "Llama4ForCausalLM",
        {**_MOE, "num_experts_per_tok": 1, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 1},
        deep=True,
    ),
    _mixture("qwen2-moe", "Qwen2MoeForCausalLM", {**_MOE, **_SHARED}),
    _mixture("olmoe", "OlmoeForCausalLM"),
    _mixture("deepseek-v3", "DeepseekV3ForCausalLM", _DEEPSEEK),
    _mixture("jetmoe", "JetMoeForCausalLM", {**_MOE, "kv_channels": 8}, ("input_linear", "output_linear")),
    _mixture("aria", "AriaTextForCausalLM", {**_MOE, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    _mixture("dbrx", "DbrxForCausalLM", _DBRX, ("mlp.w1", "mlp.v1", "mlp.w2")),
]

_MAMBA: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "state_size": 4, "num_hidden_layers": 2}
_MAMBA |= ENDLESS
_MIXER: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
_MIXER |= {"mamba_chunk_size": 4}
_ZAMBA: dict[str, Any] = {
    "layers_block_type": ["mamba", "hybrid"],
    "n_mamba_heads": 4,
    "mamba_headdim": 8,
    "mamba_ngroups": 1,
    "mamba_d_state": 4,
    "num_mem_blocks": 1,
    "chunk_size": 4,
    "use_mem_rope": True,
    "attention_hidden_size": 32,
    "attention_head_dim": 16,
    "adapter_rank": 4,
    "use_shared_mlp_adapter": True,
    "use_shared_attention_adapter": False,
    "use_mamba_kernels": False,
}
_LINEAR: dict[str, Any] = {f"linear_{what}_head_dim": 8 for what in ("key", "value")}
_LINEAR |= {f"linear_num_{what}_heads": 2 for what in ("key", "value")}
_JAMBA: dict[str, Any] = {f"{what}_layer_period": 2 for what in ("attn", "expert")}
_JAMBA |= {f"{what}_layer_offset": 1 for what in ("attn", "expert")}
_JAMBA |= {"mamba_d_state": 4, "mamba_d_conv": 3, "mamba_dt_rank": 4, "use_mamba_kernels": False}
_RWKV: dict[str, Any] = {**_MAMBA, "attention_hidden_size": HIDDEN, "intermediate_size": 32, "context_length": 16}
_RESCALED = (
    "leaving training mode, its forward divides these weights in place, which an adapter would lose: refused by name"
)

STATE_SPACES = [
    _decoder("mamba", "MambaForCausalLM", {**_MAMBA, "expand": 2, "time_step_rank": 4}, deep=True),
    _decoder("mamba2", "Mamba2ForCausalLM", {**_MAMBA, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}),
    _mixture("jamba", "JambaForCausalLM", {**_MOE, **_JAMBA}),
    _decoder("bamba", "BambaForCausalLM", {**DECODER, **_MIXER, "attn_layer_indices": [1]}),
    _decoder("zamba2", "Zamba2ForCausalLM", {**DECODER, **_ZAMBA}),
    _mixture(
        "qwen3-next",
        "Qwen3NextForCausalLM",
        {**_MOE, **_LINEAR, **_SHARED, "layer_types": ["linear_attention", "full_attention"]},
    ),
    _mixture(
        "minimax",
        "MiniMaxForCausalLM",
        {**_MOE, "layer_types": ["linear_attention", "full_attention"], "block_size": 4},
    ),
    _decoder(
        "lfm2",
        "Lfm2ForCausalLM",
        {**DECODER, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    _decoder(
        "recurrent-gemma",
        "RecurrentGemmaForCausalLM",
        {
            **DECODER,
            "lru_width": 16,
            "attention_window_size": 4,
            "block_types": ["recurrent", "attention"],
            "conv1d_width": 3,
        },
    ),
    _decoder("rwkv", "RwkvForCausalLM", {**_RWKV, "rescale_every": 0, "use_cache": False}),
    _decoder(
        "rwkv, rescaled",
        "RwkvForCausalLM",
        {**_RWKV, "rescale_every": 1, "use_cache": False},
        exclude={"attention.output": _RESCALED, "feed_forward.value": _RESCALED},
    ),
]
