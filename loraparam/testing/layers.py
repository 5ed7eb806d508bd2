"""One table of torch's layers with a weight; ``layers()`` draws from all of it."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from .holders import experts, listed, shared
from .layer_cases import LayerCase, cast, varied
from .torch_layers import (
    adaptive_softmax,
    attention,
    bilinear,
    cell,
    conv,
    conv_transpose,
    decoder,
    embedding,
    embedding_bag,
    encoder,
    linear,
    norm,
    recurrent,
)

# One row a layer. Drawing all of them is ``layers()``.
_ROWS: dict[str, st.SearchStrategy[LayerCase]] = {
    "linear": linear(),
    "bilinear": bilinear(),
    "embedding": embedding(),
    "embedding_bag": embedding_bag(),
    **{f"conv{n}d": conv(n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": conv_transpose(n) for n in (1, 2, 3)},
    "attention": attention(),
    "encoder": encoder(),
    "decoder": decoder(),
    "recurrent": recurrent(),
    "cell": cell(),
    "norm": norm(),
    "listed": listed(),
    "shared": shared(),
    "experts": experts(),
    "adaptive_softmax": adaptive_softmax(),
}
LAYERS = {name: varied(cases) for name, cases in _ROWS.items()}


def layers() -> st.SearchStrategy[LayerCase]:
    """Any of torch's layers with a weight, in float32, float64 or bfloat16; shrinks towards a small float32 Linear."""
    return st.builds(cast, st.sampled_from([None, torch.float64, torch.bfloat16]), st.one_of(*LAYERS.values()))
