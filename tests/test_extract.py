"""What a fine-tune changed, as an adapter: all of it comes back, or the best of a rank and a report that is true."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import content, deltas, items, many, save_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from peft_models import base_and_input, in_peft, output
from torch import nn

import loraparam as lp


def tuned(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with every floating-point tensor moved, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor))
    return model


@given(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    shards=st.integers(0, 2),
    models=st.booleans(),
    cut=st.sampled_from([{"rank": 99}, {"energy": 1.0}, {"error": 0.0}]),
)
def test_all_of_a_fine_tune_comes_back(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, shards: int, models: bool, cut: dict[str, Any]
) -> None:
    place = tmp_path_factory.mktemp("extract")
    base, new = many(dtype), tuned(many(dtype))
    files = [save_checkpoint(m.state_dict(), place / name, shards=shards) for m, name in ((base, "a"), (new, "b"))]
    done = lp.extract(*((base, new) if models else files), place / "adapter", full=True, **cut)
    assert max(row.residual for row in done.rows) < 1e-5
    assert set(done.left_out) == (set() if models else {"norm.running_mean", "norm.running_var"})
    lp.load(base, place / "adapter")
    lp.merge(base)
    eps = torch.finfo(dtype).eps
    for name, parameter in new.named_parameters():
        # B·A is computed in float32, then added and rounded to the dtype.
        torch.testing.assert_close(base.get_parameter(name), parameter, rtol=4 * eps, atol=1e-5 * (eps < 1e-3) + eps)


def test_each_tensor_is_the_best_of_its_rank_and_the_report_is_true(tmp_path: Path) -> None:
    base, new = many(), tuned(many())
    done = lp.extract(base, new, tmp_path / "adapter", rank=2)
    found = deltas(tmp_path / "adapter")
    assert set(found) == {row.path for row in done.rows}
    expected = {name: (p - base.get_parameter(name)).detach().double() for name, p in new.named_parameters()}
    assert set(done.left_out) == {name for name, delta in expected.items() if delta.dim() == 1}
    assert all("full=True" in why for why in done.left_out.values())
    layouts = {row.path: row.layout for row in lp.plan(base, lp.LoRA(r=1), re_all())}
    for row in done.rows:
        matrix = layouts[row.path].matrix(expected[row.path])
        S = torch.linalg.svdvals(matrix)
        best = float(torch.linalg.vector_norm(S[..., 2:])) / float(torch.linalg.vector_norm(S))
        lost = torch.linalg.vector_norm(found[row.path] - expected[row.path]) / torch.linalg.vector_norm(matrix)
        assert row.residual == pytest.approx(float(lost), rel=1e-4, abs=1e-6)
        assert row.residual == pytest.approx(best, rel=1e-4, abs=1e-6)
        assert row.norm == pytest.approx(float(torch.linalg.vector_norm(matrix)), rel=1e-5)
        assert row.rank == min(2, *matrix.shape[-2:])


def re_all() -> list[str]:
    return ["tokens", "linear", "attention", "conv", "up", "experts.gate"]


def test_layouts_told_from_a_checkpoint(tmp_path: Path) -> None:
    shapes = {"conv1d.weight": (6, 4, 3), "mlp.experts.gate_up": (3, 6, 4), "mlp.experts.weight": (3, 6, 4)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    new = {name: torch.randn(shape) for name, shape in shapes.items()}
    files = [save_checkpoint(state, tmp_path / name) for state, name in ((base, "a"), (new, "b"))]
    lp.extract(*files, tmp_path / "adapter", rank=2)
    stack = lp.Layout(out=1, batch=(0,))
    assert {name: item.layout for name, item in items(tmp_path / "adapter").items()} == {
        "conv1d.weight": lp.Layout(),
        "mlp.experts.gate_up": stack,
        "mlp.experts.weight": stack,
    }
    lp.extract(*files, tmp_path / "other", rank=2, layouts={"conv*": lp.Layout(out=1)})
    assert items(tmp_path / "other")["conv1d.weight"].layout == lp.Layout(out=1)


@pytest.mark.parametrize(
    ("layouts", "match"),
    [
        ({"linaer.weight": lp.Layout(out=1)}, r"'linaer\.weight' matches no parameter .*; nearest: 'linear\.weight'"),
        ({"*.bias": lp.Layout()}, r"'\*\.bias' matches no parameter of two dims or more"),
        ({"linear*": lp.Layout(out=2)}, r"'linear\.weight': layout .* names dim 2 of a tensor with 2 dims"),
    ],
)
def test_layouts_that_are_for_nothing(tmp_path: Path, layouts: dict[str, lp.Layout], match: str) -> None:
    base, new = (nn.ModuleDict({"linear": nn.Linear(3, 2)}) for _ in range(2))
    with pytest.raises(lp.TargetError, match=match):
        lp.extract(base, new, tmp_path / "adapter", rank=1, layouts=layouts)
    assert list(tmp_path.iterdir()) == []


def test_embeddings_and_transposed_weights_told_from_a_checkpoint(tmp_path: Path) -> None:
    """By an embedding's usual names, and by the sizes of biases, also for the square weights of such a name."""
    shapes = {"wte.weight": (9, 4), "wte_like.weight": (9, 4), "embed_tokens.weight": (4, 9), "emb.weight": (4, 4, 3)}
    shapes |= {"a.c_fc.weight": (4, 12), "a.c_fc.bias": (12,), "a.c_proj.weight": (4, 4), "a.c_proj.bias": (4,)}
    shapes |= {"b.c_proj.weight": (12, 4), "b.c_proj.bias": (4,), "b.lin.weight": (4, 4), "b.lin.bias": (4,)}
    shapes |= {"b.mix.weight": (4, 12), "b.mix.bias": (12,), "c.mix.weight": (12, 4), "c.mix.bias": (12,)}
    shapes |= {"d.mix.weight": (4, 4), "d.mix.bias": (4,), "tokens": (9, 4)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    new = {name: torch.randn(shape) for name, shape in shapes.items()}
    files = [save_checkpoint(state, tmp_path / name) for state, name in ((base, "a"), (new, "b"))]
    lp.extract(*files, tmp_path / "adapter", rank=2)
    found = {name: item.layout for name, item in items(tmp_path / "adapter").items()}
    looked_up = {name for name, layout in found.items() if layout == lp.Layout(out=1, lookup=True)}
    transposed = {name for name, layout in found.items() if layout == lp.Layout(out=1)}
    assert looked_up == {"wte.weight", "embed_tokens.weight"}
    assert transposed == {"a.c_fc.weight", "a.c_proj.weight", "b.c_proj.weight", "b.mix.weight"}
    assert len(found) == 14 - 2


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_what_is_extracted_from_checkpoints_acts_the_same_in_peft(kind: str, tmp_path: Path) -> None:
    base, x = base_and_input(kind)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith(("c_attn.weight", "c_proj.weight", "wpe.weight", "q_proj.weight", "embed_tokens.weight")):
                parameter += torch.randn_like(parameter) * 0.1
    names = {"a": base, "b": tuned}
    a, b = (
        save_checkpoint({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / n)
        for n, model in names.items()
    )
    lp.extract(a, b, tmp_path / "adapter", rank=8, to="peft")
    torch.testing.assert_close(output(in_peft(base, tmp_path / "adapter"), x), output(tuned, x), rtol=1e-4, atol=1e-5)


def test_checkpoints_that_do_not_match(tmp_path: Path) -> None:
    a = save_checkpoint({"w": torch.zeros(4, 3), "only": torch.zeros(2), "head": torch.zeros(5, 2)}, tmp_path / "a")
    b = save_checkpoint({"w": torch.eye(4, 3), "new": torch.zeros(2), "head": torch.zeros(6, 2)}, tmp_path / "b")
    before = content(tmp_path)
    match = r"differ in 'only: only in the base', 'new: only in the tuned one', 'head: shape \(5, 2\) against \(6, 2\)'"
    with pytest.raises(lp.FormatError, match=match):
        lp.extract(a, b, tmp_path / "out", rank=1)
    with pytest.raises(lp.FormatError, match="nothing to extract: no weight differs among the 3"):
        lp.extract(a, a, tmp_path / "out", rank=1)
    assert content(tmp_path) == before
    done = lp.extract(a, b, tmp_path / "out", rank=1, strict=False)
    assert [row.path for row in done.rows] == ["w"]
    assert set(done.left_out) == {"only", "new", "head"}


def test_what_no_adapter_can_hold(tmp_path: Path) -> None:
    state = {"w": torch.zeros(4, 3), "bn.running_mean": torch.zeros(3), "ids": torch.arange(3), "same": torch.ones(2)}
    a = save_checkpoint(state, tmp_path / "a")
    b = save_checkpoint(
        {**state, "w": torch.eye(4, 3), "bn.running_mean": torch.ones(3), "ids": torch.arange(1, 4)}, tmp_path / "b"
    )
    done = lp.extract(a, b, tmp_path / "out", rank=1, full=True)
    assert [row.path for row in done.rows] == ["w"]
    assert done.left_out["bn.running_mean"] == "changed; a buffer, which no adapter holds"
    assert "dtype torch.int64" in done.left_out["ids"]
    c = save_checkpoint({**state, "w": torch.full((4, 3), math.nan)}, tmp_path / "c")
    with pytest.raises(lp.FormatError, match="'w' holds NaN or infinity"):
        lp.extract(a, c, tmp_path / "nan", rank=1)
    assert not (tmp_path / "nan").exists()
