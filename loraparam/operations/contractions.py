"""``einsum`` with an effective weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..effective import EffectiveWeight
from ..forms import Form
from ..functional import autocasts
from .registry import form_of, implements, ran


@implements(torch.einsum, torch.functional.einsum)
def einsum(equation: Any, *operands: Any) -> Any:
    """A product of one tensor with one effective weight, each letter at most once in each."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    weights = [operand for operand in operands if isinstance(operand, EffectiveWeight)]
    if not isinstance(equation, str) or len(operands) != 2 or len(weights) != 1 or "." in equation:
        return NotImplemented
    form = form_of(weights[0])
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    first = isinstance(operands[0], EffectiveWeight)
    letters, x_letters, x = names[0 if first else 1], names[1 if first else 0], operands[1 if first else 0]
    if form is None or not arrow or not len(letters) == len(set(letters)) == form.weight.dim():
        return NotImplemented
    if len(form.layout.batch) != len(letters) - 2:  # a kernel's factors have other dims than it
        return NotImplemented
    if (form.row is not None or form.col is not None) and autocasts(form.weight):
        return NotImplemented  # scales are wide, and the product alone is narrow
    ran(weights[0])
    return _einsum(x, x_letters, form, letters, output)


def _einsum(x: Tensor, x_letters: str, form: Form, letters: str, output: str) -> Tensor:
    """Σ over the letters that ``output`` lacks, contracting x with the base and with the factors one by one."""
    batch, p, q = letters[:-2], letters[-2], letters[-1]
    left, right = (form.col, form.row) if form.is_transposed else (form.row, form.col)
    operands, names = [x], [x_letters]
    for scale, letter in ((left, p), (right, q)):
        if scale is not None and letter in x_letters:
            operands, names = [*operands, scale.to(x.dtype)], [*names, batch + letter]
    operands, names = [*operands, form.weight], [*names, letters]
    for scale, letter in ((left, p), (right, q)):
        if scale is not None and letter not in x_letters:
            operands, names = [*operands, scale.to(x.dtype)], [*names, batch + letter]
    y = torch.einsum(",".join(names) + "->" + output, *operands)
    pair = form.factors(x.dtype)
    if pair is None:
        return y
    A, B, factor = pair
    L, R = (A.mT, B.mT) if form.is_transposed else (B, A)
    rank = next(c for c in "zyxwvutsrqponmlkjihgfedcba" if c not in x_letters + letters + output)
    thin = [(L, batch + p + rank), (R, batch + rank + q)]
    if p not in x_letters:
        thin.reverse()
    text = ",".join([x_letters, thin[0][1], thin[1][1]]) + "->" + output
    return (y + factor * torch.einsum(text, x, thin[0][0], thin[1][0])).to(y.dtype)
