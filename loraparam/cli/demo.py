"""Four adapters on one small language model, measured.

Trains a character-level model around an unmodified nn.TransformerEncoder on Python's own sources,
then adapts it to the prose of Python's language reference: with LoRA, with DoRA, with magnitudes
only, and with DoRA on attention and magnitudes on the feed-forward layers. Takes about a minute on
one core; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import loraparam as lp

from . import demo_data
from .demo_data import Text
from .demo_model import CharModel, held_out_windows, measure, reproducible, train

BASE_SHARE = 3  # the base model trains this many times as long as an adapter
BASE_RATE = 8e-3
ADAPTER_RATE = 1e-2

ATTENTION = ("in_proj_weight[q,v]", "out_proj")
FEED_FORWARD = ("linear1", "linear2")
ADAPTERS: dict[str, tuple[str, dict[str, lp.Method]]] = {  # file name -> what the table calls it, {target: method}
    "lora": ("LoRA", dict.fromkeys(ATTENTION + FEED_FORWARD, lp.LoRA(r=4, alpha=8))),
    "dora": ("DoRA", dict.fromkeys(ATTENTION + FEED_FORWARD, lp.DoRA(r=4, alpha=8))),
    "magnitude": ("Magnitude", dict.fromkeys(ATTENTION + FEED_FORWARD, lp.Magnitude())),
    "mixed": (
        "DoRA attention, Magnitude MLP",
        dict.fromkeys(ATTENTION, lp.DoRA(r=4, alpha=8)) | dict.fromkeys(FEED_FORWARD, lp.Magnitude()),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every adapter of one run shares.

    Args:
        model: the base model, trained on code.
        code, prose: the two domains.
        steps: training steps of one adapter.
        seed: of the factors' start and of the training windows.
        out: the folder for the files.
    """

    model: CharModel
    code: Text
    prose: Text
    steps: int
    seed: int
    out: Path


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one adapter did.

    Args:
        label: what the table calls it.
        trained: parameters trained.
        total: parameters of the model with the adapter on.
        code, prose: held-out losses with the adapter on.
        difference: largest absolute difference between the outputs of the parametrized and of the merged model.
        restored: whether taking it off gave the base back, bit for bit.
        file: where the adapter was saved.
        reloaded: held-out loss on prose of a fresh copy of the base with the file loaded.
    """

    label: str
    trained: int
    total: int
    code: float
    prose: float
    difference: float
    restored: bool
    file: Path
    reloaded: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``loraparam demo``."""
    parser.add_argument(
        "--seed",
        type=functools.partial(_whole, least=0),
        default=0,
        help="same seed, same numbers (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=functools.partial(_whole, least=1),
        default=200,
        help=f"training steps of each adapter; the base model gets {BASE_SHARE} times as many (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("loraparam-demo"),
        metavar="DIR",
        help="where the base model and the adapters are saved; created if need be (default: ./%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo. The exit code is 1 if the base did not come back, or a reloaded adapter differs."""
    out = _folder(args.out)
    code, prose = demo_data.code(), demo_data.prose()
    print(f"code:  {_described(code, 'modules')} of Python's standard library")
    print(f"prose: {_described(prose, 'topics')} of Python's language reference")
    steps = args.steps * (BASE_SHARE + len(ADAPTERS))
    with reproducible(args.seed) as generator, tqdm(total=steps, unit="step", mininterval=0.5) as bar:
        bar.set_description("base model on code")
        model = CharModel()
        optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_RATE, betas=(0.9, 0.99))
        train(model, optimizer, code.train, args.steps * BASE_SHARE, generator=generator, on_step=bar.update)
        before = measure(model, code.held_out), measure(model, prose.held_out)
        save_file(model.state_dict(), out / "base.safetensors")
        setting = Setting(model=model, code=code, prose=prose, steps=args.steps, seed=args.seed, out=out)
        results = []
        for name in ADAPTERS:
            bar.set_description(f"{name} on prose")
            results.append(adapt(setting, name, on_step=bar.update))
    print(f"base:  nn.TransformerEncoder, {sum(p.numel() for p in model.parameters()):,} parameters, trained on code\n")
    print(_table(before, results), end="\n\n")
    print(_closing(setting, results))
    return 0 if all(r.restored and r.reloaded == r.prose for r in results) else 1


def adapt(setting: Setting, name: str, *, on_step: Callable[[], object]) -> Result:
    """Put an adapter on, train it on prose, measure and save it, take it off, load it onto a copy of the base.

    Args:
        setting: its model is changed in place, and is the base again at the end.
        name: a key of ``ADAPTERS``, and the name of the file.
        on_step: called after every training step.
    """
    model, (label, methods) = setting.model, ADAPTERS[name]
    file = setting.out / f"{name}.safetensors"
    base = _Base(model)
    generator = torch.Generator().manual_seed(setting.seed)  # every adapter sees the same windows
    lp.attach(model, methods, generator=generator)
    optimizer = torch.optim.AdamW(lp.param_groups(model, ADAPTER_RATE), betas=(0.9, 0.99))
    train(model, optimizer, setting.prose.train, setting.steps, generator=generator, on_step=on_step)
    trained = sum(parameter.numel() for parameter in lp.parameters(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    code, prose = measure(model, setting.code.held_out), measure(model, setting.prose.held_out)
    difference = _merged_difference(model, held_out_windows(setting.prose.held_out, 64)[:, :-1])
    lp.save(model, file)
    lp.detach(model)
    copy = CharModel()
    copy.load_state_dict(model.state_dict())
    lp.load(copy, file)
    return Result(
        label=label,
        trained=trained,
        total=total,
        code=code,
        prose=prose,
        difference=difference,
        restored=base.is_back(),
        file=file,
        reloaded=measure(copy, setting.prose.held_out),
    )


class _Base:
    """A model as it is before anything is put on it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.classes = [type(module) for module in model.modules()]
        self.parameters = list(model.named_parameters())
        self.flags = [p.requires_grad for p in model.parameters()]
        self.state = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    def is_back(self) -> bool:
        """The same classes, the very same Parameters in the same order, their flags, keys and bits."""
        parameters = list(self.model.named_parameters())
        state = self.model.state_dict()
        return (
            [type(module) for module in self.model.modules()] == self.classes
            and [(name, id(p)) for name, p in parameters] == [(name, id(p)) for name, p in self.parameters]
            and [p.requires_grad for _, p in parameters] == self.flags
            and list(state) == list(self.state)
            # As bytes: -0.0 and 0.0 are equal numbers, not equal bits.
            and all(torch.equal(t.view(torch.uint8), self.state[key].view(torch.uint8)) for key, t in state.items())
        )


def _merged_difference(model: CharModel, text: Tensor) -> float:
    """Between the adapted model and a plain one with the merged weights: in training, and on eval mode's fast path."""
    plain = CharModel()
    plain.load_state_dict(lp.merged_state_dict(model))
    with torch.enable_grad():
        training = (model.train()(text) - plain.train()(text)).abs().max().item()
    with torch.no_grad():
        evaluation = (model.eval()(text) - plain.eval()(text)).abs().max().item()
    return float(max(training, evaluation))


def _table(before: tuple[float, float], results: list[Result]) -> str:
    """One line per adapter, 97 columns."""
    lines = [
        f"{'':<29}  {'trained':>10}  {'share of':>8}  {'loss on code':^14}  {'loss on prose':^14}  {'largest':>10}",
        f"{'method':<29}  {'parameters':>10}  {'total':>8}  {'before':>6}  {'after':>6}  {'before':>6}  {'after':>6}"
        f"  {'difference':>10}",
    ]
    lines += [
        f"{r.label:<29}  {r.trained:>10,}  {r.trained / r.total:>8.2%}  {before[0]:>6.3f}  {r.code:>6.3f}"
        f"  {before[1]:>6.3f}  {r.prose:>6.3f}  {r.difference:>10.1e}"
        for r in results
    ]
    return "\n".join(lines)


def _closing(setting: Setting, results: list[Result]) -> str:
    """What the columns mean, what was checked, what was written, and what to try next."""
    restored = all(r.restored for r in results)
    reloaded = max(abs(r.reloaded - r.prose) for r in results)
    return f"""\
loss: nats per character on held-out text. largest difference: between the outputs of the model with
the adapter on and of a plain model with the merged weights, in train and in eval mode.

base restored bit for bit: {"yes" if restored else "NO"} (same Parameters, same bytes after each lp.detach)
loaded back onto a fresh copy of the base: {f"losses differ by {reloaded:.1e}" if reloaded else "same losses"}
saved in {setting.out}: base.safetensors and
  {", ".join(r.file.name for r in results)}

Try next:
  train longer:                   loraparam demo --steps {3 * setting.steps}
  use a saved adapter in Python:  lp.load(model, {str(results[0].file)!r})
  adapt a model of your own:      print(lp.attach(model, lp.DoRA(r=8), "all-linear"))"""


def _described(text: Text, documents: str) -> str:
    characters = len(text.train) + len(text.held_out)
    return f"{characters:,} characters in {text.documents} {documents} ({text.documents_held_out} held out)"


def _folder(path: Path) -> Path:
    """The folder, made if need be; what is wrong with it is said before anything is trained."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise lp.LoraparamError(f"--out {str(path)!r}: {error.strerror}; give a folder that can be made") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise lp.LoraparamError(f"--out {str(path)!r} cannot be written to; give another folder")
    return path


def _whole(text: str, least: int) -> int:
    if not text.isascii() or not text.isdigit() or not least <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}; a whole number from {least} on is needed")
    return int(text)
