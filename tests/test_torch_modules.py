"""Every module class of torch.nn that has a weight keeps every law; lazy ones as soon as they have one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import loraparam as lp
from loraparam.testing import Subject, parametrize
from loraparam.testing.holders import Listed
from loraparam.testing.torch_layers import SelfAttention

Case = tuple[lp.Method, Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]

LORA, FULL = lp.LoRA(r=1), lp.Full()


def noise(*shape: int) -> Callable[[], tuple[torch.Tensor]]:
    return lambda: (torch.randn(shape),)


def labelled(*shape: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: (torch.randn(shape), torch.arange(shape[0]) % 5)


def indices() -> tuple[torch.Tensor]:
    return (torch.arange(6).reshape(2, 3) % 5,)


def pair(*shape: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: (torch.randn(shape), torch.randn(shape))


class Named(nn.Module):
    """Reads the parameters of a container."""

    def __init__(self, container: nn.Module, keys: tuple[Any, ...]) -> None:
        super().__init__()
        self.container, self.keys = container, keys

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for key in self.keys:
            x = torch.tanh(x @ self.container[key])
        return x


def convolution(ndim: int, transposed: bool = False) -> Case:
    kind = "ConvTranspose" if transposed else "Conv"
    cls: Any = getattr(nn, f"{kind}{ndim}d")
    return LORA, lambda: cls(2, 3, 2), noise(2, 2, *[3] * ndim)


def norm(cls: Any, ndim: int, *options: Any, **more: Any) -> Case:
    return FULL, lambda: cls(*options, 4, **more), noise(3, 4, *[2] * ndim)


def recurrent(cls: Any) -> Case:
    return LORA, lambda: cls(3, 2), noise(4, 2, 3)


ENCODER_LAYER = {"d_model": 4, "nhead": 2, "dim_feedforward": 6, "dropout": 0.0, "batch_first": True}

CASES: dict[str, Case] = {
    "Linear": (LORA, lambda: nn.Linear(4, 3), noise(2, 4)),
    "Bilinear": (LORA, lambda: nn.Bilinear(3, 4, 2), lambda: (torch.randn(2, 3), torch.randn(2, 4))),
    "Embedding": (LORA, lambda: nn.Embedding(5, 3), indices),
    "EmbeddingBag": (LORA, lambda: nn.EmbeddingBag(5, 3), indices),
    **{f"Conv{n}d": convolution(n) for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": convolution(n, transposed=True) for n in (1, 2, 3)},
    **{f"BatchNorm{n}d": norm(getattr(nn, f"BatchNorm{n}d"), n) for n in (1, 2, 3)},
    **{f"InstanceNorm{n}d": norm(getattr(nn, f"InstanceNorm{n}d"), n, affine=True) for n in (1, 2, 3)},
    "SyncBatchNorm": norm(nn.SyncBatchNorm, 2),
    "GroupNorm": norm(nn.GroupNorm, 2, 2),
    "LayerNorm": norm(nn.LayerNorm, 0),
    "RMSNorm": norm(nn.RMSNorm, 0),
    "PReLU": norm(nn.PReLU, 1),
    "RNN": recurrent(nn.RNN),
    "LSTM": recurrent(nn.LSTM),
    "GRU": recurrent(nn.GRU),
    **{
        f"{kind}Cell": (LORA, lambda kind=kind: getattr(nn, f"{kind}Cell")(3, 2), noise(2, 3))
        for kind in ("RNN", "LSTM", "GRU")
    },
    "MultiheadAttention": (LORA, lambda: SelfAttention(4, 2, need_weights=False), noise(3, 2, 4)),
    "TransformerEncoderLayer": (LORA, lambda: nn.TransformerEncoderLayer(**ENCODER_LAYER), noise(2, 3, 4)),
    "TransformerDecoderLayer": (LORA, lambda: nn.TransformerDecoderLayer(**ENCODER_LAYER), pair(2, 3, 4)),
    "TransformerEncoder": (
        LORA,
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**ENCODER_LAYER), 1, enable_nested_tensor=False),
        noise(2, 3, 4),
    ),
    "TransformerDecoder": (
        LORA,
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**ENCODER_LAYER), 1),
        pair(2, 3, 4),
    ),
    "Transformer": (
        LORA,
        lambda: nn.Transformer(**ENCODER_LAYER, num_encoder_layers=1, num_decoder_layers=1),
        pair(2, 3, 4),
    ),
    "AdaptiveLogSoftmaxWithLoss": (LORA, lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 5, [2]), labelled(6, 4)),
    "LinearCrossEntropyLoss": (LORA, lambda: nn.LinearCrossEntropyLoss(4, 5), labelled(6, 4)),
    "ParameterList": (LORA, lambda: Named(nn.ParameterList([torch.randn(3, 3)]), (0,)), noise(2, 3)),
    "ParameterDict": (LORA, lambda: Named(nn.ParameterDict({"a": torch.randn(3, 3)}), ("a",)), noise(2, 3)),
}

# Not to be made by themselves.
ABSTRACT = {"RNNBase", "RNNCellBase"}


def with_weights() -> set[str]:
    """The classes of torch.nn whose constructor makes a parameter, or a layer that has one."""
    makes = re.compile(r"\b(Parameter|register_parameter|Linear|LayerNorm|MultiheadAttention|Transformer\w+)\(")
    found = set()
    for name, cls in vars(nn).items():
        if inspect.isclass(cls) and issubclass(cls, nn.Module) and not name.startswith("Lazy"):
            inits = [base.__init__ for base in cls.__mro__ if "__init__" in vars(base)][:-2]  # Module's, object's
            if any(makes.search(inspect.getsource(init)) for init in inits):
                found.add(name)
    return found


def test_no_class_with_a_weight_is_left_out() -> None:
    assert with_weights() - ABSTRACT <= set(CASES)  # which also has containers: they are given what they hold


@parametrize(
    {
        f"{name}-{mode}": Subject(make, inputs, method, training=mode == "train", cycles=4)
        for name, (method, make, inputs) in CASES.items()
        for mode in ("train", "eval")
    },
    without={"compiled_equals_eager"},
)
def test_laws(law) -> None:
    law()


LAZY = [name for name in vars(nn) if name.startswith("Lazy")]


@pytest.mark.parametrize("name", LAZY)
def test_lazy_modules_are_refused_until_they_have_a_weight(name: str) -> None:
    plain = name.removeprefix("Lazy")
    layer = getattr(nn, name)(*((3, 2) if "Conv" in name else (3,) if name == "LazyLinear" else ()))
    method, _, inputs = CASES[plain]
    if plain.startswith("InstanceNorm"):
        layer = getattr(nn, name)(affine=True)
    before = type(layer)
    with pytest.raises(lp.AttachError, match="it is not initialised yet; run one forward of the lazy module first"):
        lp.attach(layer, method, "weight")
    assert type(layer) is before
    layer(*inputs())
    lp.attach(layer, method, "weight")
    assert lp.check(layer, *inputs())["weight"].gradient in ("arrived", "zero")


def test_containers_lend_their_parameters_to_whoever_reads_them() -> None:
    layer = Listed(3)
    plan = lp.attach(layer, lp.Full(), lambda path, module, name: True)
    assert {row.path for row in plan} == {"several.0", "several.1", "named.gate", "inner.weight", "scale"}
    lp.check(layer, torch.randn(2, 3))
