"""What reading an adapted parameter yields: a tensor that keeps its parts until somebody needs the whole.

# Note [Three tiers]
1. Operations in ``operations/`` compute with the parts (``__torch_function__``): a thin product beside the base's.
2. Every other operation sees the merged tensor, computed from the live factors, so autograd is exact.
3. Code that bypasses ``__torch_function__`` (a custom ``autograd.Function``, reentrant checkpointing, scripted or C++
   operators) reaches ``__torch_dispatch__``, where autograd is done already. So that no gradient is lost there, the
   instance is the output of an ``autograd.Function`` of base and factors: a dense gradient that lands on it flows on.
Under functorch transforms, tracing and forward-mode differentiation a read yields a plain dense tensor instead; and
torch's own linear layer, which hands what it reads to one function, an ``Operand`` that never gets to tiers 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import overrides
from .errors import AttachError, LoraparamError
from .forms import Form
from .watching import tell

aten = torch.ops.aten

# {torch function: how it runs on the parts}; a handler returns NotImplemented where it needs the whole.
HANDLERS: dict[Any, Callable[..., Any]] = {}
# {handler: the arguments that it knows by name}, one of several names where it stands for several functions; None for
# any name.
KEYWORDS: dict[Callable[..., Any], frozenset[str] | None] = {}


class Source(Protocol):
    """What an effective weight is computed from.

    Attributes:
        tensors: everything differentiable that it depends on.
    """

    tensors: list[Tensor]

    def dense(self, tensors: Sequence[Tensor]) -> Tensor:
        """The merged weight of these tensors, in place of ``self.tensors``."""

    def form(self) -> Form | None:
        """The weight in structured form, where it has one."""

    def take(self, index: int | Tensor) -> Form | None:
        """The form of ``weight[index]`` on a leading batch dim, without that of the whole."""


class EffectiveWeight(torch.Tensor):
    """A weight that is computed when it is used, and only as far as it is needed.

    It cannot be written: a value written into it would vanish with it; a drop-in layer's has a base that takes it.
    ``detach()``, arithmetic and printing work as on any tensor.
    """

    _source: Source
    _site: Any = None
    _detached: bool = False  # made by detach(), so that its requires_grad may be set
    _is_leaf: bool = False  # requires_grad was set: gradients end here
    _base: Tensor | None = None  # where writes go, in a drop-in layer

    @staticmethod
    def __new__(cls, like: Tensor, source: Source, site: Any = None) -> EffectiveWeight:
        weight: EffectiveWeight = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), dtype=like.dtype, device=like.device
        )
        weight._source = source
        if site is not None:
            weight._site = site
        return weight

    def form(self) -> Form | None:
        """The structured form. Not kept: checkpointing saves and recomputes the same operations only without."""
        return None if self._is_leaf else self._source.form()

    def dense(self) -> Tensor:
        """The merged weight, differentiable."""
        if self._is_leaf:
            with torch._C.DisableTorchFunctionSubclass():
                return self.clone()
        tell(self._site, "merged")
        return self._source.dense(self._source.tensors)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs) if not kwargs or _knows(handler, kwargs) else NotImplemented
            if result is not NotImplemented:
                return result
        elif overrides.is_metadata(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if overrides.sets_requires_grad(func) and isinstance(args[0], EffectiveWeight) and args[0]._detached:
            args[0]._is_leaf = True
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        target = write_target(func, args, kwargs)
        if target is not None:
            args, kwargs = tree_map_only(EffectiveWeight, lambda w: w._base if w is target else w, (args, kwargs))
            func(*whole(args), **whole(kwargs))
            return target
        result = func(*whole(args), **whole(kwargs))
        if func in overrides.VIEWS and isinstance(overrides.subject(args, kwargs), EffectiveWeight):
            return read_only(result)
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            weight = EffectiveWeight(args[0], args[0]._source, args[0]._site)
            weight._detached = True
            return weight
        if func._schema.is_mutable and args and isinstance(args[0], EffectiveWeight):
            raise _write_error(str(func))
        args, kwargs = tree_map_only(EffectiveWeight, _merged_data, (args, kwargs))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().detach().__reduce_ex__(protocol)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"EffectiveWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


class Operand:
    """An effective weight in the hands of code that gives it to one torch function, and to nothing else.

    It is no tensor: in a model, where caches are cold, to make one and its link to autograd takes longer than all the
    rest of a read. Functions of torch take it for one; a function that needs the tensor gets it.
    """

    __slots__ = ("_base", "_like", "_source")
    _site: Any = None  # nobody is watching

    def __init__(self, source: Source, like: Tensor) -> None:
        self._source = source
        self._like = like
        self._base: Tensor | None = None

    def form(self) -> Form | None:
        """The structured form."""
        return self._source.form()

    def tensor(self) -> EffectiveWeight:
        """The tensor that any other code would have read."""
        weight = make(self._source, self._like)
        weight._base = self._base
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs) if not kwargs or _knows(handler, kwargs) else NotImplemented
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map_only(Operand, Operand.tensor, (args, kwargs))
        return func(*args, **kwargs)

    def __fx_create_arg__(self, tracer: Any) -> Any:
        return tracer.create_arg(self.tensor())


def _knows(handler: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a handler takes these arguments under these names."""
    known = KEYWORDS[handler]
    return known is None or kwargs.keys() <= known


def _merged_data(weight: EffectiveWeight) -> Tensor:
    """The merged weight without a graph, below autograd."""
    tell(weight._site, "merged")
    return weight._source.dense(weight._source.tensors).detach()


class _Link(torch.autograd.Function):
    """Makes an effective weight a function of its tensors, for code that bypasses ``__torch_function__``.

    Saves nothing in torch's way: which kind of read it was may differ between a forward and checkpointing's repetition
    of it (FSDP puts parameters where it had plain tensors), and what they save may not.
    """

    @staticmethod
    def forward(ctx: Any, source: Source, like: Tensor, site: Any, *tensors: Tensor) -> EffectiveWeight:
        ctx.source = source
        ctx.versions = [tensor._version for tensor in tensors]
        return EffectiveWeight(like, source, site)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        tensors = ctx.source.tensors
        if [tensor._version for tensor in tensors] != ctx.versions:
            raise RuntimeError(
                "an adapted weight's base or factors have been modified by an inplace operation between its forward "
                "and its backward, which needs them as they were"
            )
        pull_back: Any = torch.func.vjp(lambda *values: ctx.source.dense(values), *tensors)[1]
        return None, None, None, *pull_back(grad)


# torch's own ``apply`` first looks for functorch's transforms, under which no weight is made: in a model, where caches
# are cold, that takes longer than all the rest of it.
_link: Callable[..., EffectiveWeight] = super(torch.autograd.Function, _Link).apply


def make(source: Source, like: Tensor, site: Any = None) -> EffectiveWeight:
    """An effective weight shaped, typed and placed as ``like``."""
    if torch.is_grad_enabled():
        for tensor in source.tensors:
            if tensor.requires_grad:
                return _link(source, like, site, *source.tensors)
    return EffectiveWeight(like, source, site)


class View:
    """The source of a part of an effective weight: a form by itself."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self.tensors = form.tensors()

    def dense(self, tensors: Sequence[Tensor]) -> Tensor:
        """The part, merged."""
        return self._form.with_tensors(tensors).tensor()

    def form(self) -> Form:
        """The form itself."""
        return self._form

    def take(self, index: int | Tensor) -> Form | None:
        """A matrix of the stack, or several."""
        return self._form.take(index)


class Part:
    """The source of a view of a merged weight: a plain tensor, in which a write would be lost as well."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensors = [tensor]

    def dense(self, tensors: Sequence[Tensor]) -> Tensor:
        """The view itself."""
        return tensors[0]

    def form(self) -> None:
        """None: it is merged already."""

    def take(self, index: int | Tensor) -> None:
        """None: it is merged already."""


class Detached:
    """The source of a weight whose gradients end here."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.tensors = [tensor.detach() for tensor in source.tensors]

    def dense(self, tensors: Sequence[Tensor]) -> Tensor:
        """The merged weight."""
        return self._source.dense(tensors).detach()

    def form(self) -> Form | None:
        """The form, without gradients."""
        return _without_gradients(self._source.form())

    def take(self, index: int | Tensor) -> Form | None:
        """A matrix of the stack, or several, without gradients."""
        return _without_gradients(self._source.take(index))


def _without_gradients(form: Form | None) -> Form | None:
    return None if form is None else form.with_tensors([tensor.detach() for tensor in form.tensors()])


def view(weight: EffectiveWeight, form: Form | None) -> Any:
    """A part of an effective weight, or NotImplemented where it has no form."""
    return NotImplemented if form is None else make(View(form), form.weight, weight._site)


def whole(tree: Any) -> Any:
    """Nested arguments with every effective weight merged."""
    return tree_map_only(EffectiveWeight, EffectiveWeight.dense, tree)


def read_only(views: Any) -> Any:
    """Views of a merged weight, as tensors that cannot be written."""
    if not isinstance(views, (Tensor, tuple, list)):  # numpy() and __array__()
        views.flags.writeable = False
        return views
    return tree_map_only(Tensor, lambda view: make(Part(view), view), views)


# --- writes -------------------------------------------------------------------------------------------------


def write_target(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> EffectiveWeight | None:
    """The weight whose base takes what a function writes; None for a function that writes into no weight.

    Raises:
        AttachError: what is written would be lost; or the function hands out the weight's storage.
    """
    if isinstance(kwargs.get("out"), EffectiveWeight):
        raise _write_error("out=")
    target = overrides.subject(args, kwargs)
    if not isinstance(target, EffectiveWeight) or not (overrides.writes(func) or overrides.hands_out_storage(func)):
        return None
    if target._base is None or not overrides.writes(func):
        raise _write_error(overrides.described(func))
    return target


def _write_error(what: str) -> LoraparamError:
    return AttachError(
        f"{what} on an effective weight: it is computed from the base and its adapters, so what is written is lost. "
        "Write inside `with lp.detached(model):`, after lp.merge(model), or into the base at "
        "module.parametrizations.<name>.original"
    )
