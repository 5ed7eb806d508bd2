"""Encoders of text, and encoders with decoders."""

from __future__ import annotations

from typing import Any

import torch

from .entry import (
    DECODER,
    HIDDEN,
    SEQ2SEQ,
    TEXT_TOWER,
    VOCABULARY,
    Entry,
    prompt,
    prompt_and_answer,
    tokens,
    transformer,
)

_SIZES: dict[str, Any] = {**TEXT_TOWER, "num_labels": 3}
_NARROW: dict[str, Any] = {**_SIZES, "embedding_size": 8}
_DEBERTA: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
_DISTIL: dict[str, Any] = {"vocab_size": VOCABULARY, "dim": HIDDEN, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
_FUNNEL: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_head": 2, "d_head": 8, "d_inner": 32}
_CANINE: dict[str, Any] = {
    "num_hash_buckets": 16,
    "num_hash_functions": 2,
    "local_transformer_stride": 4,
    "downsampling_rate": 2,
    "upsampling_kernel_size": 2,
}
_PERCEIVER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_latents": 4,
    "d_latents": HIDDEN,
    "d_model": HIDDEN,
    "num_blocks": 1,
    "num_self_attends_per_block": 1,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 2,
    "qk_channels": HIDDEN,
    "v_channels": HIDDEN,
    "max_position_embeddings": 7,
}
_BIG_BIRD: dict[str, Any] = {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}


def _encoder(name: str, cls: str, sizes: dict[str, Any] = _SIZES, inputs: Any = prompt, **options: Any) -> Entry:
    return Entry(name, transformer(cls, **sizes), inputs, **options)


_POOLED = "the head reads the tokens' states, not the pooled one"


def _global() -> dict[str, Any]:
    """With attention from everywhere to the first token."""
    mask = torch.zeros(2, 8, dtype=torch.long)
    mask[:, 0] = 1
    return {"input_ids": tokens(8), "attention_mask": torch.ones_like(mask), "global_attention_mask": mask}


def _long() -> dict[str, Any]:
    return {"input_ids": tokens(24)}


ENCODERS = [
    _encoder("bert", "BertForMaskedLM", deep=True),
    _encoder("roberta", "RobertaForMaskedLM", {**_SIZES, "pad_token_id": 1}),
    _encoder("distilbert", "DistilBertForMaskedLM", {**_DISTIL, "max_position_embeddings": 32}),
    _encoder("albert", "AlbertForMaskedLM", {**_NARROW, "num_hidden_layers": 2}),
    _encoder("deberta", "DebertaForMaskedLM", {**_SIZES, **_DEBERTA}),
    _encoder("deberta-v2", "DebertaV2ForMaskedLM", {**_SIZES, **_DEBERTA}),
    _encoder("modernbert", "ModernBertForMaskedLM", {**_SIZES, "cls_token_id": 1, "sep_token_id": 2}),
    _encoder("mpnet", "MPNetForMaskedLM"),
    _encoder("esm", "EsmForMaskedLM", dead={"contact_head": "contacts are predicted only on request"}),
    _encoder("convbert", "ConvBertForMaskedLM", {**_NARROW, "num_groups": 2}, also=("layer.*.*.dense",)),
    _encoder("squeezebert", "SqueezeBertForMaskedLM", {**_SIZES, "embedding_size": HIDDEN}, dead={"pooler": _POOLED}),
    _encoder(
        "mobilebert", "MobileBertForMaskedLM", {**_NARROW, "true_hidden_size": HIDDEN, "intra_bottleneck_size": HIDDEN}
    ),
    _encoder("ibert", "IBertForMaskedLM"),
    _encoder("fnet", "FNetForMaskedLM", dead={"pooler": _POOLED}),
    _encoder("longformer", "LongformerForMaskedLM", {**_SIZES, "attention_window": 4, "pad_token_id": 1}, _global),
    _encoder("big-bird", "BigBirdForMaskedLM", {**_SIZES, **_BIG_BIRD}, _long, dead={"pooler": _POOLED}),
    _encoder(
        "funnel",
        "FunnelForMaskedLM",
        {**_FUNNEL, "block_sizes": [1, 1], "num_decoder_layers": 1},
        also=("r_kernel",),
    ),
    _encoder(
        "xlnet", "XLNetLMHeadModel", {**_FUNNEL, "n_layer": 1}, also=tuple(f"rel_attn.{letter}" for letter in "qkvor")
    ),
    _encoder(
        "canine",
        "CanineForTokenClassification",
        {**_SIZES, **_CANINE},
        lambda: {"input_ids": tokens(8)},
        dead={"pooler": _POOLED},
    ),
    _encoder("perceiver", "PerceiverForMaskedLM", _PERCEIVER),
]

_T5: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 32, "num_heads": 2}
_T5 |= {"num_layers": 1, "decoder_start_token_id": 0, "eos_token_id": None}
_SWITCH: dict[str, Any] = {"num_layers": 2, "num_experts": 2, "router_jitter_noise": 0.0}
_SWITCH |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_decoder_layers": 2}
_PROPHET: dict[str, Any] = {
    f"num_{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))
}
_PROPHET |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "hidden_size": HIDDEN, "vocab_size": VOCABULARY}
_LED: dict[str, Any] = {
    "attention_window": 4,
    "max_encoder_position_embeddings": 32,
    "max_decoder_position_embeddings": 32,
}
_FSMT: dict[str, Any] = {key: value for key, value in SEQ2SEQ.items() if key != "vocab_size"}
_FSMT |= {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["en", "de"]}
_NLLB: dict[str, Any] = {"num_experts": 2, "expert_capacity": 16, "encoder_sparse_step": 1, "decoder_sparse_step": 1}


def _seq2seq(name: str, cls: str, sizes: dict[str, Any] = SEQ2SEQ, inputs: Any = prompt_and_answer, **o: Any) -> Entry:
    return Entry(name, transformer(cls, **sizes), inputs, generates=True, **o)


def _long_and_answer() -> dict[str, Any]:
    return {**_long(), "decoder_input_ids": tokens(5)}


SEQ2SEQS = [
    _seq2seq("t5", "T5ForConditionalGeneration", _T5, deep=True),
    _seq2seq("longt5", "LongT5ForConditionalGeneration", _T5),
    _seq2seq("switch-transformers", "SwitchTransformersForConditionalGeneration", {**_T5, **_SWITCH}),
    _seq2seq("bart", "BartForConditionalGeneration"),
    _seq2seq("pegasus", "PegasusForConditionalGeneration"),
    _seq2seq("marian", "MarianMTModel"),
    _seq2seq("m2m100", "M2M100ForConditionalGeneration"),
    _seq2seq("nllb-moe", "NllbMoeForConditionalGeneration", {**SEQ2SEQ, **_NLLB}),
    _seq2seq(
        "led", "LEDForConditionalGeneration", {**SEQ2SEQ, **_LED}, lambda: {**_global(), "decoder_input_ids": tokens(5)}
    ),
    _seq2seq("bigbird-pegasus", "BigBirdPegasusForConditionalGeneration", {**SEQ2SEQ, **_BIG_BIRD}, _long_and_answer),
    _seq2seq("prophetnet", "ProphetNetForConditionalGeneration", {**_PROPHET, "max_position_embeddings": 32}),
    _seq2seq("fsmt", "FSMTForConditionalGeneration", _FSMT),
    _seq2seq(
        "t5gemma",
        "T5GemmaForConditionalGeneration",
        {"encoder": DECODER, "decoder": {**DECODER, "cross_attention_hidden_size": HIDDEN}, "vocab_size": VOCABULARY},
    ),
]
