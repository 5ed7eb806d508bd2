"""``lora.MultiheadAttention`` of LoRA-Torch's drop-in beside its formula: letters, keys, and a model around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dropins import Formula, leaf, moved, train
from torch import Tensor, nn
from torch.testing import assert_close

import loraparam as lp
import loraparam.loratorch as lora

E = 6
LETTERS = [["q", "k", "v", "o"], ["q", "v"], ["q"], ["k", "o"], ["o"], ["v", "q"]]


def rows(letters: list[str]) -> Tensor:
    """1 in the rows of ``in_proj_weight`` that these letters name."""
    return torch.cat([torch.full((E, 1), float(letter in letters)) for letter in "qkv"])


class SelfAttention(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("letters", LETTERS, ids="".join)
def test_attention_adapts_the_letters_that_are_enabled(letters: list[str]) -> None:
    """Losses of 20 steps are those of the formula, whose B acts on the rows of the letters."""
    layer = moved(lora.MultiheadAttention(E, 2, enable_lora=letters, r=2, lora_alpha=4, batch_first=True))
    plain = nn.MultiheadAttention(E, 2, batch_first=True)
    plain.load_state_dict(lp.base_state_dict(layer), strict=False)
    tag = "".join(letter for letter in "qkv" if letter in letters)
    pairs: dict[str, Any] = {}
    if tag:
        A, B = (getattr(layer, f"{tag}_lora_{side}") for side in "AB")
        assert (tuple(A.shape), tuple(B.shape)) == ((2, E), (3 * E, 2))
        pairs["in_proj_weight"] = (leaf(A), leaf(B), lambda A, B: (rows(letters) * B) @ A)
    if "o" in letters:
        pairs["out_proj.weight"] = (leaf(layer.o_lora_A), leaf(layer.o_lora_B), lambda A, B: B @ A)
    # In float64: AdamW magnifies rounding.
    model, formula = SelfAttention(layer).double(), SelfAttention(Formula(plain, 2.0, pairs)).double()
    lora.mark_only_lora_as_trainable(model)
    batches = [torch.randn(3, 4, E, dtype=torch.float64) for _ in range(20)]
    assert_close(train(model, batches), train(formula, batches))
    x = batches[0]
    assert_close(model(x), formula(x))
    model.eval()
    with torch.no_grad():  # a fused kernel, which reads the weights
        assert_close(model(x), formula(x))


def test_the_keys_of_attention() -> None:
    """The original's, in its order: with one pair for q, k and v, with a pair each, and with the pair that is dead."""
    bias = ["in_proj_weight", "in_proj_bias"]
    out = ["out_proj.weight", "out_proj.bias"]
    layer = lora.MultiheadAttention(E, 2, r=2)
    o, qkv = ["o_lora_A", "o_lora_B"], ["qkv_lora_A", "qkv_lora_B"]
    assert list(layer.state_dict()) == [*bias, *o, *qkv, *out]
    assert list(lora.MultiheadAttention(E, 2).state_dict()) == [*bias, *out]
    apart = lora.MultiheadAttention(E, 2, ["q", "v"], r=2, kdim=4, vdim=5)
    assert {key: tuple(t.shape) for key, t in lora.lora_state_dict(apart).items()} == {
        "q_lora_A": (2, E),
        "q_lora_B": (E, 2),
        "v_lora_A": (2, 5),
        "v_lora_B": (E, 2),
    }
    projections = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    assert [key for key in apart.state_dict() if "lora_" not in key] == [*projections, *bias[1:], *out]
    only_o = lora.MultiheadAttention(E, 2, ["o"], r=2)
    assert list(only_o.state_dict()) == [*bias, *o, "_lora_A", "_lora_B", *out]
    assert not any(only_o.state_dict()[key].any() for key in ("_lora_A", "_lora_B"))
    assert len(list(only_o.parameters())) == 6


def test_the_start_of_attention() -> None:
    """A is kaiming in every column, whichever the letters; B is zero, so the layer is torch's at first."""
    layer = lora.MultiheadAttention(48, 2, ["v"], r=4)
    A = layer.v_lora_A
    assert bool((A != 0).all())
    assert A.abs().max() <= 48**-0.5
    assert not layer.v_lora_B.any()
    torch.manual_seed(1)
    layer = lora.MultiheadAttention(48, 2, r=4)
    with torch.no_grad():
        before = layer.in_proj_weight.clone()
    layer.reset_parameters()
    with torch.no_grad():
        assert not torch.equal(layer.in_proj_weight, before)
    x = torch.randn(3, 2, 48)
    with lp.disabled(layer):
        base = layer(x, x, x)[0]
    assert_close(layer(x, x, x)[0], base, rtol=0, atol=0)


def test_attention_with_keys_and_values_of_other_widths() -> None:
    """Each projection has a pair of its own."""
    layer = moved(lora.MultiheadAttention(E, 2, ["q", "v", "o"], r=2, lora_alpha=2, kdim=4, vdim=5, batch_first=True))
    plain = nn.MultiheadAttention(E, 2, kdim=4, vdim=5, batch_first=True)
    plain.load_state_dict(lp.base_state_dict(layer))
    names = {"q_proj_weight": "q", "v_proj_weight": "v", "out_proj.weight": "o"}
    pairs = {
        path: (leaf(getattr(layer, f"{stem}_lora_A")), leaf(getattr(layer, f"{stem}_lora_B")), lambda A, B: B @ A)
        for path, stem in names.items()
    }
    q, k, v = torch.randn(3, 4, E), torch.randn(3, 5, 4), torch.randn(3, 5, 5)
    assert_close(layer(q, k, v), Formula(plain, 1.0, pairs)(q, k, v))


def test_a_checkpoint_that_adapts_every_row_is_read_as_what_it_was() -> None:
    """LoRA-Torch adapts k and v alike where only q is enabled; loading a sane checkpoint gives the letters back."""
    layer = lora.MultiheadAttention(E, 2, ["q"], r=2, lora_alpha=2)
    sane = {key: value.clone() for key, value in lora.lora_state_dict(layer).items()}
    old = {"q_lora_A": torch.randn(2, E), "q_lora_B": torch.randn(3 * E, 2)}
    base = lp.base_state_dict(layer)["in_proj_weight"]
    with torch.no_grad():  # what is written by hand is not a checkpoint: only q's rows act
        layer.q_lora_A.copy_(old["q_lora_A"])
        layer.q_lora_B.copy_(old["q_lora_B"])
    assert_close(layer.in_proj_weight, base + rows(["q"]) * (old["q_lora_B"] @ old["q_lora_A"]))
    assert layer.load_state_dict(old, strict=False).unexpected_keys == []
    assert_close(layer.in_proj_weight, base + old["q_lora_B"] @ old["q_lora_A"])
    layer.in_proj_weight.sum().backward()
    assert bool((layer.q_lora_B.grad != 0).all())
    layer.load_state_dict(sane, strict=False)
    layer.zero_grad()
    layer.in_proj_weight.sum().backward()
    assert_close((layer.q_lora_B.grad != 0).all(1, keepdim=True).float(), rows(["q"]))
    assert_close((layer.q_lora_B.grad != 0).any(1, keepdim=True).float(), rows(["q"]))


def test_in_a_model_as_the_open_clip_notebook_does() -> None:
    """Built from a plain layer's attributes, loaded from it with strict=False, put in its place."""
    block = nn.TransformerEncoderLayer(E, 2, 8, dropout=0.0, batch_first=True)
    x = torch.randn(2, 4, E)
    before = block(x)
    old = block.self_attn
    new = lora.MultiheadAttention(
        r=2,
        lora_alpha=32,
        enable_lora=["q", "k", "v", "o"],
        embed_dim=old.embed_dim,
        num_heads=old.num_heads,
        dropout=old.dropout,
        bias=hasattr(old, "in_proj_bias"),
        add_bias_kv=old.bias_k is not None,
        add_zero_attn=old.add_zero_attn,
        kdim=old.kdim,
        vdim=old.vdim,
        batch_first=old.batch_first,
    )
    found = new.load_state_dict(old.state_dict(), strict=False)
    assert found.missing_keys == list(lora.lora_state_dict(new))
    block.self_attn = new
    linear = lora.Linear(block.linear1.in_features, block.linear1.out_features, r=2, lora_alpha=32)
    linear.load_state_dict(block.linear1.state_dict(), strict=False)
    block.linear1 = linear
    lora.mark_only_lora_as_trainable(block)
    assert_close(block(x), before)
    moved(block)
    trained = block(x)
    assert not torch.allclose(trained, before)
    block.eval()
    with torch.no_grad():
        assert_close(block(x), trained, rtol=1e-4, atol=1e-4)  # float32 through another kernel, large weights
    assert sum(p.requires_grad for p in block.parameters()) == 6


def test_what_makes_no_sense() -> None:
    """A letter that is none."""
    with pytest.raises(lp.LoraparamError, match=r"enable_lora=\['x'\]; allowed: a list of letters out of 'q'"):
        lora.MultiheadAttention(E, 2, ["x"], r=2)
