"""Reading kohya's, LyCORIS' and ComfyUI's files: effective weights, names, and what is refused."""

import pytest
import torch
from diffusion_files import CASES, Case, base_of, case
from test_plans import unchanged
from torch import Tensor, nn

import loraparam as lp
from loraparam.formats import kohya
from loraparam.formats.bases import Base, FileBase
from loraparam.formats.content import Content

REFUSED = {"lycoris/diag_oft": "OFT", "lycoris/loha": "LoHa", "lycoris/lokr": "LoKr"}
READ = [name for name in CASES if name.partition("/")[0] != "diffusers" and name not in REFUSED]


def dense(content: Content, base: Base) -> dict[str, Tensor]:
    """{parameter: effective value in float64} of what a file changes."""
    found = {}
    for item in content.items:
        weight = base.tensor(item.parameter).double()
        factors = {key: factor.double() for key, factor in item.factors.items()}
        found[item.parameter] = item.method.apply(weight, factors, item.layout)
    return found | {path: value.double() for path, value in content.replaced.items()}


def without_level(name: str) -> str:
    return name.replace(".text_model.", ".")


# --- files of the tools themselves ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READ)
def test_effective_weights_are_the_tools_own(name: str) -> None:
    subject = case(name)
    base = FileBase(subject.base_file)
    found = dense(kohya.read(subject.file, base), base)
    assert set(found) == set(subject.spec["changed"])
    for path, value in subject.wanted().items():
        torch.testing.assert_close(found[path], value.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", READ)
def test_loaded_into_a_model_it_computes_what_the_tool_computes(name: str) -> None:
    subject = case(name)
    model = base_of(subject)
    lp.load(model, subject.file)
    merged = lp.merged_state_dict(model)
    for path, value in subject.wanted().items():
        found = merged.get(path, merged.get(without_level(path)))
        torch.testing.assert_close(found, value.float(), rtol=1e-5, atol=1e-6)
    check_output(model, subject)


@torch.no_grad()
def check_output(model: nn.Module, subject: Case) -> None:
    """The model's output is the tool's own."""
    torch.testing.assert_close(_output(model, subject), subject.expected["output"], rtol=1e-4, atol=1e-4)


def _output(model: nn.Module, subject: Case) -> Tensor:
    if "kind" in subject.spec["base"]:
        return model(subject.expected["input"])  # type: ignore[no-any-return]
    hidden = model["text_encoder"](subject.expected["ids"]).last_hidden_state  # type: ignore[index]
    torch.testing.assert_close(hidden, subject.expected["text_hidden"], rtol=1e-4, atol=1e-4)
    unet = model["unet"]  # type: ignore[index]
    return unet(subject.expected["input"], subject.expected["timestep"], hidden).sample  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", REFUSED)
def test_other_algorithms_are_refused_by_name(name: str) -> None:
    subject = case(name)
    model = base_of(subject)
    with unchanged(model), pytest.raises(lp.FormatError, match=rf"'lycoris_\w+\.\w+': {REFUSED[name]}.* is not read; "):
        lp.load(model, subject.file)
