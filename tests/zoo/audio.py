"""Models of sound, of series, and of trajectories."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .entry import (
    DECODER,
    ENCODER_DECODER,
    ENDLESS,
    HIDDEN,
    SEQ2SEQ,
    TEXT_TOWER,
    TOWER,
    VOCABULARY,
    Entry,
    noise,
    prompt,
    tokens,
    transformer,
    waveform,
)

_WAV: dict[str, Any] = {
    **TOWER,
    "vocab_size": VOCABULARY,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "squeeze_factor": 1,
    "conv_pos_kernel_size": 3,
}
_MELS: dict[str, Any] = {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}
_WHISPER: dict[str, Any] = {**ENCODER_DECODER, **_MELS, **ENDLESS, "eos_token_id": 2, "vocab_size": VOCABULARY}
_WHISPER |= {"decoder_start_token_id": 1}
_SPEECH: dict[str, Any] = {**SEQ2SEQ, "max_source_positions": 32, "max_target_positions": 32, "conv_channels": 8}
_SPEECH |= {"input_feat_per_channel": 8, "conv_kernel_sizes": [3, 3]}
_AST: dict[str, Any] = {**TOWER, "num_labels": 3, "patch_size": 4, "max_length": 12, "num_mel_bins": 8}
_AST |= {"frequency_stride": 4, "time_stride": 4}
_CODEC: dict[str, Any] = {
    "num_filters": 4,
    "kernel_size": 3,
    "last_kernel_size": 3,
    "codebook_size": 16,
    "codebook_dim": 8,
}
_CODEC |= {"upsampling_ratios": [2, 2], "hidden_size": 8}
_MIMI: dict[str, Any] = {
    **_CODEC,
    **DECODER,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_residual_layers": 1,
    "vector_quantization_hidden_dimension": 8,
    "num_quantizers": 2,
    "num_semantic_quantizers": 1,
    "upsample_groups": 16,
    "sliding_window": 8,
}
_DAC: dict[str, Any] = {"encoder_hidden_size": 4, "downsampling_ratios": [2, 2], "decoder_hidden_size": 16}
_DAC |= {"n_codebooks": 2, "codebook_size": 16, "codebook_dim": 4, "hidden_size": 8}
_CLAP: dict[str, Any] = {
    "text_config": TEXT_TOWER,
    "projection_dim": 8,
    "audio_config": {
        "spec_size": 8,
        "num_mel_bins": 4,
        "patch_size": 2,
        "patch_stride": [2, 2],
        "patch_embeds_hidden_size": 8,
        "hidden_size": HIDDEN,
        "depths": [1, 1],
        "num_attention_heads": [1, 2],
        "window_size": 2,
        "enable_fusion": False,
    },
}
_SPEECHT5: dict[str, Any] = {
    **{key: value for key, value in ENCODER_DECODER.items() if key != "d_model"},
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_mel_bins": 8,
    "speech_decoder_prenet_units": 16,
    "speech_decoder_prenet_dropout": 0.0,
    "speech_decoder_postnet_units": 8,
    "speech_decoder_postnet_layers": 2,
    "speaker_embedding_dim": 8,
    "max_text_positions": 16,
}
_VITS: dict[str, Any] = {
    **TOWER,
    "vocab_size": VOCABULARY,
    "ffn_dim": 32,
    "flow_size": 16,
    "spectrogram_bins": 8,
    "upsample_initial_channel": 16,
    "upsample_rates": [2, 2],
    "upsample_kernel_sizes": [4, 4],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1]],
    "posterior_encoder_num_wavenet_layers": 1,
    "prior_encoder_num_flows": 1,
    "prior_encoder_num_wavenet_layers": 1,
    "duration_predictor_num_flows": 1,
    "depth_separable_num_layers": 1,
}
_MOONSHINE: dict[str, Any] = {
    f"{side}_num_{what}": n
    for side in ("encoder", "decoder")
    for what, n in (("hidden_layers", 1), ("attention_heads", 2), ("key_value_heads", 2))
}
_MOONSHINE |= {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 32, "eos_token_id": None}
_MUSICGEN: dict[str, Any] = {**TOWER, "vocab_size": VOCABULARY, "ffn_dim": 32, "num_codebooks": 2}
_PATCHTST: dict[str, Any] = {
    **TOWER,
    "num_input_channels": 2,
    "context_length": 16,
    "patch_length": 4,
    "patch_stride": 4,
}
_PATCHTST |= {"prediction_length": 4, "d_model": HIDDEN, "ffn_dim": 32}
_TRAJECTORY: dict[str, Any] = {"state_dim": 4, "act_dim": 3, "hidden_size": HIDDEN, "n_layer": 1, "n_head": 2}
_TRAJECTORY |= {"max_ep_len": 16, "vocab_size": 4, "n_positions": 64}
_SERIES: dict[str, Any] = {**ENCODER_DECODER, "prediction_length": 2, "context_length": 8, "lags_sequence": [1]}
_SERIES |= {"num_time_features": 1}


def _whisper() -> nn.Module:
    model: Any = transformer("WhisperForConditionalGeneration", **_WHISPER)()
    model.generation_config.eos_token_id = None
    return model


def _mels() -> dict[str, Any]:
    return {"input_features": noise(2, 8, 16), "decoder_input_ids": tokens(5)}


def _trajectory() -> dict[str, Any]:
    shapes = {"states": 4, "actions": 3, "rewards": 1, "returns_to_go": 1}
    given = {name: noise(2, 5, size) for name, size in shapes.items()}
    return {**given, "timesteps": torch.arange(5).expand(2, 5), "attention_mask": torch.ones(2, 5)}


def _series() -> dict[str, Any]:
    past = {"past_values": noise(2, 9), "past_time_features": noise(2, 9, 1), "past_observed_mask": torch.ones(2, 9)}
    return {**past, "future_values": noise(2, 2), "future_time_features": noise(2, 2, 1)}


def _speech(name: str, cls: str, sizes: dict[str, Any] = _WAV, inputs: Any = None, **options: Any) -> Entry:
    return Entry(name, transformer(cls, **sizes), inputs or waveform(), **options)


_CODES = "codes are the nearest entries of a codebook, a choice without a gradient"
_MIMI_ENCODER = ("encoder", "encoder_transformer", "downsample", "input_proj")
_VITS_DEAD = {
    "duration_predictor": "durations are rounded, which has no gradient",
    "posterior_encoder": "it encodes the spectrograms of training, which this model does not compute losses for",
}
_OWN: dict[str, Any] = {"pickles": False, "input_gradients": False}

AUDIO = [
    _speech("wav2vec2", "Wav2Vec2Model", output="last_hidden_state", deep=True, **_OWN),
    _speech("wav2vec2-conformer", "Wav2Vec2ConformerForCTC", dead={"pos_conv_embed": "positions are relative"}, **_OWN),
    _speech("hubert", "HubertForCTC", **_OWN),
    _speech("wavlm", "WavLMForCTC", **_OWN),
    _speech("sew", "SEWForCTC", **_OWN),
    _speech("data2vec-audio", "Data2VecAudioForCTC", input_gradients=False),
    Entry("whisper", _whisper, _mels, generates=True, deep=True),
    _speech(
        "speech-to-text",
        "Speech2TextForConditionalGeneration",
        _SPEECH,
        lambda: {"input_features": noise(2, 16, 8), "decoder_input_ids": tokens(5)},
        generates=True,
    ),
    _speech(
        "moonshine",
        "MoonshineForConditionalGeneration",
        _MOONSHINE,
        lambda: {"input_values": noise(2, 1200), "decoder_input_ids": tokens(5)},
        generates=True,
    ),
    _speech("audio-spectrogram", "ASTForAudioClassification", _AST, lambda: {"input_values": noise(2, 12, 8)}),
    _speech(
        "clap", "ClapModel", _CLAP, lambda: {**prompt(), "input_features": noise(2, 1, 16, 4)}, output="logits_per_text"
    ),
    _speech(
        "encodec",
        "EncodecModel",
        {**_CODEC, "num_lstm_layers": 1, "target_bandwidths": [6.0], "sampling_rate": 400},
        waveform(64, 1),
        output="audio_values",
        pickles=False,
        dead={"encoder": _CODES},
    ),
    _speech(
        "mimi", "MimiModel", _MIMI, waveform(64, 1), output="audio_values", dead=dict.fromkeys(_MIMI_ENCODER, _CODES)
    ),
    _speech(
        "speecht5",
        "SpeechT5ForTextToSpeech",
        _SPEECHT5,
        lambda: {**prompt(), "decoder_input_values": noise(2, 6, 8), "speaker_embeddings": noise(2, 8)},
        output="spectrogram",
        dead={"prob_out": "the probability to stop is among the outputs of a loss only"},
    ),
    _speech("vits", "VitsModel", _VITS, prompt, output="waveform", pickles=False, dead=_VITS_DEAD, dtype=torch.float64),
    _speech(
        "musicgen-decoder",
        "MusicgenForCausalLM",
        _MUSICGEN,
        lambda: {"input_ids": tokens(7, batch=4), "encoder_hidden_states": noise(2, 3, HIDDEN)},
    ),
    # A head for each codebook, stacked.
    _speech(
        "csm-depth-decoder",
        "CsmDepthDecoderForCausalLM",
        {**DECODER, "num_codebooks": 4, "backbone_hidden_size": HIDDEN},
        lambda: {"input_ids": tokens(4), "backbone_last_hidden_state": noise(2, HIDDEN)},
        also=("codebooks_head",),
    ),
]

SERIES = [
    _speech(
        "patchtst",
        "PatchTSTForPrediction",
        _PATCHTST,
        lambda: {"past_values": noise(2, 16, 2)},
        output="prediction_outputs",
    ),
    _speech("time-series", "TimeSeriesTransformerForPrediction", _SERIES, _series, output="loss"),
    _speech("decision-transformer", "DecisionTransformerModel", _TRAJECTORY, _trajectory, output="action_preds"),
]
