"""One guarded class per layer class, for modules whose parameters are adapted.

# Note [One guarded class per layer class]
``register_parametrization`` gives every module a class of its own, named ``Parametrized…``. Deepcopies share it,
so taking a parametrization off a copy breaks the original; such modules cannot be pickled; regional
``torch.compile`` sees a new type at each block; FX treats them as torch's own. Here all modules of one class share
one guarded subclass with the same name, qualname and module. It ignores that other instances are parametrized
differently: its properties fall through to the plain attribute wherever an instance does not parametrize it.
"""

from __future__ import annotations

import copy
import copyreg
import weakref
from typing import Any

import torch
from torch import nn

from .catalogue import parametrized
from .errors import AttachError
from .marks import GUARDED
from .reading import read
from .sharding import is_spread
from .stack import AdapterStack

# Which modules a stack is installed on: tells whether a walked part of a model holds all of a tied group.
_places: weakref.WeakKeyDictionary[AdapterStack, weakref.WeakSet[nn.Module]] = weakref.WeakKeyDictionary()


def hosts_of(stack: Any) -> weakref.WeakSet[nn.Module]:
    """The modules a stack was installed on, as long as they live; some may have lost it since."""
    return _places.setdefault(stack, weakref.WeakSet())


def stack_of(module: nn.Module, name: str) -> AdapterStack | None:
    """Our stack on a module's parameter, if there is one."""
    plist = parametrized(module).get(name)
    return None if plist is None else stack_in(plist)


def stack_in(plist: nn.Module) -> AdapterStack | None:
    """Our stack in a parametrization list, if there is one."""
    for child in plist._modules.values():
        if isinstance(child, AdapterStack):
            return child
    return None


def refresh_rnn(module: nn.Module) -> None:
    """Point an RNN's flat list at its weights as they read now; it keeps the last ones it saw."""
    if isinstance(module, nn.RNNBase):
        with torch.no_grad():
            weights = [getattr(module, name, None) for name in module._flat_weights_names]
        module.__dict__["_flat_weights"] = weights
        module.__dict__["_flat_weight_refs"] = [None if w is None else weakref.ref(w) for w in weights]


class GuardedMeta(type):
    """Keeps a shared class whole when torch adds or removes the property of one instance."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if isinstance(value, property) and not isinstance(value, HostProperty):
            value = HostProperty(cls, name)
        type.__setattr__(cls, name, value)

    def __delattr__(cls, name: str) -> None:
        if not isinstance(cls.__dict__.get(name), HostProperty):
            type.__delattr__(cls, name)


class HostProperty(property):
    """A parameter's name on a guarded class: its effective value, or the instance's plain attribute."""

    def __init__(self, cls: type, name: str) -> None:
        def get(module: nn.Module) -> Any:
            lists = module._modules.get("parametrizations")
            if lists is not None and name in lists._modules:
                return read(module, name, lists._modules[name])  # type: ignore[arg-type]
            for attributes in (module._parameters, module._buffers, module.__dict__):
                if name in attributes:
                    return attributes[name]
            return getattr(super(cls, module), name)

        def set_(module: nn.Module, value: Any) -> None:
            refuse_assignment(module, name)
            lists = parametrized(module)
            if name in lists:
                lists[name].right_inverse(value)
            else:
                module.__dict__[name] = value

        def delete(module: nn.Module) -> None:
            refuse_assignment(module, name)
            if name not in module.__dict__:
                raise AttributeError(name)
            del module.__dict__[name]

        super().__init__(get, set_, delete)


def refuse_assignment(module: nn.Module, name: str) -> None:
    """Raise where an assignment would have to overwrite a computed weight."""
    if stack_of(module, name) is not None:
        raise AttachError(
            f"{name!r} of {type(module).__name__} carries adapters: it is computed, and cannot be assigned or deleted; "
            "lp.detach(model) or lp.merge(model) first, or assign inside `with lp.detached(model):`"
        )


_classes: dict[type, type] = {}

# {method name: function} that replaces a method of guarded classes that have it; filled by managers.py.
METHOD_GUARDS: dict[str, Any] = {}


def host_class(base: type) -> type:
    """The guarded class of a layer class, made once.

    Raises:
        AttachError: the class cannot be subclassed.
    """
    if isinstance(base, GuardedMeta):
        return base
    if base not in _classes:
        meta: type = GuardedMeta
        if type(base) is not type:
            meta = type("GuardedMeta", (GuardedMeta, type(base)), {})
        namespace: dict[str, Any] = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            GUARDED: True,
            "__reduce_ex__": _reduce_ex,
            "__setstate__": _setstate,
            "register_parameter": _register_parameter,
            "_load_from_state_dict": _load_from_state_dict,
        }
        namespace.update({name: guard for name, guard in METHOD_GUARDS.items() if hasattr(base, name)})
        if not hasattr(base, "__deepcopy__"):
            namespace["__deepcopy__"] = _deepcopy
        try:
            _classes[base] = meta(base.__name__, (base,), namespace)
        except TypeError as error:
            raise AttachError(f"its class {base.__name__} cannot be subclassed: {error}") from None
    return _classes[base]


def ensure_property(cls: type, name: str) -> None:
    """Give a guarded class the property of an adapted parameter."""
    if not isinstance(cls.__dict__.get(name), HostProperty):
        type.__setattr__(cls, name, HostProperty(cls, name))


def plain_base(cls: type) -> type:
    """The layer's own class behind a guarded one, and behind what others have put on top of that."""
    guarded = next((base for base in cls.__mro__ if base.__dict__.get(GUARDED)), None)
    return cls if guarded is None else guarded.__bases__[0]


def refuse_wrapped(module: nn.Module) -> None:
    """Raise where another library has wrapped the guarded class."""
    if not type(module).__dict__.get(GUARDED):
        raise AttachError(
            f"its module was wrapped as {type(module).__name__} by {type(module).__module__} after the adapters came "
            "on, so they cannot be taken off or folded; do it on the model as it was"
        )


def _register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    stack = stack_of(self, name)
    if stack is not None and stack.writable and param is not None:
        parametrized(self)[name].register_parameter("original", param)
        return
    refuse_assignment(self, name)
    if is_spread(param) and parametrized(self) and not is_spread(self._parameters.get(name)):
        # It would go on to parametrizations.<name>.original, which is not the module's own, and stop half-way.
        raise AttachError(
            f"{type(self).__name__} carries adapters, and cannot be made tensor parallel; parallelize the model first, "
            "then attach: the factors are placed like the weight"
        )
    plain_base(type(self)).register_parameter(self, name, param)  # type: ignore[attr-defined]


def _load_from_state_dict(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Let a checkpoint with the original keys load: translate them, and keep the factors as they are."""
    for name, plist in parametrized(self).items():
        stack = stack_of(self, name)
        if stack is None:
            continue
        inner = f"{prefix}parametrizations.{name}."
        if plist.is_tensor and prefix + name in state_dict:
            state_dict.setdefault(inner + "original", state_dict.pop(prefix + name))
        position = next(key for key, child in plist._modules.items() if child is stack)
        own = f"{inner}{position}."
        if not any(key.startswith(own) for key in state_dict):
            state_dict.update(stack.state_dict(prefix=own))
    plain_base(type(self))._load_from_state_dict(self, state_dict, prefix, *args)  # type: ignore[attr-defined]


def _state(module: nn.Module) -> dict[str, Any]:
    """What a copy starts from: the instance's state, less what an RNN rebuilds (weights with a graph)."""
    if isinstance(module, nn.RNNBase):
        return {k: v for k, v in module.__dict__.items() if k not in ("_flat_weights", "_flat_weight_refs")}
    own_getstate = getattr(plain_base(type(module)), "__getstate__", None)
    if own_getstate is None or own_getstate is getattr(object, "__getstate__", None):
        return dict(module.__dict__)
    state: dict[str, Any] = own_getstate(module)
    return state


def _setstate(self: nn.Module, state: dict[str, Any]) -> None:
    base = nn.Module if isinstance(self, nn.RNNBase) else plain_base(type(self))
    base.__setstate__(self, state)  # type: ignore[attr-defined]
    for name in parametrized(self):
        stack = stack_of(self, name)
        if stack is not None:
            hosts_of(stack).add(self)
    refresh_rnn(self)


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    done: nn.Module | None = memo.get(id(self))
    if done is not None:
        return done
    replica = type(self).__new__(type(self))
    memo[id(self)] = replica
    for slot in copyreg._slotnames(type(self)):  # type: ignore[attr-defined]
        if hasattr(self, slot):
            object.__setattr__(replica, slot, copy.deepcopy(getattr(self, slot), memo))
    replica.__setstate__(copy.deepcopy(_state(self), memo))
    return replica


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    return _blank, (plain_base(type(self)), tuple(parametrized(self))), _state(self)


def _blank(base: type, names: tuple[str, ...]) -> nn.Module:
    """An empty host, for unpickling."""
    cls = host_class(base)
    for name in names:
        ensure_property(cls, name)
    module: nn.Module = object.__new__(cls)
    return module
