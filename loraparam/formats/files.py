"""Touching files: written whole or not at all, and read without trusting them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ..errors import FormatError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that, whenever it is interrupted, the path holds the old content or the new."""
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write files one after the other, each whole or not, and none before all can be.

    Between the first and the last a few renamings pass, no more: readers of several files must tell such a moment.
    """
    temporaries: dict[Path, Path] = {}
    made: list[Path] = []  # folders, the outer ones first
    try:
        for path, content in contents.items():
            if path.is_dir():
                raise FormatError(f"{str(path)!r} is a directory; allowed: the path of a file")
            made += [folder for folder in reversed(path.parents) if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            temporaries[path] = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
            with naming(path), open(temporaries[path], "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except BaseException:
        for temporary in temporaries.values():
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another process may use it by now
                folder.rmdir()
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an ``OSError`` say which file it is about: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # without a number the message is all it has, and a name would hide it
            error.filename = error.filename or str(path)
        raise


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file's content; tensors that share memory, which the format refuses, are copied."""
    seen: set[int] = set()
    own = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        own[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return to_bytes(own, dict(metadata))


PICKLES = (".pt", ".pth", ".bin", ".ckpt")  # what torch.save writes; opened only where a format is named


def unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of torch.save, with no code of the file's executed.

    Raises:
        FormatError: it holds anything else, or is damaged.
    """
    if not path.is_file():
        raise FormatError(f"{str(path)!r} is not a file")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever a damaged or hostile file makes it raise; its messages run over many lines.
        reason = str(error).partition("\n")[0]
        raise FormatError(f"{str(path)!r} is not a readable file of torch.save: {reason}") from None
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state) or not state:
        raise FormatError(
            f"{str(path)!r} holds a {type(state).__name__}; allowed: a dict of names to tensors, not empty"
        )
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise FormatError(f"{str(path)!r}, {key!r}: a {type(tensor).__name__}; allowed: a tensor")
    return dict(state)


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file's handle, with each way of not being one as a ``FormatError``."""
    if not path.is_file():
        raise FormatError(f"{str(path)!r} is not a file")
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{str(path)!r} is not a readable safetensors file: {error}") from None


def parse_json(text: str, place: str) -> Any:
    """JSON from a file; NaN and infinity, which ``json`` takes, are refused."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{place}: not valid JSON: {error}") from None
