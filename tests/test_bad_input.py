"""Bad input: an error that says where, what was given, what is allowed and the way out; and nothing has changed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_plans import two_layers, unchanged
from torch import Tensor, nn
from torch.nn.utils import prune

import loraparam as lp

# --- targets, slices, ranks -------------------------------------------------------------------------------------

LORA = lp.LoRA(r=2)
Match = str  # a regular expression over the whole message


@pytest.mark.parametrize(
    ("targets", "error", "match"),
    [
        ("1.wieght", lp.TargetError, r"'1\.wieght' matches nothing; nearest: '1\.weight'"),
        ("q_proj", lp.TargetError, r"'q_proj' matches nothing; the parameters are '0\.weight', '0\.bias'"),
        (["0", "2"], lp.TargetError, r"'2' matches nothing"),
        (re.compile("0"), lp.TargetError, r"re\.compile\('0'\).* matches nothing; .*'0\.weight'"),
        (nn.Conv2d, lp.TargetError, r"'Conv2d' matches nothing; .*'0\.weight'"),
        (lambda path, module, name: False, lp.TargetError, r"matches nothing; .*'0\.weight'"),
        ("", lp.TargetError, r"target '': not a path .* such as 'in_proj_weight\[q,v\]'"),
        ([], lp.TargetError, r"no targets given; allowed: at least one pattern, such as 'all-linear'"),
        (None, lp.TargetError, r"target None of type NoneType; allowed: a path such as"),
        (0, lp.TargetError, r"target 0 of type int; allowed: a path such as"),
        ("0.bias", lp.TargetError, r"'0\.bias': shape \(4,\) has no input dim; LoRA needs .*lp\.Full\(\).*exclude="),
        ("0[0:9]", lp.TargetError, r"'0\.weight': slice \[0:9\] does not fit.*4 rows; allowed: within \[0:4\]"),
        ("0[3:1]", lp.TargetError, r"'0\.weight': slice \[3:1\] does not fit.*allowed: within \[0:4\]"),
        ("0[2/3]", lp.TargetError, r"'0\.weight': slice \[2/3\]: 4 output rows do not divide into 3 equal blocks"),
        ("0[3/2]", lp.TargetError, r"'0\.weight': slice \[3/2\]: blocks count from 1; allowed: 1/2 to 2/2"),
        ("0[0/2]", lp.TargetError, r"'0\.weight': slice \[0/2\]: blocks count from 1; allowed: 1/2 to 2/2"),
        ("0[q]", lp.TargetError, r"'0\.weight': slice \[q\]: not a part .*; allowed: equal blocks \[k/n\] of 4 rows"),
        ("0[1]", lp.TargetError, r"'0\.weight': slice \[1\]: not a part .*; allowed: .* rows within \[0:4\]"),
        ("0[0:2,1/2]", lp.TargetError, r"'0\.weight': slice \[1/2\] overlaps another one in '0\[0:2,1/2\]'"),
        ("0[]", lp.TargetError, r"'0\[\]': an empty slice; write names, as in '0\[q,v\]' or '0\[0:8\]'"),
        ("0[0:2][1/2]", lp.TargetError, r"'0\[0:2\]\[1/2\]': not a path with at most one bracket"),
        ("0[0:1]", lp.RankError, r"'0\.weight\[0:1\]': r=2 is too large for shape \(1, 6\).*allowed: 1\.\.1"),
    ],
)
def test_targets_that_cannot_be_met(targets: Any, error: type[Exception], match: Match) -> None:
    model = two_layers()
    for call in (lp.plan, lp.attach):
        with unchanged(model), pytest.raises(error, match=match):
            call(model, LORA, targets)


@pytest.mark.parametrize("r", [0, -1, 1.5, "2", True, None])
def test_a_rank_that_no_weight_takes(r: Any) -> None:
    with pytest.raises(lp.RankError, match=rf"DoRA: r={r!r}; allowed: an integer in 1\.\.min\(out, in\)"):
        lp.DoRA(r=r)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: lp.LoRA(alpha=float("nan")), "LoRA: alpha=nan; allowed: a finite number"),
        (lambda: lp.LoRA(alpha="8"), "LoRA: alpha='8'; allowed: a finite number"),
        (lambda: lp.LoRA(alpha=10**400), r"LoRA: alpha=1000+; allowed: a finite number"),
        (lambda: lp.LoRA(dropout=1.0), r"LoRA: dropout=1\.0; allowed: 0 <= dropout < 1"),
        (lambda: lp.LoRA(dropout_on="rows"), "LoRA: dropout_on='rows'; allowed: 'weight', 'input'"),
        (lambda: lp.LoRA(init="zeros"), "LoRA: init='zeros'; allowed: 'kaiming', 'gaussian'"),
        (lambda: lp.LoRA(rslora="no"), "LoRA: rslora='no'; allowed: .*True.*False"),
        (lambda: lp.DoRA(axis="row"), "DoRA: axis='row'; allowed: 'out', 'in'"),
        (lambda: lp.DoRA(eps=-1.0), r"DoRA: eps=-1\.0; allowed: eps >= 0"),
        (lambda: lp.DoRA(detach_norm="no"), "DoRA: detach_norm='no'; allowed: .*True.*False"),
        (lambda: lp.Magnitude(axis=0), "Magnitude: axis=0; allowed: 'out', 'in'"),
    ],
)
def test_hyperparameters_out_of_range(make: Callable[[], lp.Method], match: Match) -> None:
    with pytest.raises(lp.LoraparamError, match=match):
        make()


@pytest.mark.parametrize("method", [lp.LoRA(r=1), lp.DoRA(r=1), lp.Magnitude()])
def test_a_vector_under_a_method_for_matrices(method: lp.Method) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    match = rf"'1\.weight': shape \(4,\) has no input dim; {type(method).__name__} needs"
    with unchanged(model), pytest.raises(lp.TargetError, match=match):
        lp.attach(model, method, ["0", "1"])


# --- arguments of attach and plan -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"exclude": "2"}, lp.TargetError, "'2' matches nothing"),
        ({"train": "2"}, lp.TargetError, "'2' matches nothing"),
        ({"exclude": ["0", "1"]}, lp.TargetError, r"matches only what exclude= leaves out: '0\.weight', '1\.weight'"),
        ({"exclude": "0[0:2]"}, lp.TargetError, r"'0\[0:2\]': .*whole parameters; leave out the \[slice\]"),
        ({"method": {}}, lp.TargetError, "no targets given; allowed: at least one pattern"),
        ({"method": {"0": LORA}, "targets": "1"}, lp.TargetError, "targets='1' beside a mapping"),
        ({"method": {"0": LORA, "1": lp.LoRA(r=9)}}, lp.RankError, r"'1\.weight': r=9"),
        ({"method": lp.DoRA(r=5)}, lp.RankError, r"'0\.weight': r=5 .*shape \(4, 6\), read as .*; allowed: 1\.\.4"),
        ({"method": lp.LoRA}, lp.AttachError, "for target 'all-linear'; allowed: an instance of lp.Method"),
        ({"method": {"0": "lora"}}, lp.AttachError, "method 'lora' for target '0'; allowed: an instance of lp.Method"),
        ({"layout": "out"}, lp.TargetError, "layout='out'; allowed: an lp.Layout, or a mapping"),
        ({"layout": lp.Layout(out=2)}, lp.TargetError, r"'0\.weight': layout .* names dim 2 of a tensor with 2 dims"),
        ({"layout": {"2": lp.Layout()}}, lp.TargetError, "'2' matches nothing"),
    ],
)
def test_arguments_of_attach(arguments: dict[str, Any], error: type[Exception], match: Match) -> None:
    model = two_layers()
    with unchanged(model), pytest.raises(error, match=match):
        lp.attach(model, **{"method": LORA, **arguments})


@pytest.mark.parametrize("name", ["", ".", "..", "a.b", "a/b", "a\\b", "a\0b", "a:b", "a[q]", None, 1])
def test_adapter_names_are_one_path_component(name: Any) -> None:
    model = two_layers()
    match = r"adapter name .*; allowed: one path component .*'style'"
    with unchanged(model), pytest.raises(lp.AttachError, match=match):
        lp.attach(model, LORA, name=name)


# "weight" would be fine; these are attributes of the modules that hold the factors, which torch looks up by name.
@pytest.mark.parametrize("name", ["training", "forward", "entries", "named", "add", "compose", "reorder", "volatile"])
def test_an_adapter_name_either_works_with_torch_or_is_refused(name: str) -> None:
    model = two_layers()
    try:
        lp.attach(model, LORA, name=name)
    except lp.AttachError as error:
        assert "is an attribute of" in str(error)  # noqa: PT017
        return
    parameters = dict(model.named_parameters())
    out = torch.func.functional_call(model, parameters, torch.ones(1, 6))
    # The same parameters through the same code: no rounding between them.
    torch.testing.assert_close(out, model(torch.ones(1, 6)), rtol=0, atol=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: lp.plan(model, LORA),
        lambda model: lp.attach(model, LORA),
        lambda model: lp.activate(model, {}),
        lambda model: lp.effective_weight(model, "weight"),
        lambda model: lp.merged(model).__enter__(),
        lambda model: lp.disabled(model).__enter__(),
        lambda model: lp.save(model, "never-written.safetensors"),
        *(
            lp.detach,
            lp.merge,
            lp.adapters,
            lp.parameters,
            lp.state_dict,
            lp.base_state_dict,
            lp.merged_state_dict,
            lp.summary,
        ),
    ],
)
def test_a_model_that_is_none(call: Callable[[Any], Any]) -> None:
    with pytest.raises(lp.AttachError, match=r"model is a dict; allowed: a torch\.nn\.Module"):
        call({})


def made(factors: Any) -> type[lp.Method]:
    """A method, as a user might write it, whose ``init`` makes these factors."""

    class Odd(lp.Method):
        def init(self, weight: Tensor, layout: lp.Layout, *, generator: Any = None) -> Any:
            return factors

        def apply(self, weight: Tensor, factors: dict[str, Tensor], layout: lp.Layout) -> Tensor:
            return weight

    return Odd


@pytest.mark.parametrize(
    ("factors", "match"),
    [
        (torch.zeros(2), r"'0\.weight': Odd\.init made a Tensor; allowed: a dict of tensors"),
        ({"gain": 1.0}, r"'0\.weight': Odd\.init made a dict; allowed: a dict of tensors"),
        ({"a.b": torch.zeros(2)}, r"'0\.weight': factor 'a\.b' of Odd cannot be a parameter: .*contain"),
        ({"shape": torch.zeros(2)}, r"'0\.weight': factor 'shape' of Odd cannot be a parameter: .*exists"),
        (
            {"rows": torch.zeros(2, dtype=torch.int64)},
            r"'0\.weight': factor 'rows' of Odd .*: Only Tensors of floating",
        ),
    ],
)
def test_a_method_that_makes_no_factors(factors: Any, match: Match, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraparam.methods.base.REGISTRY", {})
    model = two_layers()
    with unchanged(model), pytest.raises(lp.AttachError, match=match):
        lp.attach(model, made(factors)(), "0")


def test_an_execution_of_another_name() -> None:
    with (
        pytest.raises(lp.LoraparamError, match="execution 'fast'; allowed: 'factored', 'merged'"),
        lp.execution("fast"),
    ):
        pass


# --- parameters that cannot be adapted --------------------------------------------------------------------------


class Opaque(Tensor):
    """A quantized weight of some library: integers, and no dequantize() of its own."""


def _integer(cls: type[Tensor] = Tensor) -> nn.Module:
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(torch.ones(4, 6, dtype=torch.int8).as_subclass(cls), requires_grad=False)
    return layer


def _inference() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(6, 4)


def _flat() -> nn.Module:
    layer = nn.Linear(6, 4)
    layer.weight._fsdp_flattened = True  # as FSDP marks what it manages
    return layer


class Sealed(nn.Linear):
    def __init_subclass__(cls, *, key: str) -> None:
        super().__init_subclass__()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (_integer, r"dtype is torch\.int8; allowed: a floating-point tensor, or a quantized one with dequantize"),
        (lambda: _integer(Opaque), r"dtype is torch\.int8; allowed: .* a quantized one with dequantize"),
        (_inference, r"made in inference mode .*; build or load the model outside of torch\.inference_mode"),
        (_flat, r"managed by FSDP; attach first, then shard"),
        (lambda: nn.Linear(6, 4, device="meta"), r"on the meta device .*; load the weights first"),
        (lambda: nn.LazyLinear(4), r"not initialised yet; run one forward"),
        (lambda: nn.Embedding(6, 4, sparse=True), r"sparse=True: .*; set module\.sparse = False"),
        (lambda: nn.EmbeddingBag(6, 4, sparse=True), r"sparse=True: .*; set module\.sparse = False"),
        (lambda: nn.utils.weight_norm(nn.Linear(6, 4)), r"use nn\.utils\.parametrizations\.weight_norm instead"),
        (lambda: nn.utils.spectral_norm(nn.Linear(6, 4)), r"use nn\.utils\.parametrizations\.spectral_norm instead"),
        (lambda: prune.l1_unstructured(nn.Linear(6, 4), "weight", 0.5), r"call prune\.remove\(module, name\) first"),
        (lambda: torch.jit.script(nn.Linear(6, 4)), r"script module, .*; adapt the model, then script a merged copy"),
        (lambda: Sealed(6, 4), r"its class Sealed cannot be subclassed"),
    ],
)
def test_parameters_that_cannot_be_adapted(make: Callable[[], nn.Module], match: Match) -> None:
    # Another target comes first: it must be left alone, too.
    model = nn.ModuleDict({"good": nn.Linear(6, 4), "bad": make()})
    with unchanged(model), pytest.raises(lp.AttachError, match=rf"'bad\.weight': .*{match}"):
        lp.attach(model, lp.LoRA(r=1), ["good", "bad"])


def test_a_script_module_does_not_stand_in_the_way_of_other_targets() -> None:
    model = nn.Sequential(nn.Linear(6, 4), torch.jit.script(nn.Linear(4, 3)))
    before = dict(model.named_parameters())
    lp.attach(model, LORA, "0")
    assert list(lp.adapters(model)["default"]) == ["0.weight"]
    lp.detach(model)
    assert all(parameter is before[path] for path, parameter in model[0].named_parameters(prefix="0"))
    assert [path for path, parameter in model.named_parameters() if not parameter.requires_grad] == []


def test_a_weight_with_adapters_cannot_be_assigned() -> None:
    model = two_layers()
    lp.attach(model, LORA, "0")
    match = r"'weight' of Linear carries adapters.*lp\.detach\(model\) or lp\.merge\(model\) first"
    for value in (nn.Parameter(torch.ones(4, 6)), torch.ones(4, 6)):
        with unchanged(model), pytest.raises(lp.AttachError, match=match):
            model[0].weight = value


# --- names of adapters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda model, name: lp.detach(model, name),
        lambda model, name: lp.merge(model, name),
        lambda model, name: lp.disabled(model, name).__enter__(),
        lambda model, name: lp.activate(model, {"style": 1.0, name: 1.0}),
        lambda model, name: lp.state_dict(model, name),
        lambda model, name: lp.load_state_dict(model, {}, name, strict=False),
        lambda model, name: lp.parameters(model, name),
        lambda model, name: lp.named_parameters(model, name),
        lambda model, name: lp.save(model, "never-written.safetensors", name=name),
    ],
)
def test_an_unknown_adapter(call: Callable[[nn.Module, str], Any]) -> None:
    model = two_layers()
    with pytest.raises(lp.AttachError, match=r"no adapter named 'stile'; none is attached"):
        lp.detach(model, "stile")
    lp.attach(model, LORA, name="style")
    with (
        unchanged(model),
        pytest.raises(lp.AttachError, match="no adapter named 'stile'; attached: 'style'; nearest: "),
    ):
        call(model, "stile")


@pytest.mark.parametrize("targets", ["1", "1[0:2]", ["0", "1"]])
def test_an_adapter_that_is_already_there(targets: Any) -> None:
    model = two_layers()
    lp.attach(model, lp.LoRA(r=1), "1", name="style")
    match = r"'1\.weight.*' already carries adapter 'style'; use another name=, or lp\.detach\(model, 'style'\) first"
    with unchanged(model), pytest.raises(lp.AttachError, match=match):
        lp.attach(model, lp.LoRA(r=1), targets, name="style")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None, True, pytest.param(10**400, id="huge")])
def test_a_weight_of_an_adapter_is_a_finite_number(weight: Any) -> None:
    model = two_layers()
    lp.attach(model, LORA, name="style")
    lp.attach(model, LORA, name="task")
    match = r"adapter 'task': weight .*; allowed: a finite number"
    with unchanged(model), pytest.raises(lp.AttachError, match=match):
        lp.activate(model, {"style": 0.5, "task": weight})
    with unchanged(model), pytest.raises(lp.AttachError, match="activate got a list; allowed: a mapping"):
        lp.activate(model, ["style"])  # type: ignore[arg-type]


# --- files ------------------------------------------------------------------------------------------------------


def refused(path: Path, match: Match, **options: Any) -> None:
    model = two_layers()
    with unchanged(model), pytest.raises(lp.FormatError, match=rf"^{re.escape(repr(str(path)))} {match}"):
        lp.load(model, path, **options)


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
@pytest.mark.parametrize("format", [None, "loraparam"])
def test_a_truncated_file(tmp_path: Path, length: int, format: str | None) -> None:
    model, path = two_layers(), tmp_path / "adapter.safetensors"
    lp.attach(model, LORA)
    lp.save(model, path)
    path.write_bytes(path.read_bytes()[:length])
    refused(path, "is not a readable safetensors file: ", format=format)


def test_a_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    refused(path, "is in no known format; known: 'loraparam'.*'diffusers'")
    refused(path, "is no loraparam file: its header says format None", format="loraparam")
    for content in (b"hello, world", b"\x80\x04K\x01.", b"PK\x03\x04" + bytes(99), b"\xff" * 99):
        path.write_bytes(content)
        refused(path, r"(is not a readable safetensors file|is in no known format)")
    refused(tmp_path / "missing.safetensors", "does not exist")
    refused(tmp_path, "is in no known format; known: 'loraparam'")
    refused(tmp_path, "is not a file", format="loraparam")


# --- effective weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("0.wieght", r"no parameter '0\.wieght'; nearest: '0\.weight'"),
        ("0", "no parameter '0'"),
        ("0.weight[q]", r"'0\.weight': slice \[q\]: not a part of this parameter; allowed: "),
        ("0.weight[0:1,1:2]", r"'0\.weight\[0:1,1:2\]': one slice at a time, such as '0\.weight\[0:1\]'"),
    ],
)
def test_effective_weight_of_what_is_not_there(path: str, match: Match) -> None:
    model = two_layers()
    with unchanged(model), pytest.raises(lp.TargetError, match=match):
        lp.effective_weight(model, path)
