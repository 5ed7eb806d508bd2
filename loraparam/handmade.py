"""LoRA layers written by hand, as tutorials do, turned into adapters on the layer they wrap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .adapters import attach, detach
from .errors import AttachError
from .methods import DoRA, LoRA
from .state import load_state_dict

_SHAPE = (
    "allowed: a module with `linear` (nn.Linear) and `lora`, which has A (in, r), B (r, out) and a number alpha, and "
    "where it is a DoRA `m` (1, in)"
)


def from_layer(module: nn.Module, *, name: str = "default") -> nn.Linear:
    """The ``nn.Linear`` inside a hand-written LoRA layer, in place, with an adapter that does what the layer did.

    Known are the tutorials' ``LinearWithLoRA`` and ``LinearWithLoRAMerged``, W + s·(A·B)ᵀ, where s is alpha or alpha/r,
    and ``LinearWithDoRAMerged``, m·V/‖V‖ with the norm over dim 0, by their attributes. That the adapter does the same,
    and which s it is, is seen on random inputs. Put the result where the module was.

    Args:
        module: the layer; afterwards only what it wraps is of use.
        name: the adapter's name.

    Raises:
        AttachError: the module has other attributes, or computes something else: the layer that normalises the
            *activations* of its LoRA branch (``LinearWithDoRA``) is no function of a weight at all.
        RankError: r is above min(out, in).

    Example:
        >>> class LoRALayer(nn.Module):
        ...     def __init__(self, in_dim, out_dim, rank, alpha):
        ...         super().__init__()
        ...         self.A = nn.Parameter(torch.randn(in_dim, rank))
        ...         self.B = nn.Parameter(torch.randn(rank, out_dim))
        ...         self.alpha = alpha
        >>> class LinearWithLoRA(nn.Module):
        ...     def __init__(self, linear, rank, alpha):
        ...         super().__init__()
        ...         self.linear = linear
        ...         self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha)
        ...
        ...     def forward(self, x):
        ...         return self.linear(x) + self.lora.alpha * (x @ self.lora.A @ self.lora.B)
        >>> layer, x = LinearWithLoRA(nn.Linear(4, 6), rank=2, alpha=3), torch.randn(5, 4)
        >>> before = layer(x)
        >>> torch.testing.assert_close(from_layer(layer)(x), before)
    """
    linear: Any = getattr(module, "linear", None)
    lora: Any = getattr(module, "lora", None)
    A, B, alpha = (getattr(lora, attribute, None) for attribute in ("A", "B", "alpha"))
    if not isinstance(linear, nn.Linear) or not isinstance(A, Tensor) or not isinstance(B, Tensor) or alpha is None:
        raise AttachError(f"{type(module).__name__} is no layer that is known; {_SHAPE}")
    out, in_ = linear.weight.shape
    r = A.shape[-1]
    if (tuple(A.shape), tuple(B.shape)) != ((in_, r), (r, out)):
        raise AttachError(f"{type(module).__name__}: A {tuple(A.shape)}, B {tuple(B.shape)}; {_SHAPE}")
    m: Any = getattr(module, "m", None)
    if m is not None and not (isinstance(m, Tensor) and m.numel() == in_):
        raise _other(module)
    factors = {"weight.lora_A": A.detach().t(), "weight.lora_B": B.detach().t().clone()}
    if m is not None:
        factors["weight.magnitude"] = m.detach().flatten()
    x, tried, expected = _sample(module, linear, B)
    # The tutorials' alpha is s itself; in some it is divided by the rank.
    for scale in dict.fromkeys((float(alpha), float(alpha) / r)):
        settings: dict[str, Any] = {"r": r, "alpha": scale * r}
        attach(linear, LoRA(**settings) if m is None else DoRA(**settings, axis="in", detach_norm=False), name=name)
        try:
            load_state_dict(linear, {**factors, "weight.lora_B": tried.t()}, name)
            if _close(linear(x), expected):
                load_state_dict(linear, factors, name)
                return linear
        except BaseException:
            detach(linear, name)
            raise
        detach(linear, name)
    raise _other(module)


def _sample(module: nn.Module, linear: nn.Linear, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Random inputs, a B, and what the module makes of them: a fresh B, of zeros, would hide what the layer does."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, linear.in_features, generator=generator).to(linear.weight)
    mode, own = module.training, B.detach().clone()
    tried = own if bool(own.any()) else torch.randn(own.shape, generator=generator).to(own)
    try:
        with torch.no_grad():
            B.copy_(tried)
            return x, tried, module.eval()(x)
    finally:
        module.train(mode)
        with torch.no_grad():
            B.copy_(own)


def _close(actual: Tensor, expected: Tensor) -> bool:
    """Equal but for another order of operations in the layer's own precision."""
    bound = float(64 * torch.finfo(actual.dtype).eps * expected.abs().max())
    return expected.shape == actual.shape and torch.allclose(actual.detach(), expected, rtol=0, atol=bound)


def _other(module: nn.Module) -> AttachError:
    return AttachError(
        f"{type(module).__name__} does not compute what its attributes say, W + s·(A·B)ᵀ with s = alpha or alpha/r, or "
        "a DoRA of it with the norm over dim 0. A layer that normalises its activations is no function of a weight: "
        "use lp.DoRA(r=...) on the plain layer and train again"
    )
