"""Low-rank approximations: the best of their rank, honest about what they leave out, exact where they can be."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import loraparam as lp
from loraparam.tools import spectra


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


sizes = st.integers(1, 6)
batches = st.sampled_from([(), (2,), (3,)])


@given(batch=batches, out=sizes, in_=sizes, r=sizes)
def test_the_svd_of_a_product_is_that_of_the_dense_matrix(batch: tuple[int, ...], out: int, in_: int, r: int) -> None:
    A, B = randn(*batch, r, in_), randn(*batch, out, r, seed=1)
    U, S, Vh = spectra.product_svd(A, B)
    k = min(r, out, in_)
    torch.testing.assert_close(S, torch.linalg.svdvals(B @ A)[..., :k])
    torch.testing.assert_close((U * S.unsqueeze(-2)) @ Vh, B @ A)
    torch.testing.assert_close(U.mT @ U, torch.eye(k, dtype=torch.float64).expand(*batch, k, k))
    torch.testing.assert_close(Vh @ Vh.mT, torch.eye(k, dtype=torch.float64).expand(*batch, k, k))


@given(
    matrix=st.builds(randn, sizes, sizes, sizes, seed=st.integers(0, 99)),
    cut=st.builds(lambda k: {"rank": k}, st.integers(1, 7))
    | st.builds(lambda share: {"energy": share}, st.floats(0.01, 1))
    | st.builds(lambda share: {"error": share}, st.floats(0, 0.99)),
)
def test_a_cut_keeps_as_little_as_it_may_and_what_is_kept_is_the_best(matrix: Tensor, cut: dict[str, Any]) -> None:
    U, S, Vh = spectra.cut_svd(matrix, spectra.Cut(**cut))
    k, full = S.shape[-1], torch.linalg.svdvals(matrix)
    total = float((full**2).sum())
    A, B = spectra.pair_of((U, S, Vh), torch.float64)
    residual = float(torch.linalg.vector_norm(matrix - B @ A))
    best = float(torch.linalg.vector_norm(full[..., k:]))
    assert residual == pytest.approx(best, abs=1e-9 * math.sqrt(total))  # Eckart and Young, batch by batch
    assert spectra.left_out(matrix, A, B) == pytest.approx(residual / math.sqrt(total), abs=1e-12)
    allowed = {"rank": math.inf, "energy": 1 - cut.get("energy", 0), "error": cut.get("error", 0) ** 2}[next(iter(cut))]
    assert residual**2 <= allowed * total + 1e-12 * total
    if "rank" in cut:
        assert k == min(cut["rank"], *matrix.shape[-2:])
    elif k > 1:
        fewer = float((full[..., k - 1 :] ** 2).sum())
        assert fewer > allowed * total * (1 - 1e-9)


@given(matrix=st.builds(randn, sizes, sizes, sizes), block=st.integers(1, 40))
def test_what_is_left_out_is_summed_over_blocks(matrix: Tensor, block: int) -> None:
    A, B = randn(matrix.shape[0], 2, matrix.shape[2]), randn(matrix.shape[0], matrix.shape[1], 2)
    expected = float(torch.linalg.vector_norm(matrix - B @ A) / torch.linalg.vector_norm(matrix))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectra, "BLOCK", block)
        assert spectra.left_out(matrix, A, B) == pytest.approx(expected)


def decaying(out: int, in_: int, decay: float) -> Tensor:
    U, V = (torch.linalg.qr(randn(n, min(out, in_), seed=n))[0] for n in (out, in_))
    return (U * decay ** torch.arange(min(out, in_), dtype=torch.float64)) @ V.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("out", "in_"), [(700, 600), (600, 900)])
@pytest.mark.parametrize("decay", [0.999, 0.95, 0.5])
def test_random_projection_is_close_to_the_best(out: int, in_: int, decay: float, dtype: torch.dtype) -> None:
    matrix = decaying(out, in_, decay).to(dtype)
    assert min(matrix.shape) > spectra.EXACT
    k = 16
    U, S, Vh = spectra.leading_svd(matrix, k)
    best = math.sqrt(sum(decay ** (2 * i) for i in range(k, min(out, in_))))
    residual = float(torch.linalg.vector_norm(matrix.double() - (U * S) @ Vh))
    floor = 20 * torch.finfo(dtype).eps  # where the best is below the rounding of the matrix itself
    assert residual <= 1.01 * best + floor
    again = spectra.leading_svd(matrix, k)
    assert all(torch.equal(a, b) for a, b in zip((U, S, Vh), again, strict=True))


@pytest.mark.parametrize("cut", [{"error": 0.2}, {"energy": 0.9}, {"error": 1e-3}])
def test_random_projection_goes_on_until_enough_is_held(cut: dict[str, float]) -> None:
    matrix = decaying(600, 560, 0.98)
    A, B = spectra.pair_of(spectra.cut_svd(matrix, spectra.Cut(**cut)), torch.float64)
    residual = spectra.left_out(matrix, A, B)
    assert residual**2 <= spectra.Cut(**cut).allowed
    # σᵢ² falls by 0.98² each: the rank that would do is known.
    least = math.ceil(math.log(spectra.Cut(**cut).allowed) / (2 * math.log(0.98)))
    assert A.shape[0] in (least, least + 1)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6))
def test_effective_ranks_lie_between_one_and_the_rank(values: list[float]) -> None:
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = int((S > 0).sum())
    for measure in (spectra.effective_rank, spectra.stable_rank):
        assert min(1, rank) - 1e-9 <= measure(S) <= rank + 1e-9
        assert measure(7 * S) == pytest.approx(measure(S))
    equal = torch.ones(len(values))
    assert spectra.effective_rank(equal) == pytest.approx(len(values))
    assert spectra.stable_rank(equal) == pytest.approx(len(values))


@pytest.mark.parametrize(
    ("given_", "match"),
    [
        ({}, "nothing given; allowed: exactly one of rank, energy and error"),
        ({"rank": 2, "error": 0.1}, "exactly one of"),
        ({"rank": 0}, "rank=0; allowed: an integer from 1"),
        ({"rank": 1.5}, "rank=1.5; allowed"),
        ({"energy": 0.0}, "energy=0.0; allowed: 0 < energy <= 1"),
        ({"energy": math.nan}, "energy=nan; allowed"),
        ({"error": 1.0}, "error=1.0; allowed: 0 <= error < 1"),
        ({"error": -0.1}, "error=-0.1; allowed"),
    ],
)
def test_how_much_to_keep_is_said_once_and_makes_sense(tmp_path: Path, given_: dict[str, Any], match: str) -> None:
    for call in (lp.extract, lp.resize):
        arguments = ["a", "b", tmp_path / "out"] if call is lp.extract else ["a", tmp_path / "out"]
        with pytest.raises(lp.LoraparamError, match=match):
            call(*arguments, **given_)
