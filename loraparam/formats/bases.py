"""What a format may ask about the model an adapter is for: the model itself, or a checkpoint's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ..catalogue import catalogue, shown_value
from ..errors import FormatError, nearest
from ..layouts import Layout, layout_of
from ..refusals import can_dequantize
from .files import open_safetensors, parse_json


class Base(Protocol):
    """The parameters an adapter goes onto.

    Attributes:
        names: every parameter's dotted path; in order of registration where ``ordered``.
        modules: every module's dotted path, the model's own "" included.
        ordered: whether ``names`` runs in the model's order of registration, which files do not keep.
    """

    names: list[str]
    modules: list[str]
    ordered: bool

    def shape(self, path: str) -> tuple[int, ...]:
        """The shape of a parameter."""
        ...

    def layout(self, path: str) -> Layout | None:
        """How a parameter reads as a matrix; None where only a module's type could tell."""
        ...

    def module(self, path: str) -> nn.Module | None:
        """The module at a path; None where there is none, or only files are known."""
        ...

    def tensor(self, path: str) -> Tensor:
        """A parameter's values, without any adapter; on the CPU, as what is read from a file is."""
        ...

    def aliases(self, path: str) -> list[str]:
        """Every name of the parameter: more than one where it is tied or its module is used twice."""
        ...


class ModelBase:
    """The base of a model in memory, with or without adapters on it."""

    ordered = True

    def __init__(self, model: nn.Module) -> None:
        self.known = catalogue(model)
        self.names = list(self.known.leaves)
        self.modules = list(self.known.modules)

    def shape(self, path: str) -> tuple[int, ...]:
        """As the layer sees it."""
        return tuple(self.known.leaves[path].shape)

    def layout(self, path: str) -> Layout | None:
        """From the module's type."""
        place = self.known.place(path)
        return layout_of(place.module, place.name, self.shape(path))

    def module(self, path: str) -> nn.Module | None:
        """The module itself, whose parameters may be parametrized."""
        return self.known.modules.get(path)

    def tensor(self, path: str) -> Tensor:
        """The frozen tensor itself; of quantized ones, and of those on an accelerator, a copy."""
        leaf, place = self.known.leaves[path], self.known.place(path)
        value = (leaf.base if leaf.base is not None else shown_value(place.module, place.name)).detach()
        return (value.dequantize().to(value.dtype) if can_dequantize(value) else value).cpu()

    def aliases(self, path: str) -> list[str]:
        """By identity."""
        return [place.path for place in self.known.leaves[path].places]


class FileBase:
    """The base in a checkpoint: one safetensors file, or a directory of shards with their index.

    Tensors are read one at a time, when they are asked for.

    Raises:
        FormatError: not such a file or directory, or an index that does not fit its shards.
    """

    ordered = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shards: dict[str, Path] = {}  # {parameter: the file that holds it}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        files, listed = _files(path)
        for file in files:
            self._add(file)
        for name, shard in listed.items():
            if self.shards.get(name, path).name != shard:
                raise FormatError(f"{str(path)!r}: its index says that {name!r} is in {shard!r}, and it is not")
        self.names = list(self.shards)
        self.modules = sorted({"", *(name[:i] for name in self.names for i, c in enumerate(name) if c == ".")})

    def _add(self, path: Path) -> None:
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 - a handle, not a dict
                if name in self.shards:
                    raise FormatError(f"{name!r} is in both {self.shards[name].name!r} and {path.name!r}")
                self.shards[name] = path
                about = file.get_slice(name)
                self._shapes[name], self._dtypes[name] = tuple(about.get_shape()), about.get_dtype()

    def shape(self, path: str) -> tuple[int, ...]:
        """From the file's header."""
        return self._shapes[path]

    def dtype(self, path: str) -> str:
        """As the file's header names it: "F32", "BF16", …"""
        return self._dtypes[path]

    def layout(self, path: str) -> Layout | None:
        """Unknown: a file does not say what its modules are."""
        return None

    def module(self, path: str) -> nn.Module | None:
        """Unknown."""
        return None

    def tensor(self, path: str) -> Tensor:
        """Read from its shard."""
        if path not in self.shards:
            raise FormatError(f"{str(self.path)!r} holds no tensor {path!r}{nearest(path, self.names)}")
        with open_safetensors(self.shards[path]) as file:
            tensor: Tensor = file.get_tensor(path)
        return tensor

    def aliases(self, path: str) -> list[str]:
        """Unknown: a file does not say what is tied."""
        return [path]


def _files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a checkpoint, and where its index says that tensors are."""
    if path.is_file():
        return [path], {}
    if not path.is_dir():
        raise FormatError(f"{str(path)!r} does not exist; allowed: a safetensors file, or a directory with an index")
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise FormatError(f"{str(path)!r} holds {len(indexes)} indexes; give the path of one checkpoint's files")
    if indexes:
        return _indexed(indexes[0])
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise FormatError(
            f"{str(path)!r} holds {len(found)} safetensors files and no *.safetensors.index.json; allowed: one file, "
            "or shards with their index"
        )
    return found, {}


def _indexed(index: Path) -> tuple[list[Path], dict[str, str]]:
    """The shards an index names, and what it says: plain file names beside it, never a path elsewhere."""
    content: Any = parse_json(index.read_text(encoding="utf-8", errors="replace"), repr(str(index)))
    mapping = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise FormatError(f"{str(index)!r}: weight_map; allowed: a non-empty object of tensor names to file names")
    names = sorted(set(mapping.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or "\0" in name or not (index.parent / name).is_file():
            raise FormatError(f"{str(index)!r} names shard {name!r}; allowed: a file in the same directory")
    return [index.parent / name for name in names], mapping
