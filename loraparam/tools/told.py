"""How the tensors of a checkpoint read as matrices, told from their names and shapes: it does not say its modules.

For the sum W + B·A any reading will do; a format that names its layers' kinds, as PEFT's does, needs the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from ..errors import TargetError, nearest
from ..formats.bases import Base
from ..layouts import Layout

# What models call their embeddings. Not those that are Linear layers somewhere: "embed_out", "x_embedder".
_EMBEDDINGS = {
    "embed_tokens", "embed_positions", "embed_in", "embed", "embedding", "embeddings", "emb", "wte", "wpe",
    "word_embeddings", "position_embeddings", "token_type_embeddings", "token_embedding", "token_embeddings",
    "position_embedding", "tok_embeddings", "tok_emb", "pos_emb", "tokens_embed", "positions_embed", "shared",
    "relative_attention_bias",
}  # fmt: skip


def told_layouts(base: Base, given: Mapping[str, Layout]) -> dict[str, Layout]:
    """{parameter: its layout} of everything with two dims or more.

    First by ``given``, {pattern: layout}, then as ``base`` knows it. Else a weight whose bias has the size of its
    second dim, and not of its first, is stored transposed, as that of transformers' Conv1D; so are then the square
    ones of the same name.

    Raises:
        LoraparamError: a given layout does not fit, or its pattern matches none of these.
    """
    names = [name for name in base.names if len(base.shape(name)) > 1]
    for pattern in given:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise TargetError(f"layouts: {pattern!r} matches no parameter of two dims or more{nearest(pattern, names)}")
    stored = {name: _stored(name, base) for name in names}
    transposed = {_leaf(name) for name in names if stored[name] == "in, out"}
    transposed -= {_leaf(name) for name in names if stored[name] == "out, in"}
    found = {}
    for name in names:
        chosen = next((layout for pattern, layout in given.items() if fnmatchcase(name, pattern)), None)
        if chosen is not None:
            _check_fits(chosen, name, base)
        found[name] = chosen or base.layout(name) or _told(name, base.shape(name), stored[name], transposed)
    return found


def _check_fits(layout: Layout, path: str, base: Base) -> None:
    try:
        layout.sizes(base.shape(path))
    except TargetError as error:
        raise error.at(path) from None


def _leaf(path: str) -> str:
    """The name of the module that a weight belongs to."""
    return (["", "", *path.split(".")])[-2]


def _stored(path: str, base: Base) -> str:
    """The order of a weight's two dims, where the size of its bias tells it."""
    owner, _, name = path.rpartition(".")
    shape, bias = base.shape(path), f"{owner}.bias"
    if name != "weight" or len(shape) != 2 or bias not in base.names or shape[0] == shape[1]:
        return ""
    size = base.shape(bias)
    return "out, in" if size == shape[:1] else "in, out" if size == shape[1:] else ""


def _told(path: str, shape: tuple[int, ...], stored: str, transposed: set[str]) -> Layout:
    name, leaf = path.rpartition(".")[2], _leaf(path)
    if len(shape) == 2 and name == "weight":
        if leaf in _EMBEDDINGS and not stored:
            return Layout(out=1, lookup=True)
        square = shape[0] == shape[1] and leaf in transposed
        return Layout(out=1) if stored == "in, out" or square else Layout()
    # A 3-D weight of a convolution is called "weight"; stacks of experts have names of their own.
    stack = len(shape) == 3 and (name != "weight" or leaf == "experts")
    return Layout(out=1, batch=(0,)) if stack else Layout()
