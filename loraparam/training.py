"""What a training loop needs: the trainable factors, optimizer groups, and a count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .adapters import adapters, entries_of
from .errors import LoraparamError
from .plans import table


def named_parameters(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """(key, factor) of one adapter or of all, each target once; keys as in ``lp.state_dict``.

    With several adapters and no name given, keys start with ``<adapter>:``.

    Raises:
        AttachError: there is no adapter of this name.
    """
    entries = entries_of(model, name)
    several = len({entry.adapter for _, entry in entries}) > 1
    return iter(
        [
            (f"{entry.adapter}:" * several + f"{path}.{factor}", tensor)
            for path, entry in entries
            for factor, tensor in entry.factors().items()
        ]
    )


def parameters(model: nn.Module, name: str | None = None) -> Iterator[Tensor]:
    """The factors of one adapter or of all, for an optimizer; one that several targets share comes once.

    Example:
        >>> import loraparam as lp, torch
        >>> model = nn.Linear(4, 6)
        >>> _ = lp.attach(model, lp.LoRA(r=2))
        >>> optimizer = torch.optim.AdamW(lp.parameters(model), lr=1e-3)
    """
    return iter({id(parameter): parameter for _, parameter in named_parameters(model, name)}.values())


def param_groups(
    model: nn.Module, lr: float, *, lr_ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups over everything trainable in the model: factors, and base parameters left trainable.

    LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354): ``lora_B`` learns at ``lr · lr_ratio``, the rest at
    ``lr``; the paper recommends a ratio around 16. Vectors (magnitudes, those of experts as well, and biases) get no
    weight decay.

    Args:
        model: a model with adapters.
        lr: the learning rate.
        lr_ratio: of ``lora_B``'s learning rate to the others'.
        weight_decay: for matrices.

    Example:
        >>> import loraparam as lp
        >>> model = nn.Linear(4, 6)
        >>> _ = lp.attach(model, lp.LoRA(r=2))
        >>> [(g["name"], g["lr"]) for g in lp.param_groups(model, 1e-3, lr_ratio=16)]
        [('base', 0.001), ('fast', 0.016)]
    """
    if not lr_ratio > 0 or not lr > 0:
        raise LoraparamError(f"lr={lr!r}, lr_ratio={lr_ratio!r}; allowed: positive numbers")
    factors = [(entry, name, factor) for _, entry in entries_of(model) for name, factor in entry.factors().items()]
    fast = {id(factor) for entry, name, factor in factors if name in entry.method.fast}
    # Of a stack of experts there is a vector for each matrix.
    vectors = {id(factor) for entry, _, factor in factors if factor.dim() - len(entry.layout.batch) < 2}
    groups: dict[str, dict[str, Any]] = {
        "base": {"lr": lr, "weight_decay": weight_decay},
        "fast": {"lr": lr * lr_ratio, "weight_decay": weight_decay},
        "vectors": {"lr": lr, "weight_decay": 0.0},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_vector = parameter.dim() < 2 or id(parameter) in vectors
            members["fast" if id(parameter) in fast else "vectors" if is_vector else "base"].append(parameter)
    return [{"name": name, "params": members[name], **groups[name]} for name in groups if members[name]]


def summary(model: nn.Module) -> str:
    """Trainable and total parameters: in all, per adapter and method, per target.

    Example:
        >>> import loraparam as lp
        >>> model = nn.Linear(4, 6)
        >>> _ = lp.attach(model, lp.LoRA(r=2))
        >>> print(lp.summary(model))
        adapter  target  method  shape   factors  strength
        default  weight  LoRA    (6, 4)       20         1
        default: LoRA 20
        trainable 20 of 50 parameters (40.00 %)
    """
    lines = [["adapter", "target", "method", "shape", "factors", "strength"]]
    counts: dict[str, dict[str, int]] = {name: {} for name in adapters(model)}
    parameters = {id(p): p for p in model.parameters()}.values()
    trainable, total = (sum(p.numel() for p in parameters if p.requires_grad or all_) for all_ in (False, True))
    for path, entry in entries_of(model):
        count, kind = sum(t.numel() for t in entry.factors().values()), type(entry.method).__name__
        counts[entry.adapter][kind] = counts[entry.adapter].get(kind, 0) + count
        lines.append([entry.adapter, path, kind, str(entry.shape), f"{count:,}", f"{entry.acting:g}"])
    parts = [table(lines, right=(4, 5))] if len(lines) > 1 else ["no adapters"]
    parts += [f"{name}: " + ", ".join(f"{k} {n:,}" for k, n in kinds.items()) for name, kinds in counts.items()]
    share = 100 * trainable / total if total else 0.0
    return "\n".join([*parts, f"trainable {trainable:,} of {total:,} parameters ({share:.2f} %)"])
