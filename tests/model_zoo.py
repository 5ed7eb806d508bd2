"""The table of models, family by family, and what a method means, written down a second time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.pytorch_utils import Conv1D
from zoo.audio import AUDIO, SERIES
from zoo.decoders import DECODERS, MIXTURES, STATE_SPACES
from zoo.diffusion import AUTOENCODERS, DENOISERS
from zoo.encoders import ENCODERS, SEQ2SEQS
from zoo.entry import HIDDEN, Entry, noise
from zoo.multimodal import MULTIMODAL
from zoo.vision import CONVOLUTIONAL, VISIONS

import loraparam as lp

# Two ways to compute the same float32 weights, or the same product, differ by rounding, which a few layers
# amplify; outputs and gradients are of size 1 to 10, and what adapters do to them is as large.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EXACT = {"rtol": 0, "atol": 0}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside: torch uses one thread; products as small as here lose time in handing work to a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


# --- torch's own ---------------------------------------------------------------------------------------------


def _encoder(norm_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(HIDDEN, 2, 32, dropout=0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


def _decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(HIDDEN, 2, 32, dropout=0, batch_first=True), 2)


def _sequence() -> dict[str, Tensor]:
    return {"src": noise(2, 5, HIDDEN)}


def _pair() -> dict[str, Tensor]:
    return {"tgt": noise(2, 5, HIDDEN), "memory": noise(2, 3, HIDDEN)}


# With fast paths that read weights past the layers' forwards.
TORCH = [
    Entry("torch-encoder", _encoder, _sequence, deep=True),
    Entry("torch-encoder-norm-first", lambda: _encoder(norm_first=True), _sequence, deep=True),
    Entry("torch-decoder", _decoder, _pair, deep=True),
]

# --- the table -----------------------------------------------------------------------------------------------

FAMILIES: dict[str, list[Entry]] = {
    "encoder": ENCODERS,
    "decoder": DECODERS,
    "encoder and decoder": SEQ2SEQS,
    "mixture of experts": MIXTURES,
    "state space": STATE_SPACES,
    "vision": VISIONS,
    "convolutional": CONVOLUTIONAL,
    "audio": AUDIO,
    "multimodal": MULTIMODAL,
    "series": SERIES,
    "denoiser": DENOISERS,
    "autoencoder": AUTOENCODERS,
    "torch": TORCH,
}
MATRIX = {entry.name: entry for family in FAMILIES.values() for entry in family}

# Those that the independent tests run on, beside the matrix.
MODELS = [entry for entry in MATRIX.values() if entry.deep]
TRANSFORMERS = [entry for entry in MODELS if entry not in TORCH]
