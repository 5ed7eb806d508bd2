"""One traced forward and backward: is every target read, and does gradient reach it?"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .adapters import check_known
from .errors import AttachError, TargetError, listed, nearest
from .hosts import Site, groups
from .plans import table
from .stack import AdapterFactors
from .suspension import refuse_suspended
from .watching import watching


@dataclass(frozen=True)
class ReportRow:
    """What happened to one target.

    Attributes:
        path: the target.
        adapter: the adapter's name.
        reads: how often the parameter was read, at all its places.
        factored: how many operations ran on the weight's parts.
        merged: how many times the dense effective weight was computed.
        gradient: "arrived", "zero" (it arrived and was zero everywhere), "none", "frozen" (the factors do
            not require grad) or "off" (the adapter does not act).
        unread: places of a tied parameter that nothing read.
    """

    path: str
    adapter: str
    reads: int
    factored: int
    merged: int
    gradient: str
    unread: tuple[str, ...] = ()

    @property
    def dead(self) -> bool:
        """Whether the adapter cannot train here, or has no effect."""
        return self.gradient not in ("frozen", "off") and (self.reads == 0 or self.gradient == "none")


@dataclass(frozen=True)
class Report:
    """The rows of ``check``; prints as a table. ``report[path]`` is the first row of a target.

    Attributes:
        rows: one per target and adapter.
    """

    rows: tuple[ReportRow, ...] = ()

    def __iter__(self) -> Iterator[ReportRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, path: str) -> ReportRow:
        for row in self.rows:
            if row.path == path:
                return row
        raise TargetError(f"no target {path!r} was checked{nearest(path, (row.path for row in self.rows))}")

    def __str__(self) -> str:
        lines = [["target", "adapter", "reads", "execution", "gradient", "not read at"]]
        for row in self.rows:
            counts = [f"{name} {n}" for name, n in (("factored", row.factored), ("merged", row.merged)) if n]
            execution = ", ".join(counts) or "-"
            lines.append([row.path, row.adapter, str(row.reads), execution, row.gradient, ", ".join(row.unread)])
        return table(lines, right=(2,))


def check(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Run ``model(*args, **kwargs)`` forward and backward once, and say what each target saw of it.

    Parameters, buffers, ``.grad``, modes and RNG states are as before afterwards. The loss is a fixed random
    projection of the outputs: a plain sum is constant behind a normalisation.

    Args:
        model: a model with adapters, in the mode to be checked.
        args, kwargs: one batch, as the model takes it.

    Returns:
        A report; print it.

    Raises:
        AttachError: nothing is attached; the outputs do not depend on any factor; or a target is dead: it was
            never read, or no gradient arrived. The error's ``dead`` has the paths of all dead targets.

    Example:
        >>> import loraparam as lp
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        >>> _ = lp.attach(model, lp.LoRA(r=2), "0")
        >>> print(lp.check(model, torch.ones(1, 4)))
        target    adapter  reads  execution  gradient  not read at
        0.weight  default      1  factored 1  arrived
    """
    refuse_suspended(model)
    check_known(model, None)
    found = groups(model)
    if not found:
        raise AttachError("nothing is attached to this model; lp.attach first")
    events: Counter[tuple[int, str, str]] = Counter()

    def watch(site: Any, event: str) -> None:
        if site is not None:
            events[*site, event] += 1

    with torch.inference_mode(False), _restored(model, args, kwargs), torch.enable_grad():
        with watching(watch):
            outputs = model(*args, **kwargs)
            loss = _project(outputs)
            if loss is not None:
                loss.backward()
        rows = tuple(_row(group, entry, events) for group in found for entry in group[0].stack.entries)
    _raise_on_dead(rows, has_loss=loss is not None)
    return Report(rows)


def _row(group: list[Site], entry: AdapterFactors, events: Counter[tuple[int, str, str]]) -> ReportRow:
    def count(event: str) -> int:
        return sum(events[id(site.module), site.name, event] for site in group)

    unread = tuple(site.path for site in group if not events[id(site.module), site.name, "read"])
    return ReportRow(
        path=group[0].path + entry.suffix,
        adapter=entry.adapter,
        reads=count("read"),
        factored=count("factored") if entry.acting else 0,
        merged=count("merged") if entry.acting else 0,
        gradient=_gradient(entry),
        unread=unread,
    )


def _gradient(entry: AdapterFactors) -> str:
    if not entry.acting:
        return "off"
    trained = [factor for factor in entry.factors().values() if factor.requires_grad]
    if not trained:
        return "frozen"
    grads = [factor.grad for factor in trained if factor.grad is not None]
    if not grads:
        return "none"
    return "arrived" if any(bool(grad.any()) for grad in grads) else "zero"


def _raise_on_dead(rows: tuple[ReportRow, ...], has_loss: bool) -> None:
    dead = [row for row in rows if row.dead]
    if not dead:
        return
    if not has_loss:
        raise AttachError(
            "the outputs do not depend differentiably on any factor; check a call that runs with gradients and "
            "returns floating-point tensors"
        )
    error = AttachError(_dead_message(dead))
    error.dead = tuple(row.path for row in dead)
    raise error


def _dead_message(dead: list[ReportRow]) -> str:
    unread = [row.path for row in dead if row.reads == 0]
    silent = [row.path for row in dead if row.reads]
    parts = [f"never read by this forward: {listed(unread)}"] * bool(unread)
    parts += [f"read, but no gradient arrived: {listed(silent)}"] * bool(silent)
    return (
        f"dead target{'s' * (len(dead) > 1)}: {'; '.join(parts)}. Adapt the parameter the forward really uses, leave "
        "the target out with exclude=, or check with inputs that reach it"
    )


def _project(outputs: Any) -> Tensor | None:
    """A scalar on which every differentiable output bears, or None where there is none."""
    leaves = [t for t in _tensors(outputs) if t.requires_grad and t.is_floating_point()]
    if not leaves:
        return None
    generator = torch.Generator().manual_seed(0)
    terms = [(t * torch.randn(t.shape, generator=generator).to(t)).sum().float() for t in leaves]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested containers; objects pytree does not know (a cache, say) count as none."""
    values = list(tree.values()) if isinstance(tree, dict) else tree
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def _restored(model: nn.Module, args: Any, kwargs: Any) -> Iterator[None]:
    """Inside, gradients start empty; afterwards gradients, buffers, modes and RNG states are as before."""
    leaves = {id(t): t for t in [*model.parameters(), *_tensors((args, kwargs))] if t.is_leaf}.values()
    grads = [(t, t.grad) for t in leaves]
    written = [(tensor, tensor.detach().clone()) for tensor in _written_by_forward(model)]
    buffers = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    modes = [(module, module.training) for module in model.modules()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            for tensor, _ in grads:
                tensor.grad = None
            yield
    finally:
        for tensor, grad in grads:
            tensor.grad = grad
        for module, mode in modes:
            module.training = mode
        for module, own in buffers:
            module._buffers.update(own)
        with torch.no_grad():
            for tensor, value in written:
                # Sparse ones have no comparison.
                if value.layout != torch.strided or not torch.equal(tensor, value):
                    tensor.copy_(value)


def _written_by_forward(model: nn.Module) -> Iterator[Tensor]:
    """The tensors a forward may write into: buffers, and the weights that max_norm renormalises."""
    for module in model.modules():
        tensors = [*module._buffers.values()]
        if getattr(module, "max_norm", None) is not None:
            tensors += module._parameters.values()
        yield from (tensor for tensor in tensors if tensor is not None and not tensor.is_meta)
