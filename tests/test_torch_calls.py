"""What a function of torch does to a merged weight it does to an effective one, however it is called, or it raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import loraparam as lp

Call = Callable[[Tensor, Tensor], Any]


class Held(nn.Module):
    """A weight of its own."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))


def adapted(shape: tuple[int, ...], layout: lp.Layout | None = None, method: lp.Method | None = None) -> Held:
    torch.manual_seed(0)
    module = Held(shape)
    lp.attach(module, method or lp.LoRA(r=2), "weight", layout=layout)
    with torch.no_grad():
        for factor in lp.parameters(module):
            factor.add_(0.3 * torch.randn_like(factor))
    return module


def stack_of(shape: tuple[int, ...]) -> lp.Layout | None:
    """How three dims read as matrices along the first; None for one matrix."""
    return lp.Layout(out=1, batch=(0,)) if len(shape) == 3 else None


def outcome(call: Call, x: Tensor, weight: Tensor) -> Any:
    """The tensors that come back, or the kind of error."""
    try:
        result = call(x, weight)
    except (IndexError, RuntimeError) as error:
        return type(error)
    return [part + 0 for part in result] if isinstance(result, (tuple, list)) else result + 0


def assert_as_merged(call: Call, x: Tensor, module: Held) -> None:
    got, want = (outcome(call, x, w) for w in (module.weight, lp.effective_weight(module, "weight")))
    if isinstance(want, type):
        assert got is want
    else:
        assert_close(got, want, rtol=1e-9, atol=1e-10)  # float64, another order of sums


# With x (5, 4) and a weight (6, 4).
CALLS: dict[str, Call] = {
    # Arguments by name: torch's functions call one thing by several names.
    "linear": lambda x, w: F.linear(input=x, weight=w, bias=None),
    "matmul, other": lambda x, w: torch.matmul(x, other=w.t()),
    "matmul, the other way round": lambda x, w: torch.matmul(other=w.t(), input=x),
    "mm, mat2": lambda x, w: torch.mm(input=x, mat2=w.t()),
    "mv, vec": lambda x, w: torch.mv(w, vec=x[0]),
    "addmm, mat1 and mat2": lambda x, w: torch.addmm(torch.ones(6).to(x), mat1=x, mat2=w.t()),
    "t, input": lambda x, w: torch.t(input=w),
    "transpose, dim0 and dim1": lambda x, w: torch.transpose(w, dim0=0, dim1=1),
    "swapaxes, axis0 and axis1": lambda x, w: w.swapaxes(axis0=0, axis1=1),
    "permute, dims": lambda x, w: torch.permute(w, dims=(1, 0)),
    "split, split_size": lambda x, w: w.split(split_size=4),
    "split_with_sizes, split_sizes": lambda x, w: torch.split_with_sizes(w, split_sizes=[2, 4]),
    "chunk, input": lambda x, w: torch.chunk(input=w, chunks=2),
    "select, input": lambda x, w: torch.select(input=w, dim=0, index=1),
    "detach, input": lambda x, w: torch.detach(input=w),
    "reshape, shape": lambda x, w: torch.reshape(input=w, shape=(-1,)),
    "chunk, of the other dim": lambda x, w: w.chunk(2, -1),
    # Options.
    "half, memory_format": lambda x, w: w.half(memory_format=torch.preserve_format).double(),
    "to, copy": lambda x, w: w.to(torch.float64, copy=True),
    "to, copy by position": lambda x, w: w.to(torch.float64, False, True),
    "to, another's dtype": lambda x, w: w.to(x.float()).double(),
    "addmm, beta = 0": lambda x, w: torch.addmm(torch.full((5, 6), torch.nan).to(x), x, w.t(), beta=0, alpha=2),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_does_what_it_does_to_the_merged_weight(name: str) -> None:
    assert_as_merged(CALLS[name], torch.randn(5, 4, dtype=torch.float64), adapted((6, 4)))


@given(st.data())
def test_an_einsum_is_that_of_the_whole_weight(data: st.DataObject) -> None:
    """Whichever letters are shared, summed or kept, in whichever order, transposed or not."""
    letters, shape = data.draw(st.sampled_from([("oi", (6, 4)), ("eoi", (3, 6, 4))]))
    method = data.draw(st.sampled_from([lp.LoRA(r=2, alpha=6), lp.DoRA(r=2), lp.DoRA(r=2, axis="in"), lp.Magnitude()]))
    module, sizes = adapted(shape, stack_of(shape), method), dict(zip(letters, shape, strict=True)) | {"n": 2}
    weight, dense = module.weight, lp.effective_weight(module, "weight")
    if data.draw(st.booleans()):
        letters, weight, dense = letters[:-2] + letters[:-3:-1], weight.mT, dense.mT
    others = data.draw(st.permutations(list(sizes)))[: data.draw(st.integers(0, len(sizes)))]
    output = [letter for letter in data.draw(st.permutations(list(sizes))) if letter in {*letters, *others}]
    output = output[: data.draw(st.integers(0, len(output)))]
    x = torch.randn([sizes[letter] for letter in others], dtype=torch.float64)
    equation = f"{''.join(others)},{letters}->{''.join(output)}"
    assert_close(torch.einsum(equation, x, weight), torch.einsum(equation, x, dense))


@pytest.mark.parametrize(
    "call",
    [
        *(
            lambda w, sizes=sizes: w.split(sizes)
            for sizes in (4, 6, 9, [1, 0, 5], (2, 4), [2, 2], [4, 4], [-1, 7], [], 0, -2)
        ),
        *(lambda w, chunks=chunks: w.chunk(chunks) for chunks in (4, 7, 0, -1)),
        *(lambda w, dim=dim: w.split(3, dim) for dim in (-2, 2, -3)),
        *(lambda w, dim=dim: w.narrow(dim, -3, 2) for dim in (0, -2, 2)),
        *(lambda w, span=span: w.narrow(0, *span) for span in ((5, 3), (7, 0), (2, -1), (-7, 1))),
        *(lambda w, dims=dims: w.transpose(*dims) for dims in ((0, 1), (-1, 0), (0, 5), (-3, 1))),
        *(lambda w, dims=dims: w.permute(dims) for dims in ((-1, 0), (0, 5), (1, 1), (0,), (0, 1, 2))),
        *(lambda w, dim=dim: w.select(dim, 1) for dim in (0, -2, 2)),
        *(lambda w, span=span: w[slice(*span)] for span in ((4, 9), (-2, None), (3, 1), (0, 6, 2))),
    ],
)
@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4)])
def test_shape_operations_take_and_refuse_what_torch_does(
    call: Callable[[Tensor], Any], shape: tuple[int, ...]
) -> None:
    module = adapted(shape, stack_of(shape))
    try:
        expected = call(lp.effective_weight(module, "weight"))
    except (RuntimeError, IndexError) as error:
        with pytest.raises(type(error), match=r"dim|split|size|chunk|range|length"):
            call(module.weight)
    else:
        assert_close(call(module.weight), expected)


@pytest.mark.parametrize("options", [{}, {"mode": "sum"}, {"mode": "max"}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("method", [lp.LoRA(r=2), lp.DoRA(r=2), lp.DoRA(r=2, axis="in"), lp.Magnitude(axis="in")])
@pytest.mark.parametrize("out", [0, 1])
def test_bags_of_rows_are_those_of_the_whole_weight(options: dict[str, Any], method: lp.Method, out: int) -> None:
    """Whichever side the scales are on; the gradients, too."""
    module, bags = adapted((6, 4), lp.Layout(out=out), method).requires_grad_(), torch.tensor([[0, 3, 3], [5, 3, 1]])
    found = []
    for weight in (module.weight, lp.effective_weight(module, "weight")):
        y = F.embedding_bag(bags, weight, **options)
        found.append([y, *torch.autograd.grad(y.sin().sum(), list(module.parameters()))])
    assert_close(*found)


@pytest.mark.parametrize("index", [1, -1, [2, 0], [0, 1, 2, 0], [1]])
@pytest.mark.parametrize("method", [lp.LoRA(r=2), lp.DoRA(r=2), lp.Magnitude(), lp.IA3(), lp.Full()])
def test_matrices_taken_from_a_stack_are_those_of_the_whole(method: lp.Method, index: int | list[int]) -> None:
    module = adapted((3, 6, 4), stack_of((3, 6, 4)), method)
    at = index if isinstance(index, int) else torch.tensor(index)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_close(x @ module.weight[at].mT, x @ lp.effective_weight(module, "weight")[at].mT)


@pytest.mark.parametrize(
    ("shape", "layout", "call"),
    [
        # A kernel, or Bilinear's weight, has three dims and factors of two.
        ((6, 3, 4), lp.Layout(), lambda x, w: torch.einsum("oki,ni->nok", w, x)),
        ((6, 4, 2), lp.Layout(), lambda x, w: torch.einsum("ni,oik->nok", x, w)),
        # A stack whose matrices are not along the first dim.
        ((3, 3, 4), lp.Layout(out=0, batch=(1,)), lambda x, w: torch.bmm(x[:3, :3].expand(3, 3, 3), w)),
        ((3, 3, 4), lp.Layout(out=0, batch=(1,)), lambda x, w: torch.einsum("abi,ni->nab", w, x)),
        ((3, 4, 5), lp.Layout(out=1, batch=(0,)), lambda x, w: w.select(3, 0)),
        ((3, 4, 5), lp.Layout(out=1, batch=(0,)), lambda x, w: list(w)),
    ],
)
def test_a_weight_of_three_dims(shape: tuple[int, ...], layout: lp.Layout, call: Call) -> None:
    module = adapted(shape, layout, lp.LoRA(r=1))
    assert_as_merged(call, torch.randn(5, 4, dtype=torch.float64), module)


VIEWS: dict[str, Callable[[Tensor], Any]] = {
    "select": lambda w: torch.select(w, 1, 0),
    "reshape": lambda w: torch.reshape(w, (-1,)),
    "chunk of columns": lambda w: torch.chunk(w, 2, 1)[0],
    "unbind": lambda w: torch.unbind(w, 1)[0],
    "unsqueeze, by name": lambda w: torch.unsqueeze(input=w, dim=0),
    "as_strided": lambda w: w.as_strided((2, 2), (1, 1)),
    "ravel": lambda w: w.ravel(),
    "adjoint": lambda w: w.mH,
    "broadcast_to": lambda w: torch.broadcast_to(w, (1, 6, 4)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_write_into_a_view_is_refused_however_the_view_is_made(name: str) -> None:
    view = VIEWS[name](adapted((6, 4)).weight)
    with torch.no_grad(), pytest.raises(lp.AttachError, match=r"lp\.detached"):
        view.zero_()
