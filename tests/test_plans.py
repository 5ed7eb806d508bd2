"""Plans: what they say, that they change nothing, that attach does the same, and which of several rules wins.

``unchanged`` and ``randomize`` serve other test files, too.
"""

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import loraparam as lp

# --- helpers ----------------------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> bytes | None:
    """The bytes of a tensor, where it has any of its own."""
    if tensor.is_meta or is_lazy(tensor) or type(tensor.detach()) is not Tensor:
        return None
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that a call without effect leaves alone; references and bytes, so that equal means untouched."""
    modules = list(model.named_modules(remove_duplicate=False))
    named = list(model.named_parameters(remove_duplicate=False))
    return {
        "modules": [(path, id(module), type(module), module.training) for path, module in modules],
        "attributes": [(path, sorted(module.__dict__)) for path, module in modules],
        "order": [[list(d.keys()) for d in (m._parameters, m._buffers, m._modules)] for _, m in modules],
        "parameters": [(path, id(p), p.dtype, None if is_lazy(p) else tuple(p.shape)) for path, p in named],
        "flags": [(path, p.requires_grad) for path, p in named],
        "bits": [(path, bits(p)) for path, p in named],
        "gradients": [(path, id(p.grad), p.grad.dtype, bits(p.grad)) for path, p in named if p.grad is not None],
        "buffers": [(path, id(b), bits(b)) for path, b in model.named_buffers(remove_duplicate=False)],
        "keys": list(model.state_dict()),
        "adapters": repr(model),  # the names, order and strengths of adapters are part of it
    }


@contextlib.contextmanager
def unchanged(*models: nn.Module) -> Iterator[None]:
    """Inside, nothing happens to the models that would show afterwards, whether or not something is raised."""
    before = [fingerprint(model) for model in models]
    yield
    for model, was in zip(models, before, strict=True):
        assert_untouched(model, was)


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    now = fingerprint(model)
    for aspect, value in before.items():
        assert now[aspect] == value, f"{aspect} changed"


def randomize(model: nn.Module, name: str | None = None, seed: int = 0) -> None:
    """Give factors random values, so that an adapter has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lp.parameters(model, name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))


def _swap(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def _reorder(model: nn.Sequential) -> None:
    model[0]._parameters["weight"] = model[0]._parameters.pop("weight")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[0].weight.data.view(torch.int32)[0, 0].add_(1),  # one unit in the last place
        lambda model: model[0].weight.requires_grad_(False),
        lambda model: model.eval(),
        lambda model: model.half(),
        lambda model: model[0].weight.grad.zero_(),
        lambda model: setattr(model[0], "left_over", None),
        lambda model: setattr(model[0], "__class__", type("Linear", (nn.Linear,), {})),
        lambda model: model[0].register_buffer("extra", None),
        lambda model: lp.activate(model, {"default": 0.5}),
        _swap,
        _reorder,
    ],
)
def test_unchanged_notices_each_kind_of_change(change: Callable[[nn.Sequential], object]) -> None:
    model = two_layers()
    lp.attach(model, lp.LoRA(r=1), "1", train="0")
    model(torch.ones(1, 6)).sum().backward()
    with pytest.raises(AssertionError, match="changed"), unchanged(model):
        change(model)


# --- what a plan says -------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two linears with one weight, attention whose projections are stacked, experts, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 4)
        self.again = nn.Linear(6, 4)
        self.again.weight = self.up.weight
        self.attention = nn.MultiheadAttention(4, 2)
        self.experts = nn.ParameterDict({"w": nn.Parameter(torch.randn(3, 5, 4))})
        self.tokens = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.attention(*[self.up(x) + self.again(x)] * 3)[0])


RULES = {
    "all-linear": lp.LoRA(r=2, alpha=4),
    "attention.in_proj_weight[q,v]": lp.DoRA(r=1),
    "experts.w[1]": lp.LoRA(r=3),
    "tokens": lp.Magnitude(),
    "norm": lp.Full(),
}


def test_the_table() -> None:
    assert str(lp.plan(Tied(), RULES)) == (
        "target                       shape   layout     method     r  parameters  rule                           shared with\n"  # noqa: E501
        "up.weight                    (4, 6)  (out, in)  LoRA       2          20  all-linear                     again.weight\n"  # noqa: E501
        "attention.in_proj_weight[q]  (4, 4)  (out, in)  DoRA       1          12  attention.in_proj_weight[q,v]\n"
        "attention.in_proj_weight[v]  (4, 4)  (out, in)  DoRA       1          12  attention.in_proj_weight[q,v]\n"
        "attention.out_proj.weight    (4, 4)  (out, in)  LoRA       2          16  all-linear\n"
        "experts.w[1]                 (5, 4)  (out, in)  LoRA       3          27  experts.w[1]\n"
        "tokens.weight                (7, 4)  (in, out)  Magnitude  -           4  tokens\n"
        "norm.weight                  (4,)    -          Full       -           4  norm\n"
        "7 targets, 95 parameters"
    )


def test_the_table_says_which_way_experts_are_read() -> None:
    model = nn.ParameterDict({"w": nn.Parameter(torch.randn(3, 5, 4))})
    assert "(E, out, in)" in str(lp.plan(model, lp.LoRA(r=1), "w"))
    transposed = lp.plan(model, lp.LoRA(r=1), "w", layout={"w": lp.Layout(out=2, batch=(0,))})
    assert "(E, in, out)" in str(transposed)
    assert transposed[0].layout == lp.Layout(out=2, batch=(0,))


@pytest.mark.parametrize(
    ("layout", "shown"),
    [
        (lp.Layout(), "(out, in)"),
        (lp.Layout(out=1), "(in, out)"),
        (lp.Layout(out=2), "(in, in, out)"),
        (lp.Layout(out=0, batch=(1,)), "(out, E, in)"),
        (lp.Layout(out=2, batch=(0, 1)), "(E, E, out, in)"),
        (lp.Layout(out=3, batch=(0, 1)), "(E, E, in, out)"),
        (lp.Layout(rows=6), "flat (6, in)"),
    ],
)
def test_a_layout_prints_as_its_dims(layout: lp.Layout, shown: str) -> None:
    assert str(layout) == shown


def test_rows_carry_what_the_table_shows() -> None:
    plan = lp.plan(Tied(), RULES)
    first, second = plan[0], plan[1]
    assert (first.path, first.shape, first.method) == ("up.weight", (4, 6), lp.LoRA(r=2, alpha=4))
    assert (first.num_params, first.rule, first.shared_with) == (2 * (4 + 6), "all-linear", ("again.weight",))
    assert (second.path, second.method, second.shared_with) == ("attention.in_proj_weight[q]", lp.DoRA(r=1), ())
    assert len(plan) == 7
    assert sum(row.num_params for row in plan) == plan.num_params == 95


# --- a plan changes nothing, and attach does what it says -------------------------------------------------------


def test_a_plan_changes_nothing() -> None:
    model, state = Tied(), torch.get_rng_state()
    with unchanged(model):
        lp.plan(model, RULES, exclude="attention.out_proj")
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)  # bytes of the generator


def test_a_plan_of_an_adapted_model_changes_nothing_and_is_the_same() -> None:
    model = Tied()
    plan = lp.attach(model, RULES)
    with unchanged(model):
        assert lp.plan(model, RULES) == plan


@pytest.mark.parametrize("exclude", [(), "attention", ["experts", "up"], nn.MultiheadAttention])
def test_attach_does_what_the_plan_says(exclude: Any) -> None:
    model = Tied()
    rules = {key: method for key, method in RULES.items() if key in ("all-linear", "norm", "tokens")}
    plan = lp.plan(model, rules, exclude=exclude)
    assert lp.attach(model, rules, exclude=exclude, name="style") == plan
    assert lp.adapters(model) == {"style": {row.path: row.method for row in plan}}
    assert sum(p.numel() for p in lp.parameters(model)) == plan.num_params
    shapes: dict[str, int] = {}
    for key, factor in lp.state_dict(model, "style").items():
        path = key.rpartition(".")[0]
        shapes[path] = shapes.get(path, 0) + factor.numel()
    assert shapes == {row.path: row.num_params for row in plan}


@pytest.mark.parametrize("exclude", ["again", "again.weight", "up"])
def test_exclude_leaves_a_tied_weight_out_by_any_of_its_names(exclude: str) -> None:
    paths = [row.path for row in lp.plan(Tied(), lp.LoRA(r=1), exclude=exclude)]
    assert paths == ["attention.in_proj_weight", "attention.out_proj.weight"]


def test_exclude_reaches_the_rules_of_a_mapping() -> None:
    plan = lp.plan(Tied(), {"all-linear": lp.LoRA(r=1), "norm": lp.Full()}, exclude=nn.MultiheadAttention)
    assert [row.path for row in plan] == ["up.weight", "norm.weight"]


# --- which rule wins --------------------------------------------------------------------------------------------


def test_a_later_rule_wins_and_the_plan_says_which() -> None:
    first, second = lp.LoRA(r=1), lp.DoRA(r=2)
    rows = list(lp.plan(two_layers(), {"all-linear": first, "1": second}))
    assert [(row.path, row.method, row.rule) for row in rows] == [
        ("0.weight", first, "all-linear"),
        ("1.weight", second, "1"),
    ]
    rows = list(lp.plan(two_layers(), {"1": second, "all-linear": first}))
    assert [(row.path, row.method, row.rule) for row in rows] == [
        ("0.weight", first, "all-linear"),
        ("1.weight", first, "all-linear"),
    ]


def test_a_key_may_be_several_patterns() -> None:
    methods = {("0", nn.LayerNorm): lp.Full(), "1": lp.LoRA(r=1)}
    plan = lp.plan(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3), nn.LayerNorm(3)), methods)
    assert {row.path: row.method for row in plan} == {
        "0.weight": lp.Full(),
        "1.weight": lp.LoRA(r=1),
        "2.weight": lp.Full(),
    }


ROWS = 12
ranges = st.tuples(st.integers(0, ROWS), st.integers(0, ROWS)).filter(lambda r: r[0] < r[1])


@given(st.lists(ranges, min_size=1, max_size=6, unique=True))
def test_a_later_slice_replaces_what_it_overlaps_and_only_that(spans: list[tuple[int, int]]) -> None:
    rules = {f"weight[{start}:{stop}]": lp.LoRA(r=1, alpha=i + 1) for i, (start, stop) in enumerate(spans)}
    plan = lp.plan(nn.Linear(5, ROWS), rules)

    def apart(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return set(range(*a)).isdisjoint(range(*b))

    kept = {span for i, span in enumerate(spans) if all(apart(span, later) for later in spans[i + 1 :])}
    assert {row.path for row in plan} == {f"weight[{start}:{stop}]" for start, stop in kept}
    assert all(row.method == rules[row.rule] and row.path == row.rule for row in plan)


def test_the_whole_replaces_its_slices_and_a_slice_the_whole() -> None:
    part, whole = lp.LoRA(r=1), lp.LoRA(r=2)
    assert [row.path for row in lp.plan(nn.Linear(6, 4), {"weight[1/2]": part, "weight": whole})] == ["weight"]
    assert [row.path for row in lp.plan(nn.Linear(6, 4), {"weight": whole, "weight[1/2]": part})] == ["weight[1/2]"]
    # Rows of all experts, and all rows of one: they share some, wherever both stand.
    experts = {"experts.w[2]": part, "experts.w[1/5]": part}
    assert [row.path for row in lp.plan(Tied(), experts)] == ["experts.w[1/5]"]


# --- all or nothing ---------------------------------------------------------------------------------------------

PACKAGE = str(Path(lp.__file__).parent)


def interrupted_everywhere(model: nn.Module, call: Callable[[], Any]) -> int:
    """Ctrl-C at the first, second, … call of a library function until ``call`` comes through; how many there were."""
    left = 0

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        # Not the catalogue, which only looks; not a generator, which may be resumed only to be dropped.
        ours = frame.f_code.co_filename.startswith(PACKAGE) and not frame.f_code.co_filename.endswith("catalogue.py")
        if event == "call" and ours and not frame.f_code.co_flags & inspect.CO_GENERATOR:
            left -= 1
            if left == 0:
                raise KeyboardInterrupt  # which ends the tracing, too

    tracer, before = sys.gettrace(), fingerprint(model)
    for n in itertools.count(1):
        left = n
        sys.settrace(trace)
        try:
            call()
        except KeyboardInterrupt:
            assert_untouched(model, before)
        else:
            assert left > 0, "an interrupt was swallowed"
            return n - 1
        finally:
            sys.settrace(tracer)
    raise AssertionError


OPERATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "attach": lambda model: lp.attach(model, {"up": lp.LoRA(r=1), "tokens": lp.DoRA(r=1)}, name="new", train="norm"),
    "attach_to_extend": lambda model: lp.attach(model, lp.Full(), "norm"),
    "detach": lambda model: lp.detach(model),
    "detach_one": lambda model: lp.detach(model, "second"),
    "merge": lambda model: lp.merge(model),
    "merge_one": lambda model: lp.merge(model, "default"),
    "activate": lambda model: lp.activate(model, {"second": 0.5, "default": 2.0}),
    "check": lambda model: lp.check(model, torch.ones(2, 6)),
    "merged": lambda model: BLOCKS.append(lp.merged(model)) or BLOCKS[-1].__enter__(),
    "detached": lambda model: BLOCKS.append(lp.detached(model)) or BLOCKS[-1].__enter__(),
    "disabled": lambda model: BLOCKS.append(lp.disabled(model)) or BLOCKS[-1].__enter__(),
}
BLOCKS: list[Any] = []  # kept alive: a block that is collected is left


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_interrupted_call_has_changed_nothing(operation: str) -> None:
    model = Tied()
    for name in ("default", "second"):
        lp.attach(model, lp.LoRA(r=1), ["up", "attention.in_proj_weight[q,v]"], name=name)
        randomize(model, name)
    BLOCKS.clear()
    assert interrupted_everywhere(model, lambda: OPERATIONS[operation](model)) > 5
    for block in BLOCKS[-1:]:
        block.__exit__(None, None, None)
    lp.summary(model)  # and the model is whole


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_a_failure_half_way_has_changed_nothing(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = Tied(), itertools.count(1)

    def fails(self: lp.Method, *args: Any, **kwargs: Any) -> Any:
        if next(calls) > len(plan) + 1:  # the plan itself asks for the shapes first
            raise error("no memory left")
        return lp.LoRA.init(self, *args, **kwargs)

    plan = lp.plan(model, lp.LoRA(r=1))
    monkeypatch.setattr(lp.DoRA, "init", fails)
    monkeypatch.setattr(lp.DoRA, "apply", lp.LoRA.apply)
    with unchanged(model), pytest.raises(error, match="no memory left"):
        lp.attach(model, lp.DoRA(r=1))
