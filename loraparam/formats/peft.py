"""PEFT's format: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``.

Tensors say which modules are adapted and with which rank; the config only adds scales and flags. PEFT itself is never
imported. A directory may hold adapters with a name in directories of their own.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import FormatError, listed
from .bases import Base
from .content import Content, Prefix
from .peft_config import parse
from .peft_header import Notes, write_files
from .peft_keys import CONFIG, PICKLE, WEIGHTS, adapter_folder, holds_adapter, read_tensors
from .peft_places import Places
from .peft_read import LayerReader
from .peft_values import Values
from .peft_write import tensors_and_config

NAME = "peft"
HINTS = ("prefix", "adapter", "out_proj")
OPTIONS = ("out_proj", "task_type", "base_model_name_or_path")

_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


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


def write(
    path: Path,
    content: Content,
    base: Base | None,
    *,
    out_proj: str | None = None,
    task_type: str | None = None,
    base_model_name_or_path: str | None = None,
) -> None:
    """Write an adapter's directory; other files in it stay.

    Args:
        path: the directory.
        content: the adapter.
        base: the model's parameters; None where the content alone must do.
        out_proj: PEFT up to 0.21.2 adds the delta of an attention's output projection twice: "twice" writes half of
            it, for these, and is the default, with a warning; "once" writes all of it, for a PEFT without that fault.
        task_type, base_model_name_or_path: as the config has them; a task needs a model of transformers. For
            classification and question answering the model's head goes into the file as it is, as in PEFT's own.

    Raises:
        FormatError: PEFT cannot hold the content; nothing is written then.
    """
    _check_out_proj(out_proj)
    if task_type not in (None, *_TASKS):
        raise FormatError(f"task_type={task_type!r}; allowed: None, {', '.join(map(repr, _TASKS))}")
    if not (base_model_name_or_path is None or isinstance(base_model_name_or_path, str)):
        raise FormatError(f"base_model_name_or_path={base_model_name_or_path!r}; allowed: a string")
    if path.exists() and not path.is_dir():
        raise FormatError(f"{str(path)!r} is a file; allowed: the path of a directory")
    tensors, config = tensors_and_config(content, base, out_proj, task_type)
    config |= {"base_model_name_or_path": base_model_name_or_path}
    notes = {
        "out_proj": out_proj or "twice",
        "training": {item.path: [type(item.method).__name__, item.method.config()] for item in content.items},
        "bases": {item.parameter: item.fingerprint for item in content.items if item.fingerprint},
    }
    write_files(path, tensors, config, notes)


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
    _check_out_proj(out_proj)
    folder = adapter_folder(path, adapter)
    tensors = read_tensors(folder)
    notes = Notes.of(tensors)
    config = parse(notes.config(folder / CONFIG), str(folder / CONFIG))
    if tensors.shared and config.kind != "VERA":
        raise FormatError(f"{tensors.place!r}: {listed(tensors.shared)} belong to VeRA, not to {config.kind!r}")
    doubles = {"twice": True, "once": False}.get(out_proj or notes.out_proj or "", config.doubles)
    reader = LayerReader(tensors, config, base, Places(tensors, config, base, prefix), doubles, notes.bases)
    for owner, layer in tensors.layers.items():
        reader.read(owner, layer)
    values = Values(tensors, config, base, prefix)
    values.add(reader.values)
    for parameter, (layer, rows) in reader.rows.items():
        values.put_rows(parameter, layer, rows)
    items = values.join(reader.items)
    if not items and not values.replaced:
        where = "" if prefix is None else f" under prefix={prefix!r}"
        raise FormatError(f"{tensors.place!r} holds no adapter's tensors{where}")
    return Content(tensors.place, tuple(items), values.replaced, tensors.metadata)


def _check_out_proj(out_proj: str | None) -> None:
    if out_proj not in (None, "once", "twice"):
        raise FormatError(f"out_proj={out_proj!r}; allowed: 'once', 'twice'")
