"""What PEFT can wrap: each low-rank item as the layer PEFT would put there, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..errors import FormatError
from ..functional import row_norm
from ..layouts import Layout, is_transformers_conv1d
from ..methods import DoRA, LoRA, Magnitude
from .bases import Base
from .content import Item
from .portable import pair

WAY_OUT = "save it as 'loraparam', or merge it into the weights"


@dataclass(frozen=True)
class Wrapper:
    """One of PEFT's layers.

    Attributes:
        item: what it is for.
        kind: "linear", "embedding", "convolution", "in_proj", "out_proj", or "parameter" for ``target_parameters``.
        layout: how PEFT reads the parameter.
        shape: of the parameter.
        A, B: with s in B, for the matrix as PEFT reads it; (E, …) for experts.
        magnitude: of a DoRA.
        groups: of a convolution.
    """

    item: Item
    kind: str
    layout: Layout
    shape: tuple[int, ...]
    A: Tensor
    B: Tensor
    magnitude: Tensor | None = None
    groups: int = 1

    @property
    def module(self) -> str:
        """The path of the module it wraps."""
        return self.item.parameter.rpartition(".")[0]

    @property
    def rank(self) -> int:
        """The smallest rank PEFT can give it: a grouped convolution has A once per group."""
        return self.A.shape[-2] * self.groups

    @property
    def has_dora(self) -> bool:
        """Whether PEFT has a DoRA for such a layer."""
        return self.kind in ("linear", "embedding", "convolution") and self.groups == 1


def wrapper(item: Item, base: Base | None, beside: Collection[str] = ()) -> Wrapper:
    """The layer for one LoRA, DoRA or Magnitude; ``beside`` are the parameters of the other items.

    Raises:
        FormatError: PEFT has none.
    """
    shape = item.shape or (base.shape(item.parameter) if base is not None else None)
    if shape is None:
        raise no_form(item, "the file it comes from does not say its shape; the base is needed")
    if not item.parameter.rpartition(".")[0]:
        raise no_form(item, "PEFT adapts parameters of modules in a model, not the model's own: put it into one")
    if base is not None and len(base.aliases(item.parameter)) > 1:
        raise no_form(item, "it is tied to another, and PEFT would adapt one of the two: untie them first")
    if item.layout.rows is not None:
        raise no_form(item, "its weight is read flat, in other rows than PEFT's")
    kind, layout, groups = _kind(item, shape, base, beside)
    swapped = item.layout.out != layout.out
    if isinstance(item.method, Magnitude):
        _, out, in_ = item.layout.sizes(shape)
        m = item.factors["magnitude"]
        A, B = m.new_zeros(1, in_), m.new_zeros(out, 1)
    else:
        A, B = pair(item)
    if swapped:  # (B·A)ᵀ = Aᵀ·Bᵀ
        A, B = B.mT.contiguous(), A.mT.contiguous()
    made = Wrapper(item, kind, layout, tuple(shape), A, B, groups=groups)
    if isinstance(item.method, LoRA):
        return made
    if base is not None and _is_renamed(item, base):
        raise no_form(item, "PEFT takes its name for a part of a stack of experts, and has no DoRA for parameters")
    if swapped or not made.has_dora or getattr(item.method, "axis", "out") != "out":
        raise no_form(item, "PEFT has DoRA per output feature of linear layers, embeddings and ungrouped convolutions")
    return _with_lengths(made, base)


def as_dora(made: Wrapper, base: Base | None) -> Wrapper:
    """A LoRA as the DoRA with the lengths it has: PEFT's ``use_dora`` is for all layers of a file."""
    if made.magnitude is not None:
        return made
    if not made.has_dora:
        raise no_form(made.item, "other parts of the adapter are DoRA, which PEFT has for all or none")
    if base is None:
        raise no_form(made.item, "beside a DoRA it needs a magnitude; the base is needed")
    return replace(made, magnitude=_lengths(made, base).to(made.A.dtype))


def _with_lengths(made: Wrapper, base: Base | None) -> Wrapper:
    """A DoRA as PEFT's m·V/‖V‖, which has no epsilon and makes NaN of a zero row."""
    m, method = made.item.factors["magnitude"], made.item.method
    eps = method.eps if isinstance(method, DoRA) else 0.0
    if base is not None:
        lengths = _lengths(made, base)
        m = (m.double() * lengths / (lengths + eps)).to(m.dtype) if eps else m
    elif eps:
        raise no_form(made.item, f"PEFT's DoRA has no eps={eps:g}; the base is needed to write it without")
    return replace(made, magnitude=m)


def _lengths(made: Wrapper, base: Base) -> Tensor:
    """‖W + s·B·A‖ per output feature, none of which may be zero."""
    weight = made.layout.matrix(base.tensor(made.item.parameter).double())
    lengths = row_norm(weight + made.B.to(weight) @ made.A.to(weight), "out")
    if not bool(lengths.all()):
        raise no_form(made.item, "it has a row of zeros, of which PEFT's DoRA makes NaN")
    return lengths


def _kind(item: Item, shape: Sequence[int], base: Base | None, beside: Collection[str]) -> tuple[str, Layout, int]:
    """(kind, how PEFT reads the parameter, groups)."""
    owner, _, name = item.parameter.rpartition(".")
    module = base.module(owner) if base is not None else None
    if module is None:
        return _kind_by_name(item, shape, name, base.names if base is not None else beside)
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        return "in_proj", Layout(), 1
    if name == "weight":
        assert base is not None
        if isinstance(module, nn.Linear):
            outer = base.module(owner.rpartition(".")[0])
            attention = isinstance(outer, nn.MultiheadAttention) and owner.endswith("out_proj")
            kind = "out_proj" if attention else "parameter" if _is_renamed(item, base) else "linear"
            return kind, Layout(), 1
        if is_transformers_conv1d(module):
            return "linear", Layout(out=1), 1
        if isinstance(module, nn.Embedding):
            return "embedding", Layout(out=1), 1
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and item.layout == Layout():
            return "convolution", Layout(), module.groups
    if isinstance(module, nn.RNNBase):
        raise no_form(item, "torch's recurrent layers read a flat copy of it, which PEFT does not adapt")
    transposed = len(shape) == 3 and bool(getattr(module, "is_transposed", False))
    return _parameter(item, shape, transposed)


# {family of mixtures: names of layers}: PEFT's _MOE_TARGET_MODULE_MAPPING. Transformers 5 stacked the experts of these,
# and PEFT reads such a name among ``target_modules`` as the stack's, also where a layer still bears it: a dense or a
# shared expert. It leaves ``target_parameters`` as they are.
_RENAMED = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}


def _is_renamed(item: Item, base: Base) -> bool:
    """Whether PEFT would take the layer's name for an expert's."""
    kind = getattr(getattr(base.module(""), "config", None), "model_type", None)
    if not isinstance(kind, str):
        return False
    try:
        # The table that PEFT reads.
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN
    except ImportError:
        return False
    family = _MODEL_TO_CONVERSION_PATTERN.get(kind, "")
    return item.parameter.split(".")[-2] in _RENAMED.get(family, ())


def _kind_by_name(item: Item, shape: Sequence[int], name: str, names: Collection[str]) -> tuple[str, Layout, int]:
    """The same where no modules are known: by names, and by the layout that was read from the file."""
    outer = item.parameter.removesuffix(".out_proj.weight")
    if name == "in_proj_weight":
        return "in_proj", Layout(), 1
    if outer != item.parameter and f"{outer}.in_proj_weight" in names:
        return "out_proj", Layout(), 1
    if name == "weight" and item.layout == Layout(out=1, lookup=True):
        return "embedding", Layout(out=1), 1
    if name == "weight" and len(shape) == 2:
        return "linear", item.layout, 1
    if name == "weight" and item.layout == Layout():
        return "convolution", Layout(), 1
    if item.layout.batch and item.layout.out == 2:
        raise no_form(item, "whether its module says that it is transposed is not known; save it from the model")
    return _parameter(item, shape, False)


def _parameter(item: Item, shape: Sequence[int], transposed: bool) -> tuple[str, Layout, int]:
    layout = Layout(out=1 + transposed, batch=(0,)) if len(shape) == 3 else Layout()
    if len(shape) not in (2, 3) or item.layout.batch != layout.batch:
        raise no_form(item, f"PEFT has no layer for its module, shape {tuple(shape)}")
    if transposed and shape[0] == 1:
        raise no_form(item, "PEFT does not transpose the delta of a single expert")
    return "parameter", layout, 1


def no_form(item: Item, why: str) -> FormatError:
    """The error for an item that PEFT cannot hold."""
    method = type(item.method).__name__
    return FormatError(f"{item.path!r}: {method} has no form in PEFT: {why}. Or {WAY_OUT}")
