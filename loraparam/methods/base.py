"""The contract every method meets."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from ..errors import LoraparamError, TargetError
from ..forms import Form
from ..functional import compute_dtype
from ..layouts import Layout

Factors = dict[str, Tensor]

REGISTRY: dict[str, type[Method]] = {}


@dataclass(frozen=True, kw_only=True, repr=False)
class Method(ABC):
    """How one weight is reparameterized: hyperparameters, and two pure functions of tensors.

    ``apply`` is the definition of the method. Merging, composing and files call it or are checked against it.
    To add a method, subclass as a frozen, keyword-only dataclass and write ``init`` and ``apply``. A subclass
    is known to ``load`` by its class name, once the module that defines it has been imported.

    Attributes:
        additive: ``apply(W) - W`` does not depend on W, so that such methods commute.
        fast: factors that get the higher learning rate of LoRA+ in ``param_groups``.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Gain(Method):
        ...     def init(self, weight, layout, *, generator=None):
        ...         return {"gain": torch.ones((), dtype=weight.dtype, device=weight.device)}
        ...
        ...     def apply(self, weight, factors, layout):
        ...         return weight * factors["gain"]
        >>> W = torch.eye(2)
        >>> torch.equal(Gain().apply(W, Gain().init(W, Layout()), Layout()), W)
        True
    """

    additive: ClassVar[bool] = False
    fast: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        REGISTRY[cls.__name__] = cls

    @abstractmethod
    def init(self, weight: Tensor, layout: Layout, *, generator: Generator | None = None) -> Factors:
        """Fresh factors for a weight. ``apply`` with them must give the weight back (to rounding).

        Only shape, dtype and device of ``weight`` may be read to decide the factors' shapes: plans call
        this with a tensor on the meta device.
        """

    @abstractmethod
    def apply(self, weight: Tensor, factors: Factors, layout: Layout) -> Tensor:
        """The effective weight, of ``weight``'s shape and dtype, differentiable in weight and factors."""

    def factored(self, form: Form, factors: Factors) -> Form | None:
        """The same map on a weight in structured form; None where it has none, and the weight is computed densely.

        Checked against ``apply``: ``factored(Form(W, layout), factors).tensor()`` must be ``apply(W, …)``.
        """
        return None

    def dims(self) -> dict[str, tuple[str, ...]]:
        """{factor: what its last dims run along}: "out" or "in" of the weight, or "".

        Where the weight is in parts on several processes, its factors are in parts alike. One that is not named
        is whole on each, unless it is shaped as the weight; that is right for any factor, and takes more memory.
        """
        return {}

    def regularize(self, factors: Factors, layout: Layout) -> Factors:
        """The factors as one training step sees them (dropout); called in training mode only."""
        return factors

    @property
    def exact_gradient(self) -> bool:
        """Whether the backward pass is the derivative of ``apply``; DoRA with a detached norm says no."""
        return True

    @property
    def needs_input(self) -> bool:
        """Whether in training it acts on the layer's input, which a dense weight cannot express."""
        return False

    def config(self) -> dict[str, Any]:
        """The hyperparameters as plain values: ``type(self)(**self.config()) == self``."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.config().items())
        return f"{type(self).__name__}({settings})"


def need_matrix(method: Method, weight: Tensor, layout: Layout) -> None:
    """Refuse a weight without an input dim."""
    if not layout.is_matrix(weight.shape):
        name = type(method).__name__
        raise TargetError(
            f"shape {tuple(weight.shape)} has no input dim; {name} needs at least (out, in). "
            "Use lp.Full() for biases and norms, or leave it out with exclude="
        )


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Factors of low-precision weights are float32: small steps would round away."""
    return compute_dtype(weight.dtype)


def check_choice(method: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a hyperparameter outside its choices."""
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        raise LoraparamError(f"{method}: {name}={value!r}; allowed: {', '.join(map(repr, allowed))}")


def is_int(value: Any) -> bool:
    """Whether a value is an integer, and no boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no boolean."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer no float can hold
        return False


def check_number(method: str, name: str, value: Any) -> None:
    """Refuse a hyperparameter that is not a finite number."""
    if not is_number(value):
        raise LoraparamError(f"{method}: {name}={value!r}; allowed: a finite number")
