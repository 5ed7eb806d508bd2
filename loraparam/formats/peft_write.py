"""Writing PEFT's two files so that every PEFT, vLLM and diffusers read the same numbers.

s is part of B and alpha = r, one rank for all (others are padded with zeros), no patterns, full module paths. The
rank and alpha of the training stand in the weights' header, with a copy of the config: should the write be
interrupted between the two files, our reader takes that one.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..errors import FormatError, listed
from ..methods import IA3, DoRA, Full, LoRA, Magnitude
from .bases import Base
from .content import Content, Item
from .peft_saved import Depths, heads, new_values, saved
from .peft_scaled import scaled
from .peft_shapes import to_experts, to_groups
from .peft_wrappers import WAY_OUT, Wrapper, as_dora, no_form, wrapper
from .portable import joined, padded

VERSION = "0.21.2"  # the PEFT whose format this is

Tensors = dict[str, Tensor]

_TWICE = (
    "{!r}: PEFT up to 0.21.2 adds the delta of an attention's output projection twice, so half of it is written, which "
    "is right for these; a PEFT that adds it once needs a file with out_proj='once'. Say out_proj='twice' or 'once'"
)
_DILATED = (
    "{!r}: PEFT's own forward of an adapted convolution does not know dilation and padding modes; what it merges from "
    "this file is right"
)


def tensors_and_config(
    content: Content, base: Base | None, out_proj: str | None, task_type: str | None = None
) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the config of an adapter.

    Raises:
        FormatError: PEFT cannot hold it.
    """
    items = joined(content, base)
    for item in items:
        if type(item.method) not in (LoRA, DoRA, Magnitude, IA3, Full):
            raise no_form(item, "PEFT has no such method")
    full = [item for item in items if isinstance(item.method, Full)]
    scales = [item for item in items if isinstance(item.method, IA3)]
    low_rank = [item for item in items if not isinstance(item.method, (Full, IA3))]
    values = new_values(content, full, base)
    if scales and low_rank:
        raise no_form(scales[0], "a file of PEFT's is IA3 or LoRA, not both")
    if scales:
        wrapped, tensors, config = scaled(scales, base)
    elif low_rank:
        wrapped, tensors, config = _low_rank(low_rank, base, out_proj)
    else:
        raise FormatError(
            f"{content.source!r} adapts no layer: PEFT needs at least one LoRA. Attach one as well (fresh, it changes "
            f"nothing), or {WAY_OUT}"
        )
    stored = saved(values, wrapped, base, heads(task_type, content, base))
    if scales and "bias" in stored.config:
        raise FormatError(f"{content.source!r} has new biases beside IA3, for which PEFT has no place. Or {WAY_OUT}")
    tensors |= {inside(path, wrapped): value for path, value in stored.values.items()}
    tensors |= {f"{inside(m, wrapped)}.token_adapter.trainable_tokens_delta": rows for m, rows in stored.rows.items()}
    defaults = {
        "inference_mode": True,
        "peft_version": VERSION,
        "task_type": task_type,
        "base_model_name_or_path": None,
    }
    return tensors, {**defaults, **config, **stored.config}


# --- LoRA and DoRA ----------------------------------------------------------------------------------------------


def _low_rank(items: Sequence[Item], base: Base | None, out_proj: str | None) -> tuple[Depths, Tensors, dict[str, Any]]:
    made = [wrapper(item, base, [item.parameter for item in items]) for item in items]
    if any(one.magnitude is not None for one in made):
        made = [as_dora(one, base) for one in made]
    for one in made:
        if one.kind == "convolution" and base is not None and _is_dilated(base.module(one.module)):
            warnings.warn(_DILATED.format(one.item.path), stacklevel=2)
    made = _with_projections(made, base, out_proj)
    groups = math.lcm(*(one.groups for one in made))
    r = -(-max(one.rank for one in made) // groups) * groups
    parameters = _nested([one for one in made if one.kind == "parameter"], base)
    modules = sorted({one.module for one in made if one.kind not in ("parameter", "out_proj")})
    wrapped = {one.module: len(parameters.get(one.module, [one])) for one in made}
    tensors: Tensors = {}
    for one in made:
        depth = parameters[one.module].index(one) if one.kind == "parameter" else 0
        key = inside(one.module, wrapped) + ".base_layer" * depth
        tensors |= {f"{key}.{leaf}": tensor for leaf, tensor in _leaves(one, r).items()}
    kinds = {one.layout.out for one in made if one.kind == "linear"}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": r,
        "target_modules": targets(modules, base),
        "bias": "none",
        "fan_in_fan_out": kinds == {1} and all(one.kind == "linear" for one in made),
        "use_dora": made[0].magnitude is not None,
        "use_rslora": False,
    }
    if parameters:
        named = sorted(one.item.parameter for inner in parameters.values() for one in inner)
        config["target_parameters"] = _exact_parameters(named, base)
    return wrapped, tensors, config


def _leaves(one: Wrapper, r: int) -> Tensors:
    A, B = padded(one.A, one.B, r // one.groups)
    if one.kind == "embedding":
        leaves = {"lora_embedding_A": A, "lora_embedding_B": B}
    else:
        if one.layout.batch:
            A, B = to_experts(A, B)
        elif one.kind == "convolution":
            A, B = to_groups(A, B, one.shape, one.groups)
        leaves = {"lora_A.weight": A, "lora_B.weight": B}
    if one.magnitude is not None:
        ones = [1] * (len(one.shape) - 2)
        leaves["lora_magnitude_vector"] = one.magnitude.reshape(1, -1, *ones) if ones else one.magnitude
    return leaves


def _with_projections(made: list[Wrapper], base: Base | None, out_proj: str | None) -> list[Wrapper]:
    """PEFT wraps an attention's two projections together, and adds the second one's delta twice up to 0.21.2."""
    attentions: dict[str, dict[str, Wrapper]] = {}
    for one in made:
        if one.kind in ("in_proj", "out_proj"):
            attention = one.module if one.kind == "in_proj" else one.module.rpartition(".")[0]
            attentions.setdefault(attention, {})[one.kind] = one
    others = [one for one in made if one.kind not in ("in_proj", "out_proj")]
    for attention, pair in attentions.items():
        if "out_proj" in pair:
            one = pair["out_proj"]
            if out_proj is None:
                warnings.warn(_TWICE.format(one.item.path), stacklevel=2)
            pair["out_proj"] = one if out_proj == "once" else replace(one, B=one.B / 2)
        embed = pair["in_proj"].shape[1] if "in_proj" in pair else pair["out_proj"].shape[0]
        for kind, rows, name in (("in_proj", 3 * embed, "in_proj_weight"), ("out_proj", embed, "out_proj.weight")):
            pair.setdefault(kind, _nothing(next(iter(pair.values())), kind, (rows, embed), f"{attention}.{name}"))
        others += [pair["in_proj"], pair["out_proj"]]
    return others


def _is_dilated(module: nn.Module | None) -> bool:
    dilation, padding = getattr(module, "dilation", (1,)), getattr(module, "padding_mode", "zeros")
    return any(step != 1 for step in dilation) or padding != "zeros"


def _nothing(like: Wrapper, kind: str, shape: tuple[int, int], parameter: str) -> Wrapper:
    """A wrapper that changes nothing."""
    item = replace(like.item, path=parameter, shape=shape)
    return Wrapper(item, kind, like.layout, shape, like.A.new_zeros(1, shape[1]), like.A.new_zeros(shape[0], 1))


def _nested(made: Iterable[Wrapper], base: Base | None) -> dict[str, list[Wrapper]]:
    """{module: its wrapped parameters, outermost first}: PEFT nests them in the order of registration."""
    found: dict[str, list[Wrapper]] = {}
    for one in made:
        found.setdefault(one.module, []).append(one)
    for module, inner in found.items():
        if len(inner) > 1:
            if base is None or not base.ordered:
                raise no_form(
                    inner[0].item, f"the order of the parameters of {module!r} is not known; save it from the model"
                )
            inner.sort(key=lambda one: -base.names.index(one.item.parameter))
    return found


# --- names ------------------------------------------------------------------------------------------------------


def inside(path: str, wrapped: Depths) -> str:
    """A path with a ``base_layer`` for each wrapper around a module on the way to it."""
    parts, above = [], ""
    for part in path.split("."):
        parts += ["base_layer"] * wrapped.get(above, 0) + [part]
        above = f"{above}.{part}" if above else part
    return ".".join(parts)


def targets(modules: Sequence[str], base: Base | None) -> list[str] | str:
    """``target_modules`` that mean these modules alone: a name also stands for every path that ends in it."""
    chosen = set(modules)
    paths = set(base.modules) if base is not None else set()
    if any(path.endswith("." + module) for path in paths - chosen for module in modules):
        return "|".join(re.escape(module) for module in modules)
    return list(modules)


def _exact_parameters(named: list[str], base: Base | None) -> list[str]:
    """The same for ``target_parameters``, which takes no patterns."""
    others = [n for n in (base.names if base else ()) if n not in named and any(n.endswith("." + p) for p in named)]
    if others:
        raise FormatError(f"PEFT would adapt {listed(others)} as well, whose path ends like a target's. {WAY_OUT}")
    return named
