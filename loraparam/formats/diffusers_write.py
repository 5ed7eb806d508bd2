"""What a file for diffusers can hold: the tensors of one module, and what all modules of a part share.

diffusers takes ranks, DoRA and biases from the tensors, per part: one DoRA makes every module one, one bias gives a
bias to every module, and releases before August 2026 want one rank. So the modules of a part are written alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import FormatError
from ..layouts import Layout
from ..methods import DoRA, Full, LoRA, Magnitude
from ..methods.lowrank import LowRank
from .bases import Base
from .components import WritePrefix, parts_of, place_below, prefixes_below
from .content import Item
from .pairs import EPS, as_pair, dora_norm, is_read_by_attention
from .portable import padded, pair

_DIFFERENCE = "write its difference with format='kohya', or use format='loraparam'"


def heads(owners: Iterable[str], base: Base | None, prefix: WritePrefix) -> dict[str, tuple[str, str]]:
    """{module path: (part, name in the file)}.

    Raises:
        FormatError: no prefix is for a module, or it is the model itself, which diffusers cannot adapt.
    """
    owners = list(owners)
    given = prefixes_below(prefix) if prefix is not None else parts_of(owners, base) or {"": ""}
    given = {path: part.rstrip(".") for path, part in given.items()}
    found = {}
    for owner in owners:
        place = place_below(owner, given)
        if place is None:
            raise FormatError(f"{owner!r}: prefix={prefix!r} has no module path above it")
        part, rest = place
        if not rest:
            raise FormatError(f"{owner or 'the model'!r}: diffusers adapts modules below a part, not the part itself")
        found[owner] = (part, f"{part}.{rest}" if part else rest)
    return found


@dataclass
class Module:
    """What is written of one module.

    Attributes:
        owner: its path.
        base: the model or checkpoint, which some contents need.
        item: of the weight, a LoRA or DoRA; None where only the bias is trained.
        bias: the trained difference of the bias.
    """

    owner: str
    base: Base | None
    item: Item | None = None
    bias: Tensor | None = None

    def add(self, item: Item) -> None:
        """One of the module's parameters.

        Raises:
            FormatError: there is no form for it.
        """
        name = item.path.rpartition(".")[2]
        if name == "bias" and isinstance(item.method, Full):
            self.bias = item.factors["diff"]
            return
        why = _no_form(item, name, self.base)
        if why:
            raise FormatError(f"{item.path!r}: diffusers has no form for {why}")
        self.item = as_pair(item)

    @property
    def is_dora(self) -> bool:
        """Whether it has a magnitude."""
        return self.item is not None and isinstance(self.item.method, DoRA)

    def rank(self) -> int:
        """Of its pair."""
        return self.item.factors["lora_A"].shape[0] if self.item is not None else 1

    def tensors(self, *, r: int, dora: bool, biased: bool) -> dict[str, Tensor]:
        """{leaf: tensor} at rank ``r``, with the magnitude and the bias that the part's other modules have."""
        item = self.item or self._zero()
        A, B = padded(*pair(item), r)
        shape = self._shape(item)
        ins, ones = (A.shape[1:], ()) if len(shape) == 2 else (shape[1:], (1,) * (len(shape) - 2))
        tensors = {"lora_A.weight": A.reshape(r, *ins), "lora_B.weight": B.reshape(B.shape[0], r, *ones)}
        if dora:
            m = self._magnitude(item)
            tensors["lora_magnitude_vector"] = m.reshape(1, -1, *ones) if ones else m
        if biased:
            tensors["lora_B.bias"] = B.new_zeros(B.shape[0]) if self.bias is None else self.bias
        return tensors

    def _zero(self) -> Item:
        """A pair without effect, for the weight beside a trained bias."""
        path = f"{self.owner}.weight"
        if self.base is None or path not in self.base.names:
            raise FormatError(f"{path!r}: the base is needed to write a pair beside the trained bias")
        assert self.bias is not None
        shape, layout = self.base.shape(path), self.base.layout(path) or Layout()
        item = Item(path, LoRA(r=1), {}, layout, shape)
        if why := _no_form(item, "weight", self.base):
            raise FormatError(f"{self.owner + '.bias'!r}: diffusers has no form for the bias beside {why}")
        _, out, in_ = layout.sizes(shape)
        return replace(item, factors={"lora_A": self.bias.new_zeros(1, in_), "lora_B": self.bias.new_zeros(out, 1)})

    def _shape(self, item: Item) -> tuple[int, ...]:
        if self.base is not None and item.path in self.base.names:
            return self.base.shape(item.path)
        if item.shape is None:
            raise FormatError(f"{item.path!r}: the base is needed to know the parameter's shape")
        return item.shape

    def _magnitude(self, item: Item) -> Tensor:
        """The magnitude for a norm without eps; of a LoRA the length of its rows, which changes nothing."""
        method = item.method if isinstance(item.method, DoRA) else DoRA(r=item.factors["lora_A"].shape[0])
        own = item.factors.get("magnitude")
        if own is not None and method.eps <= EPS:  # the rounding of a float32
            return own
        if self.base is None:
            why = "DoRA with eps" if own is not None else "LoRA beside DoRAs, which diffusers makes one, too"
            raise FormatError(f"{item.path!r}: {why}; the base is needed for the lengths of its rows")
        weight = self.base.tensor(item.path).double()
        assert isinstance(item.method, LowRank)
        norm = dora_norm(item, replace(method, alpha=item.method.scale * method.r, rslora=False), weight)
        scaled = (
            norm if own is None else own.double() * norm / torch.where(norm + method.eps == 0, 1, norm + method.eps)
        )
        return scaled.to(torch.promote_types(item.factors["lora_A"].dtype, torch.float32))


def _no_form(item: Item, name: str, base: Base | None) -> str:
    """What an item is that diffusers cannot hold, and the way out; empty where it can."""
    own = base.layout(item.path) if base is not None and item.path in base.names else None
    layout, shape = own or item.layout, item.shape
    module = base.module(item.path.rpartition(".")[0]) if base is not None else None
    if not isinstance(item.method, (LoRA, DoRA, Magnitude)):
        return f"{type(item.method).__name__}, only for low-rank pairs and biases; {_DIFFERENCE}"
    if name != "weight":
        return f"a parameter {name!r}, only for a module's weight; use format='peft' or 'loraparam'"
    if is_read_by_attention(item.path, base):
        return "the output projection of a MultiheadAttention; use format='peft' or 'loraparam'"
    if layout.lookup:
        return "an embedding alone, whose rank it cannot tell; use format='peft' or 'loraparam'"
    if (
        layout.batch
        or layout.rows is not None
        or layout != item.layout
        or (layout.out and shape is not None and len(shape) > 2)
    ):
        return f"a weight read as {item.layout}; {_DIFFERENCE}"
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        return f"a grouped convolution, whose rank it cannot tell; {_DIFFERENCE}"
    if isinstance(item.method, (DoRA, Magnitude)) and item.method.axis == "in":
        return f"a magnitude per input; {_DIFFERENCE}"
    return ""
