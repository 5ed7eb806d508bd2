"""Reading PEFT's files: samples that PEFT wrote, and files broken on purpose."""

import pytest
import torch
from peft_files import CASES, DATA, MALFORMED, case
from test_plans import unchanged
from torch import Tensor

import loraparam as lp
from loraparam.formats import peft
from loraparam.formats.bases import Base, FileBase
from loraparam.formats.content import Content

REFUSED = {
    **{f"{kind}_linear": kind.upper() for kind in ("boft", "fourierft", "hra", "oft")},
    "lora_conv2d_grouped": r"a dense convolution before a grouped one.*nor can PEFT merge it",
}
READ = [name for name in CASES if name not in REFUSED]


def dense(content: Content, base: Base) -> dict[str, Tensor]:
    """{parameter: effective value in float64} of what a file changes."""
    found = {}
    for item in content.items:
        weight = base.tensor(item.parameter).double()
        factors = {key: factor.double() for key, factor in item.factors.items()}
        found[item.parameter] = item.method.apply(weight, factors, item.layout)
    return found | {path: value.double() for path, value in content.replaced.items()}


# --- samples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READ)
def test_loaded_into_a_model_it_computes_what_peft_computes(name: str) -> None:
    subject = case(name)
    model = subject.model()
    lp.load(model, subject.folder)
    for path, value in subject.merged.items():
        torch.testing.assert_close(lp.effective_weight(model, path).detach(), value, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        output = model(subject.input)
    # Outputs are sums over up to three layers of float32 products, up to 40 in size.
    torch.testing.assert_close(getattr(output, "logits", output), subject.output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", READ)
def test_a_checkpoint_is_base_enough(name: str) -> None:
    """Only a stack of experts, whose wrappers have no names, may need the model; shapes tell these apart."""
    subject = case(name)
    base = FileBase(subject.folder / "base.safetensors")
    found = dense(peft.read(subject.folder, base), base)
    assert set(found) == set(subject.spec["changed"])
    for path, value in subject.merged.items():
        torch.testing.assert_close(found[path], value.double(), rtol=1e-5, atol=1e-6)


ALONE = [
    name
    for name in READ
    if name.partition("_")[0] not in ("ia3", "loha", "lokr", "vera", "miss")
    and name not in ("ia3_linear", "lora_mixtral", "lora_target_parameters", "lora_trainable_tokens")
]


@pytest.mark.parametrize("name", ALONE)
def test_a_file_alone_says_as_much(name: str) -> None:
    subject = case(name)
    base = FileBase(subject.folder / "base.safetensors")
    found = dense(peft.read(subject.folder, None), base)
    assert set(found) == set(subject.spec["changed"])
    for path, value in subject.merged.items():
        torch.testing.assert_close(found[path], value.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(READ) - set(ALONE)))
def test_or_says_that_it_needs_the_base(name: str) -> None:
    with pytest.raises(lp.FormatError, match=r"the base (model )?is needed"):
        peft.read(case(name).folder, None)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name: str) -> None:
    subject = case(name)
    model = subject.model()
    with unchanged(model), pytest.raises(lp.FormatError, match=REFUSED[name]):
        lp.load(model, subject.folder)


# --- files broken on purpose ------------------------------------------------------------------------------------

BROKEN = {
    "ab_rank_mismatch": r"fc1\.lora_A\.weight' has rank 2, its other half rank 3",
    "alpha_nan": r"adapter_config\.json': not valid JSON: NaN is not a number",
    "config_is_list": r"adapter_config\.json' holds a list; allowed: an object",
    "config_not_json": r"adapter_config\.json': not valid JSON",
    "integer_weights": r"has dtype torch\.int\d+; allowed: a floating-point dtype",
    "missing_B": r"fc1\.lora_A\.weight' has no 'B' beside it",
    "no_peft_type": r"adapter_config\.json': peft_type=None; allowed: a string",
    "pickle_in_disguise": r"adapter_model\.safetensors' is not a readable safetensors file",
    "r_string": r"adapter_config\.json': r='2'; allowed: a positive integer",
    "rank_disagrees": r"gives 'net\.fc1' rank 3; its tensors have rank 2",
    "unknown_module": r"nope\.lora_A\.weight' is for 'nope\.weight', which the model does not have",
    "unknown_suffix": r"fc1\.lora_C\.weight' belong to no adapter and no parameter",
    "unsupported_variant_qalora": r"use_qalora=True; allowed: not set, because QA-LoRA",
    "weights_missing": r"adapter_model\.safetensors' is not a file",
}


def test_every_broken_file_is_here() -> None:
    assert {*BROKEN, "redos_target_modules"} == set(MALFORMED)


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("format", [None, "peft"])
def test_a_broken_file_is_refused(name: str, format: str | None) -> None:
    model = case("lora_linear").model()
    with unchanged(model), pytest.raises(lp.FormatError, match=BROKEN[name]) as caught:
        lp.load(model, DATA / "malformed" / name, format=format)
    assert str(DATA / "malformed" / name) in str(caught.value)
    assert len(str(caught.value)) < 700


def test_no_pattern_of_a_file_is_run() -> None:
    """As a regular expression the one in this file takes minutes; what it says does not matter."""
    assert len(lp.load(case("lora_linear").model(), DATA / "malformed" / "redos_target_modules")) == 2
