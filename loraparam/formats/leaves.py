"""Keys of the files that tools for diffusion models write: <module's name> + <leaf>, and what each leaf is.

One pair of factors has many spellings, all of them read by ComfyUI; ``PAIRS`` lists them. Shapes are those of the
layer: down (r, in, *k), up (out, r, 1, ...).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FormatError, listed
from ..finite import all_finite
from ..layouts import Layout
from .bases import Base
from .files import PICKLES, open_safetensors, unpickled

# (down, up) of each spelling. Halves of two spellings are no pair, for no reader joins them.
PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),  # kohya, LyCORIS
    (".lora_A.weight", ".lora_B.weight"),  # PEFT, diffusers
    (".lora_A", ".lora_B"),
    (".lora_A.default.weight", ".lora_B.default.weight"),  # PEFT, saved with the adapter's name
    (".lora.down.weight", ".lora.up.weight"),  # diffusers
    ("_lora.down.weight", "_lora.up.weight"),  # diffusers before 0.22
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),  # diffusers, text encoders
)


@dataclass(frozen=True)
class Group:
    """All tensors a file holds under one module's name.

    Attributes:
        head: the module's name, as the file has it.
        tensors: {leaf: tensor}; a pair's halves are "down" and "up" in every spelling.
        keys: {leaf: key in the file}, for messages.
        file: the file's name.
    """

    head: str
    file: str
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    keys: dict[str, str] = field(default_factory=dict)

    def error(self, leaf: str, text: str) -> FormatError:
        """An error that names the file and the key."""
        return FormatError(f"{self.file!r}, {self.keys[leaf]!r}: {text}")


class Leaves:
    """The leaves one format knows.

    Args:
        plain: leaves beside the pairs.
        refused: {leaf: why it is not read}.
        rename: the module's name that a name with this end of the key stands for.
    """

    def __init__(
        self,
        plain: Iterable[str],
        refused: Mapping[str, str],
        rename: Callable[[str, str], str] = lambda head, end: head,
    ) -> None:
        self.refused, self.rename = dict(refused), rename
        self.leaf_of = {half: leaf for pair in PAIRS for half, leaf in zip(pair, ("down", "up"), strict=True)}
        self.leaf_of |= {f".{leaf}": leaf for leaf in (*plain, *refused)}
        ends = "|".join(re.escape(end) for end in self.leaf_of)
        self.pattern = re.compile(rf"(.*?)({ends})", re.DOTALL)

    def split(self, key: str) -> tuple[str, str] | None:
        """(module's name, end of the key); None for an unknown leaf."""
        found = self.pattern.fullmatch(key)
        return (self.rename(found[1], found[2]), found[2]) if found is not None and found[1] else None


def read_groups(path: Path, leaves: Leaves) -> tuple[list[Group], dict[str, str]]:
    """A file's tensors by module, and its header.

    Raises:
        FormatError: an unknown or refused leaf, half a pair, one leaf under two spellings, or a tensor that is not
            floating-point and finite.
    """
    name = str(path)
    with _opened(path) as (keys, get, metadata):
        split = {key: leaves.split(key) for key in keys}
        _check_keys(split, leaves, name)
        groups: dict[str, Group] = {}
        spelling: dict[str, str] = {}
        for key, parts in split.items():
            assert parts is not None
            head, end = parts
            group, leaf = groups.setdefault(head, Group(head, name)), leaves.leaf_of[end]
            if leaf in group.keys:
                raise FormatError(f"{name!r}: {group.keys[leaf]!r} and {key!r} are the same of one module; keep one")
            group.keys[leaf] = key
            spelling[key] = end
        for group in groups.values():
            _check_halves(group, spelling)
        for group in groups.values():
            group.tensors.update({leaf: _checked(group, leaf, get(key)) for leaf, key in group.keys.items()})
        return list(groups.values()), metadata


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[list[str], Callable[[str], Tensor], dict[str, str]]]:
    """A file's keys, a function from key to tensor, and its header."""
    if path.suffix in PICKLES:
        tensors = unpickled(path)
        yield list(tensors), tensors.__getitem__, {}
    else:
        with open_safetensors(path) as file:
            yield list(file.keys()), file.get_tensor, dict(file.metadata() or {})


def _check_keys(split: Mapping[str, tuple[str, str] | None], leaves: Leaves, file: str) -> None:
    for key, parts in split.items():
        leaf = leaves.leaf_of[parts[1]] if parts is not None else ""
        if leaf in leaves.refused:
            raise FormatError(f"{file!r}, {key!r}: {leaves.refused[leaf]}")
    unknown = [key for key, parts in split.items() if parts is None]
    if unknown or not split:
        what = f"unknown keys {listed(unknown)}" if unknown else "the file holds no tensors"
        raise FormatError(f"{file!r}: {what}; known ends of keys: {listed(leaves.leaf_of, 12)}")


def _check_halves(group: Group, spelling: Mapping[str, str]) -> None:
    for half, other in (("down", "up"), ("up", "down")):
        if half in group.keys and other not in group.keys:
            pair = next(pair for pair in PAIRS if spelling[group.keys[half]] in pair)
            missing = pair[1] if half == "down" else pair[0]
            raise group.error(half, f"half a pair; {group.head + missing!r} is missing")
    if "down" in group.keys and (spelling[group.keys["down"]], spelling[group.keys["up"]]) not in PAIRS:
        raise group.error("down", f"half a pair; {group.keys['up']!r} is the other half of another spelling")


def _checked(group: Group, leaf: str, tensor: Tensor) -> Tensor:
    if leaf == "alpha" and not tensor.is_meta and tensor.layout == torch.strided:
        return tensor
    if not tensor.is_floating_point():
        raise group.error(leaf, f"dtype {tensor.dtype}; allowed: a floating-point dtype")
    if tensor.is_meta or tensor.layout != torch.strided:
        raise group.error(leaf, f"a {tensor.layout if not tensor.is_meta else 'meta'} tensor; allowed: a dense one")
    # Nothing computes in 8 bits.
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    least = 2 if leaf in ("down", "mid", "up") else 0
    if tensor.numel() == 0 or tensor.dim() < least:
        what = "is empty" if tensor.dim() >= least else f"has fewer than {least} dims"
        raise group.error(leaf, f"shape {tuple(tensor.shape)} {what}")
    if not all_finite(tensor):
        raise group.error(leaf, "holds NaN or infinity; a finite tensor is needed")
    return tensor


def alpha_of(group: Group) -> float | None:
    """The number in a group's ``alpha``: one element, of any dtype; None where there is none.

    0 means r to kohya and LyCORIS, who write it for "no scaling", and 0 to ComfyUI; the writer's meaning holds.
    """
    alpha = group.tensors.get("alpha")
    if alpha is None:
        return None
    if alpha.numel() != 1 or alpha.dtype == torch.bool or alpha.is_complex():
        raise group.error("alpha", f"shape {tuple(alpha.shape)}, dtype {alpha.dtype}; allowed: one real number")
    value = float(alpha.double().item())
    if not math.isfinite(value):
        raise group.error("alpha", f"{value}; allowed: a finite number")
    return value or None


def refuse_growth(group: Group, leaf: str, numbers: int) -> None:
    """Refuse to make far more of a module's tensors than the file holds, where no base vouches for the sizes."""
    held = sum(tensor.numel() for tensor in group.tensors.values())
    if numbers > 100 * held + 10**6:
        raise group.error(leaf, f"{numbers} numbers would be made of {held}; the base is needed to read it")


def squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape without its trailing ones: a 1×1 convolution's kernel is a Linear's weight to every reader."""
    sizes = list(shape)
    while len(sizes) > 1 and sizes[-1] == 1:
        del sizes[-1]
    return tuple(sizes)


def layout_for(group: Group, path: str, base: Base, out: int, in_: int) -> Layout:
    """How the parameter reads, where its pair (out, r), (r, in, ...) is that of a Linear or a convolution.

    Files do not say what their modules are: there the shapes decide, and square ones read (out, in).

    Raises:
        FormatError: an embedding, a stack of experts or a transposed convolution, which have no such pair.
    """
    shape, known = base.shape(path), base.layout(path)
    if known is None:
        swapped = len(shape) == 2 and (out, in_) == (shape[1], shape[0]) and shape[0] != shape[1]
        return Layout(out=1) if swapped else Layout()
    if known.batch or known.lookup or (known.out and len(shape) > 2) or len(shape) < 2:
        # Told from the module's type, so there is a module.
        kind = type(base.module(path.rpartition(".")[0])).__name__
        key = next(iter(group.keys))
        raise group.error(key, f"{path!r} is the {tuple(shape)} parameter of a {kind}, which has no such pair here")
    return known


def matrices(group: Group, shape: Sequence[int], layout: Layout) -> tuple[Tensor, Tensor]:  # (r, in), (out, r)
    """The pair as matrices, with ``mid`` contracted into down, once every shape is known to fit.

    Raises:
        FormatError: a shape that does not fit.
    """
    down, up, mid = group.tensors["down"], group.tensors["up"], group.tensors.get("mid")
    _, out, in_ = layout.sizes(shape)
    dims = [size for dim, size in enumerate(shape) if dim != layout.out]  # (in, *k)
    kernel = dims[:1] if mid is not None else dims
    r = down.shape[0]
    if squeezed(up.shape) != squeezed((out, r)) or up.dim() < 2:
        raise group.error(
            "up", f"shape {tuple(up.shape)}; for r={r} and out={out} it is {(out, r)}, with or without 1s"
        )
    flat = down.dim() == 2 and mid is None and down.shape[1] == in_
    if down.dim() < 2 or not (flat or squeezed(down.shape[1:]) == squeezed(kernel)):
        raise group.error("down", f"shape {tuple(down.shape)}; the layer takes {(r, *kernel)}")
    if mid is None:
        return down.reshape(r, in_), up.reshape(out, r)
    if mid.shape[:2] != (r, r) or squeezed(mid.shape[2:] or (1,)) != squeezed(dims[1:] or (1,)):
        raise group.error("mid", f"shape {tuple(mid.shape)}; the layer takes {(r, r, *dims[1:])}")
    wide = torch.promote_types(down.dtype, torch.float32)
    # In float64, so that the product is rounded once.
    A = torch.einsum("mnk,nj->mjk", mid.double().reshape(r, r, -1), down.double().reshape(r, -1))
    return A.reshape(r, in_).to(wide), up.reshape(out, r).to(wide)
