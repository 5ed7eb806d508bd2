"""The native file: what is in it, that it comes back as it was, and that a damaged or foreign one changes nothing."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from test_plans import assert_untouched, bits, fingerprint, interrupted_everywhere, randomize, two_layers, unchanged
from test_state import dtypes, methods
from torch import Tensor, nn

import loraparam as lp

TARGETS = {"0[1/2]": lp.LoRA(r=1, alpha=3), "0[2/2]": lp.DoRA(r=2, axis="in"), "0.bias": lp.Full(), "1": lp.Magnitude()}


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return two_layers()


def adapted(targets: Any = TARGETS) -> nn.Sequential:
    model = base()
    lp.attach(model, targets)
    randomize(model)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(scope="module")
def saved(folder: Path) -> Path:
    """A file with every method, of the model that ``base`` makes."""
    lp.save(adapted(), folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


def values(model: nn.Module, name: str = "default") -> dict[str, tuple[torch.dtype, bytes | None]]:
    return {key: (tensor.dtype, bits(tensor)) for key, tensor in lp.state_dict(model, name).items()}


# --- what is in it, and that it comes back ----------------------------------------------------------------------


def test_the_header(saved: Path) -> None:
    with safe_open(str(saved), framework="pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(lp.state_dict(adapted()))
    assert (metadata["format"], metadata["format_version"]) == ("loraparam", "1")
    targets = json.loads(metadata["targets"])
    assert list(targets) == ["0.weight[1/2]", "0.weight[2/2]", "0.bias", "1.weight"]
    lora, dora = targets["0.weight[1/2]"], targets["0.weight[2/2]"]
    assert (lora["method"], lora["config"]["alpha"], lora["base"]) == ("LoRA", 3, None)
    assert (dora["method"], dora["config"]["axis"]) == ("DoRA", "in")
    assert lora["layout"] == {"out": 0, "batch": [], "lookup": False}
    assert len(dora["base"]) == 9  # a DoRA depends on its base: the norm and eight elements


@pytest.mark.parametrize("format", [None, "loraparam"])
def test_load_attaches_what_was_saved(saved: Path, format: str | None) -> None:
    model, original = base(), adapted()
    plan = lp.load(model, saved, format=format, name="again")
    assert lp.adapters(model)["again"] == lp.adapters(original)["default"]
    assert values(model, "again") == values(original)
    assert [(row.path, row.num_params) for row in plan] == [
        (row.path, row.num_params) for row in lp.plan(base(), TARGETS)
    ]
    assert all(factor.requires_grad for factor in lp.parameters(model))
    # The same computation on the same tensors.
    torch.testing.assert_close(model(torch.ones(1, 6)), original(torch.ones(1, 6)), rtol=0, atol=0)


@dataclass(frozen=True, kw_only=True)
class Gain(lp.Method):
    """A method of a user's own."""

    power: int = 1
    narrow: bool = False

    def init(self, weight: Tensor, layout: lp.Layout, *, generator: Any = None) -> dict[str, Tensor]:
        dtype = weight.dtype if self.narrow or weight.dtype.itemsize > 4 else torch.float32
        return {"gain": torch.ones(weight.shape[layout.out], dtype=dtype, device=weight.device)}

    def apply(self, weight: Tensor, factors: dict[str, Tensor], layout: lp.Layout) -> Tensor:
        return layout.tensor(layout.matrix(weight) * factors["gain"][:, None] ** self.power, weight.shape)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 6),
    "embedding": lambda: nn.Embedding(4, 6),
    "convolution": lambda: nn.ConvTranspose1d(4, 6, 3),
    "experts": lambda: nn.ParameterDict({"weight": nn.Parameter(torch.randn(2, 6, 4))}),
}


@given(
    methods | st.builds(Gain, power=st.integers(1, 3)),
    dtypes,
    st.sampled_from(sorted(LAYERS)),
    st.sampled_from(["weight", "weight[2/3]", "weight[:2,3:6]"]),
)
def test_save_then_load_is_the_identity(
    folder: Path, method: lp.Method, dtype: torch.dtype, layer: str, target: str
) -> None:
    torch.manual_seed(0)
    model, path = LAYERS[layer]().to(dtype), folder / "any.safetensors"
    lp.attach(model, method, target)
    randomize(model)
    before = values(model), lp.adapters(model), bits(lp.effective_weight(model, "weight"))
    lp.save(model, path)
    lp.detach(model)
    lp.load(model, path)
    assert (values(model), lp.adapters(model), bits(lp.effective_weight(model, "weight"))) == before


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 5, 4))


def test_one_expert_of_a_stack_comes_back(folder: Path) -> None:
    model, other = Stack(), Stack()
    lp.attach(model, {"experts[1]": lp.LoRA(r=2)}, layout=lp.Layout(out=2, batch=(0,)))
    lp.save(model, folder / "expert.safetensors")
    lp.load(other, folder / "expert.safetensors")
    assert lp.adapters(other) == lp.adapters(model)
    assert values(other) == values(model)


def test_factors_keep_the_dtype_that_their_method_gave_them(folder: Path) -> None:
    model, path = nn.Linear(4, 6).to(torch.bfloat16), folder / "narrow.safetensors"
    lp.attach(model, Gain(narrow=True))
    before = values(model)
    lp.save(model, path)
    lp.detach(model)
    lp.load(model, path)
    assert values(model) == before


def test_load_beside_other_adapters(saved: Path) -> None:
    model = base()
    lp.attach(model, lp.LoRA(r=1), "1")
    with unchanged(model), pytest.raises(lp.AttachError, match=r"'1\.weight' already carries adapter 'default'"):
        lp.load(model, saved)
    lp.load(model, saved, name="second")
    assert set(lp.adapters(model)) == {"default", "second"}


# --- files that cannot be loaded --------------------------------------------------------------------------------


def refused(path: Path, match: str, model: nn.Module | None = None) -> None:
    model = base() if model is None else model
    content = path.read_bytes()
    with unchanged(model), pytest.raises(lp.FormatError, match=match) as caught:
        lp.load(model, path)
    assert repr(str(path)) in str(caught.value)
    assert len(str(caught.value)) < 1500  # for people to read
    assert path.read_bytes() == content


def test_unknown_hints_formats_and_names(saved: Path) -> None:
    model, match = adapted(), r"'loraparm'; allowed: 'loraparam', .*'diffusers'; nearest: 'loraparam'"
    for call in (lp.load, lp.save):
        with unchanged(model), pytest.raises(lp.FormatError, match=match):
            call(model, saved, format="loraparm")
    match = r"unknown hint 'chek_base' for loraparam; allowed: 'check_base', 'prefix'; nearest: 'check_base'"
    with unchanged(model), pytest.raises(lp.FormatError, match=match):
        lp.load(model, saved, name="new", chek_base=False)
    with unchanged(model), pytest.raises(lp.AttachError, match=r"adapter name '\.\.'; allowed: one path component"):
        lp.load(model, saved, name="..")


def edited(saved: Path, edit: Callable[[dict[str, Any], dict[str, str], dict[str, Tensor]], Any]) -> Path:
    """A copy of the file after ``edit(targets, metadata, tensors)``; a string is put in the place of the targets."""
    with safe_open(str(saved), framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    targets = json.loads(metadata["targets"])
    text = edit(targets, metadata, tensors)
    metadata["targets"] = text if isinstance(text, str) else json.dumps(targets)
    path = saved.with_name("edited.safetensors")
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        ("0.weight[1/2]|method", "Lora", r"'0\.weight\[1/2\]': unknown method 'Lora'; known: .*'LoRA'"),
        ("1.weight|method", "LowRank", r"'1\.weight': unknown method 'LowRank'; known: (?!.*'LowRank').*'DoRA'"),
        ("1.weight|method", ["Full"], r"'1\.weight': unknown method \['Full'\]; known: "),
        ("1.weight|config", [1], r"'1\.weight': config \[1\]; allowed: an object"),
        ("1.weight|config|rank", 2, r"'1\.weight': config of Magnitude: .*'rank'"),
        ("0.weight[1/2]|config|r", 0, "LoRA: r=0; allowed: an integer in"),
        ("0.weight[1/2]|config|r", "1", "LoRA: r='1'; allowed: an integer in"),
        ("0.weight[1/2]|config|alpha", 10**400, "LoRA: alpha=1000"),
        ("0.weight[1/2]|config|alpha", -1e99, r"'0\.weight\[1/2\]': the scale -1e\+99 makes s·B infinite"),
        ("0.weight[1/2]|config|rslora", "no", "LoRA: rslora='no'; allowed: "),
        ("0.weight[1/2]|config|init", {}, r"LoRA: init=\{\}; allowed: 'kaiming', 'gaussian'"),
        ("1.weight|layout", None, r"'1\.weight': layout None; allowed: an object with"),
        ("1.weight|layout|out", 7, r"'1\.weight': layout .* names dim 7 of a tensor with 2 dims"),
        ("1.weight|layout|out", 10**6, r"'1\.weight': .*1000000"),
        ("1.weight|layout|out", -1, r"'1\.weight': .*allowed: distinct integers"),
        ("1.weight|base", [1.0], r"'1\.weight': base \[1\.0\]; allowed: 9 numbers"),
        ("1.weight|base", "x", r"'1\.weight': base 'x'; allowed: 9 numbers"),
        ("1.weight|base", [10**400, *range(8)], r"'1\.weight'"),
        ("1.weight|base", [9.0] * 9, r"'1\.weight': trained as Magnitude on another base weight"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_entry_that_is_not_understood(saved: Path, place: str, value: Any, match: str) -> None:
    def edit(targets: Any, *_: Any) -> None:
        *above, last = place.split("|")
        for key in above:
            targets = targets[key]
        targets[last] = value

    refused(edited(saved, edit), match)


LAST = "1.weight.magnitude"


def rename(targets: dict[str, Any], tensors: dict[str, Tensor], name: str) -> None:
    targets[name] = targets.pop("1.weight")
    tensors[f"{name}.magnitude"] = tensors.pop(LAST)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t, m, f: m.update(format_version="2"), r"has format version '2'; this release reads '1'"),
        (lambda t, m, f: "{}", "header 'targets': allowed: a non-empty object of objects"),
        (lambda t, m, f: '{"0.weight": 1}', "header 'targets': allowed: a non-empty object of objects"),
        (lambda t, m, f: '{"":' * 9999, "header 'targets': not valid JSON"),
        (lambda t, m, f: json.dumps(t).replace("null", "NaN", 1), "not valid JSON: NaN is not a number"),
        (lambda t, m, f: rename(t, f, "2.weight"), r"no parameter '2\.weight'; nearest: '\d\.weight'"),
        (lambda t, m, f: rename(t, f, ""), "target ''.*: not a path"),
        (lambda t, m, f: rename(t, f, "1.weight[q]"), r"'1\.weight\[q\]'.*not a part of this"),
        (lambda t, m, f: t.update({"1.bias": t["0.bias"]}), r"missing factors of '1\.bias'"),
        (lambda t, m, f: [t.pop("1.weight")], r"unexpected '1\.weight\.magnitude'"),
        (lambda t, m, f: [f.pop(LAST)], r"missing factors of '1\.weight'"),
        (
            lambda t, m, f: f.update({"1.weight.m": f.pop(LAST)}),
            r"missing '1\.weight\.magnitude'; unexpected '1\.weight\.m'",
        ),
        (lambda t, m, f: f.update({"1.wieght.m": f.pop(LAST)}), r"unexpected '1\.wieght\.m'; nearest: '1\.weight'"),
        (lambda t, m, f: f.update({LAST: torch.zeros(4)}), rf"'{LAST}' has shape \(4,\); the model takes \(3,\)"),
        (lambda t, m, f: f.update({LAST: torch.full((3,), torch.nan)}), rf"'{LAST}' holds NaN or infinity"),
        (lambda t, m, f: f.update({LAST: torch.zeros(3, dtype=torch.bool)}), rf"'{LAST}' has dtype torch\.bool"),
        # Finite, until it is float32 as the factor will be.
        (lambda t, m, f: f.update({LAST: torch.full((3,), 1e300, dtype=torch.float64)}), rf"'{LAST}'.*infinity"),
    ],
)
def test_a_file_that_does_not_fit(saved: Path, edit: Callable[..., Any], match: str) -> None:
    refused(edited(saved, edit), match)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64])
def test_tensors_of_another_float_type_are_loaded_or_refused(saved: Path, dtype: torch.dtype) -> None:
    path, model = edited(saved, lambda t, m, f: f.update({LAST: torch.ones(3).to(dtype)})), base()
    try:
        lp.load(model, path)
    except lp.FormatError as error:
        assert LAST in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(lp.state_dict(model)[LAST], torch.ones(3), rtol=0, atol=0)  # one is exact


def test_the_wrong_model(saved: Path) -> None:
    refused(saved, r"'0\.weight\[1/2\]'.*no parameter '0\.weight'", nn.Sequential(nn.ReLU(), nn.Linear(4, 3)))
    refused(saved, r"shape \(1, 6\); the model takes \(1, 7\)", nn.Sequential(nn.Linear(7, 4), nn.Linear(4, 3)))
    refused(saved, r"'0\.weight\[1/2\]'.*5 output rows", nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)))
    refused(saved, r"'0\.weight\[1/2\]'.*on the meta device", base().to("meta"))


def test_another_base_is_refused_under_a_method_that_depends_on_it(saved: Path, folder: Path) -> None:
    lp.load(base().to(torch.bfloat16), saved)  # the same base, rounded
    model = base()
    with torch.no_grad():
        model[1].weight += 0.5
    match = r"'1\.weight': trained as Magnitude on another base weight \(norm .*, here .*check_base=False"
    refused(saved, match, model)
    assert len(lp.load(model, saved, check_base=False)) == 4
    lp.save(adapted({"1": lp.LoRA(r=1)}), folder / "lora.safetensors")
    assert len(lp.load(model, folder / "lora.safetensors", name="lora")) == 1  # the same difference on any base


def test_two_targets_that_are_one_weight_of_this_model(folder: Path) -> None:
    """The adapter could keep only one of the two pairs of factors that the file has for a tied weight."""
    untied, tied = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
    tied[1].weight = tied[0].weight
    lp.attach(untied, lp.LoRA(r=1))
    lp.save(untied, folder / "untied.safetensors")
    refused(folder / "untied.safetensors", r"'[01]\.weight'", tied)


def test_two_targets_that_overlap(saved: Path) -> None:
    old, new = "0.weight[1/2]", "0.weight[2:4]"  # the rows of [2/2]

    def edit(targets: dict[str, Any], metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
        targets[new] = targets.pop(old)
        tensors.update({f"{new}.lora_{factor}": tensors.pop(f"{old}.lora_{factor}") for factor in "AB"})

    refused(edited(saved, edit), r"'0\.weight\[(2:4|2/2)\]'")


# --- damage -----------------------------------------------------------------------------------------------------


def test_an_interrupted_load_has_changed_nothing(saved: Path) -> None:
    model = base()
    assert interrupted_everywhere(model, lambda: lp.load(model, saved)) > 50
    assert values(model) == values(adapted())


@given(st.data())
def test_a_damaged_file_is_refused_or_loads(saved: Path, data: st.DataObject) -> None:
    content = bytearray(saved.read_bytes())
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        at = data.draw(st.integers(0, len(content) - 1), label="at")
        width = data.draw(st.integers(0, 4), label="bytes replaced")
        content[at : at + width] = data.draw(st.binary(max_size=4), label="by")
    path = saved.with_name("damaged.safetensors")
    path.write_bytes(content)
    model = base()
    before = fingerprint(model)
    try:
        plan = lp.load(model, path, check_base=data.draw(st.booleans()))
    except lp.LoraparamError as error:
        assert repr(str(path)) in str(error)  # noqa: PT017
    else:
        assert lp.adapters(model)["default"] == {row.path: row.method for row in plan}
        assert all(bool(torch.isfinite(factor).all()) for factor in lp.parameters(model))
        lp.detach(model)
    assert_untouched(model, before)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=3), below, max_size=3),
    max_leaves=4,
)


@given(st.data())
def test_any_json_in_the_place_of_any_other_is_refused_or_loads(saved: Path, data: st.DataObject) -> None:
    def replace(place: Any, *_: Any) -> None:
        while True:
            key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
            if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
                place[key] = data.draw(JSON)
                return
            place = place[key]

    path, model = edited(saved, replace), base()
    before = fingerprint(model)
    try:
        lp.load(model, path)
    except lp.FormatError as error:
        assert repr(str(path)) in str(error)  # noqa: PT017
    else:
        model(torch.ones(1, 6))
        lp.detach(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("format", ["loraparam", "peft", "kohya"])
def test_a_full_disk_leaves_nothing_and_the_error_names_the_file(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted({"1": lp.LoRA(r=1)})
    (tmp_path / "there").mkdir()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/there/new/folder/adapter"):
        lp.save(model, tmp_path / "there/new/folder/adapter", format=format)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
