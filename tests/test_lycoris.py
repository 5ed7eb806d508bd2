"""LyCORIS itself writes a file of random values; loaded here, the model computes what LyCORIS' network computes."""

import logging
from pathlib import Path
from typing import Any

import lycoris
import pytest
import torch
from safetensors import safe_open
from test_kohya_write import Blocks

import loraparam as lp

ARGUMENTS: dict[str, dict[str, Any]] = {
    "pairs": {"linear_dim": 2, "linear_alpha": 6, "conv_dim": 3, "conv_alpha": 1},
    "alpha 0": {"linear_dim": 2, "linear_alpha": 0},
    "a rank above the layer's": {"linear_dim": 7, "linear_alpha": 3},
    "rank-stabilized": {"linear_dim": 4, "linear_alpha": 2, "rs_lora": True},
    "a trained scalar": {"linear_dim": 2, "linear_alpha": 3, "use_scalar": True},
    "a core": {"linear_dim": 3, "linear_alpha": 2, "conv_dim": 2, "conv_alpha": 3, "use_tucker": True},
    "a magnitude per output": {"linear_dim": 2, "linear_alpha": 6, "dora_wd": True, "wd_on_output": True},
    "a magnitude per input": {"linear_dim": 2, "linear_alpha": 6, "dora_wd": True, "wd_on_output": False},
    "a core with a magnitude": {"linear_dim": 2, "use_tucker": True, "dora_wd": True, "wd_on_output": False},
    "norms": {"linear_dim": 2, "linear_alpha": 6, "train_norm": True},
    "differences": {"algo": "full", "train_norm": True},
}


def network(model: Blocks, arguments: dict[str, Any]) -> Any:
    """LyCORIS on a model, with random values."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    created = lycoris.create_lycoris(model, 1.0, **{"algo": "lora", **arguments})
    created.apply_to()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in created.named_parameters():
            scale, shift = (0.3, 0.0) if "dora_scale" not in name else (0.5, 1.0)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + shift)
    return created


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_lycoris_writes_is_read(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    theirs, x, path = Blocks(), torch.randn(2, 3, 4, 4), tmp_path / "a.safetensors"
    model = Blocks()
    model.load_state_dict(theirs.state_dict())
    plain = model(x)
    created = network(theirs, ARGUMENTS[name])
    created.save_weights(str(path), dtype, {})
    lp.load(model, path)
    with torch.no_grad():
        expected = theirs(x)
    assert not torch.allclose(plain, expected, atol=1e-2)
    # float16 rounds the factors, not what is computed of them.
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(model(x), expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def test_a_file_of_ours_holds_the_scale_before_it_was_folded(tmp_path: Path) -> None:
    model = Blocks()
    lp.attach(model, lp.LoRA(r=2, alpha=3), "to_out.0")
    lp.save(model, tmp_path / "a.safetensors", format="kohya")
    with safe_open(str(tmp_path / "a.safetensors"), framework="pt") as file:
        header = file.metadata()
    assert header["loraparam.trained"] == '{"to_out.0.weight": {"r": 2, "alpha": 3, "rslora": false}}'
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "2")
