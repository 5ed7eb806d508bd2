"""Denoisers and autoencoders of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .entry import Entry, noise


def _diffuser(
    name: str, cls: str, sizes: dict[str, Any], inputs: Callable[[], dict[str, Any]], **options: Any
) -> Entry:
    def build() -> nn.Module:
        import diffusers

        model: nn.Module = getattr(diffusers, cls)(**sizes)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    return Entry(name, build, inputs, output=options.pop("output", "sample"), **options)


def _times() -> Tensor:
    return torch.tensor([3, 7])


def _latents(channels: int = 4) -> dict[str, Tensor]:
    return {"sample": noise(2, channels, 8, 8), "timestep": _times()}


def _guided() -> dict[str, Tensor]:
    return {**_latents(), "encoder_hidden_states": noise(2, 3, 8)}


def _hidden(*shape: int, times: Tensor | None = None) -> dict[str, Any]:
    """Latents and a caption, as transformers of diffusers take them."""
    hidden = noise(*(shape or (2, 4, 8, 8)))
    times = _times() if times is None else times
    return {
        "hidden_states": hidden,
        "encoder_hidden_states": noise(len(hidden), 3, 8),
        "timestep": times[: len(hidden)],
    }


def _fractions() -> Tensor:
    return torch.tensor([0.3, 0.7])


def _flux() -> dict[str, Any]:
    places = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    return {**_hidden(2, 4, 4, times=_fractions()), **places}


_BLOCKS: dict[str, Any] = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
_CROSS: dict[str, Any] = {"cross_attention_dim": 8, "attention_head_dim": 4}
_UNET: dict[str, Any] = {
    **_BLOCKS,
    **_CROSS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
_PLAIN_UNET: dict[str, Any] = {
    **_BLOCKS,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
_FILM_UNET: dict[str, Any] = {
    **_BLOCKS,
    **_CROSS,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
_CONTROL: dict[str, Any] = {key: value for key, value in _UNET.items() if key not in ("sample_size", "up_block_types")}
_CONTROL |= {"conditioning_embedding_out_channels": (4, 8)}
_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
_SQUARE: dict[str, Any] = {**_HEADS, "in_channels": 4, "sample_size": 8, "patch_size": 2}
_DIT: dict[str, Any] = {**_SQUARE, "out_channels": 8, "num_embeds_ada_norm": 10, "norm_type": "ada_norm_zero"}
_DIT |= {"norm_elementwise_affine": False}
_PIXART: dict[str, Any] = {**_SQUARE, "out_channels": 8, "caption_channels": 8, "cross_attention_dim": 16}
_PIXART |= {"use_additional_conditions": False}
_SD3: dict[str, Any] = {**_SQUARE, "num_layers": 2, "out_channels": 4, "joint_attention_dim": 8, "qk_norm": "rms_norm"}
_SD3 |= {
    "caption_projection_dim": 16,
    "pooled_projection_dim": 8,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
}
_FLUX: dict[str, Any] = {**_HEADS, "patch_size": 1, "in_channels": 4, "num_single_layers": 1, "joint_attention_dim": 8}
_FLUX |= {"pooled_projection_dim": 8, "axes_dims_rope": (2, 2, 4), "guidance_embeds": True}
_CHROMA: dict[str, Any] = {
    key: value for key, value in _FLUX.items() if key not in ("pooled_projection_dim", "guidance_embeds")
}
_CHROMA |= {f"approximator_{what}": n for what, n in (("num_channels", 8), ("hidden_dim", 8), ("layers", 1))}
_AURA: dict[str, Any] = {key: value for key, value in _SQUARE.items() if key != "num_layers"}
_AURA |= {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "joint_attention_dim": 8, "caption_projection_dim": 16}
_AURA |= {"out_channels": 4, "pos_embed_max_size": 16}
_SANA: dict[str, Any] = {**_SQUARE, "patch_size": 1, "out_channels": 4, "caption_channels": 8, "mlp_ratio": 2.0}
_SANA |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
_LTX: dict[str, Any] = {**_HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "caption_channels": 8}
_WAN: dict[str, Any] = {
    **_HEADS,
    "attention_head_dim": 12,
    "patch_size": (1, 2, 2),
    "in_channels": 4,
    "out_channels": 4,
}
_WAN |= {"text_dim": 8, "freq_dim": 8, "ffn_dim": 32, "rope_max_seq_len": 16}
_NUCLEUS: dict[str, Any] = {**_HEADS, "in_channels": 4, "out_channels": 4, "patch_size": 1, "joint_attention_dim": 8}
_NUCLEUS |= {"axes_dims_rope": (2, 2, 4), "num_experts": 3, "moe_intermediate_dim": 12, "capacity_factors": 2.0}
_NUCLEUS |= {"dense_moe_strategy": "all_moe"}


def _nucleus() -> nn.Module:
    import diffusers

    model: nn.Module = diffusers.NucleusMoEImageTransformer2DModel(**_NUCLEUS)
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # which diffusers leaves as memory happens to be
            nn.init.normal_(parameter, std=0.1)
    return model


_COG: dict[str, Any] = {**_HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 4, "text_embed_dim": 8}
_COG |= {"sample_width": 4, "sample_height": 4, "sample_frames": 5, "patch_size": 2, "max_text_seq_length": 3}
_LUMINA: dict[str, Any] = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "num_layers": 1}
_LUMINA |= {"num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "cap_feat_dim": 8}
_LUMINA |= {"axes_dim_rope": (4, 2, 2), "axes_lens": (32, 8, 8)}
_PRIOR: dict[str, Any] = {**_HEADS, "embedding_dim": 8, "num_embeddings": 3, "additional_embeddings": 4}

DENOISERS = [
    _diffuser("unet", "UNet2DConditionModel", _UNET, _guided),
    _diffuser("unet, unconditional", "UNet2DModel", _PLAIN_UNET, lambda: _latents(3)),
    _diffuser(
        "controlnet",
        "ControlNetModel",
        _CONTROL,
        lambda: {**_guided(), "controlnet_cond": noise(2, 3, 16, 16)},
        output="mid_block_res_sample",
    ),
    _diffuser(
        "dit",
        "DiTTransformer2DModel",
        _DIT,
        lambda: {"hidden_states": noise(2, 4, 8, 8), "timestep": _times(), "class_labels": torch.tensor([1, 2])},
    ),
    _diffuser(
        "pixart",
        "PixArtTransformer2DModel",
        _PIXART,
        lambda: {**_hidden(), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    _diffuser("sd3", "SD3Transformer2DModel", _SD3, lambda: {**_hidden(), "pooled_projections": noise(2, 8)}),
    _diffuser(
        "flux",
        "FluxTransformer2DModel",
        _FLUX,
        lambda: {**_flux(), "pooled_projections": noise(2, 8), "guidance": torch.tensor([1.0, 2.0])},
    ),
    _diffuser(
        "chroma",
        "ChromaTransformer2DModel",
        _CHROMA,
        lambda: {**_flux(), "attention_mask": torch.ones(2, 7, dtype=torch.bool)},
    ),
    _diffuser("auraflow", "AuraFlowTransformer2DModel", _AURA, lambda: _hidden(times=_fractions())),
    _diffuser("sana", "SanaTransformer2DModel", _SANA, _hidden),
    _diffuser(
        "lumina2",
        "Lumina2Transformer2DModel",
        _LUMINA,
        lambda: {
            **_hidden(2, 4, 4, 4, times=_fractions()),
            "encoder_attention_mask": torch.ones(2, 3, dtype=torch.bool),
        },
    ),
    _diffuser(
        "ltx-video",
        "LTXVideoTransformer3DModel",
        _LTX,
        lambda: {
            **_hidden(2, 8, 4),
            "encoder_attention_mask": torch.ones(2, 3, dtype=torch.bool),
            "num_frames": 2,
            "height": 2,
            "width": 2,
        },
    ),
    _diffuser("wan", "WanTransformer3DModel", _WAN, lambda: _hidden(1, 4, 2, 4, 4)),
    Entry(
        "nucleus",
        _nucleus,
        lambda: {**_hidden(2, 4, 4, times=_fractions()), "img_shapes": [(1, 2, 2)] * 2},
        output="sample",
        also=("experts.gate_up_proj", "experts.down_proj"),
    ),
    _diffuser("cogvideox", "CogVideoXTransformer3DModel", _COG, lambda: _hidden(1, 2, 4, 4, 4)),
    _diffuser(
        "prior",
        "PriorTransformer",
        _PRIOR,
        lambda: {**_hidden(2, 8), "proj_embedding": noise(2, 8)},
        output="predicted_image_embedding",
    ),
]

_VAE: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 8}
_VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
_VQ: dict[str, Any] = {key: value for key, value in _VAE.items() if key != "latent_channels"}
_VQ |= {"latent_channels": 3, "num_vq_embeddings": 16}
_TINY: dict[str, Any] = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
_TINY |= {f"num_{side}_blocks": (1, 1) for side in ("encoder", "decoder")}
_DC: dict[str, Any] = {"latent_channels": 4, "attention_head_dim": 4, "scaling_factor": 0.41}
for _side in ("encoder", "decoder"):
    _DC |= {f"{_side}_block_types": ("ResBlock", "EfficientViTBlock"), f"{_side}_block_out_channels": (8, 8)}
    _DC |= {f"{_side}_layers_per_block": (1, 1), f"{_side}_qkv_multiscales": ((), (5,))}
_COG_VAE: dict[str, Any] = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 2,
    "up_block_types": ("CogVideoXUpBlock3D",) * 2,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 2,
    "temporal_compression_ratio": 2,
}
_OOBLECK: dict[str, Any] = {"encoder_hidden_size": 4, "downsampling_ratios": [2, 2], "channel_multiples": [1, 2]}
_OOBLECK |= {"decoder_channels": 4, "decoder_input_channels": 2}


_OLD_WEIGHT_NORM = "its module recomputes it before each forward with nn.utils.weight_norm"


def _sound() -> dict[str, Tensor]:
    return {"sample": noise(2, 2, 32)}


def _picture() -> dict[str, Tensor]:
    return {"sample": noise(2, 3, 8, 8)}


AUTOENCODERS = [
    _diffuser("vae", "AutoencoderKL", _VAE, _picture),
    _diffuser("vq-vae", "VQModel", _VQ, _picture),
    _diffuser(
        "vae, tiny",
        "AutoencoderTiny",
        _TINY,
        _picture,
        dead={"encoder": "latents are rounded to bytes, which has no gradient"},
    ),
    _diffuser("vae, deep compression", "AutoencoderDC", _DC, _picture),
    _diffuser("vae, film", "AutoencoderKLCogVideoX", _COG_VAE, lambda: {"sample": noise(1, 3, 3, 8, 8)}),
    _diffuser("vae, audio", "AutoencoderOobleck", _OOBLECK, _sound, refused=_OLD_WEIGHT_NORM),
]
