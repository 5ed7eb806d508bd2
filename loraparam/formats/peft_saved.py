"""Writing what PEFT keeps as whole values: biases, ``modules_to_save``, and rows of embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import FormatError, listed
from ..methods import Full
from .bases import Base
from .content import Content, Item
from .peft_wrappers import WAY_OUT

Depths = Mapping[str, int]  # {module: how many wrappers are around it}

# {task: how the paths of modules end that PEFT adds to modules_to_save by itself, and so asks for in a file}
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass
class Saved:
    """Values and the config that makes PEFT take them.

    Attributes:
        values: by path in the base model.
        rows: {embedding: its new rows}.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def new_values(content: Content, full: Iterable[Item], base: Base | None) -> dict[str, Tensor]:
    """{parameter: its new value} of all that changes as a whole.

    Raises:
        FormatError: the base is needed to know a value.
    """
    values = dict(content.replaced)
    for item in full:
        if base is None:
            raise FormatError(f"{item.path!r}: PEFT stores new values, not differences; the base is needed")
        weight = base.tensor(item.parameter)
        values[item.parameter] = item.method.apply(weight, item.factors, item.layout)
    return values


def heads(task_type: str | None, content: Content, base: Base | None) -> list[str]:
    """The modules that PEFT stores whole for a task, changed or not.

    Raises:
        FormatError: the base is needed to find them, or one is adapted otherwise.
    """
    if task_type not in HEADS:
        return []
    if base is None:
        raise FormatError(
            f"task_type={task_type!r}: PEFT stores the model's head beside the adapter; the base is needed"
        )
    ends = [path for path in base.modules if path.endswith(HEADS[task_type])]
    found = [path for path in ends if not any(_within(path, other) for other in ends if other != path)]
    for item in content.items:
        if not isinstance(item.method, Full) and any(_within(item.parameter, head) for head in found):
            raise FormatError(
                f"{item.path!r}: PEFT stores the head of task_type={task_type!r} whole; give it lp.Full(), leave it "
                "out, or save without the task"
            )
    return found


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(module + ".")


def saved(values: Mapping[str, Tensor], wrapped: Depths, base: Base | None, heads: Sequence[str] = ()) -> Saved:
    """How PEFT stores new values of parameters, and all of the modules that its task asks for.

    Raises:
        FormatError: it has no place for one.
    """
    made, modules = Saved(), {head: head for head in heads}
    for path in values:
        owner, _, name = path.rpartition(".")
        if name != "bias" and owner not in wrapped and not any(_within(owner, head) for head in heads):
            modules[owner] = path
    for path, value in values.items():
        owner, _, name = path.rpartition(".")
        if any(_within(owner, module) for module in modules):
            continue
        if name != "bias" and not name.endswith("_bias"):
            raise _no_place(path, "PEFT adapts its module, and then stores biases of it only")
        made.values[path] = value
        made.config["bias"] = "lora_only" if owner in wrapped and made.config.get("bias") != "all" else "all"
    for module, path in list(modules.items()):
        if path in values and _as_rows(made, module, path, values[path], base):
            del modules[module]
    if modules:
        _save_modules(made, modules, values, wrapped, base)
    return made


def _as_rows(made: Saved, module: str, path: str, value: Tensor, base: Base | None) -> bool:
    """Keep an embedding of which few rows are new as these rows."""
    if base is None or not isinstance(base.module(module), nn.Embedding) or len(base.aliases(path)) > 1:
        return False
    weight = base.tensor(path)
    changed = (value.to(weight) != weight).any(-1).nonzero().flatten()
    if not 0 < len(changed) <= len(weight) // 2 or _others(module, base):
        return False
    made.rows[module] = value[changed]
    made.config.setdefault("trainable_token_indices", {})[module] = changed.tolist()
    return True


def _save_modules(
    made: Saved, modules: Mapping[str, str], values: Mapping[str, Tensor], wrapped: Depths, base: Base | None
) -> None:
    """Whole modules, with what else they have."""
    if base is None:
        raise _no_place(next(iter(modules.values())), "the base is needed for the rest of its module")
    for module, path in modules.items():
        if not module:
            raise _no_place(path, "it is the model's own, and PEFT stores modules of it")
        inside = [name for name in wrapped if name == module or name.startswith(module + ".")]
        above = [name for name in wrapped if module.startswith(name + ".")]
        if inside or above:
            raise _no_place(path, f"its module holds, or is in, {listed(inside or above)}, which PEFT wraps")
    # PEFT takes each module whose path ends like one of these, and asks for all that is in it.
    taken = {name for module in modules for name in (module, *_others(module, base))}
    for module in taken:
        clash = [name for name in wrapped if name == module or f"{name}.".startswith(f"{module}.")]
        if clash:
            raise _no_place(modules.get(module, module), f"PEFT would store {listed(clash)} too, whose path ends alike")
        for path in (name for name in base.names if name.startswith(module + ".")):
            tied = set(base.aliases(path)) - {path}
            if tied:
                raise _no_place(path, f"it is tied to {listed(sorted(tied))}, which PEFT would leave as it was")
            made.values[path] = values[path] if path in values else base.tensor(path)
        made.values.update(_buffers(module, base))
    made.config["modules_to_save"] = sorted(modules)


def _others(module: str, base: Base) -> list[str]:
    """Other modules whose path ends like this one's: PEFT's rule for ``modules_to_save``."""
    return [path for path in base.modules if path.endswith(module) and path != module]


def _buffers(module: str, base: Base) -> dict[str, Tensor]:
    root = base.module(module)
    found = {}
    for path, part in root.named_modules() if root is not None else ():
        for name, buffer in part._buffers.items():
            hidden = name in part._non_persistent_buffers_set or "parametrizations" in path.split(".")
            if buffer is not None and not hidden:
                found[".".join(text for text in (module, path, name) if text)] = buffer.detach()
    return found


def _no_place(path: str, why: str) -> FormatError:
    return FormatError(f"{path!r}: its new value has no place in PEFT's format: {why}. Or {WAY_OUT}")
