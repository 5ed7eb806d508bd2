"""Checkpoints of any size, one tensor in memory at a time, and finished results put in place in one step.

A safetensors file is eight bytes (the header's length), a header of JSON that gives each tensor's dtype, shape and
place, and the tensors' bytes: https://huggingface.co/docs/safetensors/index#format. A rewritten file keeps the
header as it is, and with it the metadata, the order and the layout; only bytes of tensors change.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import FormatError, LoraparamError
from .files import naming, open_safetensors

CHUNK = 1 << 22  # bytes copied at a time
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file.

    Attributes:
        name: its key.
        dtype: as the format names it: "F32", "BF16", …
        shape: its sizes.
        start, stop: its bytes, counted from the file's first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self, file: IO[bytes]) -> Tensor:
        """Its values, in memory of their own; only of the dtypes in ``DTYPES``."""
        if self.start == self.stop:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        buffer = bytearray(self.stop - self.start)
        file.seek(self.start)
        if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
            raise FormatError(f"tensor {self.name!r}: the file has become shorter while it was read")
        return torch.frombuffer(buffer, dtype=DTYPES[self.dtype]).reshape(self.shape)


def header_of(path: Path) -> tuple[bytes, list[Stored]]:
    """A file's first bytes up to the tensors, and its tensors in the order of their bytes.

    Raises:
        FormatError: not a valid safetensors file.
    """
    with open_safetensors(path):  # its own checks of lengths, offsets and shapes
        pass
    with open(path, "rb") as file:
        length = file.read(8)
        header = length + file.read(int.from_bytes(length, "little"))
    entries = {name: about for name, about in json.loads(header[8:]).items() if name != "__metadata__"}
    found = [
        Stored(name, about["dtype"], tuple(about["shape"]), *(len(header) + at for at in about["data_offsets"]))
        for name, about in entries.items()
    ]
    return header, sorted(found, key=lambda tensor: (tensor.start, tensor.stop))


def rewrite(source: Path, target: Path, change: Callable[[Stored, IO[bytes]], Tensor | None]) -> None:
    """Write a copy of a safetensors file with other values, and read it back to compare.

    Args:
        source: the file to copy.
        target: a new file.
        change: the new values of a tensor, of its own dtype and shape; None for the old bytes.

    Raises:
        FormatError: what the disk holds is not what was written.
    """
    header, tensors = header_of(source)
    digests = []
    with naming(target), open(source, "rb") as old, open(target, "xb") as new:
        new.write(header)
        for tensor in tensors:
            digest = hashlib.blake2b()
            for chunk in _chunks(tensor, old, change(tensor, old)):
                digest.update(chunk)
                new.write(chunk)
            digests.append(digest.digest())
        new.flush()
        os.fsync(new.fileno())
    _check_written(target, header, tensors, digests)


def _chunks(tensor: Stored, file: IO[bytes], value: Tensor | None) -> Iterator[Any]:
    """A tensor's bytes: those of its new value, or those in the file."""
    if value is not None:
        assert (value.dtype, tuple(value.shape)) == (DTYPES[tensor.dtype], tensor.shape)
        if value.numel():
            yield value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return
    yield from _bytes(file, tensor.start, tensor.stop)


def _bytes(file: IO[bytes], start: int, stop: int) -> Iterator[bytes]:
    file.seek(start)
    while start < stop:
        chunk = file.read(min(CHUNK, stop - start))
        if not chunk:
            raise FormatError("the file ends before its header says")
        start += len(chunk)
        yield chunk


def _check_written(path: Path, header: bytes, tensors: list[Stored], digests: list[bytes]) -> None:
    with open(path, "rb") as file:
        if file.read(len(header)) != header:
            raise FormatError(f"{str(path)!r}: the header reads back as other bytes than were written; check the disk")
        for tensor, expected in zip(tensors, digests, strict=True):
            digest = hashlib.blake2b()
            for chunk in _bytes(file, tensor.start, tensor.stop):
                digest.update(chunk)
            if digest.digest() != expected:
                raise FormatError(
                    f"{str(path)!r}: {tensor.name!r} reads back as other bytes than were written; check the disk"
                )


# --- putting results in place ---------------------------------------------------------------------------------------


def check_free(out: Path, force: bool) -> None:
    """Refuse to write where something is; an empty directory is nothing.

    Raises:
        FormatError: ``out`` exists, without ``force``.
    """
    if not force and _occupied(out):
        raise FormatError(f"{str(out)!r} exists; give another path, or force=True (--force) to replace it")


def _occupied(path: Path) -> bool:
    if path.is_dir() and not path.is_symlink():
        return any(path.iterdir())
    return path.exists() or path.is_symlink()


@contextlib.contextmanager
def in_place_of(out: Path) -> Iterator[Path]:
    """A path beside ``out`` to write a file or a directory to; without an error it takes the place of ``out``.

    Whenever this is interrupted, ``out`` is what it was, or all of the new result. What an interrupted process
    leaves behind is named ``.<name>.<random>.tmp``.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if out.is_dir() and _occupied(out):
            _exchange(temporary, out)  # the old directory is the temporary one then
        else:
            os.replace(temporary, out)
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Delete a file or a directory with all that is in it; nothing there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _exchange(new: Path, out: Path) -> None:
    """Put a directory in the place of another one that holds files, for which there is no portable call.

    In one step where the system can (Linux). Elsewhere in two: a process that is killed between them leaves the old
    directory beside ``out``, as ``.<name>.<random>.tmp.old``.
    """
    if _exchanged_at_once(new, out):
        return
    aside = new.with_name(new.name + ".old")
    os.rename(out, aside)
    try:
        os.rename(new, out)
    except BaseException:
        os.rename(aside, out)
        raise
    remove(aside)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchanged_at_once(one: Path, other: Path) -> bool:
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def refuse_same(out: Path, *inputs: Path) -> None:
    """Refuse a result that would take the place of what it is made from, or lie inside of it.

    Raises:
        LoraparamError: naming both.
    """
    target = out.resolve()
    for path in inputs:
        source = path.resolve()
        if target == source or source in target.parents or target in source.parents:
            raise LoraparamError(f"{str(out)!r} is, is inside, or holds the input {str(path)!r}; give another path")
