"""Values that a PEFT file holds whole: biases, ``modules_to_save``, embeddings, and single rows of embeddings."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import FormatError, StateError, listed, nearest
from ..state import check_factor
from .bases import Base
from .content import Item, Prefix, relocate
from .peft_config import Config
from .peft_keys import PREFIX, Layer, Tensors


class Values:
    """A file's new values of parameters, checked against config and base.

    Raises:
        FormatError: a key that is nobody's, a value that does not fit, or one that is missing.
    """

    def __init__(self, tensors: Tensors, config: Config, base: Base | None, prefix: Prefix) -> None:
        self.tensors, self.config, self.base = tensors, config, base
        self.replaced: dict[str, Tensor] = {}
        unknown = []
        for path, value in tensors.values.items():
            place = relocate(path, prefix)
            if place is not None and not self._take(path, place, value):
                unknown.append(tensors.keys[path])
        if unknown:
            known = [] if base is None else base.names
            near = nearest(unknown[0].removeprefix(PREFIX), known)
            raise FormatError(f"{tensors.place!r}: {listed(unknown)} belong to no adapter and no parameter{near}")
        if base is not None:
            self._check_complete(base)

    def _error(self, path: str, what: str) -> FormatError:
        return FormatError(f"{self.tensors.place!r}: {self.tensors.keys[path]!r} {what}")

    def _take(self, path: str, place: str, value: Tensor) -> bool:
        """Keep one value; False where nothing has that name."""
        name = path.rpartition(".")[2]
        if self.base is None:
            told = self._is_saved(path) or ".base_layer." in self.tensors.keys[path]
            if not (told or (name == "bias" and self.config.bias != "none")):
                return False
        elif place not in self.base.names:
            return self._is_buffer(path, place, value)
        elif tuple(value.shape) != self.base.shape(place):
            size = f"has shape {tuple(value.shape)}; {place!r} of the model has {self.base.shape(place)}"
            raise self._error(path, f"{size} (was the vocabulary resized? resize the model's embeddings first)")
        elif self._is_saved(path) and len(self.base.aliases(place)) > 1:
            raise self._error(path, f"is for {place!r} alone, which is tied in this model; give each a copy first")
        elif not (value.is_floating_point() and (name == "bias" or self._is_saved(path))) and torch.equal(
            value, self.base.tensor(place).to(value.dtype)
        ):
            return True  # an embedding that PEFT saved as it is
        try:
            check_factor(self.tensors.keys[path], value, value.shape, torch.float64)
        except StateError as error:
            raise FormatError(f"{self.tensors.place!r}: {error}") from None
        self.replaced[place] = value
        return True

    def _is_buffer(self, path: str, place: str, value: Tensor) -> bool:
        """A buffer of ``modules_to_save`` (a norm's statistics) is no parameter: it must be what the model has."""
        assert self.base is not None
        owner, _, name = place.rpartition(".")
        module = self.base.module(owner)
        buffer = module._buffers.get(name) if module is not None else None
        if buffer is None:
            return False
        if buffer.shape != value.shape or not torch.equal(buffer.cpu(), value.to(buffer.dtype)):
            raise self._error(
                path, f"is another value of the buffer {place!r}; adapters hold parameters: set it by hand"
            )
        return True

    def _check_complete(self, base: Base) -> None:
        missing = [
            path
            for path in base.names
            if base.module("") is not None and self._is_saved(path) and path not in self.replaced
        ]
        if missing:
            raise FormatError(
                f"{self.tensors.place!r} lacks {listed(missing)}, of modules_to_save in {self.config.place!r}"
            )

    def _is_saved(self, path: str) -> bool:
        owner = path.rpartition(".")[0]
        parents = [owner[:i] for i, character in enumerate(owner) if character == "."]
        return any(self.config.saves(module) for module in (owner, *parents) if module)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Values that follow from wrappers."""
        both = [path for path in values if path in self.replaced]
        if both:
            raise FormatError(f"{self.tensors.place!r} gives {listed(both)} a new value twice")
        self.replaced.update(values)

    # --- rows of embeddings ---------------------------------------------------------------------------------

    def put_rows(self, parameter: str, layer: Layer, rows: Tensor) -> None:
        """New rows of one embedding: despite its name, ``trainable_tokens_delta`` replaces."""
        place = f"{self.tensors.place!r}: {layer.key!r}"
        ids = next(
            (v for k, v in self.config.tokens.items() if k and layer.path.endswith(k)), self.config.tokens.get("")
        )
        if ids is None:
            raise FormatError(f"{place}: trainable_token_indices do not name {layer.path!r}")
        if self.base is None:
            raise FormatError(f"{place} holds some rows of an embedding; the base is needed for the others")
        value = self.replaced.get(parameter)
        value = self.base.tensor(parameter) if value is None else value
        if value.dim() != 2 or tuple(rows.shape) != (len(ids), value.shape[1]) or max(ids, default=0) >= value.shape[0]:
            raise FormatError(
                f"{place} has shape {tuple(rows.shape)} for {len(ids)} ids up to {max(ids, default=0)}; "
                f"{parameter!r} has {tuple(value.shape)}"
            )
        value = value.to(torch.promote_types(value.dtype, rows.dtype), copy=True)
        value[torch.tensor(ids, dtype=torch.long)] = rows.to(value)
        self.replaced[parameter] = value

    # --- values and adapters on one parameter ---------------------------------------------------------------

    def join(self, items: list[Item]) -> list[Item]:
        """The items, less those whose parameter gets a new value as well: that is then all in the value."""
        kept = []
        for item in items:
            value = self.replaced.get(item.path)
            if value is None:
                kept.append(item)
            elif self.base is None:
                raise FormatError(
                    f"{self.tensors.place!r} gives {item.path!r} a value and an adapter; the base is needed to join"
                )
            else:
                wide = value.double()
                factors = {key: factor.double() for key, factor in item.factors.items()}
                effective = item.method.apply(wide, factors, item.layout)
                self.replaced[item.path] = effective.to(torch.promote_types(value.dtype, torch.float32))
        return kept
