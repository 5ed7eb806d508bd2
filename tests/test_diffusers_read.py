"""Reading diffusers' files: effective weights, scales, the spellings of a pair, parts, and what is refused."""

import pytest
import torch
from diffusion_files import CASES, base_of, case
from test_kohya_read import check_output, dense, without_level

import loraparam as lp
from loraparam.formats import diffusers
from loraparam.formats.bases import FileBase

FILES = [name for name in CASES if name.startswith("diffusers/")]


@pytest.mark.parametrize("name", FILES)
def test_effective_weights_are_diffusers_own(name: str) -> None:
    subject = case(name)
    base = FileBase(subject.base_file)
    alpha = subject.spec.get("network_alphas")  # diffusers keeps the alphas of the oldest spelling beside the file
    found = dense(diffusers.read(subject.file, base, alpha=alpha), base)
    assert set(found) == set(subject.spec["changed"])
    for path, value in subject.wanted().items():
        torch.testing.assert_close(found[path], value.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_loaded_into_a_model_it_computes_what_diffusers_computes(name: str) -> None:
    subject = case(name)
    model = base_of(subject)
    alpha = subject.spec.get("network_alphas")
    lp.load(model, subject.file, **({} if alpha is None else {"alpha": alpha}))
    merged = lp.merged_state_dict(model)
    for path, value in subject.wanted().items():
        found = merged.get(path, merged.get(without_level(path)))
        torch.testing.assert_close(found, value.float(), rtol=1e-5, atol=1e-6)
    check_output(model, subject)
