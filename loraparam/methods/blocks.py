"""BlockLoRA: LoRA on some of m equal blocks of output rows, with the blocks' factors stacked.

loralib's ``MergedLinear`` (https://github.com/microsoft/LoRA): block i of those that are on gets s·B_i·A_i, the others
nothing. ``shared`` is LoRA-Torch's way with attention: one A for all blocks, and B only on the rows of those that are
on. As in both, and unlike ``LoRA``, the rank has no ceiling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..errors import LoraparamError, TargetError
from ..forms import Form
from ..functional import lora
from ..layouts import Layout
from .base import Factors, check_choice, need_matrix
from .lowrank import DropoutOn, Init, LowRank


@dataclass(frozen=True, kw_only=True, repr=False)
class BlockLoRA(LowRank):
    """Low-rank update of some blocks of output rows, in factors stacked as loralib stacks them.

    Shapes: with n of the m blocks on, ``lora_A`` (*batch, r·n, in) and ``lora_B`` (*batch, n·out/m, r), block after
    block; with ``shared`` ``lora_A`` (*batch, r, in) and ``lora_B`` (*batch, out, r), of which only the rows of the
    blocks that are on act.

    Args:
        r, alpha, rslora, dropout, dropout_on, init: as for ``LoRA``, with r of each block; any r >= 1.
        blocks: which of the equal blocks are on.
        shared: one A for all of them.

    Raises:
        TargetError: the output rows do not divide into so many blocks.

    Example:
        >>> import torch
        >>> W, lora = torch.zeros(3, 1), BlockLoRA(r=1, alpha=2, blocks=(True, False, True))
        >>> factors = {"lora_A": torch.tensor([[1.0], [2.0]]), "lora_B": torch.tensor([[3.0], [4.0]])}
        >>> lora.apply(W, factors, Layout()).flatten()
        tensor([ 6.,  0., 16.])
    """

    additive: ClassVar[bool] = True

    blocks: tuple[bool, ...] = (True,)
    shared: bool = False

    if TYPE_CHECKING:  # ``init`` is the constructor's argument and a method: see LowRank

        def __init__(
            self,
            *,
            r: int = ...,
            alpha: float | None = ...,
            rslora: bool = ...,
            dropout: float = ...,
            dropout_on: DropoutOn = ...,
            init: Init = ...,
            blocks: tuple[bool, ...] = ...,
            shared: bool = ...,
        ) -> None: ...

    def __post_init__(self, init: str) -> None:  # type: ignore[override]
        super().__post_init__(init)
        given: object = self.blocks
        listed = isinstance(given, (tuple, list)) and all(isinstance(on, bool) for on in given)
        if not listed or not any(self.blocks):
            raise LoraparamError(f"BlockLoRA: blocks={self.blocks!r}; allowed: booleans, at least one of them True")
        check_choice("BlockLoRA", "shared", self.shared, (True, False))
        object.__setattr__(self, "blocks", tuple(self.blocks))  # a file's is a list

    def init(self, weight: Tensor, layout: Layout, *, generator: Generator | None = None) -> Factors:
        """LoRA's start, for all blocks at once."""
        need_matrix(self, weight, layout)
        batch, out, in_ = layout.sizes(weight.shape)
        m, n = len(self.blocks), sum(self.blocks)
        if out % m:
            raise TargetError(f"{out} output rows do not divide into {m} equal blocks")
        A_rows, B_rows = (self.r, out) if self.shared else (self.r * n, out // m * n)
        return self.draw(weight, layout, (*batch, A_rows, in_), (*batch, B_rows, self.r), generator)

    def plain(self, factors: Factors) -> Factors:
        """The same update as ``LoRA``'s: A, and the B beside it, (*batch, out, A's rows), zero where nothing acts."""
        A, B, width = factors["lora_A"], factors["lora_B"], factors["lora_A"].shape[-2]
        stacked = B.chunk(len(self.blocks) if self.shared else sum(self.blocks), -2)
        zero = B.new_zeros(*B.shape[:-2], stacked[0].shape[-2], width)
        queue, parts, column = iter(stacked), [], 0
        for on in self.blocks:
            own = next(queue) if on or self.shared else zero
            parts.append(F.pad(own, (column, width - self.r - column)) if on else zero)
            column += self.r if on and not self.shared else 0
        return {"lora_A": A, "lora_B": torch.cat(parts, -2)}

    def apply(self, weight: Tensor, factors: Factors, layout: Layout) -> Tensor:
        """W + s·B_i·A_i on each block i that is on."""
        own = self.plain(factors)
        W = lora(layout.matrix(weight), own["lora_A"], own["lora_B"], self.scale)
        return layout.tensor(W, weight.shape)

    def factored(self, form: Form, factors: Factors) -> Form:
        """One more term."""
        return self.term(form, self.plain(factors))
