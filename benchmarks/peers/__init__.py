"""The libraries that are compared; which of them are installed is found out when they are asked."""

from __future__ import annotations

from .base import DORA, LORA, MAGNITUDE, METHODS, Library, PeerError, version
from .loralib import Loralib
from .loratorch import LoRATorch
from .lycoris import Lycoris
from .minlora import MinLoRA
from .ours import Ours, by_target, stir
from .peft import Peft

OURS = Ours()
PEFT = Peft()
PEERS: tuple[Library, ...] = (PEFT, Loralib(), LoRATorch(), MinLoRA(), Lycoris())
LIBRARIES: tuple[Library, ...] = (OURS, *PEERS)

__all__ = [
    "DORA",
    "LIBRARIES",
    "LORA",
    "MAGNITUDE",
    "METHODS",
    "OURS",
    "PEERS",
    "PEFT",
    "Library",
    "PeerError",
    "by_target",
    "stir",
    "version",
]
