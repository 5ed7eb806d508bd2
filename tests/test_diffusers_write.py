"""Writing diffusers' files: equal in diffusers itself, and when read back; and reading what diffusers writes."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_files import build, case
from safetensors import safe_open
from safetensors.torch import load_file
from test_plans import randomize, unchanged
from torch import Tensor, nn

import loraparam as lp

SPEC = case("diffusers/sd_peft_metadata").spec["base"]
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
CONTENTS: dict[str, dict[Any, lp.Method]] = {
    "pairs": {
        f"{BLOCK}.attn1.to_q": lp.LoRA(r=2, alpha=7),
        f"{BLOCK}.attn1.to_out.0": lp.LoRA(r=3, alpha=2, rslora=True),
        "down_blocks.0.resnets.0.conv1.weight": lp.LoRA(r=4, alpha=1),
        "down_blocks.0.attentions.0.proj_in.weight": lp.LoRA(r=1),
    },
    "directions": {
        f"{BLOCK}.attn1.to_q": lp.DoRA(r=2, alpha=7),
        f"{BLOCK}.attn1.to_k": lp.DoRA(r=1, eps=0.3),
        f"{BLOCK}.attn1.to_v": lp.Magnitude(),
        "down_blocks.0.resnets.0.conv1.weight": lp.DoRA(r=3),
    },
    "a pair beside directions": {f"{BLOCK}.attn1.to_q": lp.DoRA(r=2), f"{BLOCK}.attn1.to_k": lp.LoRA(r=1, alpha=3)},
    "biases": {
        f"{BLOCK}.attn1.to_out.0.weight": lp.LoRA(r=2, alpha=5),
        f"{BLOCK}.attn1.to_out.0.bias": lp.Full(),
        f"{BLOCK}.ff.net.2.bias": lp.Full(),
        "down_blocks.0.resnets.0.conv1": lp.LoRA(r=2),
        "down_blocks.0.resnets.0.conv1.bias": lp.Full(),
    },
    "slices": {
        f"{BLOCK}.attn1.to_q.weight[1/2]": lp.LoRA(r=1, alpha=3),
        f"{BLOCK}.attn1.to_q.weight[2/2]": lp.LoRA(r=2),
    },
}


@functools.cache
def _base(part: str) -> nn.Module:
    torch.manual_seed(0)
    model = build(SPEC[part]).eval()
    randomized = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=randomized) * 0.3)
    return model


def base(part: str = "unet") -> Any:
    return copy.deepcopy(_base(part))


def output(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, hidden = (torch.randn(shape, generator=generator) for shape in ((1, 4, 4, 4), (1, 5, 6)))
    with torch.no_grad():
        if hasattr(model, "conv_in"):
            return model(x, torch.tensor([3]), hidden).sample  # type: ignore[no-any-return]
        return model(torch.arange(5)[None]).last_hidden_state  # type: ignore[no-any-return]


def fused(model: Any) -> dict[str, Tensor]:
    """A model's weights with diffusers' adapter folded in."""
    model.fuse_lora()
    state = model.state_dict()
    return {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diffusers")


@pytest.mark.parametrize("prefix", [None, ""])
@pytest.mark.parametrize("name", CONTENTS)
def test_diffusers_reads_the_file_and_has_the_same_weights(folder: Path, name: str, prefix: str | None) -> None:
    model, path = base(), folder / "unet.safetensors"
    lp.attach(model, CONTENTS[name])
    randomize(model)
    expected, weights = output(model), lp.merged_state_dict(model)
    lp.save(model, path, format="diffusers", prefix=prefix)
    lp.detach(model)
    theirs = base()
    theirs.load_lora_adapter(str(path.parent), weight_name=path.name, prefix="unet" if prefix is None else None)
    torch.testing.assert_close(output(theirs), expected, rtol=1e-4, atol=1e-4)
    same(fused(theirs), weights)
    lp.load(model, path)
    same(lp.merged_state_dict(model), weights)
