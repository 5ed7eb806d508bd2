"""The target language: which parameters, and which rows of them, each form means."""

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import loraparam as lp


class Block(nn.Module):
    """Attention with separate projections, a gated MLP and a norm, as language models name them."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(4, 8), "down_proj": nn.Linear(8, 4)})
        self.norm = nn.LayerNorm(4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.conv = nn.Conv1d(4, 4, 3)
        self.pair = nn.Bilinear(4, 4, 2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.cross = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
        self.lstm = nn.LSTM(4, 3, bidirectional=True)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


def found(model: nn.Module, targets: Any, **options: Any) -> list[str]:
    """The paths a target means; Full takes tensors of any shape."""
    return [row.path for row in lp.plan(model, lp.Full(), targets, **options)]


def each_layer(*names: str) -> list[str]:
    return [f"layers.{i}.{name}" for i in range(2) for name in names]


PROJECTIONS = [f"self_attn.{letter}_proj.weight" for letter in "qkvo"]
LINEARS = [*PROJECTIONS, "mlp.up_proj.weight", "mlp.down_proj.weight"]
CROSS = [f"cross.{letter}_proj_weight" for letter in "qkv"]
LSTM = [f"lstm.weight_{gate}_l0{way}" for way in ("", "_reverse") for gate in ("ih", "hh")]
ATTENTION = ["attention.in_proj_weight", "attention.out_proj.weight", *CROSS, "cross.out_proj.weight"]
ALL_LINEAR = [*each_layer(*LINEARS), "pair.weight", *ATTENTION]  # not the head, which is tied to the embedding


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ALL_LINEAR),
        # A dotted path, or its last components; a module stands for its weights.
        ("q_proj", each_layer("self_attn.q_proj.weight")),
        ("q_proj.weight", each_layer("self_attn.q_proj.weight")),
        ("q_proj.bias", each_layer("self_attn.q_proj.bias")),
        ("layers.1.mlp.up_proj", ["layers.1.mlp.up_proj.weight"]),
        ("1.mlp.up_proj.weight", ["layers.1.mlp.up_proj.weight"]),
        ("mlp", each_layer("mlp.up_proj.weight", "mlp.down_proj.weight")),
        ("layers.0", [f"layers.0.{name}" for name in LINEARS]),
        ("norm", each_layer("norm.weight")),
        ("attention", ATTENTION[:2]),
        ("cross", [*CROSS, "cross.out_proj.weight"]),
        ("lstm", LSTM),
        ("lstm.bias_hh_l0", ["lstm.bias_hh_l0"]),
        ("embed", ["embed.weight"]),
        ("head", ["head.weight"]),
        # * is one component, or a part of one; ** any number.
        ("layers.*.norm", each_layer("norm.weight")),
        ("layers.*.*.q_proj", each_layer("self_attn.q_proj.weight")),
        ("layers.*.q_proj", None),
        ("layers.**.q_proj", each_layer("self_attn.q_proj.weight")),
        ("layers.**.norm", each_layer("norm.weight")),
        ("layers.1.**.weight", [f"layers.1.{name}" for name in [*LINEARS, "norm.weight"]]),
        ("**.up_proj", each_layer("mlp.up_proj.weight")),
        ("*_proj", [*each_layer(*LINEARS), "attention.out_proj.weight", "cross.out_proj.weight"]),
        ("mlp.*", each_layer("mlp.up_proj.weight", "mlp.down_proj.weight")),
        ("layers.0.norm.*", ["layers.0.norm.weight", "layers.0.norm.bias"]),
        ("self*_proj", None),
        ("proj", None),  # whole components: no part of "q_proj"
        ("q.proj", None),  # a dot is a dot
        # Regular expressions match the whole path of a parameter.
        (re.compile(r"layers\.\d\..*_proj\.weight"), each_layer(*LINEARS)),
        (re.compile(r"q_proj\.weight"), None),
        (re.compile(r"layers\.0\.mlp"), None),
        # Types match by isinstance: the projection in MultiheadAttention is a subclass of Linear.
        (nn.Linear, [*each_layer(*LINEARS), "attention.out_proj.weight", "cross.out_proj.weight", "head.weight"]),
        (nn.Conv1d, ["conv.weight"]),
        (nn.RNNBase, LSTM),
        (nn.modules.conv._ConvNd, ["conv.weight"]),
        # Callables see (path, module, parameter name).
        (lambda path, module, name: isinstance(module, nn.Conv1d) and name == "bias", ["conv.bias"]),
        (lambda path, module, name: path.endswith("norm.weight"), each_layer("norm.weight")),
        # Lists, tuples and sets of all of these.
        (["conv", nn.Bilinear], ["conv.weight", "pair.weight"]),
        (("conv", re.compile("conv.bias")), ["conv.weight", "conv.bias"]),
        ({"conv"}, ["conv.weight"]),
        (["conv", "conv.weight"], ["conv.weight"]),
    ],
)
def test_each_form(targets: Any, expected: list[str] | None) -> None:
    model = Model()
    if expected is None:
        with pytest.raises(lp.TargetError, match="matches nothing"):
            found(model, targets)
    else:
        assert sorted(found(model, targets)) == sorted(
            "embed.weight" if path == "head.weight" and targets == "embed" else path for path in expected
        )


def test_rows_come_in_the_order_of_the_model() -> None:
    model = Model()
    order = [path for path, _ in model.named_parameters()]
    paths = found(model, ["cross", "conv", "q_proj", "lstm"])
    assert paths == sorted(paths, key=order.index)


def test_the_model_itself_may_be_the_layer() -> None:
    assert found(nn.Linear(2, 3), "all-linear") == ["weight"]
    assert found(nn.Linear(2, 3), ["weight", "bias"]) == ["weight", "bias"]
    assert found(nn.LSTM(2, 3), nn.LSTM) == [f"weight_{gate}_l0" for gate in ("ih", "hh")]


def test_all_linear_knows_the_conv1d_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    plan = lp.plan(nn.Sequential(Conv1D(6, 4), nn.Conv1d(4, 4, 1)), lp.LoRA(r=1))
    assert [(row.path, row.shape, row.layout) for row in plan] == [("0.weight", (4, 6), lp.Layout(out=1))]


def test_all_linear_takes_two_tied_linears_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    (row,) = lp.plan(model, lp.LoRA(r=1))
    assert (row.path, row.shared_with) == ("0.weight", ("1.weight",))


def test_all_linear_leaves_out_whatever_is_tied_to_an_embedding() -> None:
    for embedding in (nn.Embedding(4, 4), nn.EmbeddingBag(4, 4)):
        model = nn.ModuleDict({"head": nn.Linear(4, 4), "other": nn.Linear(4, 4), "embedding": embedding})
        model["head"].weight = embedding.weight
        assert found(model, "all-linear") == ["other.weight"]


@pytest.mark.parametrize("target", ["embedding", "head"])
def test_a_tied_parameter_is_listed_under_the_name_it_was_asked_for(target: str) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "head": nn.Linear(4, 4)})
    model["head"].weight = model["embedding"].weight
    (row,) = lp.plan(model, lp.LoRA(r=1), target)
    both = {"embedding.weight", "head.weight"}
    assert ({row.path}, set(row.shared_with)) == ({f"{target}.weight"}, both - {f"{target}.weight"})


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("layers", ["conv.weight", "attention.out_proj.weight", "cross.out_proj.weight"]),
        (["layers.0", "cross"], [*each_layer(*LINEARS)[6:], "conv.weight", "attention.out_proj.weight"]),
        (["layers", nn.MultiheadAttention, "conv.bias"], ["conv.weight"]),
        (["layers", re.compile(r".*out_proj\.weight")], ["conv.weight"]),
        (lambda path, module, name: "conv" not in path, ["conv.weight"]),
    ],
)
def test_exclude_takes_the_same_forms(exclude: Any, left: list[str]) -> None:
    targets = re.compile(r".*_proj\.weight|conv\.weight")
    assert sorted(found(Model(), targets, exclude=exclude)) == sorted(left)


@pytest.mark.parametrize(
    ("target", "suggestion"),
    [
        ("q_prj", "q_proj"),
        ("self_atn.q_proj", "self_attn.q_proj"),
        ("layers.1.mlp.upproj", "layers.1.mlp.up_proj"),
        ("attention.in_proj_wieght[q]", "attention.in_proj_weight"),
        ("Conv", "conv"),
    ],
)
def test_a_dead_pattern_suggests_what_was_meant(target: str, suggestion: str) -> None:
    with pytest.raises(lp.TargetError, match=rf"{re.escape(target)}.* matches nothing; nearest: .*'{suggestion}'"):
        found(Model(), ["embed", target])


# --- string patterns on random trees ----------------------------------------------------------------------------

NAMES = ("a", "b", "q", "q_proj", "0")
trees = st.recursive(
    st.just("linear"), lambda below: st.dictionaries(st.sampled_from(NAMES), below, min_size=1), max_leaves=6
)
components = st.sampled_from((*NAMES, "*", "**", "q*", "*_proj", "weight", "bias", "*s"))


def build(tree: Any) -> nn.Module:
    return nn.Linear(1, 1) if tree == "linear" else nn.ModuleDict({name: build(sub) for name, sub in tree.items()})


def ends_with(path: list[str], pattern: list[str]) -> bool:
    """The language by its definition: some suffix of the path, component by component."""

    def whole(path: list[str], pattern: list[str]) -> bool:
        if not pattern:
            return not path
        if pattern[0] == "**":
            return any(whole(path[i:], pattern[1:]) for i in range(len(path) + 1))
        return bool(path) and fnmatchcase(path[0], pattern[0]) and whole(path[1:], pattern[1:])

    return any(whole(path[i:], pattern) for i in range(len(path)))


@example({"a": "linear"}, ["a", "*", "**"])  # any number is none, too
@given(trees.filter(lambda tree: tree != "linear"), st.lists(components, min_size=1, max_size=4))
def test_a_string_matches_what_its_definition_says(tree: Any, pattern: list[str]) -> None:
    model = build(tree)
    expected = []
    for path, _ in model.named_parameters():
        parts = path.split(".")
        in_a_match = any(ends_with(parts[:i], pattern) for i in range(1, len(parts)))
        if ends_with(parts, pattern) or (in_a_match and parts[-1] == "weight"):
            expected.append(path)
    if expected:
        assert found(model, ".".join(pattern)) == expected
    else:
        with pytest.raises(lp.TargetError, match="matches nothing"):
            found(model, ".".join(pattern))


# --- slices -----------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed  # as transformers' GPT-OSS says it
        self.up = nn.Parameter(torch.randn(3, 4, 6))


def attention() -> nn.Module:
    return nn.MultiheadAttention(4, 2)


def cross() -> nn.Module:
    return nn.MultiheadAttention(4, 2, kdim=3, vdim=5)


# (layer, target, {parameter: index of what it means}). The blocks' orders are those of torch's documentation.
SLICES: list[tuple[Callable[[], nn.Module], str, dict[str, list[Any]]]] = [
    (attention, "in_proj_weight[q,v]", {"in_proj_weight": [slice(0, 4), slice(8, 12)]}),
    (attention, "in_proj_weight[ k ]", {"in_proj_weight": [slice(4, 8)]}),
    (attention, "in_proj_bias[v]", {"in_proj_bias": [slice(8, 12)]}),
    (attention, "m[q,o]", {"m.in_proj_weight": [slice(0, 4)], "m.out_proj.weight": [slice(None)]}),
    (cross, "m[k,o]", {"m.k_proj_weight": [slice(None)], "m.out_proj.weight": [slice(None)]}),
    (lambda: nn.LSTM(4, 3), "weight_ih_l0[i,g]", {"weight_ih_l0": [slice(0, 3), slice(6, 9)]}),
    (lambda: nn.LSTMCell(4, 3), "m[f,o]", {f"m.weight_{k}": [slice(3, 6), slice(9, 12)] for k in ("ih", "hh")}),
    (
        lambda: nn.LSTM(4, 3, proj_size=2),  # its weight_hr has no gates
        "m[o]",
        {f"m.weight_{k}_l0": [slice(9, 12)] for k in ("ih", "hh")},
    ),
    (lambda: nn.GRU(4, 3), "bias_hh_l0[r,n]", {"bias_hh_l0": [slice(0, 3), slice(6, 9)]}),
    (lambda: nn.GRUCell(4, 3), "m[z]", {f"m.weight_{k}": [slice(3, 6)] for k in ("ih", "hh")}),
    (lambda: nn.Linear(4, 6), "m[1/3,3/3]", {"m.weight": [slice(0, 2), slice(4, 6)]}),
    (lambda: nn.Linear(4, 6), "weight[:2,5:6]", {"weight": [slice(0, 2), slice(5, 6)]}),
    (lambda: nn.Linear(4, 6), "weight[3:]", {"weight": [slice(3, 6)]}),
    (lambda: nn.Embedding(5, 6), "m[1/2]", {"m.weight": [(slice(None), slice(0, 3))]}),
    (lambda: nn.ConvTranspose1d(4, 6, 3), "m[0:2]", {"m.weight": [(slice(None), slice(0, 2))]}),
    (lambda: Experts(False), "up[0,2]", {"up": [0, 2]}),
    (lambda: Experts(False), "up[2/2]", {"up": [(slice(None), slice(2, 4))]}),
    (lambda: Experts(True), "up[2/2]", {"up": [(slice(None), slice(None), slice(3, 6))]}),
]


@pytest.mark.parametrize(("make", "target", "expected"), SLICES, ids=[target for _, target, _ in SLICES])
def test_slices_mean_these_elements(make: Callable[[], nn.Module], target: str, expected: dict[str, list[Any]]) -> None:
    model = make() if not any(path.startswith("m.") for path in expected) else nn.ModuleDict({"m": make()})
    before = {path: parameter.detach().clone() for path, parameter in model.named_parameters()}
    plan = lp.attach(model, lp.Full(), target)
    assert len(plan) == sum(map(len, expected.values()))
    with torch.no_grad():
        for number, factor in enumerate(lp.parameters(model), start=1):
            factor.fill_(number)
    number = 0
    for path, indices in expected.items():
        for index in indices:
            number += 1
            before[path][index] += number
    for path, value in before.items():
        # A sum of two float32 numbers is rounded the same way on both sides.
        torch.testing.assert_close(lp.effective_weight(model, path), value, rtol=0, atol=0)


def test_the_batch_dims_of_a_layout_are_a_tuple() -> None:
    given: Any = [0]
    assert lp.Layout(out=1, batch=given) == lp.Layout(out=1, batch=(0,))
    lp.plan(nn.ParameterDict({"w": torch.randn(2, 3, 4)}), lp.LoRA(r=1), "w", layout=lp.Layout(out=1, batch=given))
    given = 0
    with pytest.raises(lp.TargetError, match=r"Layout\(out=1, batch=0\); allowed: .* in a tuple"):
        lp.Layout(out=1, batch=given)


@pytest.mark.parametrize(
    ("shape", "layout", "target"),
    [
        ((4, 6), lp.Layout(out=1), "w[0:4]"),
        ((4, 6), lp.Layout(out=1), "w[1/3]"),
        ((2, 4, 6), lp.Layout(out=2, batch=(0,)), "w[1]"),
        ((4, 2, 6), lp.Layout(out=0, batch=(1,)), "w[1]"),
    ],
)
def test_an_effective_slice_is_cut_as_its_adapter_reads_the_weight(
    shape: tuple[int, ...], layout: lp.Layout, target: str
) -> None:
    model = nn.ParameterDict({"w": torch.randn(shape)})
    (row,) = lp.attach(model, lp.LoRA(r=1), target, layout=layout)
    assert lp.effective_weight(model, row.path).shape == row.shape


def test_each_slice_has_factors_and_a_key_of_its_own() -> None:
    model = nn.MultiheadAttention(4, 2)
    plan = lp.attach(model, lp.LoRA(r=1), "in_proj_weight[q,v]")
    assert [row.path for row in plan] == ["in_proj_weight[q]", "in_proj_weight[v]"]
    assert list(lp.state_dict(model)) == [f"in_proj_weight[{p}].lora_{f}" for p in "qv" for f in "AB"]


@given(rows=st.integers(1, 12), count=st.integers(1, 12))
def test_equal_blocks_cover_the_rows_once(rows: int, count: int) -> None:
    layer = nn.Linear(2, rows)
    blocks = ",".join(f"{k}/{count}" for k in range(1, count + 1))
    if rows % count:
        with pytest.raises(lp.TargetError, match=rf"{rows} output rows do not divide into {count} equal blocks"):
            lp.plan(layer, lp.Full(), f"weight[{blocks}]")
        return
    lp.attach(layer, lp.Full(), f"weight[{blocks}]")
    weight = layer.weight.detach().clone()
    with torch.no_grad():
        for factor in lp.parameters(layer):
            factor.fill_(1.0)
    # Each element was added to once, whatever the rounding of that sum.
    torch.testing.assert_close(layer.weight.detach(), weight + 1, rtol=0, atol=0)


def test_a_slice_of_an_adapted_weight_is_read_as_its_adapters_read_it() -> None:
    model = nn.Linear(4, 6)
    lp.attach(model, lp.LoRA(r=1, init="gaussian"), "weight", layout=lp.Layout(out=1))
    torch.testing.assert_close(lp.effective_weight(model, "weight[1:3]"), model.weight[:, 1:3])


def test_an_expert_that_is_not_there() -> None:
    model = nn.ParameterDict({"experts": nn.Parameter(torch.zeros(3, 5, 4))})
    with pytest.raises(lp.TargetError, match=r"'experts': slice \[3\]: there are 3 experts; allowed: 0\.\.2"):
        lp.plan(model, lp.LoRA(r=1), "experts[3]")
    with pytest.raises(lp.TargetError, match=r"allowed: .*rows within \[0:.\]; experts 0\.\.2 by index"):
        lp.plan(model, lp.LoRA(r=1), "experts[q]")
