"""The table of models in docs/models.md. ``python tests/models_table.py`` writes it again."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

from model_zoo import FAMILIES, MATRIX, one_thread
from zoo.entry import Entry

import loraparam as lp
from loraparam.errors import listed

PATH = Path(__file__).resolve().parents[1] / "docs" / "models.md"
HEAD = ("model", "class", "targets", "trained / all parameters", "reads", "cache", "result")

TEXT = """# Models

Architectures of transformers, diffusers and torch, unmodified and each from a tiny config, with LoRA on all linear
layers, all convolutions and all stacks of experts. `tests/test_matrix.py` checks on each of them the laws of adapted
layers in `lp.testing.laws()` but two that take long: outputs and gradients are those of a plain model with the
effective weights, fresh adapters change nothing, one optimizer step moves the factors alone, detaching and blocks
restore every bit, merging keeps the outputs, states and files load again, copies are independent. Merged, each is saved
with `save_pretrained` and comes back from `from_pretrained` as it was. `tests/models_table.py` writes this file.

- **reads**: operations in one forward that ran on the weight's parts (factored), and those that took the merged weight.
- **cache**: whether the model generates token by token; then the merged model generates the same.
- **result**: "ok", or what is left out and why. Targets that no gradient can reach were named by `lp.check`, and what
  the model itself would overwrite is refused by name.
"""


def row(entry: Entry) -> str:
    """A row, computed anew."""
    model = entry.model()
    kind = type(model).__name__
    if entry.refused:
        return _line(entry.name, kind, "-", "-", "-", "-", f"refused: {refusal(entry)}")
    subject = entry.subject()
    total = sum(parameter.numel() for parameter in model.parameters())
    plan = subject.attach(model)
    report = lp.check(model, **entry.inputs())
    factored, merged = (sum(getattr(r, how) for r in report) for how in ("factored", "merged"))
    reads = ", ".join(f"{n} {how}" for n, how in ((factored, "factored"), (merged, "merged")) if n)
    counts = f"{plan.num_params:,} / {total:,}"
    return _line(entry.name, kind, str(len(plan)), counts, reads, "yes" if entry.generates else "", result(entry))


def refusal(entry: Entry) -> str:
    """What attach says of a model that cannot be adapted."""
    subject = entry.subject()
    try:
        lp.plan(entry.model(), subject.method, subject.targets)
    except lp.LoraparamError as error:
        return str(error)
    raise AssertionError(f"{entry.name} is not refused")


def result(entry: Entry) -> str:
    """ "ok", and what is left out and why."""
    reasons: dict[str, list[str]] = {}
    for path, reason in (entry.dead | entry.exclude).items():
        reasons.setdefault(reason, []).append(path)
    return "; ".join(["ok", *(f"without {listed(paths)}: {reason}" for reason, paths in reasons.items())])


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def rows_of(text: str) -> dict[str, str]:
    """{model: its row} in the text of a table."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines if line.split(" | ")[0] != "| model"}


def render() -> str:
    """The whole file."""
    parts = [TEXT]
    for family, entries in FAMILIES.items():
        lines = [_line(*HEAD), _line(*["---"] * len(HEAD)).replace(" ", ""), *(row(entry) for entry in entries)]
        parts.append(f"## {family[0].upper()}{family[1:]}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts) + f"\n{len(MATRIX)} models.\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with one_thread():
        PATH.parent.mkdir(exist_ok=True)
        PATH.write_text(render(), encoding="utf-8")
    sys.stdout.write(f"{PATH}\n")
