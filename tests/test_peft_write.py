"""Writing PEFT's format: PEFT itself loads, computes and merges what was saved; what it cannot hold is refused."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_files import Experts
from peft_models import Tied, base_and_input, in_peft, output
from safetensors import safe_open
from test_plans import unchanged
from torch import nn

import loraparam as lp
from loraparam.testing.subjects import shake

Targets = dict[Any, lp.Method]

LORA, DORA = lp.LoRA(r=2, alpha=5), lp.DoRA(r=2, alpha=5)
WRITTEN: dict[str, tuple[str, Targets]] = {
    "ranks and scales": ("linear", {"a": LORA, "b": lp.LoRA(r=3, rslora=True)}),
    "DoRA": ("linear", {"a": DORA, "b": lp.DoRA(r=3)}),
    "DoRA with epsilon": ("linear", {"a": lp.DoRA(r=2, eps=0.5)}),
    "LoRA beside DoRA": ("linear", {"a": LORA, "b": DORA}),
    "Magnitude": ("linear", {"a": LORA, "b": lp.Magnitude()}),
    "slices": ("linear", {"a.weight[1/2]": LORA, "a.weight[2/2]": lp.LoRA(r=1)}),
    "bias of an adapted layer": ("linear", {"a": LORA, "a.bias": lp.Full()}),
    "bias of another layer": ("linear", {"b": LORA, "a.bias": lp.Full()}),
    "norm": ("linear", {"a": LORA, "norm": lp.Full()}),
    "whole layer": ("linear", {"a": LORA, "b": lp.Full(), "norm.bias": lp.Full()}),
    "statistics": ("statistics", {"a": LORA, "norm.weight": lp.Full()}),
    "embedding": ("embedding", {"tokens": LORA, "head": lp.LoRA(r=1)}),
    "embedding, DoRA": ("embedding", {"tokens": DORA, "head": lp.LoRA(r=1)}),
    "whole embedding": ("embedding", {"tokens": lp.Full(), "head": LORA}),
    "1d": ("convolutions", {"one": LORA, "head": lp.LoRA(r=1)}),
    "1d, DoRA": ("convolutions", {"one": DORA, "head": lp.LoRA(r=1)}),
    "2d": ("2d", {"two": LORA}),
    "2d, DoRA": ("2d", {"two": DORA}),
    "3d": ("3d", {"three": lp.LoRA(r=3)}),
    "groups": ("groups", {"two": LORA, "one": lp.LoRA(r=1)}),
    "(in, out)": ("transposed", {"c": LORA}),
    "(in, out), DoRA": ("transposed", {"c": DORA, "a": lp.LoRA(r=1)}),
    "attention": ("attention", {"attn.in_proj_weight": LORA}),
    "queries and values": ("attention", {"attn.in_proj_weight[q,v]": LORA, "head": lp.LoRA(r=1)}),
    "attention's biases": (
        "attention",
        {"attn.in_proj_weight": LORA, "attn.in_proj_bias": lp.Full(), "attn.out_proj.bias": lp.Full()},
    ),
    "whole attention": ("attention", {"head": LORA, "attn.in_proj_weight": lp.Full()}),
    "three projections": ("wide attention", {"attn.q_proj_weight": LORA, "attn.v_proj_weight": lp.LoRA(r=1)}),
    "experts": ("experts", {"a": lp.LoRA(r=3), "experts.*": LORA}),
    "experts, one parameter": ("experts", {"experts.down_proj": LORA}),
    "one expert": ("experts", {"experts.down_proj[1]": LORA}),
    "experts, transposed": ("experts, transposed", {"a": lp.LoRA(r=3), "experts.*": LORA}),
    "like names": ("like names", {re.compile("q.weight"): LORA, re.compile("k.weight"): lp.Full()}),
    "Llama": ("Llama", {"self_attn.*": LORA, "embed_tokens": lp.LoRA(r=1), "norm": lp.Full(), "lm_head": lp.Full()}),
    "Mixtral": ("Mixtral", {"q_proj": LORA, "experts.*": lp.LoRA(r=3, alpha=7), "mlp.gate": lp.LoRA(r=1)}),
    "layers named like parts of experts": (
        "GLM",
        {"self_attn.*": LORA, "shared_experts.*": lp.LoRA(r=3), "experts.down_proj": LORA},
    ),
    "GPT2": ("GPT2", {"c_attn": LORA, "c_proj": DORA, "wpe": lp.LoRA(r=1)}),
}


def adapted(name: str, targets: Targets) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """(a base, the same with a trained adapter, an input)."""
    base, x = base_and_input(name)
    model = copy.deepcopy(base)
    lp.attach(model, targets)
    shake(model)
    return base, model, x


def close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """float32 sums in another order, of numbers around 1."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("case", WRITTEN)
def test_peft_computes_the_same(case: str, tmp_path: Path) -> None:
    name, targets = WRITTEN[case]
    base, model, x = adapted(name, targets)
    lp.save(model, tmp_path / "out", format="peft")
    merged = lp.merged_state_dict(model)
    theirs = in_peft(base, tmp_path / "out")
    # Outputs go up to 50 with these weights.
    torch.testing.assert_close(output(theirs, x), output(model, x), rtol=1e-5, atol=1e-4)
    if name != "groups":  # which PEFT refuses to merge
        close(theirs.merge_and_unload().state_dict(), merged)
    lp.load(base, tmp_path / "out")
    close(lp.merged_state_dict(base), merged)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_what_is_written(tmp_path: Path) -> None:
    """s in B, alpha = r, one rank, full paths, no patterns; the training's numbers in the header."""
    _, model, _ = adapted(*WRITTEN["ranks and scales"])
    lp.save(model, tmp_path, format="peft", base_model_name_or_path="some/model")
    assert config_of(tmp_path) == {
        "peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["a", "b"], "bias": "none",
        "fan_in_fan_out": False, "use_dora": False, "use_rslora": False, "inference_mode": True, "task_type": None,
        "base_model_name_or_path": "some/model", "peft_version": "0.21.2",
    }  # fmt: skip
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        A = file.get_tensor("base_model.model.a.lora_A.weight")
        B = file.get_tensor("base_model.model.a.lora_B.weight")
        header = json.loads(file.metadata()["loraparam"])
    start = "base_model.model."
    assert shapes == {
        f"{start}a.lora_A.weight": (3, 6), f"{start}a.lora_B.weight": (10, 3),
        f"{start}b.lora_A.weight": (3, 10), f"{start}b.lora_B.weight": (4, 3),
    }  # fmt: skip
    own = lp.state_dict(model)
    assert torch.equal(A[:2], own["a.weight.lora_A"])
    assert not A[2].any()
    torch.testing.assert_close(B[:, :2], own["a.weight.lora_B"] * 2.5)
    assert header["training"]["a.weight"][1]["alpha"] == 5
    assert header["training"]["b.weight"][1]["rslora"] is True


def test_few_rows_of_an_embedding_are_trainable_tokens(tmp_path: Path) -> None:
    base, model, _ = adapted("embedding", {"tokens": lp.Full(), "head": LORA})
    with torch.no_grad():
        lp.state_dict(model)["tokens.weight.diff"][[0, *range(2, 9)]] = 0
    lp.save(model, tmp_path, format="peft")
    assert config_of(tmp_path)["trainable_token_indices"] == {"tokens": [1, 9, 10]}
    merged = lp.merged_state_dict(model)
    close(in_peft(base, tmp_path).merge_and_unload().state_dict(), merged)
    lp.load(base, tmp_path)
    close(lp.merged_state_dict(base), merged)


def test_a_whole_embedding_is_a_module_to_save(tmp_path: Path) -> None:
    _, model, _ = adapted(*WRITTEN["whole embedding"])
    lp.save(model, tmp_path, format="peft")
    assert config_of(tmp_path)["modules_to_save"] == ["tokens"]


@pytest.mark.parametrize("layout", [lp.Layout(out=1), lp.Layout()])
@pytest.mark.parametrize("name", ["linear", "transposed"])
def test_a_weight_read_the_other_way(name: str, layout: lp.Layout, tmp_path: Path) -> None:
    """(B·A)ᵀ is a pair as well; the norms of a DoRA are others."""
    base, _ = base_and_input(name)
    model = copy.deepcopy(base)
    lp.attach(model, LORA, "a", layout=layout)
    shake(model)
    lp.save(model, tmp_path, format="peft")
    close(in_peft(base, tmp_path).merge_and_unload().state_dict(), lp.merged_state_dict(model))
    lp.detach(model)
    lp.attach(model, DORA, "a", layout=layout)
    if layout.out:
        with pytest.raises(lp.FormatError, match="DoRA has no form in PEFT"):
            lp.save(model, tmp_path / "dora", format="peft")
    else:
        lp.save(model, tmp_path / "dora", format="peft")


@pytest.mark.parametrize("methods", [{"a": DORA}, {"a": LORA, "b": DORA}])
def test_a_row_of_zeros_has_no_dora_in_peft(methods: Targets, tmp_path: Path) -> None:
    """Ours leaves it at zero; PEFT divides by its length."""
    model, _ = base_and_input("linear")
    with torch.no_grad():
        model.a.weight[0] = 0
    lp.attach(model, methods)
    with pytest.raises(lp.FormatError, match=r"'a\.weight': .*a row of zeros, of which PEFT's DoRA makes NaN"):
        lp.save(model, tmp_path, format="peft")


# --- (IA)³ ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "transposed", "2d", "3d"])
def test_peft_rescales_the_same(name: str, tmp_path: Path) -> None:
    base, x = base_and_input(name)
    model = copy.deepcopy(base)
    first, *others = (path for path, module in base.named_modules() if hasattr(module, "weight") and path != "norm")
    methods: Targets = {f"{first}.weight": lp.IA3(), f"{first}.bias": lp.IA3()}
    lp.attach(model, methods | {f"{path}.weight": lp.IA3(axis="in") for path in others})
    shake(model)
    scales = lp.state_dict(model)
    with torch.no_grad():
        scales[f"{first}.bias.scale"].copy_(scales[f"{first}.weight.scale"])
    lp.save(model, tmp_path, format="peft")
    # It is for all layers of a file: none of these models has (in, out) alone.
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    theirs = in_peft(base, tmp_path)
    torch.testing.assert_close(output(theirs, x), output(model, x), rtol=1e-5, atol=1e-5)
    merged = lp.merged_state_dict(model)
    close(theirs.merge_and_unload().state_dict(), merged)
    lp.load(base, tmp_path)
    close(lp.merged_state_dict(base), merged)


# --- the output projection of an attention ----------------------------------------------------------------------


def test_an_output_projection_is_written_for_the_peft_that_reads_it(tmp_path: Path) -> None:
    """PEFT up to 0.21.2 adds its delta twice, so half of it is written; our reader knows."""
    base, model, x = adapted("attention", {"attn": LORA})
    merged = lp.merged_state_dict(model)
    with pytest.warns(UserWarning, match=r"'attn\.out_proj\.weight': PEFT up to 0\.21\.2 .* half of it is written"):
        lp.save(model, tmp_path / "warned", format="peft")
    for choice in ("twice", "once"):
        lp.save(model, tmp_path / choice, format="peft", out_proj=choice)
    for folder in ("warned", "twice"):
        theirs = in_peft(base, tmp_path / folder)
        torch.testing.assert_close(output(theirs, x), output(model, x), rtol=1e-5, atol=1e-4)
        close(theirs.merge_and_unload().state_dict(), merged)
    for folder in ("warned", "twice", "once"):
        again = copy.deepcopy(base)
        lp.load(again, tmp_path / folder)
        close(lp.merged_state_dict(again), merged)


# --- what PEFT cannot hold --------------------------------------------------------------------------------------


class Mine(lp.Full):
    """A method that PEFT does not know."""


REFUSED: dict[str, tuple[str, Targets, str]] = {
    "other axis": ("linear", {"a": lp.DoRA(r=2, axis="in")}, r"'a\.weight': DoRA has no form .* per output feature"),
    "grouped DoRA": ("groups", {"two": DORA}, r"'two\.weight': DoRA has no form .* ungrouped convolutions"),
    "attention beside DoRA": (
        "attention",
        {"attn.in_proj_weight": LORA, "head": DORA},
        r"'attn\.in_proj_weight': .* for all or none",
    ),
    "DoRA of a layer named like a part of experts": (
        "GLM",
        {"q_proj": DORA, "shared_experts.up_proj": DORA},
        r"shared_experts\.up_proj\.weight': DoRA has no form .* takes its name for a part of a stack",
    ),
    "experts' DoRA": ("experts", {"experts.down_proj": DORA}, r"'experts\.down_proj': DoRA has no form"),
    "both on one weight": (
        "linear",
        {"a.weight[1/2]": LORA, "a.weight[2/2]": lp.Full()},
        r"cannot be written as one low-rank pair",
    ),
    "norms alone": ("linear", {"norm": lp.Full()}, r"adapts no layer: .* Attach one as well"),
    "a scale and no bias's": ("linear", {"a.weight": lp.IA3()}, r"'a\.weight': IA3 has no form .* attach IA3 there"),
    "scales and LoRA": ("linear", {"b": lp.IA3(), "a": LORA}, r"IA3 or LoRA, not both"),
    "scales and a bias": ("linear", {"b": lp.IA3(), "norm.bias": lp.Full()}, r"new biases beside IA3"),
    "scales of inputs and a bias": (
        "linear",
        {"a.weight": lp.IA3(axis="in"), "a.bias": lp.IA3()},
        r"'a\.bias': .* its layer's output only",
    ),
    "scales within a kernel": (
        "2d",
        {"two.weight": lp.IA3(axis="in")},
        r"'two\.weight': .* one number per input channel",
    ),
    "a norm named like a layer": (
        "like names",
        {"net.k": LORA, re.compile("k.weight"): lp.Full()},
        r"PEFT would store 'net\.k' too, whose path ends alike",
    ),
    "a method of the user's": ("linear", {"a": Mine()}, r"'a\.weight': Mine has no form in PEFT: PEFT has no such"),
    "scales of an embedding": ("embedding", {"tokens": lp.IA3()}, r"IA3 for Linear, Conv2d, Conv3d and"),
    "part of a wrapped module": (
        "experts",
        {"experts.down_proj": LORA, "experts.gate_up_proj": lp.Full()},
        r"stores biases of it only",
    ),
}


def test_what_peft_computes_otherwise_in_a_convolution_is_said(tmp_path: Path) -> None:
    model = nn.ModuleDict({"c": nn.Conv1d(4, 6, 2, dilation=2)})
    lp.attach(model, LORA, "c")
    with pytest.warns(UserWarning, match=r"'c\.weight': PEFT's own forward .* does not know dilation"):
        lp.save(model, tmp_path / "out", format="peft")


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_hold_is_refused(case: str, tmp_path: Path) -> None:
    name, targets, match = REFUSED[case]
    _, model, _ = adapted(name, targets)
    with unchanged(model), pytest.raises(lp.FormatError, match=match) as caught:
        lp.save(model, tmp_path / "out", format="peft")
    assert "save it as 'loraparam'" in str(caught.value) or case == "both on one weight"
    assert not (tmp_path / "out").exists()


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.net = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("make", "targets", "match"),
    [
        (lambda: nn.Linear(4, 6), {"weight": LORA}, "not the model's own: put it into one"),
        (Own, {"net": LORA, "scale": lp.Full()}, "it is the model's own"),
        (
            lambda: nn.ModuleDict({"m": Own()}),
            {"m.net": LORA, "m.scale": lp.Full()},
            "is in, 'm.net', which PEFT wraps",
        ),
        (lambda: nn.ModuleDict({"l": nn.LSTM(3, 4)}), {"l": LORA}, "read a flat copy"),
        (
            lambda: nn.ModuleDict({"l": nn.ConvTranspose1d(3, 4, 2)}),
            {"l": LORA},
            r"no layer for its module, shape \(3,",
        ),
        (lambda: nn.ModuleDict({"l": nn.Bilinear(3, 4, 2)}), {"l": LORA}, r"no layer for its module, shape \(2, 3"),
        (Tied, {"tokens": LORA}, "it is tied to another"),
        (Tied, {"head.weight": lp.IA3()}, "it is tied to another"),
        (
            lambda: nn.ModuleDict({"e": Experts(2, 3, 4), "net": nn.ModuleDict({"e": Experts(2, 3, 4)})}),
            {re.compile(r"e\.down_proj"): LORA},
            r"PEFT would adapt 'net\.e\.down_proj' as well",
        ),
        (Tied, {"mix": LORA, "tokens": lp.Full()}, "it is tied to 'head.weight'"),
    ],
)
def test_places_that_peft_does_not_reach(make: Any, targets: Targets, match: str, tmp_path: Path) -> None:
    model = make()
    lp.attach(model, targets)
    shake(model)
    with unchanged(model), pytest.raises(lp.FormatError, match=match):
        lp.save(model, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()
