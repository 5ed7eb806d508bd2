"""Joining slices, folding scales and padding ranks for other formats: the effective weight stays the same."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import loraparam as lp
from loraparam.formats.bases import Base, FileBase, ModelBase
from loraparam.formats.content import Item, content_of
from loraparam.formats.portable import at_most_full_rank, joined, padded, pair
from loraparam.methods.lowrank import LowRank
from loraparam.testing.subjects import shake


def dense(item: Item, base: Base) -> torch.Tensor:
    weight = base.tensor(item.parameter).double()
    return item.method.apply(weight, {k: v.double() for k, v in item.factors.items()}, item.layout)


SLICED: dict[str, tuple[Any, dict[str, lp.Method]]] = {
    "projections": (
        lambda: nn.MultiheadAttention(8, 2),
        {"in_proj_weight[q]": lp.LoRA(r=2, alpha=3), "in_proj_weight[v]": lp.LoRA(r=3)},
    ),
    "gates": (lambda: nn.LSTM(3, 4), {"weight_ih_l0[f]": lp.LoRA(r=1), "weight_ih_l0[o]": lp.LoRA(r=2, alpha=9)}),
    "some rows are a DoRA": (
        lambda: nn.Linear(5, 6),
        {"weight[1/3]": lp.DoRA(r=2, alpha=4), "weight[3/3]": lp.LoRA(r=1)},
    ),
    "differences": (lambda: nn.Linear(5, 6), {"weight[0:2]": lp.Full(), "weight[4:6]": lp.Full()}),
    "transposed convolution": (
        lambda: nn.ConvTranspose1d(4, 6, 3),
        {"weight[1/2]": lp.LoRA(r=2), "weight[2/2]": lp.LoRA(r=3)},
    ),
}


@pytest.mark.parametrize("case", SLICED)
def test_slices_join_into_one_item_of_the_same_weight(case: str) -> None:
    torch.manual_seed(0)
    make, methods = SLICED[case]
    model = make().double()
    lp.attach(model, methods)
    shake(model)
    base = ModelBase(model)
    (item,) = joined(content_of(model, "default"), base)
    expected = lp.effective_weight(model, item.parameter).detach()
    torch.testing.assert_close(dense(item, base), expected)
    assert not isinstance(item.method, LowRank) or item.method.scale == 1


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 5, 4, dtype=torch.float64))


def test_experts_by_index_join_into_a_stack() -> None:
    torch.manual_seed(0)
    model = Experts()
    lp.attach(model, {"stack[0]": lp.LoRA(r=1, alpha=3), "stack[2]": lp.LoRA(r=2)})
    shake(model)
    base = ModelBase(model)
    (item,) = joined(content_of(model, "default"), base)
    assert item.factors["lora_A"].shape == (3, 2, 4)
    torch.testing.assert_close(dense(item, base), lp.effective_weight(model, "stack").detach())


def test_slices_that_no_pair_expresses_are_refused() -> None:
    model = nn.Linear(4, 6)
    lp.attach(model, {"weight[1/2]": lp.DoRA(r=2, axis="in"), "weight[2/2]": lp.LoRA(r=2)})
    with pytest.raises(lp.FormatError, match=r"'weight\[1/2\]': DoRA, .* one low-rank pair for 'weight'"):
        joined(content_of(model, "default"), ModelBase(model))


@given(out=st.integers(1, 5), in_=st.integers(1, 5), r=st.integers(1, 8), more=st.integers(0, 3))
def test_padding_and_refactoring_keep_the_product(out: int, in_: int, r: int, more: int) -> None:
    generator = torch.Generator().manual_seed(out + 10 * in_ + 100 * r)
    A, B = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((r, in_), (out, r)))
    for new_A, new_B in (padded(A, B, r + more), at_most_full_rank(A, B)):
        torch.testing.assert_close(new_B @ new_A, B @ A)
    assert at_most_full_rank(A, B)[0].shape[0] == min(r, out, in_)


def test_a_pair_of_16_bits_is_not_rounded_when_it_is_refactored() -> None:
    A, B = (torch.randn(shape).to(torch.bfloat16) for shape in ((5, 3), (2, 5)))
    new_A, new_B = at_most_full_rank(A, B)
    torch.testing.assert_close(new_B @ new_A, B.float() @ A.float())


def test_the_scale_is_folded_into_B() -> None:
    item = Item("weight", lp.LoRA(r=2, alpha=3), {"lora_A": torch.ones(2, 3), "lora_B": torch.ones(4, 2)})
    A, B = pair(item)
    torch.testing.assert_close((A, B), (torch.ones(2, 3), torch.full((4, 2), 1.5)), rtol=0, atol=0)


def test_a_checkpoint_is_a_base(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    save_file({k: v for k, v in model.state_dict().items() if k.startswith("0")}, tmp_path / "a.safetensors")
    save_file({k: v for k, v in model.state_dict().items() if k.startswith("1")}, tmp_path / "b.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    names = '{"weight_map": {"0.weight": "a.safetensors", "0.bias": "a.safetensors", "1.weight": "b.safetensors"}}'
    index.write_text(names)
    base = FileBase(tmp_path)
    assert sorted(base.names) == sorted(model.state_dict())
    assert base.shape("1.weight") == (2, 4)
    assert torch.equal(base.tensor("0.bias"), model[0].bias)
    for bad in ("../a.safetensors", "/etc/passwd", "", "c.safetensors", 3):
        index.write_text(names.replace('"a.safetensors"', f'"{bad}"' if isinstance(bad, str) else str(bad)))
        with pytest.raises(lp.FormatError, match=r"names shard|weight_map"):
            FileBase(tmp_path)
    for wrong in (names.replace("0.bias", "0.gone"), names.replace('"1.weight": "b.', '"1.weight": "a.')):
        index.write_text(wrong)
        with pytest.raises(lp.FormatError, match=r"its index says that '(0\.gone|1\.weight)' is in 'a\.safetensors'"):
            FileBase(tmp_path)
    index.unlink()
    with pytest.raises(lp.FormatError, match="holds 2 safetensors files and no"):
        FileBase(tmp_path)
    assert FileBase(tmp_path / "b.safetensors").shape("1.bias") == (2,)
