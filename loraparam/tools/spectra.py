"""Singular values of differences: of B·A without forming it, and of large matrices by random projection.

Everything is computed in float64 but the products with a large matrix, which run in its own dtype.
By Eckart, Young and Mirsky, the first k singular triplets are the best approximation of rank k in the Frobenius
norm, and what they leave out is √(Σ_{i>k} σᵢ²).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LoraparamError
from ..methods.base import is_int, is_number

EXACT = 512  # up to this many rows or columns an exact decomposition is quick
OVERSAMPLING, POWER_ITERATIONS = 10, 4
BLOCK = 1 << 22  # elements of a product that are there at a time
SVD = tuple[Tensor, Tensor, Tensor]  # U (*batch, out, k), S (*batch, k) descending, Vh (*batch, k, in)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How many singular triplets to keep; exactly one of the three is given.

    Args:
        rank: this many.
        energy: the fewest that hold this share of Σσ², in (0, 1].
        error: the fewest with ‖Δ − Δₖ‖ ≤ error·‖Δ‖ in the Frobenius norm, in [0, 1): energy = 1 − error².

    Raises:
        LoraparamError: none or several given, or one out of range.

    Example:
        >>> Cut(energy=0.75).choose(torch.tensor([2.0, 1.0, 1.0]), 6.0)
        2
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise LoraparamError(f"{given or 'nothing'} given; allowed: exactly one of rank, energy and error")
        if self.rank is not None and (not is_int(self.rank) or self.rank < 1):
            raise LoraparamError(f"rank={self.rank!r}; allowed: an integer from 1")
        if self.energy is not None and not (is_number(self.energy) and 0 < self.energy <= 1):
            raise LoraparamError(f"energy={self.energy!r}; allowed: 0 < energy <= 1")
        if self.error is not None and not (is_number(self.error) and 0 <= self.error < 1):
            raise LoraparamError(f"error={self.error!r}; allowed: 0 <= error < 1")

    @property
    def allowed(self) -> float:
        """The share of Σσ² that may be left out; 1 where a rank is given, which bounds nothing."""
        if self.rank is not None:
            return 1.0
        return 1 - self.energy if self.energy is not None else (self.error or 0.0) ** 2

    def choose(self, S: Tensor, total: float) -> int:
        """How many to keep, at least 1; len(S) where even all of them are too few.

        Args:
            S: singular values, descending, (*batch, k); one number is chosen for the whole batch.
            total: Σσ² of the whole matrix, of which S may hold a part.
        """
        k = S.shape[-1]
        if self.rank is not None:
            return min(self.rank, k)
        # From the smallest up: the sums of small tails keep their digits, differences from the total do not.
        squares = (S.double() ** 2).reshape(-1, k).sum(0)
        beyond = max(0.0, total - float(squares.sum()))
        tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]) + beyond
        # What rounding alone leaves is no part of the matrix.
        slack = total * (self.allowed + (k * torch.finfo(torch.float64).eps) ** 2)
        fitting = (tails <= slack).nonzero()
        return min(k, max(1, int(fitting[0]))) if len(fitting) else k


def product_svd(A: Tensor, B: Tensor) -> SVD:
    """The singular value decomposition of B·A, without forming it.

    With the thin B = Q_B·R_B and Aᵀ = Q_A·R_A, B·A = Q_B·(R_B·R_Aᵀ)·Q_Aᵀ, and the r×r middle is decomposed: exact, at
    O((out + in)·r²). Golub and Van Loan, Matrix Computations, section 5.2.

    Args:
        A: (*batch, r, in).
        B: (*batch, out, r).

    Returns:
        min(r, out, in) triplets, in float64.

    Example:
        >>> A, B = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0], [0.0]])
        >>> product_svd(A, B)[1]
        tensor([10.], dtype=torch.float64)
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.mT


def leading_svd(matrix: Tensor, k: int, *, seed: int = 0) -> SVD:
    """The first k singular triplets of a matrix: exact for a small one, else by random projection.

    Halko, Martinsson and Tropp 2011, https://arxiv.org/abs/0909.4061: an orthonormal Q that spans the range of
    (M·Mᵀ)^q·M·Ω for a random Ω (algorithm 4.4, with a QR at each step), then the decomposition of QᵀM (algorithm 5.1).
    With ten more columns than k and four power iterations the error is within a hair of the best of rank k.

    Args:
        matrix: (*batch, out, in).
        k: how many; fewer come back where the matrix has fewer.
        seed: of Ω; the same seed gives the same result.
    """
    out, in_ = matrix.shape[-2:]
    least = min(out, in_)
    if matrix.dim() > 2:
        found = [leading_svd(one, k, seed=seed) for one in matrix.reshape(-1, out, in_)]
        U, S, Vh = (torch.stack(parts).unflatten(0, matrix.shape[:-2]) for parts in zip(*found, strict=True))
        return U, S, Vh
    if least <= EXACT or 2 * (k + OVERSAMPLING) >= least:
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return U[:, :k], S[:k], Vh[:k]
    generator = torch.Generator(matrix.device).manual_seed(seed)
    omega = torch.randn(in_, k + OVERSAMPLING, dtype=torch.float64, generator=generator, device=matrix.device)
    Q = torch.linalg.qr(matrix @ omega.to(matrix.dtype))[0]
    for _ in range(POWER_ITERATIONS):
        Q = torch.linalg.qr(matrix.mT @ Q)[0]
        Q = torch.linalg.qr(matrix @ Q)[0]
    U, S, Vh = torch.linalg.svd((Q.mT @ matrix).double(), full_matrices=False)
    return (Q.double() @ U)[:, :k], S[:k], Vh[:k]


def cut_svd(matrix: Tensor, cut: Cut, *, seed: int = 0) -> SVD:
    """The singular triplets that a cut asks for, of a dense matrix (*batch, out, in).

    For an energy or an error more triplets are computed until enough is held, which is judged by what they hold
    themselves: Σσ² − Σσₖ² is exactly what a projection leaves out, random or not.
    """
    least = min(matrix.shape[-2:])
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    k = min(cut.rank, least) if cut.rank is not None else min(64, least)
    while True:
        U, S, Vh = leading_svd(matrix, k, seed=seed)
        held = float((S**2).sum())
        if cut.rank is not None or k >= least or total - held <= cut.allowed * total:
            break
        k = min(2 * k, least)
    if k >= least:
        total = held  # all there is: the difference from the norm is rounding
    keep = cut.choose(S, total)
    return U[..., :keep], S[..., :keep], Vh[..., :keep, :]


def pair_of(svd: SVD, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A = √S·Vᵀ and B = U·√S, so that B·A = U·S·Vᵀ with both factors of one size."""
    U, S, Vh = svd
    root = S.sqrt()
    return (root.unsqueeze(-1) * Vh).to(dtype).contiguous(), (U * root.unsqueeze(-2)).to(dtype).contiguous()


def left_out(matrix: Tensor, A: Tensor, B: Tensor) -> float:
    """‖M − B·A‖ / ‖M‖ in the Frobenius norm; 0 for a zero matrix."""
    rest, total = 0.0, float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    rows = max(1, BLOCK // max(1, matrix.shape[-1] * math.prod(matrix.shape[:-2])))
    for start in range(0, matrix.shape[-2], rows):  # in blocks of rows, so that B·A is never there as a whole
        block = matrix[..., start : start + rows, :].double() - B[..., start : start + rows, :].double() @ A.double()
        rest = math.hypot(rest, float(torch.linalg.vector_norm(block)))
    return rest / total if total else 0.0


def effective_rank(S: Tensor) -> float:
    """exp(H(p)), the exponential of the entropy of p = σ/Σσ; 0 for zero singular values.

    Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO, definition 1.

    Example:
        >>> effective_rank(torch.ones(4)), effective_rank(torch.zeros(4))
        (4.0, 0.0)
    """
    total = float(S.sum())
    if not total:
        return 0.0
    p = S.double() / total
    return float(torch.exp(torch.special.entr(p).sum()))


def stable_rank(S: Tensor) -> float:
    """‖M‖_F² / ‖M‖₂² = Σσ²/σ₁²; 0 for zero singular values.

    Rudelson and Vershynin 2007, https://arxiv.org/abs/math/0503442.

    Example:
        >>> stable_rank(torch.tensor([2.0, 2.0, 1.0]))
        2.25
    """
    largest = float(S.max()) if S.numel() else 0.0
    return float(((S.double() / largest) ** 2).sum()) if largest else 0.0
