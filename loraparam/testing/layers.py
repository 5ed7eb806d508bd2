"""One table of torch's layers with a weight, as strategies that draw their shapes and options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerCase:
    """A layer to put adapters on.

    Attributes:
        name: its row in the table.
        make_layer: builds it.
        make_inputs: builds its positional arguments.
        dtypes: those that the plain layer itself runs in; None for all.
    """

    name: str
    make_layer: Callable[[], nn.Module]
    make_inputs: Callable[[], Sequence[Any]]
    dtypes: tuple[torch.dtype, ...] | None = None


SIZE = st.integers(2, 5)
N_BATCH = st.integers(1, 3)


@st.composite
def linear(draw: st.DrawFn) -> LayerCase:
    """Linear, with or without bias, on inputs of one to three dims."""
    out, in_, bias = draw(SIZE), draw(SIZE), draw(st.booleans())
    lead = draw(st.lists(st.integers(1, 3), max_size=2))
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
    options: dict[str, Any] = {
        "padding_idx": draw(st.none() | st.integers(0, num - 1)),
        "max_norm": draw(st.none() | st.just(0.5)),
        "scale_grad_by_freq": draw(st.booleans()),
    }
    return LayerCase(
        "embedding", lambda: nn.Embedding(num, dim, **options), lambda: (torch.arange(2 * num).reshape(2, num) % num,)
    )


@st.composite
def embedding_bag(draw: st.DrawFn) -> LayerCase:
    """EmbeddingBag in each mode."""
    num, dim, mode = draw(SIZE), draw(SIZE), draw(st.sampled_from(["sum", "mean", "max"]))
    padding = draw(st.none() | st.integers(0, num - 1))
    return LayerCase(
        "embedding_bag",
        lambda: nn.EmbeddingBag(num, dim, mode=mode, padding_idx=padding),
        lambda: (torch.arange(2 * num).reshape(2, num) % num,),
    )


def _conv(ndim: int) -> st.SearchStrategy[LayerCase]:
    cls: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]

    @st.composite
    def conv(draw: st.DrawFn) -> LayerCase:
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

    return conv()


def _conv_transpose(ndim: int) -> st.SearchStrategy[LayerCase]:
    cls: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[ndim - 1]

    @st.composite
    def conv_transpose(draw: st.DrawFn) -> LayerCase:
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

    return conv_transpose()


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
    options: dict[str, Any] = {
        "bias": draw(st.booleans()),
        "add_bias_kv": draw(st.booleans()),
        "add_zero_attn": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
    }
    need_weights, kind = draw(st.booleans()), draw(st.sampled_from(["self", "cross", "kdim"]))
    if kind == "kdim":
        options |= {"kdim": 3, "vdim": 5}

    def make_inputs() -> Sequence[Tensor]:
        query, key, value = torch.randn(2, 2, dim), torch.randn(2, 2, dim), torch.randn(2, 2, dim)
        if kind == "kdim":
            key, value = torch.randn(2, 2, 3), torch.randn(2, 2, 5)
        return (query,) if kind == "self" else (query, key, value)

    return LayerCase("attention", lambda: SelfAttention(dim, heads, need_weights, **options), make_inputs)


@st.composite
def encoder(draw: st.DrawFn) -> LayerCase:
    """TransformerEncoder, whose evaluation takes torch's fused path where it can."""
    layers, first, norm = draw(st.integers(1, 2)), draw(st.booleans()), draw(st.booleans())
    activation = draw(st.sampled_from(["relu", "gelu"]))

    def make_layer() -> nn.Module:
        layer = nn.TransformerEncoderLayer(
            4, 2, 6, dropout=0.0, batch_first=first, norm_first=norm, activation=activation
        )
        return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    return LayerCase("encoder", make_layer, lambda: (torch.randn(2, 3, 4),))


@st.composite
def decoder(draw: st.DrawFn) -> LayerCase:
    """TransformerDecoder: self- and cross-attention."""
    first = draw(st.booleans())

    def make_layer() -> nn.Module:
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=first), 1)

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
    cls: Any = draw(st.sampled_from([nn.RNNCell, nn.GRUCell, nn.LSTMCell]))
    in_, hidden = draw(SIZE), draw(SIZE)
    return LayerCase("cell", lambda: cls(in_, hidden), lambda: (torch.randn(2, in_),))


@st.composite
def norm(draw: st.DrawFn) -> LayerCase:
    """LayerNorm, RMSNorm, GroupNorm, BatchNorm, PReLU: vectors, for ``Full``."""
    kind, size = (
        draw(st.sampled_from(["layer", "rms", "group", "batch", "instance", "prelu"])),
        2 * draw(st.integers(1, 2)),
    )
    makers: dict[str, Callable[[], nn.Module]] = {
        "layer": lambda: nn.LayerNorm(size),
        "rms": lambda: nn.RMSNorm(size),
        "group": lambda: nn.GroupNorm(2, size),
        "batch": lambda: nn.BatchNorm1d(size),
        "instance": lambda: nn.InstanceNorm1d(size, affine=True),
        "prelu": lambda: nn.PReLU(size),
    }
    shape = (3, size, 4) if kind in ("group", "instance") else (3, size)
    return LayerCase("norm", makers[kind], lambda: (torch.randn(shape),))


class Listed(nn.Module):
    """Parameters in a ParameterList and a ParameterDict, one of them read by this parent, and a 0-dim one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.several = nn.ParameterList([torch.randn(size, size), torch.randn(size, size)])
        self.named = nn.ParameterDict({"gate": torch.randn(size, size)})
        self.inner = nn.Linear(size, size, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        """Chain them all; ``inner`` is never called, only its weight is read."""
        for weight in self.several:
            x = torch.tanh(x @ weight)
        return self.scale * torch.nn.functional.linear(x * torch.sigmoid(x @ self.named["gate"]), self.inner.weight)


@st.composite
def listed(draw: st.DrawFn) -> LayerCase:
    """Parameters in containers, and weights read by a parent instead of their layer."""
    size = draw(SIZE)
    return LayerCase("listed", lambda: Listed(size), lambda: (torch.randn(2, size),))


class Shared(nn.Module):
    """A layer used twice, and an embedding tied with an output projection."""

    def __init__(self, num: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num, dim)
        self.once = nn.Linear(dim, dim)
        self.again = self.once
        self.head = nn.Linear(dim, num, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        """Look up, transform twice, project back."""
        x = torch.tanh(self.once(self.embed(index)))
        return self.head(torch.tanh(self.again(x)))  # type: ignore[no-any-return]


@st.composite
def shared(draw: st.DrawFn) -> LayerCase:
    """Modules used twice and tied weights."""
    num, dim = draw(SIZE), draw(SIZE)
    return LayerCase("shared", lambda: Shared(num, dim), lambda: (torch.arange(num),))


class Experts(nn.Module):
    """A stack of expert matrices, (E, out, in) or (E, in, out), each input routed to one."""

    def __init__(self, experts: int, in_: int, out: int, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        shape = (experts, in_, out) if transposed else (experts, out, in_)
        self.up_proj = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        """One expert for each input, x is (E, n, in); half by a batched product, half by a loop."""
        weight = self.up_proj if self.is_transposed else self.up_proj.transpose(1, 2)
        looped = torch.stack([row @ w for row, w in zip(x, weight, strict=True)])
        return torch.bmm(x, weight) + looped


@st.composite
def experts(draw: st.DrawFn) -> LayerCase:
    """Expert stacks in both orientations."""
    count, in_, out, transposed = draw(st.integers(1, 3)), draw(SIZE), draw(SIZE), draw(st.booleans())
    return LayerCase("experts", lambda: Experts(count, in_, out, transposed), lambda: (torch.randn(count, 2, in_),))


# One row a layer. Drawing all of them is ``layers()``.
LAYERS: dict[str, st.SearchStrategy[LayerCase]] = {
    "linear": linear(),
    "bilinear": bilinear(),
    "embedding": embedding(),
    "embedding_bag": embedding_bag(),
    **{f"conv{n}d": _conv(n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _conv_transpose(n) for n in (1, 2, 3)},
    "attention": attention(),
    "encoder": encoder(),
    "decoder": decoder(),
    "recurrent": recurrent(),
    "cell": cell(),
    "norm": norm(),
    "listed": listed(),
    "shared": shared(),
    "experts": experts(),
}


def layers() -> st.SearchStrategy[LayerCase]:
    """Any of torch's layers with a weight; shrinks towards a small Linear."""
    return st.one_of(*LAYERS.values())
