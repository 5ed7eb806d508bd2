"""What our own files say in the weights' header, and how the two files stay one adapter.

Two files cannot be replaced at one moment. The weights come first and hold a copy of the config and a digest of the
config file they found; until that file is replaced as well, a reader that finds the digest's file takes the copy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FormatError
from .content import is_fingerprint
from .files import parse_json, safetensors_bytes, write_together
from .peft_keys import CONFIG, PREFIX, WEIGHTS, Tensors

_KEY = "loraparam"


def write_files(path: Path, tensors: Mapping[str, Tensor], config: dict[str, Any], notes: dict[str, Any]) -> None:
    """Write both files of an adapter, so that each moment has a readable one."""
    before = _digest(path / CONFIG) if (path / CONFIG).is_file() else None
    header = json.dumps({**notes, "config": config, "config_before": before}, sort_keys=True)
    named = {PREFIX + key: tensor for key, tensor in tensors.items()}
    weights = safetensors_bytes(named, {"format": "pt", _KEY: header})
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    write_together({path / WEIGHTS: weights, path / CONFIG: text})


@dataclass(frozen=True)
class Notes:
    """Our notes in a header; empty in other tools' files.

    Attributes:
        copy: of the config.
        config_before: digest of the config file that the weights were written beside.
        out_proj: how often a reader is to add the delta of an attention's output projection.
        bases: fingerprints of base weights that a DoRA was trained on.
    """

    copy: Any = None
    config_before: str | None = None
    out_proj: str | None = None
    bases: Mapping[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: Tensors) -> Notes:
        """From a file's header.

        Raises:
            FormatError: it is damaged.
        """
        text = tensors.metadata.get(_KEY)
        if text is None:
            return cls()
        place = f"{tensors.place!r}, header {_KEY!r}"
        value = parse_json(text, place)
        bases = value.get("bases", {}) if isinstance(value, dict) else None
        if not isinstance(bases, dict) or not all(map(is_fingerprint, bases.values())):
            raise FormatError(f"{place}; allowed: an object, with bases of 9 numbers each")
        out_proj = value.get("out_proj")
        if out_proj not in (None, "once", "twice"):
            raise FormatError(f"{place}: out_proj; allowed: null, 'once', 'twice'")
        return cls(value.get("config"), value.get("config_before"), out_proj, bases)

    def config(self, path: Path) -> Any:
        """The content of the config file, or of the copy where the file is not there yet.

        Raises:
            FormatError: there is none, or it is damaged.
        """
        if self.copy is not None and (not path.is_file() or _digest(path) == self.config_before):
            return self.copy
        if not path.is_file():
            raise FormatError(f"{str(path)!r} does not exist")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"{str(path)!r} is not readable text: {error}") from None
        return parse_json(text, repr(str(path)))


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise FormatError(f"{str(path)!r} is not readable: {error}") from None
