"""Adapters of another rank: the best of it, or of the share that is to be kept, in a scale that stays."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import adapted, content, deltas, every_interruption, items, many
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import loraparam as lp
from loraparam.formats import read_content

TARGETS: dict[Any, lp.Method] = {
    "tokens": lp.LoRA(r=4, alpha=3),
    "linear": lp.LoRA(r=5, rslora=True, dropout=0.1),
    "attention.in_proj_weight[q]": lp.LoRA(r=3),
    "conv": lp.DoRA(r=4, alpha=2),
    "experts.gate": lp.LoRA(r=3),
    "norm.weight": lp.Full(),
    "up": lp.Magnitude(),
}


def saved(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    lp.save(adapted(many(dtype), TARGETS), path)
    return path


def pairs(path: Path) -> dict[str, tuple[lp.Method, Tensor]]:
    """{target: (method, s·B·A in float64)} of the targets that have a rank."""
    return {
        name: (item.method, item.method.scale * item.factors["lora_B"].double() @ item.factors["lora_A"].double())
        for name, item in items(path).items()
        if isinstance(item.method, (lp.LoRA, lp.DoRA))
    }


@given(rank=st.integers(1, 8), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_resizing_is_the_best_of_its_rank(
    tmp_path_factory: pytest.TempPathFactory, rank: int, dtype: torch.dtype
) -> None:
    place = tmp_path_factory.mktemp("resize")
    done = lp.resize(saved(place / "old", dtype), place / "new", rank=rank)
    old, new = pairs(place / "old"), pairs(place / "new")
    rows = {row.path: row for row in done.rows}
    for name, (method, matrix) in old.items():
        out, in_ = matrix.shape[-2:]
        assert new[name][0].r == min(rank, out, in_)
        assert new[name][0].dropout == method.dropout
        S, norm = torch.linalg.svdvals(matrix), float(torch.linalg.vector_norm(matrix))
        best = float(torch.linalg.vector_norm(S[..., rank:])) / norm
        lost = float(torch.linalg.vector_norm(new[name][1] - matrix)) / norm
        # Of two factors in float32: 1e-7 each, and a few of them add up.
        assert lost == pytest.approx(best, rel=1e-5, abs=1e-6)
        assert rows[name].residual == pytest.approx(lost, rel=1e-6, abs=1e-9)
        assert rows[name].norm == pytest.approx(norm)
    for name in ("norm.weight", "up.weight"):
        assert rows[name].note == "has no rank; kept as it is"


@pytest.mark.parametrize("rank", [5, 6, 40])
def test_resizing_up_changes_nothing(tmp_path: Path, rank: int) -> None:
    model = adapted(many(), TARGETS)
    lp.save(model, tmp_path / "old")
    done = lp.resize(tmp_path / "old", tmp_path / "new", rank=rank)
    assert max(row.residual for row in done.rows) < 1e-7  # B takes up the change of alpha/r, and is rounded
    for name, item in items(tmp_path / "new").items():
        assert getattr(item.method, "alpha", None) == getattr(items(tmp_path / "old")[name].method, "alpha", None)
    other = many()
    lp.load(other, tmp_path / "new")
    for name, weight in lp.merged_state_dict(model).items():
        torch.testing.assert_close(lp.merged_state_dict(other)[name], weight)


@given(share=st.floats(0.05, 0.99), kind=st.sampled_from(["energy", "error"]))
def test_energy_and_error_are_honoured(tmp_path_factory: pytest.TempPathFactory, share: float, kind: str) -> None:
    place = tmp_path_factory.mktemp("resize")
    lp.resize(saved(place / "old", torch.float64), place / "new", **{kind: share})
    allowed = 1 - share if kind == "energy" else share**2
    new = pairs(place / "new")
    for name, (_, matrix) in pairs(place / "old").items():
        S = torch.linalg.svdvals(matrix).reshape(-1, min(matrix.shape[-2:]))
        tails = [float((S[:, k:] ** 2).sum() / (S**2).sum()) for k in range(S.shape[1] + 1)]
        expected = next(k for k in range(1, len(tails)) if tails[k] <= allowed + 1e-12)
        assert new[name][0].r == expected


def test_a_shortened_dora_keeps_its_lengths_and_says_so(tmp_path: Path) -> None:
    model = adapted(many(), {"linear": lp.DoRA(r=4)})
    lp.save(model, tmp_path / "old")
    done = lp.resize(tmp_path / "old", tmp_path / "new", rank=2)
    assert "lengths kept" in done.rows[0].note
    assert done.rows[0].residual > 0.01
    other = many()
    lp.load(other, tmp_path / "new")
    lengths = [torch.linalg.vector_norm(m.linear.weight.detach().clone(), dim=1) for m in (model, other)]
    torch.testing.assert_close(*lengths)
    assert not torch.allclose(model.linear.weight, other.linear.weight, rtol=1e-2)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_each_block_of_a_merged_linear_is_resized(tmp_path: Path, shared: bool, rank: int) -> None:
    method = lp.BlockLoRA(r=3, alpha=2, blocks=(True, False, True), shared=shared)
    model = adapted(many(), {"attention.in_proj_weight": method})
    lp.save(model, tmp_path / "old")
    row = lp.resize(tmp_path / "old", tmp_path / "new", rank=rank).rows[0]
    (item,) = items(tmp_path / "new").values()
    assert (type(item.method), item.method.blocks, item.method.shared) == (lp.BlockLoRA, method.blocks, shared)
    assert (item.method.r, row.rank) == (rank, rank)
    old, new = (deltas(tmp_path / name)["attention.in_proj_weight"] for name in ("old", "new"))
    matrices = [old] if shared else list(old.chunk(3))
    best = math.sqrt(sum(float((torch.linalg.svdvals(m)[rank:] ** 2).sum()) for m in matrices))
    assert float(torch.linalg.vector_norm(new - old)) == pytest.approx(best, rel=1e-5, abs=1e-5)
    assert row.residual == pytest.approx(best / float(torch.linalg.vector_norm(old)), rel=1e-5, abs=1e-6)
    lp.load(many(), tmp_path / "new")


def test_resizing_in_place_and_over_what_is_there(tmp_path: Path) -> None:
    path = saved(tmp_path / "adapter")
    before = content(tmp_path)
    with pytest.raises(lp.FormatError, match=r"adapter' exists; give another path, or force=True"):
        lp.resize(path, path, rank=1)
    assert content(tmp_path) == before
    count = every_interruption(
        lambda: lp.resize(path, path, rank=1, force=True), lambda: content(tmp_path) == before or pytest.fail("changed")
    )
    assert count >= 2
    assert {item.method.r for item in items(path).values() if hasattr(item.method, "r")} == {1}


def test_nothing_to_resize(tmp_path: Path) -> None:
    lp.save(adapted(many(), {"up": lp.Magnitude()}), tmp_path / "adapter")
    with pytest.raises(lp.FormatError, match="holds no low-rank pair"):
        lp.resize(tmp_path / "adapter", tmp_path / "out", rank=1)


@pytest.mark.parametrize("alpha", [1e-90, 1e30, -1.0])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_scale_of_any_size_stays_in_alpha(tmp_path: Path, alpha: float, rank: int) -> None:
    """Split over both factors, its root would vanish in float32, or the rest of it would be infinite."""
    model = nn.Linear(6, 8)
    lp.attach(model, lp.LoRA(r=2, alpha=alpha))
    entry = model.parametrizations.weight[0].default
    with torch.no_grad():
        entry.lora_A[1] = entry.lora_A[0] * 2  # of rank 1, so that nothing is left out
        entry.lora_B.normal_()
    lp.save(model, tmp_path / "a")
    done = lp.resize(tmp_path / "a", tmp_path / "b", rank=rank)
    item = read_content(tmp_path / "b", None).items[0]
    assert item.method == lp.LoRA(r=rank, alpha=alpha)
    expected = (entry.lora_B.double() @ entry.lora_A.double()).detach() / 2
    torch.testing.assert_close(
        item.factors["lora_B"].double() @ item.factors["lora_A"].double() / rank, expected, rtol=1e-5, atol=1e-6
    )
    assert done.rows[0].residual < 1e-6
    assert done.rows[0].norm == pytest.approx(abs(alpha) * float(expected.norm()), rel=1e-6)
