"""Transformers and convolutional networks for images and films."""

from __future__ import annotations

from typing import Any

import torch

from .entry import ENCODER_DECODER, TEXT_TOWER, TOWER, VISION, Entry, images, noise, transformer

_LABELS: dict[str, Any] = {"num_labels": 3}
_VIT = ("cls_token", "position_embeddings")
_SWIN: dict[str, Any] = {**_LABELS, "image_size": 8, "patch_size": 2, "embed_dim": 8, "window_size": 2}
_SWIN |= {"depths": [1, 1], "num_heads": [1, 2]}
_HIERA: dict[str, Any] = {
    **_LABELS,
    "image_size": [16, 16],
    "patch_size": [3, 3],
    "patch_stride": [2, 2],
    "patch_padding": [1, 1],
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "mlp_ratio": 2.0,
    "query_stride": [2, 2],
    "num_query_pool": 1,
    "masked_unit_size": [4, 4],
}
_STAGES: dict[str, Any] = {**_LABELS, "hidden_sizes": [8, 16], "depths": [1, 1]}
_PYRAMID: dict[str, Any] = {
    **_STAGES,
    "num_encoder_blocks": 2,
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "sr_ratios": [2, 1],
    "decoder_hidden_size": 8,
}
_BACKBONE: dict[str, Any] = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
_BACKBONE |= {"layer_type": "basic", "out_features": ["stage2"]}
_DETR: dict[str, Any] = {**ENCODER_DECODER, **_LABELS, "num_queries": 3, "backbone_config": _BACKBONE}
_DETR |= {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
_SAM: dict[str, Any] = {
    "vision_config": {
        **TOWER,
        "intermediate_size": None,
        "image_size": 16,
        "patch_size": 4,
        "output_channels": 8,
        "num_pos_feats": 4,
        "window_size": 2,
        "global_attn_indexes": [0],
        "mlp_dim": 32,
    },
    "prompt_encoder_config": {"hidden_size": 8, "image_size": 16, "patch_size": 4, "mask_input_channels": 4},
    "mask_decoder_config": {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "mlp_dim": 16,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 8,
        "iou_head_depth": 2,
    },
}
_MAE: dict[str, Any] = {f"decoder_{key}": value for key, value in TOWER.items()}
_DPT: dict[str, Any] = {**TOWER, "num_hidden_layers": 4, "image_size": 16, "patch_size": 4}
_DPT |= {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [4] * 4, "reassemble_factors": [1] * 4}
_DPT |= {"fusion_hidden_size": 4}
_SIGLIP: dict[str, Any] = {**_LABELS, "vision_config": VISION, "text_config": TEXT_TOWER}


def _vision(name: str, cls: str, sizes: dict[str, Any] = VISION, inputs: Any = None, **options: Any) -> Entry:
    return Entry(name, transformer(cls, **sizes), inputs or images(), **options)


_AVERAGED = "the classifier averages the tokens instead of pooling them"
_FIRST = "the first fusion has nothing to add"


def _points() -> dict[str, Any]:
    return {
        "pixel_values": noise(1, 3, 16, 16),
        "input_points": torch.ones(1, 1, 1, 2),
        "input_masks": noise(1, 1, 16, 16),
    }


VISIONS = [
    _vision("vit", "ViTForImageClassification", full=_VIT, deep=True),
    _vision("deit", "DeiTForImageClassification"),
    _vision("beit", "BeitForImageClassification"),
    _vision("dinov2", "Dinov2ForImageClassification"),
    _vision("vit-mae", "ViTMAEForPreTraining", {**VISION, **_MAE}, lambda: {**images()(), "noise": noise(2, 4)}),
    _vision("siglip-classifier", "SiglipForImageClassification", _SIGLIP, dead={"head": _AVERAGED}),
    _vision("swin", "SwinForImageClassification", _SWIN),
    _vision("swinv2", "Swinv2ForImageClassification", _SWIN),
    _vision("hiera", "HieraForImageClassification", _HIERA, images(16)),
    _vision("yolos", "YolosForObjectDetection", {**VISION, "image_size": [8, 8], "num_detection_tokens": 3}),
    _vision("detr", "DetrForObjectDetection", _DETR, images(32), dtype=torch.float64),
    _vision("sam", "SamModel", _SAM, _points, output="pred_masks", dtype=torch.float64),
    _vision("segformer", "SegformerForSemanticSegmentation", _PYRAMID, images(16)),
    _vision(
        "dpt",
        "DPTForDepthEstimation",
        _DPT,
        images(16),
        output="predicted_depth",
        dead={"fusion_stage.layers.0.residual_layer1": _FIRST},
    ),
    _vision(
        "vivit", "VivitForVideoClassification", {**VISION, "num_frames": 2, "tubelet_size": [1, 4, 4]}, images(8, 2)
    ),
]

_MOBILEVIT: dict[str, Any] = {**_LABELS, "image_size": 32, "hidden_sizes": [8, 8, 8], "num_attention_heads": 2}
_MOBILEVIT |= {"neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 8], "mlp_ratio": 2.0}
_CVT: dict[str, Any] = {
    **_LABELS,
    "patch_sizes": [3, 3],
    "patch_stride": [2, 2],
    "patch_padding": [1, 1],
    "embed_dim": [8, 16],
    "num_heads": [1, 2],
    "depth": [1, 2],
    "mlp_ratio": [2.0, 2.0],
    "drop_rate": [0.0, 0.0],
    "attention_drop_rate": [0.0, 0.0],
    "drop_path_rate": [0.0, 0.0],
    "qkv_bias": [True, True],
    "cls_token": [False, True],
    "qkv_projection_method": ["dw_bn"] * 2,
    "kernel_qkv": [3, 3],
    "padding_kv": [1, 1],
    "stride_kv": [2, 2],
    "padding_q": [1, 1],
    "stride_q": [1, 1],
}
_LEVIT: dict[str, Any] = {**_LABELS, "image_size": 16, "hidden_sizes": [8] * 3, "num_attention_heads": [1] * 3}
_LEVIT |= {"depths": [1] * 3, "key_dim": [4] * 3, "mlp_ratio": [2] * 3, "attention_ratio": [2] * 3}
_PVT: dict[str, Any] = {
    **_PYRAMID,
    "image_size": 16,
    "patch_sizes": [4, 2],
    "strides": [4, 2],
    "sequence_reduction_ratios": [2, 1],
}
_EFFICIENT: dict[str, Any] = {
    **_LABELS,
    "image_size": 32,
    "in_channels": [8, 8],
    "out_channels": [8, 16],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 2],
    "depthwise_padding": [],
    "width_coefficient": 0.25,
    "depth_coefficient": 1.0,
    "hidden_dim": 320,
}
_FOCAL: dict[str, Any] = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "focal_levels": [1, 1]}
_FOCAL |= {"focal_windows": [3, 3]}
_UPERNET: dict[str, Any] = {**_LABELS, "hidden_size": 8, "pool_scales": [1, 2], "use_auxiliary_head": False}
_UPERNET |= {
    "backbone_config": {
        "model_type": "convnext",
        "hidden_sizes": [8] * 4,
        "depths": [1] * 4,
        "out_features": [f"stage{i}" for i in (1, 2, 3, 4)],
    }
}

CONVOLUTIONAL = [
    _vision(
        "resnet", "ResNetForImageClassification", {**_STAGES, "embedding_size": 8, "layer_type": "basic"}, images(16)
    ),
    _vision("regnet", "RegNetForImageClassification", {**_STAGES, "embedding_size": 8, "groups_width": 4}, images(16)),
    _vision("bit", "BitForImageClassification", {**_STAGES, "embedding_size": 8, "num_groups": 2}, images(16)),
    _vision("convnext", "ConvNextForImageClassification", {**_STAGES, "num_stages": 2}, images(16)),
    _vision("convnextv2", "ConvNextV2ForImageClassification", {**_STAGES, "num_stages": 2}, images(16)),
    _vision("efficientnet", "EfficientNetForImageClassification", _EFFICIENT, images(32)),
    _vision("poolformer", "PoolFormerForImageClassification", {**_PYRAMID, "padding": [1, 1]}, images(16)),
    _vision("focalnet", "FocalNetForImageClassification", {**_STAGES, **_FOCAL}, images(16)),
    _vision("pvt", "PvtForImageClassification", _PVT, images(16)),
    _vision("levit", "LevitForImageClassification", _LEVIT, images(16)),
    _vision("cvt", "CvtForImageClassification", _CVT, images(16)),
]
