"""Weights read flat, row by row, whatever their dims mean: layers compute with them, files keep them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.testing import assert_close

import loraparam as lp
from loraparam.testing.subjects import shake

# A layer, its input's shape, and the rows it is read by.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5), 9),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5), 9),
    "linear": (lambda: nn.Linear(6, 4), (3, 6), 8),
    "attention": (lambda: nn.MultiheadAttention(4, 2), (3, 2, 4), 6),
}
METHODS: dict[str, lp.Method] = {"lora": lp.LoRA(r=2, alpha=3), "dora": lp.DoRA(r=2, detach_norm=False)}


def run(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)
    return y


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_computes_with_what_apply_says(case: str, method: str) -> None:
    """Outputs and gradients are those of a plain layer whose weight is apply(W)."""
    make, shape, rows = LAYERS[case]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    name = "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"
    plain = make().double()
    plain.load_state_dict(layer.state_dict())
    lp.attach(layer, METHODS[method], name, layout=lp.Layout(rows=rows))
    shake(layer)
    factors = {key.rpartition(".")[2]: p for key, p in lp.named_parameters(layer)}
    tensors = [x, *factors.values()]
    got = run(layer, x)
    weight = METHODS[method].apply(getattr(plain, name), factors, lp.Layout(rows=rows))
    wanted = torch.func.functional_call(plain, {name: weight}, (x, x, x) if name != "weight" else (x,))
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    assert_close(got, wanted)
    direction = torch.randn_like(got)
    assert_close(torch.autograd.grad(got, tensors, direction), torch.autograd.grad(wanted, tensors, direction))


def test_a_vector_reads_as_a_matrix() -> None:
    """So that a bias or a norm's weight can have a LoRA."""
    layer, x = nn.LayerNorm(6), torch.randn(3, 6)
    (row,) = lp.attach(layer, lp.LoRA(r=1), "weight", layout=lp.Layout(rows=2))
    assert (row.num_params, str(row.layout)) == (5, "flat (2, in)")
    shake(layer)
    A, B = lp.parameters(layer)
    assert_close(layer(x), F.layer_norm(x, (6,), 1 + (B @ A).flatten(), layer.bias))


def test_dropout_of_the_input_reaches_the_update_alone() -> None:
    """A convolution's kernel s·B·A does not factor, so there it has a convolution of its own."""
    layer, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5)
    method = lp.LoRA(r=6, alpha=18, dropout=0.5, dropout_on="input")
    lp.attach(layer, method, "weight", layout=lp.Layout(rows=18))
    shake(layer)
    A, B = lp.parameters(layer)
    base, delta = layer.parametrizations.weight.original, 3 * (B @ A).view(6, 4, 3, 3)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    expected = F.conv2d(x, base, layer.bias, padding=1) + F.conv2d(F.dropout(x, 0.5), delta, padding=1)
    assert_close(y, expected)
    layer.eval()
    assert_close(layer(x), F.conv2d(x, base + delta, layer.bias, padding=1))


def test_files_keep_the_rows(tmp_path: Path) -> None:
    """And say nothing of them where there are none, so that files of other weights stay as they were."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3))
    lp.attach(model, lp.LoRA(r=4), ["0", "1"], layout={"0": lp.Layout(rows=18)})
    shake(model)
    lp.save(model, tmp_path / "flat.safetensors")
    with safe_open(str(tmp_path / "flat.safetensors"), framework="pt") as file:
        about = json.loads(file.metadata()["targets"])
    assert about["0.weight"]["layout"]["rows"] == 18
    assert "rows" not in about["1.weight"]["layout"]
    other = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3))
    other.load_state_dict(lp.base_state_dict(model))
    plan = lp.load(other, tmp_path / "flat.safetensors")
    assert [str(row.layout) for row in plan] == ["flat (18, in)", "(out, in)"]
    x = torch.randn(1, 4, 7, 7)
    assert_close(other(x), model(x), rtol=0, atol=0)  # the same numbers, computed the same way


@pytest.mark.parametrize("format", ["peft", "kohya", "diffusers"])
def test_lengths_of_other_rows_have_no_form_elsewhere(format: str, tmp_path: Path) -> None:
    """A LoRA read flat is some matrix to others, too; a DoRA's magnitudes are of rows that they do not have."""
    model = nn.Sequential(nn.Linear(4, 6))
    lp.attach(model, lp.DoRA(r=1), "0", layout=lp.Layout(rows=12))
    with pytest.raises(lp.FormatError, match=r"'0\.weight': .* read (as )?flat"):
        lp.save(model, tmp_path / "out", format=format)
