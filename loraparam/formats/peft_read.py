"""Reading a PEFT adapter's wrappers: each factor in our own shapes, each parameter found in the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import FormatError, listed
from ..layouts import Layout
from ..methods import IA3, DoRA, Full, LoRA, Magnitude, Method
from .bases import Base
from .content import Item
from .peft_config import Config
from .peft_keys import Layer, Tensors
from .peft_places import Places, Spot
from .peft_products import LEAVES, low_rank, miss, product, rank_of, vera
from .peft_shapes import from_experts, from_groups, rescaled_groups
from .peft_starts import starting_pair
from .portable import at_most_full_rank

# What one wrapper may hold, by peft_type.
_LEAVES = {
    "LORA": ({"A", "B"}, {"embedding_A", "embedding_B"}, {"tokens"}),
    "DORA": ({"A", "B"}, {"magnitude"}),
    "IA3": ({"ia3"},),
    **LEAVES,
}


@dataclass
class LayerReader:
    """Turns wrappers into items, and token rows into values of whole embeddings.

    Attributes:
        doubles: whether the delta of an attention's output projection counts twice.
        marks: fingerprints of base weights, by parameter.
        items: what was read.
        rows: new rows of embeddings, with their wrapper.
        values: new values, of what no method expresses.
    """

    tensors: Tensors
    config: Config
    base: Base | None
    places: Places
    doubles: bool
    marks: Mapping[str, list[float]]
    items: list[Item] = field(default_factory=list)
    rows: dict[str, tuple[Layer, Tensor]] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    def error(self, layer: Layer, what: str) -> FormatError:
        """An error about one wrapper."""
        return FormatError(f"{self.tensors.place!r}: {layer.key!r} {what}")

    def read(self, owner: str, layer: Layer) -> None:
        """Add what one wrapper says."""
        self._check_leaves(layer)
        if "tokens" in layer.tensors:
            self._tokens(owner, layer)
        elif "ia3" in layer.tensors:
            self._ia3(owner, layer)
        elif self.config.kind in LEAVES:
            self._product(owner, layer)
        elif "A" in layer.tensors or "embedding_A" in layer.tensors:
            self._low_rank(owner, layer)
        else:
            self._magnitude(owner, layer)

    def _check_leaves(self, layer: Layer) -> None:
        have, config = set(layer.tensors), self.config
        near = [leaves for leaves in _LEAVES[config.kind] if leaves & have] or [_LEAVES[config.kind][0]]
        core = next((leaves for leaves in near if leaves == have), near[0])
        low_rank = bool(core & {"A", "embedding_A"})
        optional = {"magnitude"} if config.kind == "DORA" else set()
        needed = {"magnitude"} if config.dora and low_rank else set()
        needed |= {"bias"} if config.lora_bias and "A" in core else set()
        missing, unexpected = (core | needed) - have, have - core - needed - optional
        if missing:
            raise self.error(layer, f"has no {listed(sorted(missing))} beside it: half of a wrapper is missing")
        if unexpected:
            made = f"peft_type {config.kind!r}, use_dora={config.dora}, lora_bias={config.lora_bias}"
            raise self.error(
                layer, f"has {listed(sorted(unexpected))} beside it, which the config ({made}) does not make"
            )

    # --- s·B·A ----------------------------------------------------------------------------------------------

    def _low_rank(self, owner: str, layer: Layer) -> None:
        kind = "embedding_" if "embedding_A" in layer.tensors else ""
        A, B = layer.tensors[kind + "A"], layer.tensors[kind + "B"]
        if A.dim() != B.dim() or A.dim() < 2 or (kind and A.dim() > 2) or any(size != 1 for size in B.shape[2:]):
            raise self.error(layer, f"and its other half have shapes {tuple(A.shape)} and {tuple(B.shape)}")
        spot = self.places.find(owner, layer, B.shape[0], A.shape[1])
        if spot is None:
            return
        spot = replace(spot, shape=self._fitting_shape(layer, spot, A, B))
        r = A.shape[0]
        if spot.layout.batch:
            A, B = from_experts(A, B, spot.shape[0])  # type: ignore[index]
            r = A.shape[1]
        elif A.shape[0] != B.shape[1]:
            grouped = from_groups(A, B)
            if grouped is None:
                raise self.error(
                    layer,
                    "is a dense convolution before a grouped one, as PEFT trains them: the delta joins channels of "
                    "different groups, which the layer's weight cannot hold (nor can PEFT merge it)",
                )
            A, B = grouped
        else:
            A, B = A.flatten(1), B.flatten(1)
        self._add(layer, spot, A, B, r)

    def _fitting_shape(self, layer: Layer, spot: Spot, A: Tensor, B: Tensor) -> tuple[int, ...]:
        """The shape of the parameter that a pair is for: the base's, if it is that."""
        (r, in_, *kernel), (out, r_B, *_) = A.shape, B.shape
        groups = r // r_B if kernel else 1
        if groups < 1 or r != groups * r_B or in_ % groups or out % groups:
            raise self.error(layer, f"has rank {r}, its other half rank {r_B}")
        expected = [out, in_ // groups, *kernel] if spot.layout.out == 0 else [in_, out]
        if spot.layout.batch and spot.shape is not None:
            expected = list(spot.shape)
            expected[spot.layout.out], expected[3 - spot.layout.out] = out, in_
            if r % spot.shape[0]:
                raise self.error(layer, f"has {r} rows for {spot.shape[0]} experts")
        if spot.shape is not None and tuple(expected) != spot.shape:
            resized = "; was the vocabulary resized? resize the model's first" * spot.layout.lookup
            raise self.error(layer, f"is for shape {tuple(expected)}; {spot.parameter!r} has {spot.shape}{resized}")
        return tuple(expected)

    def _add(self, layer: Layer, spot: Spot, A: Tensor, B: Tensor, r: int) -> None:
        """One pair, of a file's rank ``r`` (a grouped convolution's has another by now)."""
        config = self.config
        alpha = config.alpha_for(spot.name, r)
        scale = LoRA(r=r, alpha=alpha, rslora=config.rslora).scale
        if "bias" in layer.tensors:
            self._bias(layer, spot, layer.tensors["bias"], scale)
        times = 2 if spot.twice and self.doubles else 1
        dora = "magnitude" in layer.tensors
        method: Method = (DoRA if dora else LoRA)(r=r, alpha=times * alpha, rslora=config.rslora)
        if config.start or A.shape[-2] != r or r > min(B.shape[-2], A.shape[-1]):
            A, B = self._folded(layer, spot, A, B, times * scale, r)
            method = (DoRA if dora else LoRA)(r=A.shape[-2])
        factors = {"lora_A": A, "lora_B": B}
        if dora:
            factors["magnitude"] = self._lengths(layer, B.shape[-2])
        self._item(spot, method, factors)

    def _folded(self, layer: Layer, spot: Spot, A: Tensor, B: Tensor, scale: float, r: int) -> tuple[Tensor, Tensor]:
        """The pair with its scale in B, and with what PEFT takes out of the base when it loads the file."""
        dtype, start = torch.promote_types(A.dtype, torch.float32), self.config.start
        A, B = A.to(dtype), (B.double() * scale).to(dtype)
        if start:
            linear = layer.tensors.get("A", B[None]).dim() == 2 and not spot.layout.batch and not spot.layout.lookup
            if not linear or spot.is_projection or (start == "olora" and spot.layout.out):
                raise self.error(layer, f"cannot start as {start}, which is for linear layers")
            if self.base is None:
                raise self.error(layer, f"starts as {start}, which depends on the base; the base is needed")
            W = spot.layout.matrix(self.base.tensor(spot.parameter))
            A0, B0 = starting_pair(W, start, r, scale, repr(spot.parameter))
            A, B = torch.cat([A, A0.to(A)]), torch.cat([B, -B0.to(B)], -1)
        return at_most_full_rank(A, B)

    def _bias(self, layer: Layer, spot: Spot, bias: Tensor, scale: float) -> None:
        """lora_bias: b' = b + s·(the bias of B)."""
        if spot.is_projection:
            return  # PEFT makes one for an attention and never reads it, in forward or merge
        path = spot.sibling("bias")
        if self.places.shape_of(layer, path) not in (None, tuple(bias.shape)):
            raise self.error(layer, f"has a bias of shape {tuple(bias.shape)} beside it; {path!r} has another")
        diff = (bias.double() * scale).to(torch.promote_types(bias.dtype, torch.float32))
        self.items.append(Item(path, Full(), {"diff": diff}, Layout(), tuple(bias.shape)))

    # --- the others -----------------------------------------------------------------------------------------

    def _lengths(self, layer: Layer, out: int) -> Tensor:
        magnitude = layer.tensors["magnitude"]
        if magnitude.numel() != out or out not in magnitude.shape:
            raise self.error(layer, f"has a magnitude of shape {tuple(magnitude.shape)} beside it; allowed: ({out},)")
        return magnitude.reshape(-1)

    def _magnitude(self, owner: str, layer: Layer) -> None:
        spot = self.places.find(owner, layer, layer.tensors["magnitude"].numel(), -1)
        if spot is not None:
            out = spot.layout.sizes(spot.shape)[1] if spot.shape else layer.tensors["magnitude"].numel()
            self._item(spot, Magnitude(), {"magnitude": self._lengths(layer, out)})

    def _tokens(self, owner: str, layer: Layer) -> None:
        """New rows of an embedding, kept until its own new value, if any, is known."""
        rows = layer.tensors["tokens"]
        spot = self.places.find(owner, layer, rows.shape[-1] if rows.dim() else 0, -1)
        if spot is not None:
            self.rows[spot.parameter] = (layer, rows)

    def _ia3(self, owner: str, layer: Layer) -> None:
        scale = layer.tensors["ia3"]
        rows, columns = (*scale.shape, 1, 1)[:2]
        spot = self.places.find(owner, layer, rows if rows > 1 else -1, columns if columns > 1 else -1)
        if spot is None:
            return
        if spot.shape is None or self.base is None:
            raise self.error(layer, "rescales a layer with its bias; the base is needed to tell whether it has one")
        l, kernel = scale.flatten(), spot.shape[2:]
        out, in_ = (spot.shape[i] for i in (spot.layout.out, 1 - spot.layout.out))
        forward = self._acts_on_input(layer, scale, out, in_, len(kernel))
        groups = len(l) // in_ if forward and kernel else 1
        expected = [1, len(l), *[1] * len(kernel)] if forward or kernel else [len(l), 1]
        if list(scale.shape) != expected or len(l) != (groups * in_ if forward else out) or out % max(groups, 1):
            raise self.error(layer, f"has shape {tuple(scale.shape)}; {spot.parameter!r} has {spot.shape}")
        if groups > 1:
            self.values[spot.parameter] = rescaled_groups(self.base.tensor(spot.parameter), l, groups)
            return
        if forward:
            self._item(spot, IA3(axis="in"), {"scale": l.repeat_interleave(torch.Size(kernel).numel())})
            return
        self._item(spot, IA3(), {"scale": l})
        bias = spot.sibling("bias")
        if bias in self.base.names:
            self.items.append(Item(bias, IA3(), {"scale": l.clone()}, Layout(), self.base.shape(bias)))

    def _product(self, owner: str, layer: Layer) -> None:
        """LoHa, LoKr, VeRA and MiSS as the LoRA they are; LoHa and LoKr whole, where that is smaller."""
        spot = self.places.find(owner, layer, -1, -1)
        if spot is None:
            return
        if spot.shape is None:
            raise self.error(layer, "does not say the shape of its weight; the base is needed")
        _, out, in_ = spot.layout.sizes(spot.shape)
        try:
            if self.config.kind == "VERA":
                A, B = vera(layer.tensors, self.tensors.shared, out, in_)
            elif self.config.kind == "MISS":
                A, B = miss(layer.tensors["miss_block"], out, in_)
            else:
                made, r = product(layer.tensors, spot.shape), rank_of(layer.tensors)
                r = self.config.rank_for(spot.name) if r is None else r
                scale = self.config.alpha_for(spot.name, r) / r
                pair = low_rank(layer.tensors, out, in_) if spot.layout.out == 0 else None
                if pair is None:
                    self._item(spot, Full(), {"diff": (made * scale).float()})
                    return
                A, B = pair[0].float(), (pair[1] * scale).float()
        except FormatError as error:
            raise self.error(layer, f"cannot be read: {error}") from None
        A, B = at_most_full_rank(A, B)
        self._item(spot, LoRA(r=A.shape[0]), {"lora_A": A.contiguous(), "lora_B": B.contiguous()})

    def _acts_on_input(self, layer: Layer, scale: Tensor, out: int, in_: int, kernel: int) -> bool:
        """Whether IA3 rescales the input: told by the shape, (1, in) or (out, 1), where that can tell."""
        if kernel or out == in_ == scale.numel() == 1:
            return self.config.is_feedforward(layer.path)
        return scale.dim() == 2 and (scale.shape[0], scale.shape[1]) == (1, in_) and (in_ > 1 or out > 1)

    def _item(self, spot: Spot, method: Method, factors: dict[str, Tensor]) -> None:
        mark = None if method.additive else self.marks.get(spot.parameter)
        self.items.append(Item(spot.parameter, method, factors, spot.layout, spot.shape, mark))
