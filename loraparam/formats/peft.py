"""PEFT's format: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``.

Tensors say which modules are adapted and with which rank; the config only adds scales and flags. PEFT itself is never
imported. A directory may hold adapters with a name in directories of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import FormatError
from .bases import Base
from .content import Content, Prefix
from .files import parse_json
from .peft_config import parse
from .peft_keys import CONFIG, PICKLE, WEIGHTS, adapter_folder, holds_adapter, read_tensors
from .peft_places import Places
from .peft_read import LayerReader
from .peft_values import Values

NAME = "peft"
HINTS = ("prefix", "adapter", "out_proj")
OPTIONS: tuple[str, ...] = ()


def recognises(path: Path) -> bool:
    """Whether this is an adapter's directory, one of adapters with names, or the weights in the former."""
    if path.is_file():
        return path.name == WEIGHTS and (path.parent / CONFIG).is_file()
    if not path.is_dir():
        return False
    folders = [path] if holds_adapter(path) else [folder for folder in path.iterdir() if holds_adapter(folder)]
    pickled = [folder for folder in folders if (folder / PICKLE).is_file() and not (folder / WEIGHTS).is_file()]
    if folders and len(pickled) == len(folders):
        raise FormatError(f"{str(pickled[0] / PICKLE)!r} is a pickle; name format='peft' to have its tensors read")
    return bool(folders)


def read(
    path: Path,
    base: Base | None,
    *,
    prefix: Prefix = None,
    adapter: str | None = None,
    out_proj: str | None = None,
) -> Content:
    """The adapter in a directory.

    Args:
        path: the directory, or the weights in it.
        base: the model's parameters; None where the file alone must do.
        prefix: the part of the file to load, or a map of the file's prefixes to module paths.
        adapter: the name of an adapter in a directory of its own.
        out_proj: "twice" or "once": how often the delta of an attention's output projection counts. PEFT up to
            0.21.2 adds it twice, in training as well; by default the config's version decides.
    """
    if out_proj not in (None, "once", "twice"):
        raise FormatError(f"out_proj={out_proj!r}; allowed: 'once', 'twice'")
    folder = adapter_folder(path, adapter)
    tensors = read_tensors(folder)
    config = parse(_config(folder / CONFIG), str(folder / CONFIG))
    doubles = config.doubles if out_proj is None else out_proj == "twice"
    places = Places(tensors, config, base, prefix)
    reader = LayerReader(tensors, config, base, places, doubles, {})
    for owner, layer in tensors.layers.items():
        reader.read(owner, layer)
    values = Values(tensors, config, base, prefix)
    for parameter, (layer, rows) in reader.rows.items():
        values.put_rows(parameter, layer, rows)
    items = values.join(reader.items)
    if not items and not values.replaced:
        raise FormatError(
            f"{tensors.place!r} holds no adapter's tensors" + f" under prefix={prefix!r}" * (prefix is not None)
        )
    return Content(tensors.place, tuple(items), values.replaced, tensors.metadata)


def _config(path: Path) -> Any:
    if not path.is_file():
        raise FormatError(f"{str(path)!r} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{str(path)!r} is not a readable text: {error}") from None
    return parse_json(text, repr(str(path)))
