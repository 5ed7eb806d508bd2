"""``all_finite`` says what ``torch.isfinite(…).all()`` says, without its temporaries; LoRA makes none too many."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import loraparam as lp
from loraparam.finite import all_finite

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Made(TorchDispatchMode):
    """Counts results of ``size`` elements or more in memory of their own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.size:
            self.count += address(result) not in {address(given) for given in args if isinstance(given, torch.Tensor)}
        return result


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@given(
    shape=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    dtype=st.sampled_from((*FLOATS, torch.int8, torch.bool, torch.complex64)),
    bad=st.sampled_from((None, float("nan"), float("inf"), -float("inf"))),
    data=st.data(),
)
def test_it_says_what_isfinite_says(shape: tuple[int, ...], dtype: torch.dtype, bad: float | None, data: Any) -> None:
    values = torch.randn(shape)
    if bad is not None and values.numel():
        values.view(-1)[data.draw(st.integers(0, values.numel() - 1))] = bad
    takes_any = dtype.is_floating_point or dtype.is_complex
    tensor = (values if takes_any else torch.nan_to_num(values)).to(dtype)
    assert all_finite(tensor) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    assert all_finite(torch.tensor([largest, largest, -largest], dtype=dtype))  # whose sum is infinite


def test_it_makes_no_tensor_as_large() -> None:
    ones = torch.ones(10, 10)
    with Made(100) as made:
        assert all_finite(ones)
    assert made.count == 0


def test_it_takes_a_parameter_and_one_inside_a_graph() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    assert all_finite(parameter)
    assert not all_finite(parameter * float("inf"))


def test_a_dense_lora_makes_the_product_and_the_sum() -> None:
    W, A, B = torch.randn(20, 20), torch.randn(2, 20), torch.randn(20, 2)
    with Made(400) as made:
        lp.functional.lora(W, A, B, 0.5)
    assert made.count == 2


def test_a_merge_makes_the_product_and_the_sum() -> None:
    model = torch.nn.Linear(20, 20, bias=False)
    lp.attach(model, lp.LoRA(r=2, alpha=1, init="gaussian"))
    with Made(400) as made:
        lp.merge(model)
    assert made.count == 2
