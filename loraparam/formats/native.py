"""The native file: one safetensors file whose header says version, methods and layouts.

Tensors are keyed as in ``lp.state_dict``. The header's ``__metadata__`` holds ``format`` ("loraparam"),
``format_version`` ("1") and ``targets``, JSON of {path: {"method", "config", "layout", "base", "shape"}}. ``base`` is
a fingerprint of the weight under a method that depends on it: a DoRA means nothing on another base, where a LoRA
means at least the same difference. ``shape`` is the parameter's own, for tools that have no model at hand.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import FormatError, LoraparamError, StateError, listed, nearest
from ..layouts import Layout
from ..methods import REGISTRY, Factors, Method
from ..methods.base import is_int
from ..state import check_factor
from .bases import Base
from .content import Content, Item, Prefix, difference, is_fingerprint, relocate
from .files import open_safetensors, parse_json, safetensors_bytes, write_whole

NAME = "loraparam"
HINTS = ("prefix",)
OPTIONS: tuple[str, ...] = ()
VERSION = "1"


def recognises(path: Path) -> bool:
    """Whether this is a native file."""
    if not path.is_file():
        return False
    with open_safetensors(path) as file:
        return (file.metadata() or {}).get("format") == NAME


def write(path: Path, content: Content, base: Base | None) -> None:
    """Write one adapter."""
    items = list(content.items)
    for parameter, value in content.replaced.items():
        if base is None:
            raise FormatError(f"{content.source!r} replaces {parameter!r} as a whole; the base is needed to write it")
        items.append(difference(parameter, value, base, content.source))
    tensors = {f"{item.path}.{key}": factor for item in items for key, factor in item.factors.items()}
    targets = {item.path: _about(item) for item in items}
    metadata = {"format": NAME, "format_version": VERSION, "targets": json.dumps(targets)}
    write_whole(path, safetensors_bytes(tensors, metadata))


def _about(item: Item) -> dict[str, Any]:
    return {
        "method": type(item.method).__name__,
        "config": item.method.config(),
        # Without what is not set: files of weights that are read by their dims stay as they were.
        "layout": {key: value for key, value in asdict(item.layout).items() if value is not None},
        "base": item.fingerprint,
        "shape": item.shape,
    }


def read(path: Path, base: Base | None, *, prefix: Prefix = None) -> Content:
    """The adapter in a file."""
    file_name = str(path)
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        targets = _targets(metadata, file_name)
        factors = _factors(file, list(targets), file_name)
    items = []
    for target, about in targets.items():
        place = relocate(target, prefix)
        if place is not None:
            items.append(_item(place, target, about, factors[target], file_name))
    if not items:
        raise FormatError(f"{file_name!r}: prefix={prefix!r} selects none of {listed(targets)}")
    return Content(file_name, tuple(items), metadata=metadata)


def _targets(metadata: dict[str, str], file_name: str) -> dict[str, Any]:
    if metadata.get("format") != NAME:
        raise FormatError(f"{file_name!r} is no loraparam file: its header says format {metadata.get('format')!r}")
    if metadata.get("format_version") != VERSION:
        raise FormatError(
            f"{file_name!r} has format version {metadata.get('format_version')!r}; this release reads {VERSION!r}"
        )
    targets = parse_json(metadata.get("targets", ""), f"{file_name!r}, header 'targets'")
    if not isinstance(targets, dict) or not all(isinstance(about, dict) for about in targets.values()) or not targets:
        raise FormatError(f"{file_name!r}, header 'targets': allowed: a non-empty object of objects")
    return targets


def _item(place: str, target: str, about: dict[str, Any], factors: Factors, file_name: str) -> Item:
    try:
        method, layout, shape = _method(about), _layout(about.get("layout")), _shape(about.get("shape"))
        return Item(place, method, factors, layout, shape, _fingerprint(about.get("base")))
    except LoraparamError as error:
        raise FormatError(f"{file_name!r}, target {target!r}: {error}") from None


def _method(about: dict[str, Any]) -> Method:
    kind, config = about.get("method"), about.get("config")
    method = REGISTRY.get(kind) if isinstance(kind, str) else None
    if method is None or inspect.isabstract(method):
        known = sorted(name for name, other in REGISTRY.items() if not inspect.isabstract(other))
        raise FormatError(
            f"unknown method {kind!r}; known: {listed(known, 12)}. A method of your own is known once "
            "the module that defines it is imported"
        )
    if not isinstance(config, dict):
        raise FormatError(f"config {config!r}; allowed: an object of hyperparameters")
    try:
        return method(**config)
    except TypeError as error:
        raise FormatError(f"config of {kind}: {error}") from None


def _layout(value: Any) -> Layout:
    if (
        isinstance(value, dict)
        and set(value) - {"rows"} == {"out", "batch", "lookup"}
        and isinstance(value["batch"], list)
        and isinstance(value["lookup"], bool)
    ):
        return Layout(**{**value, "batch": tuple(value["batch"])})
    raise FormatError(f"layout {value!r}; allowed: an object with out, batch and lookup, and rows where it is flat")


def _fingerprint(value: Any) -> list[float] | None:
    if value is None or is_fingerprint(value):
        return value
    raise FormatError(f"base {value!r}; allowed: 9 numbers")


def _shape(value: Any) -> tuple[int, ...] | None:
    if value is None:  # files of older releases say nothing
        return None
    if isinstance(value, list) and all(is_int(size) and size >= 0 for size in value):
        return tuple(value)
    raise FormatError(f"shape {value!r}; allowed: a list of sizes")


def _factors(file: Any, targets: list[str], file_name: str) -> dict[str, Factors]:
    """Each target's factors, once every key is known to belong to one."""
    factors: dict[str, Factors] = {target: {} for target in targets}
    owners = {key: key.rpartition(".")[0] for key in file.keys()}  # noqa: SIM118 - a handle, not a dict
    unexpected = [key for key in owners if owners[key] not in factors]
    held = set(owners.values())
    missing = [target for target in targets if target not in held]
    if missing or unexpected:
        parts = [f"missing factors of {listed(missing)}"] * bool(missing)
        parts += [f"unexpected {listed(unexpected)}"] * bool(unexpected)
        raise FormatError(
            f"{file_name!r}: {'; '.join(parts)}{nearest(owners[unexpected[0]], targets) if unexpected else ''}"
        )
    for key, target in owners.items():
        tensor = file.get_tensor(key)
        try:
            check_factor(key, tensor, tensor.shape, torch.float64)
        except StateError as error:
            raise FormatError(f"{file_name!r}: {error}") from None
        factors[target][key.rpartition(".")[2]] = tensor
    return factors
