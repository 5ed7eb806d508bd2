"""Unmodified models from tiny configs, adapters for them, and what a method means, written down a second time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.pytorch_utils import Conv1D

import loraparam as lp

VOCABULARY, HIDDEN = 64, 16

# Two ways to compute the same float32 weights, or the same product, differ by rounding, which a few layers
# amplify; outputs and gradients are of size 1 to 10, and what adapters do to them is as large.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EXACT = {"rtol": 0, "atol": 0}


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        build: makes it; no dropout, so that train and eval agree.
        inputs: makes one batch of keyword arguments.
        output: the tensor of interest in what the model returns.
        full: parameters with two dims or more that are no matrices, by the end of their path.
        generates: whether it decodes token by token, from its inputs without ``decoder_input_ids``.
        pickles: whether the model itself, without adapters, can be pickled.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    output: str = "logits"
    full: tuple[str, ...] = ()
    generates: bool = False
    pickles: bool = True

    def __str__(self) -> str:
        return self.name

    def model(self) -> Any:
        """A fresh one in train mode, the same bits each time."""
        torch.manual_seed(0)
        model = self.build().train()
        # Zero biases and unit norms would hide what an adapter does to them.
        randomise(model.parameters())
        return model

    def plain(self) -> Any:
        """One in which no parameter is computed from others, not even by the model's own weight_norm."""
        model = self.model()
        for module in model.modules():
            for name in list(getattr(module, "parametrizations", ())):
                parametrize.remove_parametrizations(module, name)
        return model

    def call(self, model: nn.Module) -> Tensor:
        """The output on the batch."""
        result = model(**self.inputs())
        return result if isinstance(result, Tensor) else result[self.output]

    def call_with(self, plain: nn.Module, weights: dict[str, Tensor]) -> Tensor:
        """The output of a plain model with other weights, differentiable in them."""
        result = torch.func.functional_call(plain, weights, kwargs=self.inputs())
        return result if isinstance(result, Tensor) else result[self.output]

    def attach(self, model: nn.Module, recipe: str) -> lp.Plan:
        """Attach the fresh adapters of a recipe, in place."""
        return lp.attach(model, RECIPES[recipe](self), generator=torch.Generator().manual_seed(2))

    def adapt(self, model: nn.Module, recipe: str) -> None:
        """Attach adapters whose factors are as after training, in place: none is zero."""
        self.attach(model, recipe)
        randomise(lp.parameters(model))

    def adapted(self, recipe: str) -> Any:
        """A fresh model with such adapters."""
        model = self.model()
        self.adapt(model, recipe)
        return model


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside: torch uses one thread; products as small as here lose time in handing work to a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def randomise(tensors: Any, seed: int = 3) -> None:
    """Move every tensor by noise, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.3)


# --- adapters ----------------------------------------------------------------------------------------------


def _matrices(entry: Entry) -> Callable[[str, nn.Module, str], bool]:
    def is_matrix(path: str, module: nn.Module, name: str) -> bool:
        return getattr(module, name).dim() >= 2 and "bias" not in name and not path.endswith(entry.full or ("\0",))

    return is_matrix


def _others(entry: Entry) -> Callable[[str, nn.Module, str], bool]:
    is_matrix = _matrices(entry)
    return lambda path, module, name: not is_matrix(path, module, name)


LORA, DORA = lp.LoRA(r=2, alpha=3), lp.DoRA(r=2, alpha=3)

# {name: what to attach}. "everywhere" leaves no parameter out: embeddings, experts, convolutions, norms, biases.
RECIPES: dict[str, Callable[[Entry], Mapping[Any, lp.Method]]] = {
    "lora": lambda entry: {"all-linear": LORA},
    "dora": lambda entry: {"all-linear": DORA},
    "lora-everywhere": lambda entry: {_matrices(entry): LORA, _others(entry): lp.Full()},
    "dora-everywhere": lambda entry: {_matrices(entry): DORA, _others(entry): lp.Full()},
}

# Weights stored (…, in, out); an embedding's rows are its inputs.
TRANSPOSED = (Conv1D, nn.Embedding, GptOssExperts, Llama4TextExperts)


def effective(module: nn.Module, weight: Tensor, method: lp.Method, factors: Mapping[str, Tensor]) -> Tensor:
    """What the method makes of the weight: the papers' formulas in float64, rounded once."""
    W, f = weight.double(), {name: factor.double() for name, factor in factors.items()}
    if isinstance(method, lp.Full):
        return (W + f["diff"]).to(weight.dtype)
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    transposed = isinstance(module, TRANSPOSED)
    W = W.flatten(1) if convolution else W.mT if transposed else W
    W = W + method.alpha / method.r * f["lora_B"] @ f["lora_A"]
    if isinstance(method, lp.DoRA):
        # Section 4.3 of the paper: the norm is a constant in the backward pass.
        W = f["magnitude"].unsqueeze(-1) * W / W.detach().pow(2).sum(-1, keepdim=True).sqrt()
    W = W.mT if transposed else W
    return W.reshape(weight.shape).to(weight.dtype)


def effective_weights(plain: nn.Module, adapted: nn.Module, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{path: effective weight} of an adapted model, from the weights of its plain copy."""
    weights = {}
    for path, method in lp.adapters(adapted)["default"].items():
        parent, _, name = path.rpartition(".")
        module = plain.get_submodule(parent)
        own = {key.rpartition(".")[2]: factor for key, factor in factors.items() if key.rpartition(".")[0] == path}
        weights[path] = effective(module, getattr(module, name), method, own)
    return weights


# --- models ------------------------------------------------------------------------------------------------


def _text(length: int = 7, seed: int = 5) -> Tensor:
    return torch.randint(1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))


def _prompt() -> dict[str, Tensor]:
    return {"input_ids": _text()}


def _prompt_and_answer() -> dict[str, Tensor]:
    return {"input_ids": _text(), "decoder_input_ids": _text(5)}


_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_TOWER = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_IMAGE = {"image_size": 8, "patch_size": 4}


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER))


def _gpt2() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": HIDDEN, "n_layer": 2, "n_head": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = transformers.GPT2Config(**sizes, **tokens, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0)
    return transformers.GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    no_dropout = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    config = transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **_TOWER, **no_dropout)
    return transformers.BertForMaskedLM(config)


def _t5() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    tokens = {"decoder_start_token_id": 0, "eos_token_id": None}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **tokens, dropout_rate=0))


def _vit() -> nn.Module:
    no_dropout = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    config = transformers.ViTConfig(**_TOWER, **_IMAGE, **no_dropout, num_labels=3)
    return transformers.ViTForImageClassification(config)


def _whisper() -> nn.Module:
    layers = {f"{part}_{of}": n for part in ("encoder", "decoder") for of, n in [("layers", 1), ("ffn_dim", 32)]}
    heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    sizes = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "num_mel_bins": 8}
    lengths = {"max_source_positions": 8, "max_target_positions": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**layers, **heads, **sizes, **lengths, **tokens, dropout=0)
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    return model


def _mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def _qwen3_moe() -> nn.Module:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**_DECODER, **experts, mlp_only_layers=[]))


def _gpt_oss() -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.GptOssConfig(**_DECODER, **experts, layer_types=["full_attention"] * 2)
    return transformers.GptOssForCausalLM(config)


def _llama4() -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 32}
    config = transformers.Llama4TextConfig(**_DECODER, **experts, interleave_moe_layer_step=1)
    return transformers.Llama4ForCausalLM(config)


def _mamba() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "state_size": 4, "num_hidden_layers": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, **tokens, expand=2, time_step_rank=4))


def _clip() -> nn.Module:
    text = {**_TOWER, "vocab_size": VOCABULARY, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config={**_TOWER, **_IMAGE}, projection_dim=12)
    return transformers.CLIPModel(config)


def _wav2vec2() -> nn.Module:
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "feat_extract_norm": "layer"}
    position = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop")
    off = {**dict.fromkeys(dropouts, 0.0), "mask_time_prob": 0.0}
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**_TOWER, **convolutions, **position, **off))


def _encoder(norm_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(HIDDEN, 2, 32, dropout=0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


def _decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(HIDDEN, 2, 32, dropout=0, batch_first=True), 2)


def _images() -> dict[str, Tensor]:
    return {"pixel_values": _noise(2, 3, 8, 8)}


def _speech() -> dict[str, Tensor]:
    return {"input_features": _noise(2, 8, 16), "decoder_input_ids": _text(5)}


def _audio() -> dict[str, Tensor]:
    return {"input_values": _noise(2, 400)}


def _sequence() -> dict[str, Tensor]:
    return {"src": _noise(2, 5, HIDDEN)}


TRANSFORMERS = [
    Entry("llama", _llama, _prompt, generates=True),
    Entry("gpt2", _gpt2, _prompt, generates=True),
    Entry("bert", _bert, _prompt),
    Entry("t5", _t5, _prompt_and_answer, generates=True),
    Entry("vit", _vit, _images, full=("cls_token", "position_embeddings")),
    Entry("whisper", _whisper, _speech, generates=True),
    Entry("mixtral", _mixtral, _prompt, generates=True),
    Entry("qwen3-moe", _qwen3_moe, _prompt, generates=True),
    Entry("gpt-oss", _gpt_oss, _prompt, generates=True),
    Entry("llama4", _llama4, _prompt, generates=True),
    Entry("mamba", _mamba, _prompt, generates=True),
    Entry("clip", _clip, lambda: {**_prompt(), **_images()}, output="logits_per_image"),
    Entry("wav2vec2", _wav2vec2, _audio, output="last_hidden_state", pickles=False),
]

# Built by torch, with fast paths that read weights past the layers' forwards.
TORCH = [
    Entry("torch-encoder", _encoder, _sequence),
    Entry("torch-encoder-norm-first", lambda: _encoder(norm_first=True), _sequence),
    Entry("torch-decoder", _decoder, lambda: {"tgt": _noise(2, 5, HIDDEN), "memory": _noise(2, 3, HIDDEN)}),
]

MODELS = TRANSFORMERS + TORCH
