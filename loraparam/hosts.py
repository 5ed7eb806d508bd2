"""The modules whose parameters are adapted: putting a stack on a tensor, taking it off, finding them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from .catalogue import parametrized, walk
from .errors import LoraparamError
from .guarded import GuardedMeta, ensure_property, host_class, hosts_of, refresh_rnn, refuse_wrapped, stack_in, stack_of
from .lists import AdaptedList
from .marks import ALIAS, RECORD
from .sharding import refuse_fsdp
from .stack import AdapterStack


@dataclass
class HostRecord:
    """What a host needs to become itself again.

    Attributes:
        order: the names of its parameters, in their order.
        previous: the class it had, where another parametrization had already changed it.
    """

    order: tuple[str, ...]
    previous: type | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The dynamic class torch makes cannot be pickled; the guarded class does its work as well.
        return {"order": self.order, "previous": None}


@dataclass(frozen=True)
class Site:
    """One place of one stack: parameter ``name`` of ``module``, at ``path`` in the walked model."""

    path: str
    module: nn.Module
    name: str
    stack: AdapterStack


def sites(model: nn.Module) -> list[Site]:
    """Every adapted tensor, once per (module, name), in the model's order."""
    found: dict[tuple[int, str], Site] = {}
    for module_path, module in walk(model):
        for name, plist in parametrized(module).items():
            stack = stack_in(plist)
            if stack is not None and (id(module), name) not in found:
                path = f"{module_path}.{name}" if module_path else name
                found[id(module), name] = Site(path, module, name, stack)
    return list(found.values())


def groups(model: nn.Module) -> list[list[Site]]:
    """The sites of each stack; the first is the one its adapters were attached to."""
    by_stack: dict[int, list[Site]] = {}
    for site in sites(model):
        by_stack.setdefault(id(site.stack), []).append(site)
    return [sorted(group, key=lambda site: _is_alias(site)) for group in by_stack.values()]


def _is_alias(site: Site) -> bool:
    return bool(getattr(parametrized(site.module)[site.name], ALIAS, False))


def refuse_sharded(group: list[Site]) -> None:
    """Raise where a tensor of these places, or an adapter's factors on it, are in FSDP's care."""
    for site in group:
        try:
            refuse_fsdp(site.module, *parametrized(site.module)[site.name].parameters())
        except LoraparamError as error:
            raise error.at(site.path) from None


def install(module: nn.Module, name: str, stack: AdapterStack, *, alias: bool = False) -> None:
    """Put a stack on one parameter, in place."""
    plist = parametrized(module).get(name)
    if plist is None:
        original = module._parameters[name]
        # unsafe: shape and dtype hold by construction, and checking them would evaluate the weight.
        plist = AdaptedList([stack], original, unsafe=True)  # type: ignore[arg-type]
    become_host(module)
    lists = module._modules.get("parametrizations")
    if not isinstance(lists, nn.ModuleDict):
        lists = module._modules["parametrizations"] = nn.ModuleDict().train(module.training)
    for parameter in {*lists._modules, name}:
        ensure_property(type(module), parameter)
    if name in lists._modules:
        plist.append(stack)
    else:
        lists._modules[name] = plist
        del module._parameters[name]
        plist.training = module.training
    stack.train(module.training)  # alone: the modes of other parametrizations are not ours
    object.__setattr__(plist, ALIAS, alias)
    hosts_of(stack).add(module)


def remove(module: nn.Module, name: str) -> None:
    """Take our stack off one parameter, in place; any other parametrization on it stays."""
    refuse_wrapped(module)
    plist = parametrized(module)[name]
    plist.__dict__.pop(ALIAS, None)
    children = list(plist._modules.values())
    index = next(i for i, child in enumerate(children) if isinstance(child, AdapterStack))
    if len(children) > 1:
        del plist[index]
        if type(plist) is AdaptedList:
            plist.__class__ = parametrize.ParametrizationList  # type: ignore[assignment]
    else:
        del module._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        module._parameters[name] = plist._parameters["original"]
    cease_host(module)


def _class_for(module: nn.Module) -> type:
    cls = type(module)
    # The class torch gave a module that it parametrized is a wrapper around the layer's own.
    return host_class(cls.__bases__[0] if _is_torch_wrapped(module) else cls)


def _is_torch_wrapped(module: nn.Module) -> bool:
    return bool(parametrized(module)) and not isinstance(type(module), GuardedMeta)


def is_guarded(module: nn.Module) -> bool:
    """Whether a module has the guarded class."""
    return isinstance(type(module), GuardedMeta) and RECORD in module.__dict__


def become_host(module: nn.Module) -> None:
    """Give a module the guarded class of its own class, in place.

    Raises:
        AttachError: the class cannot be subclassed.
    """
    host = _class_for(module)
    if is_guarded(module):
        return
    previous = type(module) if _is_torch_wrapped(module) else None
    module.__dict__[RECORD] = HostRecord(tuple(module._parameters), previous)
    module.__class__ = host


def release_hosts(model: nn.Module) -> None:
    """Give every guarded module without adapters its class back, in place."""
    for module in model.modules():
        if is_guarded(module):
            cease_host(module)


def cease_host(module: nn.Module) -> None:
    """Restore the order of the parameters, and the class once nothing of ours is left, in place."""
    record: HostRecord = module.__dict__[RECORD]
    rank = {name: i for i, name in enumerate(record.order)}
    ordered = sorted(module._parameters.items(), key=lambda item: rank.get(item[0], len(rank)))
    module._parameters.clear()
    module._parameters.update(ordered)
    lists = parametrized(module)
    if any(stack_of(module, name) is not None for name in lists):
        return
    del module.__dict__[RECORD]
    if not lists:
        module._modules.pop("parametrizations", None)
        module.__class__ = type(module).__bases__[0]
    elif record.previous is not None and all(name in record.previous.__dict__ for name in lists):
        module.__class__ = record.previous
    refresh_rnn(module)


def places_outside(group: list[Site]) -> int:
    """How many modules outside of ``group`` have the group's stack."""
    inside, stack = {id(site.module) for site in group}, group[0].stack
    others = [host for host in hosts_of(stack) if id(host) not in inside]
    return sum(any(stack_of(host, name) is stack for name in parametrized(host)) for host in others)
