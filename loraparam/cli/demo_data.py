"""Two real texts that come with every Python: its own sources (code), and its language reference (prose)."""

from __future__ import annotations

import importlib
import re
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LoraparamError

VOCABULARY = 96  # newline, then the printable ASCII characters; anything else reads as '?'
HELD_OUT = 8  # every eighth file, or topic, is never trained on
LEAST = 50_000  # characters below which a text is too short to learn from


@dataclass(frozen=True, kw_only=True)
class Text:
    """One domain: what to train on and what to measure on, as character numbers.

    Args:
        train: characters of the documents trained on, (n,) uint8.
        held_out: characters of the other documents, (m,) uint8.
        documents: how many documents were read.
        documents_held_out: how many of them are held out.
    """

    train: Tensor
    held_out: Tensor
    documents: int
    documents_held_out: int


def code(stdlib: Path | None = None) -> Text:
    """The top-level modules of the standard library, in the order of their names, split by file.

    Args:
        stdlib: the folder to read. Default: this Python's own.

    Raises:
        LoraparamError: there is too little source there (a Python without its sources).
    """
    folder = stdlib or Path(sysconfig.get_path("stdlib"))
    # Only modules that Python itself names: a distribution may put files of its own beside them.
    files = [path for path in sorted(folder.glob("*.py")) if path.stem in sys.stdlib_module_names]
    sources = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return _split(sources, "\n", f"standard-library sources in {str(folder)!r}")


def prose() -> Text:
    """The topics of Python's language reference (what ``help("yield")`` prints), split by topic.

    Some topics repeat paragraphs of others; each paragraph is kept once, and one that occurs in a held-out topic is
    never trained on.

    Raises:
        LoraparamError: this Python comes without them.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        topics = {}
    # Headings have more blank lines before them in some topics than in others.
    paragraphs = [re.split(r"\n{2,}", topics[name].strip("\n")) for name in sorted(topics)]
    seen = {text for topic in paragraphs[::HELD_OUT] for text in topic}
    documents = []
    for index, topic in enumerate(paragraphs):
        if index % HELD_OUT:
            topic = [text for text in topic if text not in seen]
            seen.update(topic)
        documents.append("\n\n".join(dict.fromkeys(topic)))
    return _split(documents, "\n\n", "language reference (the module 'pydoc_data.topics')")


def encode(text: str) -> Tensor:
    """The characters of ``text`` as numbers below ``VOCABULARY``, (len(text),) uint8.

    Example:
        >>> encode("\\n !~é").tolist()
        [0, 1, 2, 95, 32]
    """
    table = torch.full((256,), ord("?") - 31, dtype=torch.uint8)
    table[ord("\n")] = 0
    table[32:127] = torch.arange(1, VOCABULARY, dtype=torch.uint8)
    if not text:  # frombuffer takes no empty buffer
        return torch.empty(0, dtype=torch.uint8)
    return table[torch.frombuffer(bytearray(text, "ascii", "replace"), dtype=torch.uint8).long()]


def _split(documents: Sequence[str], between: str, what: str) -> Text:
    """Every ``HELD_OUT``-th document held out, the others to train on."""
    train = encode(between.join(text for index, text in enumerate(documents) if index % HELD_OUT))
    held_out = encode(between.join(documents[::HELD_OUT]))
    if len(train) + len(held_out) < LEAST:
        raise LoraparamError(
            f"the demo needs {LEAST:,} characters of Python's {what} and found {len(train) + len(held_out):,}; "
            "run it with a Python that was installed with them (python.org, conda, or the full system package)"
        )
    return Text(
        train=train,
        held_out=held_out,
        documents=len(documents),
        documents_held_out=len(documents[::HELD_OUT]),
    )
