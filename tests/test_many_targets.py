"""What grows with the number of targets: counted in calls, for the seconds depend on the machine."""

import gc
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loraparam as lp
from loraparam.formats.content import Content, Item
from loraparam.formats.portable import refuse_misshapen


def many(count: int, width: int = 4) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def with_two(count: int) -> nn.Module:
    model = many(count)
    for name in ("first", "second"):
        lp.attach(model, lp.LoRA(r=1), name=name)
    return model


def calls(function: Callable[[], Any]) -> int:
    """Calls of Python functions while a function runs."""
    made = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal made
        made += event == "call"

    profiler = sys.getprofile()
    gc.disable()  # a collection inside would call what waits for the garbage of other tests
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(profiler)
        gc.enable()
    return made


def disable(model: nn.Module) -> None:
    with lp.disabled(model):
        pass


# {what: (the model it is done to, what is done, calls of Python functions it may take for each target)}
ACTIONS: dict[str, tuple[Callable[[int], nn.Module], Callable[[nn.Module], Any], int]] = {
    "plan": (many, lambda model: lp.plan(model, lp.DoRA(r=1)), 100),
    "attach": (many, lambda model: lp.attach(model, lp.DoRA(r=1)), 450),
    "activate": (with_two, lambda model: lp.activate(model, {"second": 0.5}), 55),
    "activate in another order": (with_two, lambda model: lp.activate(model, {"second": 1.0, "first": 1.0}), 55),
    "disabled": (with_two, disable, 75),
    "merge": (with_two, lp.merge, 400),
    "detach": (with_two, lp.detach, 215),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_the_work_is_proportional_to_the_targets(action: str) -> None:
    make, call, allowed = ACTIONS[action]
    call(make(2))  # whatever is done once
    few, twice = (calls(partial(call, make(count))) for count in (30, 60))
    assert (twice - few) / 30 <= allowed
    assert twice <= 2.1 * few


def test_a_load_is_proportional_to_the_targets(tmp_path: Path) -> None:
    def load(count: int) -> int:
        model = many(count)
        lp.attach(model, lp.LoRA(r=1))
        lp.save(model, tmp_path / f"{count}.safetensors")
        lp.detach(model)
        return calls(lambda: lp.load(model, tmp_path / f"{count}.safetensors"))

    load(2)
    few, twice = load(30), load(60)
    assert (twice - few) / 30 <= 430
    assert twice <= 2.1 * few


@dataclass(frozen=True, kw_only=True)
class Shift(lp.Method):
    """W + a shift for each of its rows."""

    tags: Any = ()

    def init(self, weight: torch.Tensor, layout: lp.Layout, *, generator: Any = None) -> dict[str, torch.Tensor]:
        if weight.is_meta:
            TRIED.append(tuple(weight.shape))
        return {"shift": torch.zeros(weight.shape[0], 1, dtype=weight.dtype, device=weight.device)}

    def apply(self, weight: torch.Tensor, factors: dict[str, torch.Tensor], layout: lp.Layout) -> torch.Tensor:
        return weight + factors["shift"]


TRIED: list[tuple[int, ...]] = []


def test_a_plan_tries_a_method_once_for_each_shape() -> None:
    model = nn.Sequential(many(5), many(4, width=6), nn.Linear(4, 4, dtype=torch.float64))
    TRIED.clear()
    plan = lp.plan(model, {"all-linear": Shift(), "1.0": Shift(tags="another")})
    assert sorted(TRIED) == [
        (4, 4),
        (4, 4),
        (6, 6),
        (6, 6),
    ]  # the first of them in two dtypes, the last for two methods
    assert [row.num_params for row in plan] == [4] * 5 + [6] * 4 + [4]


def test_a_method_is_tried_once_for_each_shape_of_a_file() -> None:
    items = tuple(Item(f"{i}.weight", Shift(), {"shift": torch.ones(4, 1)}, shape=(4, 4)) for i in range(3))
    TRIED.clear()
    refuse_misshapen(Content("x", items), None)
    assert TRIED == [(4, 4)]
    other = replace(items[0], path="3.weight", shape=(6, 4))
    with pytest.raises(lp.FormatError, match=r"'x', target '3\.weight': factors of shapes .* on shape \(6, 4\)"):
        refuse_misshapen(Content("x", (*items, other)), None)


def test_a_method_without_a_hash_is_tried_each_time() -> None:
    TRIED.clear()
    plan = lp.attach(many(3), Shift(tags=["a list"]))
    assert TRIED == [(4, 4)] * 3
    assert plan.num_params == 12


def test_a_second_plan_asks_the_method_again() -> None:
    model, method = many(2), Shift()
    TRIED.clear()
    lp.plan(model, method)
    lp.plan(model, method)
    assert len(TRIED) == 2


@dataclass(frozen=True, kw_only=True)
class Counting(Shift):
    """Counts how often it is applied."""

    seen: list[int] = field(default_factory=list, compare=False)

    def apply(self, weight: torch.Tensor, factors: dict[str, torch.Tensor], layout: lp.Layout) -> torch.Tensor:
        self.seen.append(1)
        return super().apply(weight, factors, layout)


def test_a_load_computes_no_weight(tmp_path: Path) -> None:
    model = many(3)
    lp.attach(model, lp.LoRA(r=1), name="saved")
    lp.save(model, tmp_path / "adapter.safetensors", name="saved")
    lp.detach(model)
    method = Counting()
    lp.attach(model, method, name="other")
    method.seen.clear()
    lp.load(model, tmp_path / "adapter.safetensors", name="saved")
    assert method.seen == []
    model(torch.ones(1, 4))
    assert method.seen


def test_a_plan_imports_no_compiler(tmp_path: Path) -> None:
    # A second each, at the first call: torch's kernels for the meta device are Python, and some import a lot.
    code = (
        "import sys, loraparam as lp; from torch import nn; model = nn.Linear(4, 6); before = set(sys.modules)\n"
        "for method in (lp.LoRA(r=2), lp.DoRA(r=2), lp.DoRA(r=2, axis='in'), lp.Magnitude(), lp.Full()):\n"
        "    lp.attach(model, method); lp.detach(model)\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before}, 'torch._dynamo' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "sympy" not in shown.stdout
    assert shown.stdout.endswith("False\n")
