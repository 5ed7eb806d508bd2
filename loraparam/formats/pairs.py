"""Low-rank pairs on their way between a file of the diffusion tools and our items."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import FormatError
from ..functional import Axis, lora, row_norm
from ..layouts import Layout
from ..methods import DoRA, LoRA, Magnitude
from .bases import Base
from .content import Item
from .kohya_products import product_of
from .leaves import Group, refuse_growth
from .portable import at_most_full_rank

EPS = torch.finfo(torch.float32).eps  # LyCORIS and ComfyUI add it to a DoRA's norm


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A low-rank pair as matrices, with the scale it was trained with and perhaps a magnitude.

    Attributes:
        A, B: (r, in), (out, r).
        alpha: s = alpha / r, or alpha / √r with ``rslora``; None is r.
        magnitude: of a DoRA, one per output or (``axis="in"``) per input.
        eps: as for ``DoRA``.
    """

    A: Tensor
    B: Tensor
    alpha: float | None = None
    rslora: bool = False
    magnitude: Tensor | None = None
    axis: Axis = "out"
    eps: float = 0.0

    @property
    def scale(self) -> float:
        """s."""
        return LoRA(r=self.A.shape[0], alpha=self.alpha, rslora=self.rslora).scale

    def checked(self, group: Group) -> Pair:
        """The pair, once s·B is known to be finite, which folding and merging rely on."""
        if not float(self.B.abs().max()) * abs(self.scale) <= torch.finfo(torch.float32).max:
            key = "alpha" if "alpha" in group.keys else next(iter(group.keys))
            raise group.error(key, f"the scale {self.scale:g} makes s·B infinite")
        return self

    def item(self, path: str, layout: Layout, shape: tuple[int, ...]) -> Item:
        """As an item, at rank ≤ min(out, in) and without components that only pad it."""
        A, B = _without_padding(self.A, self.B)
        A, B = at_most_full_rank(A, B) if A.shape[0] > min(A.shape[1], B.shape[0]) else (A, B)
        r, alpha, rslora = A.shape[0], self.alpha, self.rslora
        if r != self.A.shape[0]:
            alpha, rslora = self.scale * r, False
        factors = {"lora_A": A, "lora_B": B}
        if self.magnitude is None:
            return Item(path, LoRA(r=r, alpha=alpha, rslora=rslora), factors, layout, shape)
        factors["magnitude"] = self.magnitude.reshape(-1)
        method = DoRA(r=r, alpha=alpha, rslora=rslora, axis=self.axis, eps=self.eps)
        return Item(path, method, factors, layout, shape)


def _without_padding(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The pair without components that are zero on both sides, which change nothing and can never train."""
    used = (A != 0).any(1) | (B != 0).any(0)
    if bool(used.all()):
        return A, B
    used[0] |= not bool(used.any())
    return A[used], B[:, used]


def as_pair(item: Item) -> Item:
    """A magnitude alone as a DoRA whose pair is zero."""
    if not isinstance(item.method, Magnitude):
        return item
    assert item.shape is not None
    m = item.factors["magnitude"]
    _, out, in_ = item.layout.sizes(item.shape)
    zeros = {"lora_A": m.new_zeros(1, in_), "lora_B": m.new_zeros(out, 1), "magnitude": m}
    return replace(item, method=DoRA(r=1, axis=item.method.axis), factors=zeros)


def is_read_by_attention(path: str, base: Base | None) -> bool:
    """Whether a parameter is that of torch's MultiheadAttention's ``out_proj``, whose forward is never called.

    Tools that adapt a layer by its forward have no effect there.
    """
    parent = path.rpartition(".")[0].rpartition(".")[0]
    return base is not None and isinstance(base.module(parent), nn.MultiheadAttention)


def dora_norm(item: Item, method: DoRA, weight: Tensor) -> Tensor:
    """‖W + s·B·A‖ along a DoRA's axis, in float64."""
    V = lora(item.layout.matrix(weight), item.factors["lora_A"], item.factors["lora_B"], method.scale)
    return row_norm(V, method.axis)


class Implied:
    """The parameters that a file's own shapes imply, where no base is given: Linear layers, convolutions, embeddings.

    Args:
        groups: the file's modules.
        paths: {module's name in the file: module path}.
    """

    ordered = False

    def __init__(self, groups: Iterable[Group], paths: Mapping[str, str]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.lookups: set[str] = set()
        for group in groups:
            if group.head in paths:
                self._add(group, f"{paths[group.head]}.".removeprefix("."))
        self.names = list(self.shapes)
        self.modules = sorted({"", *(name.rpartition(".")[0] for name in self.names)})

    def _add(self, group: Group, owner: str) -> None:
        known = {leaf: tuple(tensor.shape) for leaf, tensor in group.tensors.items()}
        weight = next((known[leaf] for leaf in ("diff", "w_norm", "set_weight") if leaf in known), None)
        if (product := product_of(group)) is not None:
            weight = product.shape()
            refuse_growth(group, next(iter(known)), product.made(*product.sizes()))
        if "down" in known:
            weight = (known["up"][0], *known["down"][1:])
        if "down" in known and "mid" in known:
            weight = (known["up"][0], *known["down"][1:2], *known["mid"][2:])
            refuse_growth(group, "mid", known["down"][0] * math.prod(known["down"][1:]) * math.prod(known["mid"][2:]))
        if "lora_embedding_A" in known and "lora_embedding_B" in known:
            weight = (*known["lora_embedding_A"][1:], *known["lora_embedding_B"][:1])
            self.lookups.add(f"{owner}weight")
        if weight is not None:
            self.shapes[f"{owner}weight"] = weight
        for leaf in ("lora_B.bias", "diff_b", "b_norm"):
            if leaf in known:
                self.shapes[f"{owner}bias"] = known[leaf]

    def shape(self, path: str) -> tuple[int, ...]:
        """From the pair."""
        return self.shapes[path]

    def layout(self, path: str) -> Layout | None:
        """From the pair's spelling."""
        return Layout(out=1, lookup=True) if path in self.lookups else Layout()

    def module(self, path: str) -> None:
        """Unknown."""

    def aliases(self, path: str) -> list[str]:
        """Its own name: a file does not say what is tied."""
        return [path]

    def tensor(self, path: str) -> Tensor:
        """Unknown."""
        raise FormatError(f"the base is needed for the values of {path!r}")
