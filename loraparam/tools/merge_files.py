"""Folding adapters into the tensors of a checkpoint on disk, without a model and without its memory."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from ..errors import FormatError, listed
from ..finite import all_finite
from ..formats import read_content
from ..formats.bases import FileBase
from ..formats.streams import CHUNK, Stored, check_free, header_of, in_place_of, refuse_same, rewrite
from .fitting import Adapters, PathLike, Target, by_parameter, check_bases, fit, update, weighted
from .reports import Progress, silent

# Other copies of the base weights, which the merged ones would contradict, and what belongs to a download.
_STALE = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "*.gguf",
    ".git",
    ".cache",
)


@dataclass(frozen=True)
class Merged:
    """What ``merge_files`` wrote.

    Attributes:
        out: the file or directory.
        merged: the parameters that adapters changed.
        copied: how many tensors were copied as they were.
        carried: other files of the directory that went along.
        left_out: other copies of the base weights that did not.
        twins: {changed parameter: unchanged ones with the same values}. Where the model ties them, name the other
            one in the adapter instead: what is loaded last would win.
    """

    out: str
    merged: tuple[str, ...]
    copied: int
    carried: tuple[str, ...]
    left_out: tuple[str, ...]
    twins: dict[str, tuple[str, ...]]

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"merged {len(self.merged)} tensors, copied {self.copied} as they were"]
        if self.carried:
            lines.append(f"carried over {listed(self.carried, 8)}")
        if self.left_out:
            lines.append(f"left out {listed(self.left_out, 8)}: other copies of the base weights, or of a download")
        lines += [
            f"note: {path!r} had the same values as {listed(others)}, which no adapter changes; if they are tied, they "
            "no longer agree"
            for path, others in self.twins.items()
        ]
        return "\n".join([*lines, f"wrote {self.out}, read back and compared"])


def merge_files(
    base: PathLike,
    adapters: Adapters,
    out: PathLike,
    *,
    weights: Sequence[float] | None = None,
    format: str | None = None,
    check_base: bool = True,
    force: bool = False,
    progress: Progress[Any] = silent,
    **hints: Any,
) -> Merged:
    """Write a checkpoint with adapters folded in: W → first → second → …, each as W + w·(apply(W) − W).

    What ``lp.merge`` does to a model in memory, tensor by tensor: computed in float32 (float64 for a float64 base)
    and rounded once to the base's dtype. Tensors without an adapter keep their bytes, files their header. At most one
    tensor is in memory, beside the adapters. The result is read back and compared before it takes its place in one
    step: an interruption leaves ``out`` as it was.

    Args:
        base: a safetensors file, or a directory of shards with their index.
        adapters: one file (or directory, for formats that have one), several in the order in which they act, or
            {file: weight}.
        out: a file where ``base`` is a file, else a directory.
        weights: w of each adapter. Default: 1.
        format: of the adapters, where it cannot be told from the files.
        check_base: refuse a DoRA or Magnitude that was trained on another base weight, where its file says so.
        force: replace what is at ``out``.
        progress: shows progress.
        hints: as for ``lp.load``.

    Raises:
        FormatError: a damaged file, an adapter that does not fit the base, an ``out`` that exists.
        LoraparamError: ``out`` is the base or lies inside it; a merged weight that is not finite.

    Example:
        >>> import loraparam as lp, tempfile, torch
        >>> from safetensors.torch import load_file, save_file
        >>> model = torch.nn.Linear(4, 6)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(model.state_dict(), f"{folder}/base.safetensors")
        ...     _ = lp.attach(model, lp.LoRA(r=2, init="gaussian"))
        ...     lp.save(model, f"{folder}/adapter.safetensors")
        ...     _ = lp.merge_files(f"{folder}/base.safetensors", f"{folder}/adapter.safetensors", f"{folder}/out")
        ...     torch.equal(load_file(f"{folder}/out")["weight"], model.weight)
        True
    """
    given = weighted(adapters, weights)
    source, target = Path(base), Path(out)
    known = FileBase(source)
    refuse_same(target, source, *(path for path, _ in given))
    check_free(target, force)
    if force and target.exists() and target.is_dir() != source.is_dir():
        kind = "directory" if source.is_dir() else "file"
        raise FormatError(f"{str(target)!r} is not a {kind}, as the base is; give another path")
    contents = [(read_content(path, known, format=format, **hints), weight) for path, weight in given]
    targets = by_parameter([t for content, weight in contents for t in fit(content, known, weight)])
    shards = sorted(set(known.shards.values()))
    twins = _twins(shards, targets)
    bar = iter(progress(known.names, "merging"))
    with in_place_of(target) as temporary:
        if source.is_dir():
            temporary.mkdir()
        for shard in shards:
            place = temporary / shard.name if source.is_dir() else temporary
            rewrite(shard, place, lambda tensor, file: _changed(tensor, file, targets, check_base, bar))
        carried, left_out = _carry(source, temporary, shards) if source.is_dir() else ([], [])
        next(bar, None)  # lets a bar close
    copied = len(known.names) - len(targets)
    return Merged(str(target), tuple(targets), copied, tuple(carried), tuple(left_out), twins)


def _changed(
    tensor: Stored, file: IO[bytes], targets: Mapping[str, Sequence[Target]], check: bool, bar: Iterator[Any]
) -> Tensor | None:
    """The merged values of a tensor; None where no adapter is on it."""
    next(bar, None)
    own = targets.get(tensor.name)
    if own is None:
        return None
    weight = tensor.read(file)
    if check:
        check_bases(weight, own)
    value = update(weight, own)
    if not all_finite(value):
        raise FormatError(
            f"{tensor.name!r}: the merged weight is not finite in {tensor.dtype}; the base or the adapter has "
            "diverged, or a weight is too large"
        )
    return value


def _twins(shards: Sequence[Path], targets: Mapping[str, Sequence[Target]]) -> dict[str, tuple[str, ...]]:
    """Parameters that no adapter changes, with the bytes of one that is changed; vectors and constants aside."""
    groups: dict[bytes, list[tuple[Path, Stored]]] = {}
    for shard in shards:
        tensors = header_of(shard)[1]
        with open(shard, "rb") as file:
            for tensor in tensors:
                file.seek(tensor.start)
                head = file.read(min(4096, tensor.stop - tensor.start))
                if len(tensor.shape) > 1 and len(set(head)) > 8:  # a constant repeats the bytes of one number
                    key = hashlib.blake2b(f"{tensor.dtype}{tensor.shape}".encode() + head).digest()
                    groups.setdefault(key, []).append((shard, tensor))
    twins = {}
    for group in groups.values():
        changed = [pair for pair in group if pair[1].name in targets]
        others = [pair for pair in group if pair[1].name not in targets]
        for shard, tensor in changed if others else []:
            same = tuple(other.name for at, other in others if _equal(shard, tensor, at, other))
            if same:
                twins[tensor.name] = same
    return twins


def _equal(one: Path, a: Stored, other: Path, b: Stored) -> bool:
    left, stop = a.start, a.stop
    with open(one, "rb") as first, open(other, "rb") as second:
        first.seek(a.start)
        second.seek(b.start)
        while left < stop:
            size = min(CHUNK, stop - left)
            if first.read(size) != second.read(size):
                return False
            left += size
    return True


def _carry(source: Path, target: Path, shards: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Copy the rest of a checkpoint's directory; its index too, which holds for the merged shards as well."""
    carried, left_out = [], []
    names = {shard.name for shard in shards}
    index = [path.name for path in source.glob("*.safetensors.index.json")]
    for path in sorted(source.iterdir()):
        if path.name in names:
            continue
        if path.name not in index and any(fnmatchcase(path.name, pattern) for pattern in _STALE):
            left_out.append(path.name)
        elif path.is_dir():
            shutil.copytree(path, target / path.name)
            carried.append(path.name)
        else:
            shutil.copy2(path, target / path.name)
            carried.append(path.name)
    return carried, left_out
