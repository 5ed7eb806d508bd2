"""Reading LoHa, LoKr, VeRA and MiSS: what they add to a weight, as a LoRA where it is one, else as a whole.

LoHa: s·(w1_a·w1_b ⊙ w2_a·w2_b) (Hyeon-Woo et al. 2022, https://arxiv.org/abs/2108.06098). LoKr: s·(w1 ⊗ w2) (Yeh et al.
2024, https://arxiv.org/abs/2309.14859), s = alpha / r always, unlike LyCORIS. VeRA: diag(λ_b)·B·diag(λ_d)·A with A and
B shared by all layers (Kopiczko et al. 2024, https://arxiv.org/abs/2310.11454). MiSS: column j gets the row j mod r of
its block (Kang and Yin 2024, https://arxiv.org/abs/2409.15371).

Sizes are checked against the weight first: small factors may stand for a large product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import FormatError
from .products import Product, Side, kron, whole_side

Tensors = Mapping[str, Tensor]

# What one wrapper may hold, by peft_type.
LEAVES: dict[str, tuple[set[str], ...]] = {
    "LOHA": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},),
    "LOKR": tuple(
        w1 | w2
        for w1 in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
        for w2 in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
    ),
    "VERA": ({"vera_lambda_b", "vera_lambda_d"},),
    "MISS": ({"miss_block"},),
}
LEAVES["LOHA"] += (LEAVES["LOHA"][0] | {"hada_t1", "hada_t2"},)
SHARED = ("vera_A", "vera_B")


def rank_of(tensors: Tensors) -> int | None:
    """The rank of a LoHa or LoKr; None where a LoKr has two full factors."""
    for leaf in ("hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if leaf in tensors and tensors[leaf].dim():
            return tensors[leaf].shape[0]
    return None


def product(tensors: Tensors, shape: Sequence[int]) -> Tensor:
    """A LoHa's or LoKr's product for a weight of this shape, in float64, s not included.

    Raises:
        FormatError: the factors are for another shape.
    """
    wide = {leaf: tensor.double() for leaf, tensor in tensors.items()}
    made = _loha(wide, shape) if "hada_w1_a" in wide else _lokr(wide, shape)
    return made.reshape(torch.Size(shape))


def low_rank(tensors: Tensors, out: int, in_: int) -> tuple[Tensor, Tensor] | None:
    """The same as one pair, A (r, in·∏k) and B (out, r) in float64, where that is smaller than the whole product."""
    if any(leaf in tensors for leaf in ("hada_t1", "lokr_t2")):
        return None
    kronecker = "hada_w1_a" not in tensors
    stem = "lokr_w" if kronecker else "hada_w"
    left, right = (_side(tensors, f"{stem}{side}") for side in (1, 2))
    whole = Product(left, right, kronecker, None)
    return whole.pair() if whole.is_pair(out, in_) else None


def _side(tensors: Tensors, name: str) -> Side:
    if name in tensors:
        return whole_side(tensors[name])
    P, Q = tensors[f"{name}_a"], tensors[f"{name}_b"]
    return Side(P, Q, Q.shape[0])


def _loha(t: Tensors, shape: Sequence[int]) -> Tensor:
    cores = [t.get("hada_t1"), t.get("hada_t2")]
    pairs = [(t["hada_w1_a"], t["hada_w1_b"]), (t["hada_w2_a"], t["hada_w2_b"])]
    for (a, b), core in zip(pairs, cores, strict=True):
        rank_a, out = a.shape[::-1] if core is None and a.dim() == 2 else a.shape[:2] if a.dim() == 2 else (0, 0)
        _need(b.dim() == 2 and rank_a == b.shape[0] and _fits(out, b.shape[1], core, b.shape[0], shape), t, shape)
    left, right = (_pair(a, b, core) for (a, b), core in zip(pairs, cores, strict=True))
    _need(left.shape == right.shape, t, shape)
    return left * right


def _lokr(t: Tensors, shape: Sequence[int]) -> Tensor:
    core = t.get("lokr_t2")
    sizes = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in t:
            sizes.append(tuple(t[name].shape))
            continue
        a, b = t[name + "_a"], t[name + "_b"]
        own = core if name == "lokr_w2" else None
        ranks = (a.shape[0] if own is not None else a.shape[-1], b.shape[0]) if a.dim() == b.dim() == 2 else (0, 1)
        _need(ranks[0] == ranks[1], t, shape)
        _need(own is None or (own.dim() == 4 and own.shape[:2] == (ranks[0], ranks[0])), t, shape)
        sizes.append((a.shape[1 if own is not None else 0], b.shape[1], *(own.shape[2:] if own is not None else ())))
    (first, second) = sizes
    numbers = math.prod(first) * math.prod(second)
    _need(len(first) == 2 and len(second) >= 2 and numbers == math.prod(shape), t, shape)
    _need(first[0] * second[0] == shape[0], t, shape)
    w1 = t["lokr_w1"] if "lokr_w1" in t else _pair(t["lokr_w1_a"], t["lokr_w1_b"], None)
    w2 = t["lokr_w2"] if "lokr_w2" in t else _pair(t["lokr_w2_a"], t["lokr_w2_b"], core)
    # As PEFT has it, which leaves w1 a matrix beside a kernel of one dim.
    return kron(w1[..., None, None] if w2.dim() == 4 else w1, w2)


def _pair(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    return a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a)


def _fits(out: int, columns: int, core: Tensor | None, rank: int, shape: Sequence[int]) -> bool:
    if core is not None and (core.dim() != 4 or core.shape[:2] != (rank, rank)):
        return False
    kernel = math.prod(core.shape[2:]) if core is not None else 1
    return out == shape[0] and out * columns * kernel == math.prod(shape)


def vera(tensors: Tensors, shared: Tensors, out: int, in_: int) -> tuple[Tensor, Tensor]:
    """A VeRA's A (r, in) and B (out, r)."""
    d, b = tensors["vera_lambda_d"], tensors["vera_lambda_b"]
    A, B = shared.get("vera_A"), shared.get("vera_B")
    if A is None or B is None:
        raise FormatError("the file holds no vera_A and vera_B (save_projection=false); save it with them")
    good = A.dim() == B.dim() == 2 and d.shape == (A.shape[0],) == (B.shape[1],) and b.shape == (out,)
    _need(good and A.shape[1] >= in_ and B.shape[0] >= out, {**tensors, **shared}, (out, in_))
    return d[:, None] * A[:, :in_], b[:, None] * B[:out]


def miss(block: Tensor, out: int, in_: int) -> tuple[Tensor, Tensor]:
    """A MiSS's A (r, in), which says which column gets which row of the block, and B (out, r)."""
    good = block.dim() == 2 and block.shape[0] <= in_ and out % block.shape[1] == 0
    _need(good, {"miss_block": block}, (out, in_))
    r = block.shape[0]
    A = torch.eye(r, dtype=block.dtype).repeat(1, -(-in_ // r))[:, :in_]
    return A, block.repeat(1, out // block.shape[1]).T.contiguous()


def _need(good: bool, tensors: Tensors, shape: Sequence[int]) -> None:
    if not good:
        sizes = ", ".join(f"{leaf} {tuple(tensor.shape)}" for leaf, tensor in tensors.items())
        raise FormatError(f"{sizes} are not for shape {tuple(shape)}")
