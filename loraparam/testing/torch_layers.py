"""torch's layers with a weight, as strategies that draw their shapes and options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from .layer_cases import N_BATCH, SIZE, LayerCase

# Hypothesis takes the case of the fewest choices for the smallest, and for a smaller one it replays the choices made
# under an earlier row. So each row draws its sizes first, no row makes fewer choices than Linear's three, and options
# that are many for a layer so simple are one choice among their product.
_BOOLEANS = (False, True)


@st.composite
def linear(draw: st.DrawFn) -> LayerCase:
    """Linear, with or without bias, on inputs of one to three dims."""
    in_, out = draw(SIZE), draw(SIZE)
    bias, lead = draw(st.sampled_from([*product((True, False), ((), (1,), (3,), (1, 2), (3, 1)))]))
    return LayerCase("linear", lambda: nn.Linear(in_, out, bias=bias), lambda: (torch.randn(*lead, in_),))


@st.composite
def bilinear(draw: st.DrawFn) -> LayerCase:
    """Bilinear: weight (out, in1, in2)."""
    a, b, out, n = draw(SIZE), draw(SIZE), draw(SIZE), draw(N_BATCH)
    return LayerCase("bilinear", lambda: nn.Bilinear(a, b, out), lambda: (torch.randn(n, a), torch.randn(n, b)))


@st.composite
def embedding(draw: st.DrawFn) -> LayerCase:
    """Embedding with padding_idx, max_norm and scale_grad_by_freq; the padding row is looked up as well."""
    num, dim = draw(SIZE), draw(SIZE)
    padding, max_norm, by_freq = draw(st.sampled_from([*product((None, 0, -1), (None, 0.5), _BOOLEANS)]))
    return LayerCase(
        "embedding",
        lambda: nn.Embedding(num, dim, padding_idx=padding, max_norm=max_norm, scale_grad_by_freq=by_freq),
        lambda: (torch.arange(2 * num).reshape(2, num) % num,),
    )


@st.composite
def embedding_bag(draw: st.DrawFn) -> LayerCase:
    """EmbeddingBag in each mode."""
    num, dim = draw(SIZE), draw(SIZE)
    mode, padding = draw(st.sampled_from([*product(("sum", "mean", "max"), (None, 0, -1))]))
    return LayerCase(
        "embedding_bag",
        lambda: nn.EmbeddingBag(num, dim, mode=mode, padding_idx=padding),
        lambda: (torch.arange(2 * num).reshape(2, num) % num,),
    )


def conv(ndim: int) -> st.SearchStrategy[LayerCase]:
    """Convolutions: groups, depthwise, dilation, every padding mode."""
    cls: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]

    @st.composite
    def case(draw: st.DrawFn) -> LayerCase:
        groups = draw(st.sampled_from([1, 2, 3]))
        depthwise = draw(st.booleans())
        in_ = groups * (1 if depthwise else draw(st.integers(1, 2)))
        out = groups * draw(st.integers(1, 2))
        options: dict[str, Any] = {
            "kernel_size": draw(st.integers(1, 3)),
            "stride": draw(st.integers(1, 2)),
            "padding": draw(st.integers(0, 2)),
            "dilation": draw(st.integers(1, 2)),
            "groups": groups,
            "bias": draw(st.booleans()),
            "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        }
        n = draw(N_BATCH)
        return LayerCase(f"conv{ndim}d", lambda: cls(in_, out, **options), lambda: (torch.randn(n, in_, *[6] * ndim),))

    return case()


def conv_transpose(ndim: int) -> st.SearchStrategy[LayerCase]:
    """Transposed convolutions: groups, strides, output padding."""
    cls: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[ndim - 1]

    @st.composite
    def case(draw: st.DrawFn) -> LayerCase:
        groups = draw(st.sampled_from([1, 2, 3]))
        in_, out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
        stride = draw(st.integers(1, 2))
        options: dict[str, Any] = {
            "kernel_size": draw(st.integers(1, 3)),
            "stride": stride,
            "padding": draw(st.integers(0, 1)),
            "output_padding": draw(st.integers(0, stride - 1)),
            "dilation": draw(st.integers(1, 2)),
            "groups": groups,
            "bias": draw(st.booleans()),
        }
        n = draw(N_BATCH)
        return LayerCase(
            f"conv_transpose{ndim}d", lambda: cls(in_, out, **options), lambda: (torch.randn(n, in_, *[4] * ndim),)
        )

    return case()


class SelfAttention(nn.Module):
    """An ``nn.MultiheadAttention`` as query, key and value of one input; or of three, by its options."""

    def __init__(self, dim: int, heads: int, need_weights: bool, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, **options)
        self.need_weights = need_weights

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Any:
        """Attend."""
        key, value = (query if key is None else key), (query if value is None else value)
        return self.attention(query, key, value, need_weights=self.need_weights)


@st.composite
def attention(draw: st.DrawFn) -> LayerCase:
    """MultiheadAttention: packed or kdim/vdim, bias_k, batch_first, with and without attention weights."""
    heads = draw(st.sampled_from([1, 2]))
    dim = 2 * heads
    names = ("bias", "add_bias_kv", "add_zero_attn", "batch_first")
    options: dict[str, Any] = dict(zip(names, draw(st.sampled_from([*product(_BOOLEANS, repeat=4)])), strict=True))
    need_weights, kind = draw(st.booleans()), draw(st.sampled_from(["self", "cross", "kdim"]))
    if kind == "kdim":
        options |= {"kdim": 3, "vdim": 5}

    def make_inputs() -> Sequence[Tensor]:
        query, key, value = torch.randn(2, 2, dim), torch.randn(2, 2, dim), torch.randn(2, 2, dim)
        if kind == "kdim":
            key, value = torch.randn(2, 2, 3), torch.randn(2, 2, 5)
        return (query,) if kind == "self" else (query, key, value)

    return LayerCase("attention", lambda: SelfAttention(dim, heads, need_weights, **options), make_inputs)


def _transformer_options() -> st.SearchStrategy[dict[str, Any]]:
    flags, activation = st.booleans(), st.sampled_from(["relu", "gelu"])
    return st.fixed_dictionaries({"batch_first": flags, "norm_first": flags, "activation": activation})


@st.composite
def encoder(draw: st.DrawFn) -> LayerCase:
    """TransformerEncoder, whose evaluation takes torch's fused path where it can."""
    layers, options = draw(st.integers(1, 2)), draw(_transformer_options())

    def make_layer() -> nn.Module:
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, **options)
        return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    return LayerCase("encoder", make_layer, lambda: (torch.randn(2, 3, 4),))


@st.composite
def decoder(draw: st.DrawFn) -> LayerCase:
    """TransformerDecoder: self- and cross-attention."""
    layers, options = draw(st.integers(1, 2)), draw(_transformer_options())

    def make_layer() -> nn.Module:
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, **options), layers)

    return LayerCase("decoder", make_layer, lambda: (torch.randn(2, 2, 4), torch.randn(2, 2, 4)))


class Packed(nn.Module):
    """An RNN fed with a packed sequence."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Any:
        """Run sequences of unequal length; x is (2, time, in)."""
        lengths = torch.tensor([x.shape[1], max(1, x.shape[1] - 1)])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        out, state = self.rnn(packed)
        return nn.utils.rnn.pad_packed_sequence(out, batch_first=True)[0], state


@st.composite
def recurrent(draw: st.DrawFn) -> LayerCase:
    """RNN, GRU, LSTM: several layers, both directions, projections, packed sequences."""
    cls: Any = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "batch_first": True,
    }
    if cls is nn.LSTM and draw(st.booleans()):
        options["proj_size"] = 2
    packed, in_ = draw(st.booleans()), draw(SIZE)

    def make_layer() -> nn.Module:
        rnn = cls(in_, 3, **options)
        return Packed(rnn) if packed else rnn

    return LayerCase("recurrent", make_layer, lambda: (torch.randn(2, 3, in_),))


@st.composite
def cell(draw: st.DrawFn) -> LayerCase:
    """RNNCell, GRUCell, LSTMCell."""
    in_, hidden = draw(SIZE), draw(SIZE)
    cls: Any = draw(st.sampled_from([nn.RNNCell, nn.GRUCell, nn.LSTMCell]))
    return LayerCase("cell", lambda: cls(in_, hidden), lambda: (torch.randn(2, in_),))


@st.composite
def norm(draw: st.DrawFn) -> LayerCase:
    """Norms over a vector, a sequence, an image or a film, and PReLU: vectors, for ``Full``."""
    size, ndim = 2 * draw(st.integers(1, 2)), draw(st.integers(1, 3))
    batch, instance = (getattr(nn, f"{kind}Norm{ndim}d") for kind in ("Batch", "Instance"))
    makers: dict[str, Callable[[], nn.Module]] = {
        "layer": lambda: nn.LayerNorm(size),
        "rms": lambda: nn.RMSNorm(size),
        "group": lambda: nn.GroupNorm(2, size),
        "batch": lambda: batch(size),
        "instance": lambda: instance(size, affine=True),
        "prelu": lambda: nn.PReLU(size),
    }
    kind = draw(st.sampled_from(list(makers)))
    shape = (3, 4, size) if kind in ("layer", "rms") else (3, size, *[3] * ndim)
    return LayerCase("norm", makers[kind], lambda: (torch.randn(shape),))


@st.composite
def adaptive_softmax(draw: st.DrawFn) -> LayerCase:
    """AdaptiveLogSoftmaxWithLoss: projections in a Sequential for each cluster of rare classes."""
    size, n, bias = 4 * draw(SIZE), draw(st.integers(3, 5)), draw(st.booleans())
    return LayerCase(
        "adaptive_softmax",
        lambda: nn.AdaptiveLogSoftmaxWithLoss(size, 6, [2, 4], div_value=2.0, head_bias=bias),
        lambda: (torch.randn(n, size), 2 * torch.arange(n) % 6),  # each cluster is reached
    )
