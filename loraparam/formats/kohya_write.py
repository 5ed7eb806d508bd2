"""What a kohya file can hold, and under which keys: names of modules, and the tensors of one module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import FormatError
from ..functional import row_norm
from ..methods import DoRA, Full, LoRA, Magnitude
from .bases import Base
from .components import WritePrefix, parts_of, place_below, prefixes_below
from .content import Item
from .pairs import EPS, as_pair, dora_norm, is_read_by_attention
from .portable import pair

Flavor = Literal["lycoris", "comfyui"]
FLAVOR = "loraparam.flavor"  # in the header
_PREFIXES = {
    "unet": "lora_unet_",
    "transformer": "lora_transformer_",
    "text_encoder": "lora_te_",
    "text_encoder_2": "lora_te2_",
    "text_encoder_3": "lora_te3_",
    "prior": "lora_prior_unet_",
}
_ELSEWHERE = "use format='peft' or 'loraparam'"


def check_flavor(flavor: Any) -> Flavor:
    """Refuse any other."""
    if flavor not in ("lycoris", "comfyui"):
        raise FormatError(f"flavor={flavor!r}; allowed: 'lycoris', 'comfyui'")
    return flavor  # type: ignore[no-any-return]


# --- names ------------------------------------------------------------------------------------------------------


class Names:
    """Keys' heads for module paths.

    Args:
        owners: the modules that are written.
        base: the model, for its class and for names that would stand for two of its modules.
        prefix: one for all, or {module path: prefix}; one that ends in "." keeps the dots of the path. By default
            told from the parts of a pipeline, else ``lycoris_``.
    """

    def __init__(self, owners: Iterable[str], base: Base | None, prefix: WritePrefix) -> None:
        self.owners = dict.fromkeys(owners)
        self.prefixes = self._by_path(base, prefix)
        known = [*self.owners, *(name.rpartition(".")[0] for name in (base.names if base is not None else ()))]
        self.meaning: dict[str, set[str]] = {}
        for owner in dict.fromkeys(known):
            if (head := self._head(owner)) is not None:
                self.meaning.setdefault(head, set()).add(owner)

    def _by_path(self, base: Base | None, prefix: WritePrefix) -> dict[str, str]:
        """{module path: prefix with its separator}."""
        if prefix is None:
            parts = parts_of(self.owners, base)
            chosen = {path: _PREFIXES.get(part, "") for path, part in parts.items()}
            if not chosen or "" in chosen.values():
                return {"": "lycoris_"}
            two = base is not None and any(name.startswith("text_encoder_2.") for name in base.names)
            if "text_encoder" in chosen and (two or "text_encoder_2" in chosen):
                chosen["text_encoder"] = "lora_te1_"
            return chosen
        given = prefixes_below(prefix)
        return {path: text if not text or text[-1] in "._" else f"{text}_" for path, text in given.items()}

    def _head(self, owner: str) -> str | None:
        place = place_below(owner, self.prefixes)
        if place is None:
            return None
        start, rest = place
        return f"{start}{rest}".rstrip(".") if start.endswith(".") else start + rest.replace(".", "_")

    def is_dotted(self, owner: str) -> bool:
        """Whether names there keep the path's dots, and can name any parameter."""
        place = place_below(owner, self.prefixes)
        return place is not None and place[0].endswith(".")

    def head(self, owner: str) -> str:
        """The name of a module in the file.

        Raises:
            FormatError: no prefix is for it, or the name would stand for another module, too.
        """
        head = self._head(owner)
        if head is None:
            raise FormatError(f"{owner!r}: prefix={self.prefixes!r} has no module path above it")
        others = sorted(self.meaning.get(head, set()) - {owner})
        if others:
            raise FormatError(
                f"{owner!r} and {others[0]!r} are one name, {head!r}, once '.' is '_'; {_ELSEWHERE}, or ComfyUI's "
                "dotted names: prefix='diffusion_model.'"
            )
        return head


# --- tensors ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """The tensors of one parameter.

    Attributes:
        base: the model or checkpoint, which some contents need.
        flavor: whose reading of an output-axis DoRA the file is for.
    """

    base: Base | None
    flavor: Flavor

    def module(self, weight: Item | None, bias: Item | None) -> dict[str, Tensor]:
        """{leaf: tensor} for a module's weight and bias.

        LyCORIS passes over a bias that stands alone or beside a pair: for it, the weight is written as a difference.
        """
        if bias is None:
            assert weight is not None
            return self._norm(weight) if _is_norm(weight.factors) else self.leaves(weight)
        if not isinstance(bias.method, Full):
            raise FormatError(
                f"{bias.path!r}: kohya's format has no form for {type(bias.method).__name__}; {_ELSEWHERE}"
            )
        diff_b = bias.factors["diff"]
        if self.flavor == "lycoris":
            weight = self._zero(bias) if weight is None else self.dense(weight)
        if weight is None:
            return {"diff_b": diff_b}
        if _is_norm(weight.factors):
            return {**self._norm(weight), "b_norm": diff_b}
        return {**self.leaves(weight), "diff_b": diff_b}

    def _norm(self, weight: Item) -> dict[str, Tensor]:
        return {"w_norm": weight.factors["diff"]}

    def _zero(self, bias: Item) -> Item:
        """No difference, for the weight beside a bias."""
        path = f"{bias.path.removesuffix('bias')}weight"
        if self.base is None or path not in self.base.names:
            raise FormatError(
                f"{bias.path!r}: LyCORIS reads no bias without its weight, whose shape is not known; give the base, or "
                "flavor='comfyui'"
            )
        diff = bias.factors["diff"]
        return Item(path, Full(), {"diff": diff.new_zeros(self.base.shape(path))})

    def leaves(self, item: Item) -> dict[str, Tensor]:
        """{leaf: tensor} for a weight.

        Raises:
            FormatError: there is no form for it, or the base is needed and not there.
        """
        shape = self._shape(item)
        if isinstance(item.method, Full):
            return {"diff": item.factors["diff"]}
        item = as_pair(item)
        A, B = pair(item)
        if item.layout.out and len(shape) > 2:
            A, B = by_first_dim(item, A, B, shape)
        # transformers' Conv1D stores a Linear's weight transposed; its pair is a Linear's.
        ins, ones = (A.shape[1:], ()) if item.layout.out and len(shape) == 2 else (shape[1:], (1,) * (len(shape) - 2))
        r = A.shape[0]
        leaves = {
            "lora_down.weight": A.reshape(r, *ins),
            "lora_up.weight": B.reshape(B.shape[0], r, *ones),
            "alpha": torch.tensor(float(r)),
        }
        if isinstance(item.method, DoRA):
            leaves["dora_scale"] = self._dora_scale(item, item.method, shape)
        return leaves

    def _shape(self, item: Item) -> tuple[int, ...]:
        """The parameter's shape, where there is a form for it."""
        shape, own = item.shape, None
        if self.base is not None and item.path in self.base.names:
            shape, own = self.base.shape(item.path), self.base.layout(item.path)
        layout = own or item.layout
        if shape is None:
            raise FormatError(f"{item.path!r}: the base is needed to know the parameter's shape")
        if layout.lookup and not (isinstance(item.method, Full) and self.flavor == "comfyui"):
            raise FormatError(f"{item.path!r}: kohya's format has no form for an embedding; {_ELSEWHERE}")
        if self.flavor == "lycoris" and is_read_by_attention(item.path, self.base):
            raise FormatError(
                f"{item.path!r}: LyCORIS has no effect on a MultiheadAttention's output projection; use format='peft' "
                "or 'loraparam', or flavor='comfyui'"
            )
        if isinstance(item.method, Full):
            return shape
        if not isinstance(item.method, (LoRA, DoRA, Magnitude)):
            name = type(item.method).__name__
            raise FormatError(f"{item.path!r}: kohya's format has no form for {name}; {_ELSEWHERE}")
        if item.layout.rows is not None:
            raise FormatError(f"{item.path!r}: kohya's format has no form for a weight read flat; {_ELSEWHERE}")
        # A convolution's DoRA per input channel reads its weight by the second dim, as a transposed convolution does.
        by_channel = own is None and isinstance(item.method, DoRA)
        if layout.batch or (layout.out and len(shape) > 2 and not by_channel):
            kind = "stack of matrices" if layout.batch else "transposed convolution"
            raise FormatError(f"{item.path!r}: kohya's format has no low-rank form for a {kind}; {_ELSEWHERE}")
        return shape

    def _dora_scale(self, item: Item, method: DoRA, shape: tuple[int, ...]) -> Tensor:
        """The magnitude, along the dim it belongs to, for the norm that the reader divides by."""
        m = item.factors["magnitude"]
        dim = item.layout.out
        if method.axis == "in":
            dim = 1 - dim
            if m.numel() != shape[dim]:
                raise FormatError(
                    f"{item.path!r}: a DoRA with a magnitude per input and place in the kernel; kohya's format has one "
                    f"per input channel. {_ELSEWHERE}, or merge it and write the difference"
                )
        # transformers' Conv1D is written as the Linear it is.
        dim = int(method.axis == "in") if len(shape) == 2 else dim
        if method.eps != EPS or self.flavor == "comfyui":
            m = self._for_reader(item, method)
        return m.reshape([-1 if i == dim else 1 for i in range(len(shape))])

    def _for_reader(self, item: Item, method: DoRA) -> Tensor:
        """The magnitude that means here, under the reader's norm and eps, what it means to us."""
        m = item.factors["magnitude"]
        if self.base is None and method.eps == 0 and self.flavor == "lycoris":
            return m
        weight = self._weight(item, "the norms of its weight")
        after = dora_norm(item, method, weight)
        theirs = _comfyui_norm(item, weight) if self.flavor == "comfyui" else None
        ratio = ((after if theirs is None else theirs) + EPS) / (after + method.eps)
        # The reader's eps alone shows in rows that are nearly zero; elsewhere m stays as it is, to the bit. A row of
        # zeros is zero under any scale.
        plain = (ratio - 1).abs() <= 1e-5 if theirs is None else torch.zeros_like(ratio, dtype=torch.bool)
        plain |= after + method.eps == 0
        return torch.where(plain, m.double(), m.double() * ratio).to(torch.promote_types(m.dtype, torch.float32))

    def _weight(self, item: Item, why: str) -> Tensor:
        if self.base is None:
            way = "; or flavor='lycoris'" if self.flavor == "comfyui" else ""
            raise FormatError(f"{item.path!r}: the base is needed for {why}{way}")
        return self.base.tensor(item.path).double()

    def dense(self, item: Item) -> Item:
        """The item as a difference from the base, which stands for any method."""
        if isinstance(item.method, Full):
            return item
        shape = self._shape(item)
        additive = item.method.additive
        weight = torch.zeros(shape, dtype=torch.float64) if additive else self._weight(item, "the difference it makes")
        factors = {key: factor.double() for key, factor in item.factors.items()}
        diff = item.method.apply(weight, factors, item.layout) - weight
        dtype = torch.promote_types(next(iter(item.factors.values())).dtype, torch.float32)
        return replace(item, method=Full(), factors={"diff": diff.to(dtype)})


def _comfyui_norm(item: Item, weight: Tensor) -> Tensor | None:
    """‖W‖ per output, where ComfyUI divides by that; None where it divides by ‖W + s·B·A‖, as LyCORIS does.

    A scale whose first size is that of the weight is one per output to it, also where both are 1.
    """
    assert isinstance(item.method, DoRA)
    W = item.layout.matrix(weight) if weight.dim() == 2 else weight.flatten(1)
    per_output = (item.method.axis == "out") == (weight.dim() == 2 or item.layout.out == 0)
    return row_norm(W) if per_output or W.shape[0] == 1 else None


def from_comfyui(item: Item, base: Base) -> Item:
    """A DoRA read from a file for ComfyUI, with the magnitude that means the same here."""
    assert isinstance(item.method, DoRA)
    weight = base.tensor(item.path).double()
    theirs = _comfyui_norm(item, weight)
    if theirs is None:
        return item
    m = item.factors["magnitude"]
    scaled = m.double() * (dora_norm(item, item.method, weight) + item.method.eps) / (theirs + EPS)
    scaled = scaled.to(torch.promote_types(m.dtype, torch.float32))
    return replace(item, factors={**item.factors, "magnitude": scaled})


def _is_norm(factors: Mapping[str, Tensor]) -> bool:
    """Whether the weight has no input dim, as a norm's has none."""
    return "diff" in factors and factors["diff"].dim() == 1


def by_first_dim(item: Item, A: Tensor, B: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The pair of the same ΔW read as (first dim, all others), at its exact rank, to the resolution of float32."""
    delta = item.layout.tensor(B.double() @ A.double(), shape).flatten(1)
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    r = max(1, int((S[0] * EPS * max(delta.shape) < S).sum()))
    root = S[:r].sqrt()
    return (root[:, None] * Vh[:r]).to(A.dtype), (U[:, :r] * root).to(A.dtype)
