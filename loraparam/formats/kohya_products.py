"""LyCORIS' LoHa and LoKr: differences that are a product of two pairs, element by element or by Kronecker.

LoHa (Hyeon-Woo et al. 2022, https://arxiv.org/abs/2108.06098): ΔV = s·(P₁·Q₁) ⊙ (P₂·Q₂). LoKr: ΔV = s·(P₁·Q₁) ⊗
(P₂·Q₂), where a side may be a whole matrix, and s = 1 where both are. Either is one pair of rank r₁·r₂, which is
what is made of it, or a whole difference, where that is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .leaves import Group, refuse_growth, squeezed
from .products import Product, Side, whole_side

HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2")
KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


def product_of(group: Group) -> Product | None:
    """The product that a module's tensors are; None where they are something else.

    Raises:
        FormatError: a part of one is missing, or does not fit the others.
    """
    kronecker = any(leaf in group.keys for leaf in KRONECKER)
    found = [leaf for leaf in (*HADAMARD, *KRONECKER) if leaf in group.keys]
    if not found:
        return None
    known = KRONECKER if kronecker else HADAMARD
    if any(leaf not in known for leaf in found):
        raise group.error(found[0], "LoHa and LoKr on one module; keep one")
    start = "lokr_" if kronecker else "hada_"
    left, right = (_side(group, start, side) for side in (1, 2))
    if not kronecker and (left.P.shape[0], left.Q.shape[1]) != (right.P.shape[0], right.Q.shape[1]):
        raise group.error(found[0], "its two sides have different sizes")
    ranks = [side.rank for side in ((right, left) if kronecker else (left, right)) if side.rank is not None]
    return Product(left, right, kronecker, ranks[0] if ranks else None)


def _side(group: Group, start: str, side: int) -> Side:
    whole, a, b, core = (f"{start}{leaf}" for leaf in (f"w{side}", f"w{side}_a", f"w{side}_b", f"t{side}"))
    if whole in group.keys:
        extra = next((leaf for leaf in (a, b, core) if leaf in group.keys), None)
        if extra is not None:
            raise group.error(extra, f"{group.keys[whole]!r} is the whole of it; keep one")
        return _whole(group, whole)
    for leaf in (a, b):
        if leaf not in group.keys:
            there = next(iter(group.keys))
            raise group.error(there, f"{f'{group.head}.{leaf}'!r} is missing")
        if group.tensors[leaf].dim() != 2:
            raise group.error(leaf, f"shape {tuple(group.tensors[leaf].shape)}; allowed: a matrix")
    P, Q = group.tensors[a], group.tensors[b]
    if core not in group.keys:
        if P.shape[1] != Q.shape[0]:
            raise group.error(a, f"shape {tuple(P.shape)}, beside {tuple(Q.shape)}: ranks that differ")
        return Side(P, Q, Q.shape[0])
    T = group.tensors[core]
    if T.dim() < 3 or T.shape[0] != P.shape[0] or T.shape[1] != Q.shape[0] or T.shape[0] != T.shape[1]:
        raise group.error(core, f"shape {tuple(T.shape)}, beside {tuple(P.shape)} and {tuple(Q.shape)}")
    r, kernel = Q.shape[0], tuple(T.shape[2:])
    refuse_growth(group, core, T.numel() // r * Q.shape[1])
    contracted = torch.einsum("ijk,jd->idk", T.double().reshape(r, r, -1), Q.double()).reshape(r, -1)
    return Side(P.T, contracted, r, kernel)


def _whole(group: Group, leaf: str) -> Side:
    matrix = group.tensors[leaf]
    if matrix.dim() < 2:
        raise group.error(leaf, f"shape {tuple(matrix.shape)}; allowed: (out, in, *k)")
    return whole_side(matrix)


def refuse_misfit(group: Group, product: Product, shape: Sequence[int], out: int, in_: int) -> None:
    """Refuse a product of another shape than its weight's, before it is expanded."""
    kernels = [side.kernel for side in (product.left, product.right) if squeezed((1, *side.kernel)) != (1,)]
    if product.sizes() == (out, in_) and all(squeezed((1, *kernel)) == squeezed((1, *shape[2:])) for kernel in kernels):
        return
    made = (*product.sizes(), *(f"kernel {kernel}" for kernel in kernels))
    raise group.error(next(iter(group.keys)), f"the product is {made}; the layer is {(out, in_)}, of {tuple(shape)}")
