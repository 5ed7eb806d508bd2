"""Models of images together with text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .entry import (
    DECODER,
    ENDLESS,
    HIDDEN,
    IMAGE,
    TEXT_TOWER,
    TOWER,
    VISION,
    VOCABULARY,
    Entry,
    images,
    noise,
    prompt,
    prompt_and_image,
    tokens,
    transformer,
)

_TWO: dict[str, Any] = {"text_config": TEXT_TOWER, "vision_config": {**TOWER, **IMAGE}, "projection_dim": 12}
_PLACEHOLDER: dict[str, Any] = {"image_token_index": 2, "image_token_id": 2}
_BLIP: dict[str, Any] = {
    **_TWO,
    "text_config": {**TEXT_TOWER, "encoder_hidden_size": HIDDEN},
    "image_text_hidden_size": HIDDEN,
}
_VILT: dict[str, Any] = {**TEXT_TOWER, **IMAGE, "num_labels": 3, "modality_type_vocab_size": 2}
_FLAVA: dict[str, Any] = {"text_config": TEXT_TOWER, "image_config": {**TOWER, **IMAGE}, "multimodal_config": TOWER}
_FLAVA |= {"hidden_size": HIDDEN, "projection_dim": 12}
_LAYOUT: dict[str, Any] = {**TEXT_TOWER, "num_labels": 3, "max_2d_position_embeddings": 16, "coordinate_size": 3}
_LAYOUT |= {"shape_size": 2, "input_size": 8, "patch_size": 4, "pad_token_id": 1}
_LLAVA: dict[str, Any] = {
    **_PLACEHOLDER,
    "text_config": {"model_type": "llama", **DECODER},
    "vision_config": {"model_type": "clip_vision_model", **TOWER, **IMAGE},
    "image_seq_length": 4,
    "vision_feature_layer": -1,
}
_PALIGEMMA: dict[str, Any] = {
    **_PLACEHOLDER,
    "text_config": {"model_type": "gemma", **DECODER},
    "vision_config": {"model_type": "siglip_vision_model", **TOWER, **IMAGE, "projection_dim": HIDDEN},
    "projection_dim": HIDDEN,
}
_QWEN2VL: dict[str, Any] = {
    "text_config": {
        **DECODER,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    },
    "vision_config": {
        "depth": 1,
        "embed_dim": HIDDEN,
        "hidden_size": HIDDEN,
        "num_heads": 2,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "mlp_ratio": 2,
    },
    "image_token_id": 2,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}
_IDEFICS3: dict[str, Any] = {"text_config": {"model_type": "llama", **DECODER}, "vision_config": {**TOWER, **IMAGE}}
_IDEFICS3 |= {"image_token_id": 2, "scale_factor": 2}
_OPT: dict[str, Any] = {"model_type": "opt", **DECODER, "word_embed_proj_dim": HIDDEN, "ffn_dim": 32}
_BLIP2: dict[str, Any] = {
    **_PLACEHOLDER,
    "text_config": _OPT,
    "vision_config": {**TOWER, **IMAGE},
    "qformer_config": {**TEXT_TOWER, "encoder_hidden_size": HIDDEN},
    "num_query_tokens": 2,
}
_GPT2: dict[str, Any] = {**ENDLESS, "model_type": "gpt2", "vocab_size": VOCABULARY, "n_positions": 32, "n_embd": HIDDEN}
_GPT2 |= {"n_layer": 1, "n_head": 2, "add_cross_attention": True, "is_decoder": True}
_PAIR: dict[str, Any] = {"encoder": {"model_type": "vit", **VISION}, "decoder": _GPT2}
_PAIR |= {"decoder_start_token_id": 1, "pad_token_id": 0}
_KOSMOS: dict[str, Any] = {"text_config": {"vocab_size": VOCABULARY, "embed_dim": HIDDEN, "layers": 1, "ffn_dim": 32}}
_KOSMOS["text_config"] |= {"attention_heads": 2, "max_position_embeddings": 32, **ENDLESS}
_KOSMOS |= {"vision_config": {**TOWER, **IMAGE}, "latent_query_num": 2}
_LXMERT: dict[str, Any] = {**TEXT_TOWER, "l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 8}


def _behind(places: int, **more: Tensor) -> dict[str, Tensor]:
    """A prompt that begins with so many placeholders of an image."""
    placeholders = torch.full((2, places), 2)
    return {"input_ids": torch.cat([placeholders, tokens()], dim=1), **more}


def _patches() -> dict[str, Tensor]:
    grid = torch.tensor([[1, 2, 2]] * 2)
    inputs = _behind(1, pixel_values=noise(2 * 4, 3 * 2 * 4 * 4), image_grid_thw=grid)
    return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == 2).int()}


def _regions() -> dict[str, Tensor]:
    return {**prompt(), "visual_feats": noise(2, 3, 8), "visual_pos": noise(2, 3, 4)}


def _embedded() -> dict[str, Tensor]:
    kinds = {"visual_token_type_ids": torch.ones(2, 3, dtype=torch.long), "visual_attention_mask": torch.ones(2, 3)}
    return {**prompt(), "visual_embeds": noise(2, 3, 8), **kinds}


def _located() -> dict[str, Tensor]:
    return {**prompt_and_image(), "bbox": torch.zeros(2, 7, 4, dtype=torch.long)}


def _masked() -> dict[str, Tensor]:
    return {**prompt_and_image(), "image_embeds_position_mask": torch.tensor([[0, 1, 1, 0, 0, 0, 0]] * 2)}


_CONTRAST = "only the contrastive loss projects"
_UNTRAINED = "its forward reads the relative positions under no_grad"
_UNPOOLED = "the decoder attends to the patches, not to the pooled one"


def _both(name: str, cls: str, sizes: dict[str, Any] = _TWO, inputs: Any = prompt_and_image, **options: Any) -> Entry:
    return Entry(name, transformer(cls, **sizes), inputs, **options)


def _talks(name: str, cls: str, sizes: dict[str, Any], inputs: Any, **options: Any) -> Entry:
    return _both(name, cls, sizes, inputs, generates=True, **options)


MULTIMODAL = [
    _both("clip", "CLIPModel", output="logits_per_image", deep=True),
    _both("siglip", "SiglipModel", output="logits_per_image"),
    _both("owlvit", "OwlViTModel", output="logits_per_image"),
    _both("vilt", "ViltForQuestionAnswering", _VILT),
    _both(
        "flava",
        "FlavaModel",
        _FLAVA,
        output="multimodal_embeddings",
        dead=dict.fromkeys(("image_projection", "text_projection"), _CONTRAST),
    ),
    _both("layoutlmv3", "LayoutLMv3ForTokenClassification", _LAYOUT, _located, dead={"rel_pos*bias": _UNTRAINED}),
    _both("lxmert", "LxmertModel", _LXMERT, _regions, output="pooled_output"),
    _both(
        "visual-bert", "VisualBertModel", {**TEXT_TOWER, "visual_embedding_dim": 8}, _embedded, output="pooler_output"
    ),
    _both("git", "GitForCausalLM", {**TEXT_TOWER, "vision_config": {**TOWER, **IMAGE}}),
    _talks("blip", "BlipForConditionalGeneration", _BLIP, prompt_and_image),
    _talks("blip-2", "Blip2ForConditionalGeneration", _BLIP2, lambda: _behind(2, **images()())),
    _talks("llava", "LlavaForConditionalGeneration", _LLAVA, lambda: _behind(4, **images()())),
    _talks(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        _PALIGEMMA,
        lambda: _behind(4, **images()()),
        dead={"vision_tower.head": _UNPOOLED},
    ),
    _talks("qwen2-vl", "Qwen2VLForConditionalGeneration", _QWEN2VL, _patches),
    _talks("idefics3", "Idefics3ForConditionalGeneration", _IDEFICS3, lambda: _behind(1, **images(8, 1)())),
    _talks("kosmos-2", "Kosmos2ForConditionalGeneration", _KOSMOS, _masked),
    _talks(
        "vit-gpt2",
        "VisionEncoderDecoderModel",
        _PAIR,
        lambda: {**images()(), "decoder_input_ids": tokens(5)},
        dead={"pooler": _UNPOOLED},
    ),
]
