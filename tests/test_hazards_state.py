"""Hazards of plain ``parametrize`` in tied weights, state dicts and checkpoints; see test_hazards.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hazards import EXACT, adapted, factors_of, x
from torch import nn
from torch.testing import assert_close

import loraparam as lp

# --- ties (S13, S14) ---------------------------------------------------------------------------------------


def t5() -> Any:
    sizes = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0)
    return transformers.T5ForConditionalGeneration(config)


def test_adapting_t5s_shared_module_reaches_its_readers() -> None:
    """T5 never calls `shared`: its parameter is read by the encoder, the decoder and the head. No effect, no error."""
    model, ids = t5(), torch.tensor([[1, 2, 3]])
    base = model(input_ids=ids, decoder_input_ids=ids).logits
    adapted(model, targets="shared")
    assert (model(input_ids=ids, decoder_input_ids=ids).logits - base).abs().max() > 0.1
    (row,) = lp.check(model, input_ids=ids, decoder_input_ids=ids)
    assert (row.path, row.gradient) == ("shared.weight", "arrived")
    assert row.unread == ("shared.weight",)


def test_a_parameter_that_no_forward_reads_is_named_by_check() -> None:
    """A parametrization that nobody evaluates is silent."""
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    model.forward = lambda x: model["used"](x)
    lp.attach(model, lp.LoRA(r=2))
    with pytest.raises(lp.AttachError, match=r"dead target.*'unused\.weight'"):
        lp.check(model, x())


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("target", ["0", "1"])
def test_merging_a_tied_weight_keeps_the_tie(target: str) -> None:
    """Removing one side writes its delta into the shared Parameter, and the other side changes too."""
    model, ids = adapted(tied(), targets=target), torch.tensor([0, 5])
    output = model(ids)
    lp.merge(model)
    assert model[0].weight is model[1].weight
    assert_close(model(ids), output)


@pytest.mark.parametrize("change", [lp.merge, lp.detach])
def test_one_side_of_a_tied_weight_is_not_changed_alone(change) -> None:
    """As above, with only one of the two layers at hand."""
    model, ids = adapted(tied(), targets="0"), torch.tensor([0, 5])
    output = model(ids)
    with pytest.raises(lp.AttachError, match="tied with 1 place outside of this module"):
        change(model[0])
    assert_close(model(ids), output, **EXACT)


# --- state dicts (S11, S12) --------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_a_checkpoint_with_the_original_keys_reaches_the_base(strict: bool, assign: bool) -> None:
    """strict=True raises on every key; strict=False returns quietly without having loaded the weight."""
    model = adapted()
    before = {name: factor.detach().clone() for name, factor in factors_of(model).items()}
    checkpoint_ = {"weight": torch.ones(4, 4), "bias": torch.zeros(4)}
    given = dict(checkpoint_)
    result = model.load_state_dict(checkpoint_, strict=strict, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert checkpoint_.keys() == given.keys()
    assert_close(dict(lp.base_state_dict(model)), given, **EXACT)
    assert_close(factors_of(model), before, **EXACT)


def test_an_adapted_models_own_state_dict_loads_into_another() -> None:
    """Trainer's resume and DCP rely on the parametrize names; renaming them for good would break both."""
    model, other = adapted(), adapted()
    names = ["bias", *(f"parametrizations.weight.{n}" for n in ("original", "0.default.lora_A", "0.default.lora_B"))]
    assert list(model.state_dict()) == names == [name for name, _ in model.named_parameters()]
    other.load_state_dict(model.state_dict())
    assert_close(other(x()), model(x()), **EXACT)


def test_a_naive_save_pretrained_is_refused(tmp_path) -> None:
    """The file has parametrize's keys: from_pretrained re-initialises the layer, with a warning in a log."""
    model = adapted(t5(), targets="SelfAttention.q")
    with pytest.raises(lp.AttachError, match=r"save_pretrained\(\) of a model with adapters .* start at random"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_on_a_root_module_keeps_its_name_in_a_checkpoint(tmp_path) -> None:
    """save_pretrained would write architectures: ["ParametrizedCLIPModel"]."""
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**tower, "vocab_size": 8, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**tower, "image_size": 4, "patch_size": 2}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    adapted(model, lp.Full(), "logit_scale")
    model.save_pretrained(tmp_path, state_dict=lp.merged_state_dict(model))
    reloaded = transformers.CLIPModel.from_pretrained(tmp_path)
    assert reloaded.config.architectures == ["CLIPModel"]
    assert_close(reloaded.logit_scale, lp.effective_weight(model, "logit_scale"))
