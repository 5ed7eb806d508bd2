"""The methods' formulas, written again in the plainest way: loops over rows of numpy arrays in float64."""

from __future__ import annotations

import numpy as np

import loraparam as lp

Arrays = dict[str, np.ndarray]


def effective(method: lp.Method, W: np.ndarray, factors: Arrays) -> np.ndarray:
    """What a method makes of one matrix (out, in)."""
    if isinstance(method, lp.DoRA):
        return dora(W, factors, method)
    if isinstance(method, lp.LoRA):
        return W + scale(method) * np.einsum("or,ri->oi", factors["lora_B"], factors["lora_A"])
    if isinstance(method, lp.BlockLoRA):
        return W + scale(method) * blocks(method, W.shape, factors)
    if isinstance(method, lp.Magnitude):
        return rescaled(W, factors["magnitude"], method.axis, 0.0)
    if isinstance(method, lp.IA3):
        return np.einsum("oi,o->oi" if method.axis == "out" else "oi,i->oi", W, factors["scale"])
    assert isinstance(method, lp.Full)
    return W + factors["diff"]


def blocks(method: lp.BlockLoRA, shape: tuple[int, ...], factors: Arrays) -> np.ndarray:
    """B_i A_i in the rows of each block that is on; the rest zero."""
    A, B, rows, r = factors["lora_A"], factors["lora_B"], shape[0] // len(method.blocks), method.r
    delta, used = np.zeros(shape), 0
    for i, on in enumerate(method.blocks):
        if on:
            A_i = A if method.shared else A[used * r : (used + 1) * r]
            B_i = B[i * rows : (i + 1) * rows] if method.shared else B[used * rows : (used + 1) * rows]
            delta[i * rows : (i + 1) * rows] = np.einsum("or,ri->oi", B_i, A_i)
            used += 1
    return delta


def scale(method: lp.LoRA | lp.DoRA | lp.BlockLoRA) -> float:
    """alpha / r, or alpha / sqrt(r)."""
    alpha = method.r if method.alpha is None else method.alpha
    return float(alpha / np.sqrt(method.r) if method.rslora else alpha / method.r)


def dora(W: np.ndarray, factors: Arrays, method: lp.DoRA) -> np.ndarray:
    """m V / (|V| + eps)."""
    V = W + scale(method) * np.einsum("or,ri->oi", factors["lora_B"], factors["lora_A"])
    return rescaled(V, factors["magnitude"], method.axis, method.eps)


def rescaled(V: np.ndarray, m: np.ndarray, axis: str, eps: float) -> np.ndarray:
    """Each row (column) brought to length m; one of length zero left as it is."""
    rows = V if axis == "out" else V.T
    result = np.zeros_like(rows)
    for i, row in enumerate(rows):
        length = np.sqrt(np.sum(row * row)) + eps
        result[i] = m[i] * row / length if length > 0 else row
    return result if axis == "out" else result.T


def matrices(W: np.ndarray, layout: lp.Layout) -> list[np.ndarray]:
    """The matrices (out, in) that a weight holds, one index of the batch dim after the other, input row-major."""
    if layout.rows is not None:
        flat = [W[index] for index in np.ndindex(*W.shape)]
        width = len(flat) // layout.rows
        return [np.array([flat[i * width : (i + 1) * width] for i in range(layout.rows)])]
    if layout.batch:
        inner = lp.Layout(out=layout.out - 1, lookup=layout.lookup)
        return [matrix for stacked in W for matrix in matrices(stacked, inner)]
    rows = [np.take(W, i, axis=layout.out).reshape(-1) for i in range(W.shape[layout.out])]
    return [np.stack(rows)]
