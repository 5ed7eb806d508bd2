"""Which cases are measured, in which sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import product

from .case import Case
from .cases_torch import convolutions, embedding, encoder, lstm, tied, unet
from .cases_transformers import gpt2, llama, mixtral

KINDS = ("eager", "grouped_mm", "batched_mm")  # ways in which transformers multiplies by experts


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is.

    Attributes:
        llama: (hidden, tokens, rank) of each Llama stack.
        layers: of the stacks.
        hidden, tokens: of the other sequence models.
        vocabularies: of the embeddings.
        channels, images, side: of the UNet and the stack of convolutions.
        growth: (hidden, tokens) of the stack on which ranks, adapters, targets and batches grow.
        ranks, stacks, kinds, batches: what they grow to.
        targets, width, rank: of the model on which adapters are handled.
        cycles: of merging and unmerging, or toggling.
        block: (hidden, tokens, rank) of the block whose kernels are looked at.
    """

    llama: tuple[tuple[int, int, int], ...]
    layers: int = 2
    hidden: int = 512
    tokens: int = 512
    vocabularies: tuple[int, ...] = (50_257, 128_256)
    channels: int = 64
    images: int = 4
    side: int = 32
    growth: tuple[int, int] = (512, 128)
    ranks: tuple[int, ...] = (8, 64, 256)
    stacks: tuple[int, ...] = (1, 2, 4, 8)
    kinds: tuple[int, ...] = (1, 2, 4, 7)
    batches: tuple[int, ...] = (1, 4, 16)
    targets: int = 1000
    width: int = 128
    rank: int = 8
    cycles: int = 1000
    block: tuple[int, int, int] = (4096, 4096, 16)

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


DEFAULT = Sizes(
    llama=(
        (512, 32, 8),
        (512, 512, 8),
        (512, 512, 64),
        (512, 512, 256),
        (1024, 32, 8),
        (1024, 512, 8),
        (2048, 32, 8),
    )
)
FULL = replace(DEFAULT, llama=tuple(product((512, 1024, 2048), (32, 512, 1024), (8, 64, 256))), layers=4)
# In the tiny sizes no activation is shaped as a weight: 37 tokens or images, and widths that are not 37.
TINY = Sizes(
    llama=((64, 37, 4),),
    layers=1,
    hidden=64,
    tokens=37,
    vocabularies=(211,),
    channels=8,
    images=2,
    side=8,
    growth=(32, 5),
    ranks=(2, 4),
    stacks=(1, 2),
    kinds=(1, 7),
    batches=(1, 2),
    targets=5,
    width=16,
    rank=4,
    cycles=3,
    block=(32, 5, 4),
)


def suite(sizes: Sizes) -> list[Case]:
    """The cases of the whole suite."""
    hidden, tokens = sizes.hidden, sizes.tokens
    vocabulary = sizes.vocabularies[0]
    return [
        # Half as deep where it is widest: a dozen copies have to fit beside each other.
        *(llama(h, t, r=r, layers=sizes.layers if h < 2048 else max(1, sizes.layers // 2)) for h, t, r in sizes.llama),
        encoder(hidden, tokens, layers=sizes.layers),
        gpt2(hidden, tokens, layers=sizes.layers),
        *(embedding(count, hidden // 2, tokens) for count in sizes.vocabularies),
        tied(hidden // 2, tokens // 2 + 1, vocabulary=vocabulary),
        unet(sizes.channels, sizes.images, side=sizes.side),
        *(mixtral(hidden // 2, tokens // 2 + 1, kind) for kind in KINDS[:2]),
        lstm(hidden // 2, tokens // 8 + 1, 8),
    ]


def cases(*, tiny: bool) -> list[Case]:
    """Those of ``python -m benchmarks.execution``; ``tiny`` in sizes that run in moments."""
    tokens = 37 if tiny else 512
    llamas = [(64, 37)] if tiny else [(1024, 512), (512, 512), (512, 32)]
    hidden = 64 if tiny else 512
    return [
        *(llama(hidden, tokens) for hidden, tokens in llamas),
        encoder(hidden, tokens),
        gpt2(hidden, tokens),
        tied(hidden // 2, 37 if tiny else 256, vocabulary=211 if tiny else 50_257),
        convolutions(8 if tiny else 128, images=5 if tiny else 8),
        *(mixtral(hidden // 2, tokens // 2 + 1, kind) for kind in KINDS[:2]),
        # It copies an expert for each token.
        mixtral(hidden // 2, 19 if tiny else 32, KINDS[2]),
    ]
