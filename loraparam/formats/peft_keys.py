"""The tensors of ``adapter_model``: found, checked, and grouped by the module they belong to.

A key is ``[base_model.model.]<module>.<leaf>``. PEFT puts what it wraps under ``base_layer``: a parameter's own value
(``fc.base_layer.bias``), an attention's output projection, and the inner ones of several wrappers on one module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters import check_name
from ..errors import FormatError, LoraparamError, StateError, listed
from ..state import check_factor
from .files import open_safetensors, unpickled
from .peft_products import LEAVES, SHARED

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

BY_LEAF = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "bias",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "weight_m_wdecomp.weight": "magnitude",  # NVlabs
    "ia3_l": "ia3",
    "token_adapter.trainable_tokens_delta": "tokens",
    **{leaf: leaf for leaf in (*sorted({leaf for sets in LEAVES.values() for leaf in set().union(*sets)}), *SHARED)},
}


@dataclass
class Layer:
    """What a file holds for one wrapper.

    Attributes:
        path: of the wrapped module, as the file has it.
        depth: how many more wrappers are around this one.
        tensors: by kind of leaf.
        key: of the first tensor, for messages.
    """

    path: str
    depth: int
    key: str
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Tensors:
    """A file's content, sorted.

    Attributes:
        place: the file, for messages.
        layers: by the owner's path in the file.
        values: new values of parameters and buffers, by path.
        keys: the key of each value, for messages.
        shared: tensors of all wrappers of a file together.
        metadata: of the header.
    """

    place: str
    layers: dict[str, Layer] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def adapter_folder(path: Path, adapter: str | None = None) -> Path:
    """Where an adapter's two files are: the directory itself, or the one in it for an adapter with a name.

    Raises:
        FormatError: no such adapter, or several to choose from.
    """
    if path.is_file():
        path = path.parent
    if adapter is not None:
        try:
            check_name(adapter)
        except LoraparamError as error:
            raise FormatError(str(error)) from None
        if not holds_adapter(path / adapter):
            raise FormatError(f"{str(path)!r} holds no adapter {adapter!r}; it holds {listed(_named(path)) or 'none'}")
        return path / adapter
    if holds_adapter(path):
        return path
    names = _named(path)
    if len(names) == 1:
        return path / names[0]
    if names:
        raise FormatError(f"{str(path)!r} holds adapters {listed(names)}; choose one with adapter=")
    raise FormatError(f"{str(path / WEIGHTS)!r} does not exist")


def holds_adapter(folder: Path) -> bool:
    """Whether one of PEFT's files is in a folder."""
    return any((folder / name).is_file() for name in (CONFIG, WEIGHTS, PICKLE))


def _named(path: Path) -> list[str]:
    folders = sorted(path.iterdir()) if path.is_dir() else []
    return [folder.name for folder in folders if folder.is_dir() and holds_adapter(folder)]


def read_tensors(folder: Path) -> Tensors:
    """All tensors of an adapter, checked and sorted.

    Raises:
        FormatError: a damaged file, two keys for one thing, or a tensor that is no adapter's.
    """
    path = folder / WEIGHTS
    if path.is_file() or not (folder / PICKLE).is_file():
        with open_safetensors(path) as file:
            named = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a handle, not a dict
            metadata = file.metadata() or {}
    else:
        path, metadata = folder / PICKLE, {}
        named = unpickled(path)
    found = Tensors(str(path), metadata=metadata)
    for key, tensor in named.items():
        # Little can be computed in float8; float32 holds the same numbers.
        narrow = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.itemsize < 2
        _sort(found, key, tensor.float() if narrow else tensor)
    return found


def _sort(found: Tensors, key: str, tensor: Any) -> None:
    inner = key.removeprefix(PREFIX)
    for leaf, kind in BY_LEAF.items():
        if inner == leaf or inner.endswith("." + leaf):
            _check(found.place, key, tensor)
            if kind in SHARED:
                found.shared[kind] = tensor
                return
            owner = inner[: -len(leaf)].removesuffix(".")
            path, depth = _unwrapped(owner)
            layer = found.layers.setdefault(owner, Layer(path, depth, key))
            if kind in layer.tensors:
                raise FormatError(f"{found.place!r}: {key!r} is in the file twice, with and without a prefix")
            layer.tensors[kind] = tensor
            return
    _sort_value(found, key, inner, tensor)


def _sort_value(found: Tensors, key: str, inner: str, tensor: Any) -> None:
    """A parameter's new value; copies that PEFT's bias="all" leaves of ``modules_to_save`` are not in use."""
    *owner, name = inner.split(".")
    if "original_module" in owner:
        return
    copy = "modules_to_save" in owner
    if copy:  # of a module's own values the adapter's name was removed, of those further in it was not
        at = owner.index("modules_to_save")
        owner[at:] = owner[at + 2 :]
    path = ".".join([part for part in _without(owner) if part] + [name])
    if path in found.values and not (copy or "modules_to_save" in found.keys[path].split(".")):
        raise FormatError(f"{found.place!r}: {key!r} and {found.keys[path]!r} are both a value for {path!r}")
    if not isinstance(tensor, Tensor):
        raise FormatError(f"{found.place!r}: {key!r} is a {type(tensor).__name__}; allowed: a tensor")
    if not copy or path not in found.values:
        found.values[path], found.keys[path] = tensor, key


def _unwrapped(owner: str) -> tuple[str, int]:
    parts = owner.split(".")
    depth = 0
    while len(parts) > 1 and parts[-1] == "base_layer":
        depth, parts = depth + 1, parts[:-1]
    return ".".join(_without(parts)), depth


def _without(parts: list[str]) -> list[str]:
    """A path without what PEFT puts into it."""
    return [part for part in parts if part not in ("base_layer", "token_adapter")]


def _check(place: str, key: str, tensor: Any) -> None:
    try:
        check_factor(key, tensor, getattr(tensor, "shape", ()), torch.float64)
    except StateError as error:
        raise FormatError(f"{place!r}: {error}") from None
    if tensor.numel() == 0:
        raise FormatError(f"{place!r}: {key!r} has shape {tuple(tensor.shape)}; allowed: a rank of at least 1")
