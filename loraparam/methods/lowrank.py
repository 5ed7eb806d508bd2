"""What LoRA and DoRA share: the pair A, B with its rank, scale, start and dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Generator, Tensor

from ..errors import LoraparamError, RankError
from ..forms import Form
from ..layouts import Layout
from .base import Factors, Method, check_choice, check_number, factor_dtype, is_int, need_matrix

Init = Literal["kaiming", "gaussian"]
DropoutOn = Literal["weight", "input"]


@dataclass(frozen=True, kw_only=True, repr=False)
class LowRank(Method):
    """A method built on s·B·A with s = alpha / r; its subclasses say what that does to W.

    The constructor takes ``init="kaiming" | "gaussian"``, kept as ``start``: ``init`` is the method that
    makes the factors.
    """

    fast: ClassVar[tuple[str, ...]] = ("lora_B",)

    r: int = 8
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    dropout_on: DropoutOn = "weight"
    # Not in the repr that a subclass gets from @dataclass: no constructor takes it.
    start: Init = field(init=False, default="kaiming", repr=False)
    if TYPE_CHECKING:

        def init(self, weight: Tensor, layout: Layout, *, generator: Generator | None = None) -> Factors:
            """See ``_init``."""
    else:
        init: InitVar[Init] = "kaiming"

    def __post_init__(self, init: Any) -> None:  # type: ignore[override]
        # dataclasses.replace reads the argument back by its name and so gets the method of that name.
        start = init.__self__.start if callable(init) else init
        object.__setattr__(self, "start", start)
        name = type(self).__name__
        if not is_int(self.r) or self.r < 1:
            raise RankError(f"{name}: r={self.r!r}; allowed: an integer in 1..min(out, in) of the weight")
        if self.alpha is not None:
            check_number(name, "alpha", self.alpha)
        check_choice(name, "rslora", self.rslora, (True, False))
        check_number(name, "dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise LoraparamError(f"{name}: dropout={self.dropout!r}; allowed: 0 <= dropout < 1")
        check_choice(name, "dropout_on", self.dropout_on, ("weight", "input"))
        check_choice(name, "init", start, ("kaiming", "gaussian"))

    @property
    def scale(self) -> float:
        """s = alpha / r; with ``rslora`` alpha / √r (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""
        alpha = self.r if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def draw(
        self,
        weight: Tensor,
        layout: Layout,
        A_shape: Sequence[int],
        B_shape: Sequence[int],
        generator: Generator | None,
    ) -> Factors:
        """A and B of these shapes as they start: one random, the other zero."""
        # A generator draws on its own device only.
        device = weight.device if generator is None else generator.device
        A, B = (torch.zeros(*shape, dtype=factor_dtype(weight), device=device) for shape in (A_shape, B_shape))
        if weight.is_meta:  # a plan asks for the shapes alone, and drawing there is slow
            return {"lora_A": A, "lora_B": B}
        if layout.lookup:
            B.normal_(generator=generator)
        elif self.start == "gaussian":
            A.normal_(std=1 / self.r, generator=generator)
        else:
            bound = 1 / math.sqrt(A_shape[-1])
            A.uniform_(-bound, bound, generator=generator)
        return {"lora_A": A.to(weight.device), "lora_B": B.to(weight.device)}

    @property
    def needs_input(self) -> bool:
        """Only with dropout of the input."""
        return self.dropout > 0 and self.dropout_on == "input"

    def term(self, form: Form, factors: Factors) -> Form:
        """M + s·B·A."""
        dropout = self.dropout if form.noisy and self.needs_input else 0.0
        return form.add(factors["lora_A"], factors["lora_B"], self.scale, dropout)

    def dims(self) -> dict[str, tuple[str, ...]]:
        """A (r, in), B (out, r)."""
        return {"lora_A": ("", "in"), "lora_B": ("out", "")}

    def config(self) -> dict[str, Any]:
        """The hyperparameters, under the names the constructor takes."""
        config = super().config()
        config["init"] = config.pop("start")
        return config

    def regularize(self, factors: Factors, layout: Layout) -> Factors:
        """Inverted dropout of A's columns: the low-rank path loses whole input features."""
        if self.dropout == 0 or self.dropout_on == "input":
            return factors
        A = factors["lora_A"]
        keep = torch.full_like(A[..., :1, :], 1 - self.dropout).bernoulli() / (1 - self.dropout)
        return {**factors, "lora_A": A * keep}


def _init(self: LowRank, weight: Tensor, layout: Layout, *, generator: Generator | None = None) -> Factors:
    """One factor random, the other zero, so that s·B·A = 0.

    As in loralib and PEFT: A ~ U(±1/√in) (kaiming with a = √5), or N(0, std 1/r) with ``init="gaussian"``;
    B = 0. For an embedding the zero factor is the vocabulary side, A, and B ~ N(0, 1).

    Raises:
        RankError: ``r`` is not in 1..min(out, in).
        TargetError: the weight has no input dim.
    """
    need_matrix(self, weight, layout)
    batch, out, in_ = layout.sizes(weight.shape)
    if self.r > min(out, in_):
        raise RankError(
            f"r={self.r} is too large for shape {tuple(weight.shape)}, read as (out={out}, in={in_}); "
            f"allowed: 1..{min(out, in_)}"
        )
    return self.draw(weight, layout, (*batch, self.r, in_), (*batch, out, self.r), generator)


# After the dataclass is made: inside it, ``init`` is the constructor's argument.
LowRank.init = _init  # type: ignore[method-assign]
