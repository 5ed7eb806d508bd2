"""The native file: one safetensors file whose header says version, methods and layouts.

Tensors are keyed as in ``lp.state_dict``. The header's ``__metadata__`` holds ``format`` ("loraparam"),
``format_version`` ("1") and ``targets``, JSON of {path: {"method", "config", "layout", "base"}}. ``base`` is a
fingerprint of the weight under a method that depends on it: a DoRA means nothing on another base, where a LoRA
means at least the same difference.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ..adapters import attach_rows, entries_of
from ..catalogue import Catalogue, catalogue
from ..errors import FormatError, LoraparamError, StateError, listed, nearest
from ..layouts import Layout
from ..methods import REGISTRY, Factors, Method
from ..methods.base import is_number
from ..plans import Plan, Row, row_at
from ..slices import overlap
from ..state import check_factor, state_dict
from .files import open_safetensors, parse_json, write_whole

NAME = "loraparam"
VERSION = "1"


def recognises(path: Path) -> bool:
    """Whether this is a native file."""
    if not path.is_file():
        return False
    with open_safetensors(path) as file:
        return (file.metadata() or {}).get("format") == NAME


def save(model: nn.Module, path: Path, name: str) -> None:
    """Write one adapter."""
    tensors = {key: tensor.contiguous() for key, tensor in state_dict(model, name).items()}
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise StateError(f"{key!r} holds NaN or infinity, which no reader would take; the adapter has diverged")
    known = catalogue(model)
    targets = {
        target: {
            "method": type(entry.method).__name__,
            "config": entry.method.config(),
            "layout": asdict(entry.layout),
            "base": None if entry.method.additive else fingerprint(_base(known, target)),
        }
        for target, entry in entries_of(model, name)
    }
    metadata = {"format": NAME, "format_version": VERSION, "targets": json.dumps(targets)}
    write_whole(path, to_bytes(tensors, metadata))


def load(model: nn.Module, path: Path, name: str, *, check_base: bool = True) -> Plan:
    """Attach the adapter in a file. The model is touched only once all of the file has been checked."""
    file_name = str(path)
    known = catalogue(model)
    with open_safetensors(path) as file:
        targets = _targets(file.metadata() or {}, file_name)
        rows = [_row(known, target, about, file_name) for target, about in targets.items()]
        _refuse_overlap(rows, file_name)
        factors = _factors(file, rows, file_name)
    if check_base:
        for row, about in zip(rows, targets.values(), strict=True):
            _check_base(known, row, about.get("base"), file_name)
    plan = Plan(tuple(rows))
    attach_rows(model, plan, name, factors)
    return plan


def _refuse_overlap(rows: list[Row], file_name: str) -> None:
    """Two targets of the file may be one parameter here, where it is tied."""
    first: dict[int, list[Row]] = {}
    for row in rows:
        for other in first.setdefault(id(row.leaf), []):
            if overlap(row.part, other.part):
                raise FormatError(
                    f"{file_name!r}: targets {other.path!r} and {row.path!r} are one parameter of this model; load "
                    "into a model in which they are not tied"
                )
        first[id(row.leaf)].append(row)


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


def _row(known: Catalogue, target: str, about: dict[str, Any], file_name: str) -> Row:
    """The target as a row of a plan for this model."""
    try:
        return row_at(known, target, _method(about), _layout(about.get("layout")), rule=file_name)
    except LoraparamError as error:
        raise FormatError(f"{file_name!r}, target {target!r}: {error}") from None


def _method(about: dict[str, Any]) -> Method:
    kind, config = about.get("method"), about.get("config")
    if not isinstance(kind, str) or kind not in REGISTRY:
        raise FormatError(
            f"unknown method {kind!r}; known: {listed(sorted(REGISTRY), 12)}. A method of your own is known once "
            "the module that defines it is imported"
        )
    if not isinstance(config, dict):
        raise FormatError(f"config {config!r}; allowed: an object of hyperparameters")
    try:
        return REGISTRY[kind](**config)
    except TypeError as error:
        raise FormatError(f"config of {kind}: {error}") from None


def _layout(value: Any) -> Layout:
    if (
        isinstance(value, dict)
        and set(value) == {"out", "batch", "lookup"}
        and isinstance(value["batch"], list)
        and isinstance(value["lookup"], bool)
    ):
        return Layout(out=value["out"], batch=tuple(value["batch"]), lookup=value["lookup"])
    raise FormatError(f"layout {value!r}; allowed: an object with out, batch and lookup")


def _factors(file: Any, rows: list[Row], file_name: str) -> list[Factors]:
    """The factors of each row, their shapes checked before a tensor is read."""
    expected = {f"{row.path}.{factor}": shape for row in rows for factor, shape in row.factor_shapes.items()}
    keys = list(file.keys())
    missing, unexpected = [k for k in expected if k not in keys], [k for k in keys if k not in expected]
    if missing or unexpected:
        parts = [f"missing {listed(missing)}"] * bool(missing) + [f"unexpected {listed(unexpected)}"] * bool(unexpected)
        hint = nearest(unexpected[0], expected) if unexpected else ""
        raise FormatError(f"{file_name!r}: {'; '.join(parts)}{hint}")
    for key, shape in expected.items():
        found = tuple(file.get_slice(key).get_shape())
        if found != shape:
            raise FormatError(f"{file_name!r}, {key!r}: shape {found}; the model takes {shape}")
    tensors = {key: file.get_tensor(key) for key in expected}
    dtypes = {f"{row.path}.{name}": dtype for row in rows for name, dtype in row.factor_dtypes.items()}
    try:
        for key, tensor in tensors.items():
            check_factor(key, tensor, expected[key], dtypes[key])
    except StateError as error:
        raise FormatError(f"{file_name!r}: {error}") from None
    return [{factor: tensors[f"{row.path}.{factor}"] for factor in row.factor_shapes} for row in rows]


def fingerprint(weight: Tensor | None) -> list[float] | None:
    """The norm of a weight and eight of its elements: tells another base, and survives a change of dtype."""
    if weight is None or weight.numel() == 0:
        return None
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, 8, dtype=torch.float64).long().to(flat.device)
    norm = torch.linalg.vector_norm(flat.float() if flat.dtype.itemsize < 4 else flat)
    return [float(norm), *(float(value) for value in flat[index])]


def _base(known: Catalogue, target: str) -> Tensor | None:
    # A slice's factors depend on the slice alone, but the whole weight tells another base as well.
    return known.leaves[target.partition("[")[0]].base


def _check_base(known: Catalogue, row: Row, saved: Any, file_name: str) -> None:
    now = fingerprint(_base(known, row.path))
    if saved is None or now is None:
        return
    if not (isinstance(saved, list) and len(saved) == len(now) and all(map(is_number, saved))):
        raise FormatError(f"{file_name!r}, target {row.path!r}: base {saved!r}; allowed: {len(now)} numbers")
    # 1 % of the typical element covers a change of dtype down to bfloat16 (0.4 %).
    typical = now[0] / max(1, row.leaf.base.numel() if row.leaf.base is not None else 1) ** 0.5
    close = abs(saved[0] - now[0]) <= 0.01 * now[0] + 1e-12
    close = close and all(
        abs(a - b) <= 0.01 * max(abs(b), typical) + 1e-12 for a, b in zip(saved[1:], now[1:], strict=True)
    )
    if not close:
        raise FormatError(
            f"{file_name!r}, target {row.path!r}: trained as {type(row.method).__name__} on another base weight "
            f"(norm {saved[0]:.6g}, here {now[0]:.6g}), on which it means something else; load the right base, or "
            "pass check_base=False"
        )
