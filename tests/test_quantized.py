"""Adapters on quantized weights: torchao's train, are saved and merged; bitsandbytes' are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import loraparam as lp

EXACT = {"rtol": 0, "atol": 0}
X = torch.randn(5, 8, generator=torch.manual_seed(1))


def quantized() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def steps(model: nn.Module) -> list[float]:
    optimizer, losses = torch.optim.AdamW(lp.parameters(model), 0.02), []
    for _ in range(6):
        loss = model(X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", [lp.LoRA(r=2), lp.DoRA(r=2)])
def test_an_int8_base_trains_saves_and_merges(method: lp.Method, tmp_path: Path) -> None:
    model, expected = quantized(), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    for layer, wide in zip(model, expected, strict=True):
        if isinstance(layer, nn.Linear):
            wide.weight.data, wide.bias.data = layer.weight.dequantize().detach(), layer.bias.detach().clone()
    stored = model[0].weight
    for each in (model, expected):
        torch.manual_seed(1)
        lp.attach(each, method)
    losses = [steps(each) for each in (model, expected)]
    assert_close(*losses)
    assert losses[0][-1] < losses[0][0]
    assert_close(lp.state_dict(model), lp.state_dict(expected))
    lp.save(model, tmp_path / "adapter.safetensors")
    loaded = quantized()
    lp.load(loaded, tmp_path / "adapter.safetensors")
    assert_close(loaded(X), model(X), **EXACT)
    lp.merge(loaded)  # into ordinary weights: an int8 grid would lose most of the difference
    assert type(loaded[0].weight) is nn.Parameter
    assert_close(loaded(X), model(X))
    lp.detach(model)
    assert model[0].weight is stored


@pytest.mark.parametrize("kind", ["Params4bit", "Int8Params"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_a_bitsandbytes_layer_is_refused_with_the_reason(kind: str, dtype: torch.dtype) -> None:
    """Its forward reads scales from the parameter object itself; before quantization it holds ordinary floats."""
    parameter = type(kind, (nn.Parameter,), {"__module__": "bitsandbytes.nn.modules"})
    layer = nn.Linear(4, 4)
    layer.weight = torch.zeros(4, 4, dtype=dtype).as_subclass(parameter)
    with pytest.raises(lp.AttachError, match=rf"'weight': it is bitsandbytes' {kind}: .*torchao"):
        lp.attach(layer, lp.LoRA(r=2), "weight")
