"""PiSSA and OLoRA: starts that PEFT takes out of the base, and takes out again each time it loads the file.

The file's pair then goes onto W − s·B₀A₀, so that the effective weight is W − s·B₀A₀ + s·B·A (Meng et al. 2024,
https://arxiv.org/abs/2404.02948; Büyükakyüz 2024, https://arxiv.org/abs/2406.01775). B₀A₀ does not depend on the
signs that a decomposition is free to choose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError

_GAP, _CONVERGED = 1e-5, 1e-6

_WAY_OUT = "convert the file with PEFT, save_pretrained(path_initial_model_for_weight_conversion=...), and load that"


def starting_pair(W: Tensor, start: str, r: int, scale: float, place: str) -> tuple[Tensor, Tensor]:
    """A₀ (r, in) and B₀ (out, r) whose product, s included, PEFT takes out of W (out, in).

    Raises:
        FormatError: the product is not determined by W.
    """
    if r > min(W.shape) or scale <= 0:
        raise FormatError(f"{place}: {start} at rank {r}, scale {scale:g}, for shape {tuple(W.shape)}")
    W = W.double()
    if start == "olora":
        Q, R = torch.linalg.qr(W)
        return R[:r], Q[:, :r] * scale
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    rest = float(S[r]) if r < len(S) else 0.0
    ratio = rest / max(float(S[r - 1]), 1e-300)
    if rest > 0 and float(S[r - 1]) - rest < _GAP * float(S[0]):
        raise FormatError(
            f"{place}: singular values {r} and {r + 1} are equal, so {start} is not determined; {_WAY_OUT}"
        )
    _, _, steps = start.partition("_niter_")
    # A random subspace of r dimensions comes closer by this factor in each of 2n + 1 products with W.
    if steps and ratio ** (2 * int(steps) + 1) * (r * max(W.shape)) ** 0.5 > _CONVERGED:
        raise FormatError(
            f"{place}: {start} starts from a random subspace that has not converged on this weight (ratio of singular "
            f"values {ratio:.3g}), so that PEFT itself loads the file differently each time; {_WAY_OUT}"
        )
    return Vh[:r], U[:, :r] * S[:r]
