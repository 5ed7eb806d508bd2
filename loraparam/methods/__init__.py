"""The methods, one per file. To add one: its file here, one line below, one row in ``tests/cases.py``."""

from .base import REGISTRY, Factors, Method
from .blocks import BlockLoRA
from .dora import DoRA
from .full import Full
from .ia3 import IA3
from .lora import LoRA
from .magnitude import Magnitude

__all__ = ["IA3", "REGISTRY", "BlockLoRA", "DoRA", "Factors", "Full", "LoRA", "Magnitude", "Method"]
