"""Seeding torch's global generator, often and under deep stacks."""

from __future__ import annotations

import torch


def seed(value: int) -> torch.Generator:
    """``torch.manual_seed``, without a word to accelerators that are not there.

    For three kinds of them torch keeps the seed until one is used, each time with the caller's whole stack as text.
    Laws seed before each run of a small layer, which takes less than that.
    """
    if torch.accelerator.is_available():
        return torch.manual_seed(value)
    return torch.default_generator.manual_seed(value)
