"""Files meet a model that is on an accelerator: here one whose tensors refuse to meet those of the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import loraparam as lp


class Elsewhere(torch.Tensor):
    """A tensor that computes with its like alone, until ``cpu()`` brings it to the host."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.cpu:
                return args[0].as_subclass(Tensor)
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
        there = [isinstance(tensor, cls) for tensor in tensors]
        if any(there) and not all(there):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices!")
        return super().__torch_function__(func, types, args, kwargs or {})


def made(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))})


def elsewhere(model: nn.Module) -> nn.Module:
    """The model, moved there in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().as_subclass(Elsewhere), requires_grad=False)
    return model


METHODS: dict[Any, lp.Method] = {"net.0.weight[1/2]": lp.DoRA(r=2), "net.2": lp.LoRA(r=1), "net.1.bias": lp.Full()}

TOOLS: dict[str, Callable[[nn.Module, Path, Path], Any]] = {
    "verify": lambda base, file, out: lp.verify(base, file).findings,
    "combine": lambda base, file, out: lp.combine([file, file], out, base=base, how="svd").rows,
    "extract": lambda base, file, out: lp.extract(base, made(1), out, rank=1, full=True).rows,
    **{
        format: lambda base, file, out, to=format: lp.convert(file, out, to=to, base=base).targets
        for format in ("peft", "kohya", "loraparam")
    },
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_on_a_model_elsewhere(tool: str, tmp_path: Path) -> None:
    """The same as on the host's, where the adapter's file has been read to."""
    model = made()
    lp.attach(model, METHODS)
    with torch.no_grad():
        for factor in lp.parameters(model):
            factor.add_(0.1 * torch.randn_like(factor))
    lp.save(model, tmp_path / "adapter")
    here, there = (
        TOOLS[tool](base, tmp_path / "adapter", tmp_path / str(i)) for i, base in enumerate((made(), elsewhere(made())))
    )
    assert here == there


def test_the_stand_in_refuses() -> None:
    tensor = torch.ones(2).as_subclass(Elsewhere)
    with pytest.raises(RuntimeError, match="same device"):
        tensor + torch.ones(2)
    assert type(tensor + tensor) is Elsewhere
    assert type(tensor.cpu()) is Tensor
