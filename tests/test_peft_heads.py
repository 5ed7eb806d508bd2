"""The heads that PEFT stores whole for a task: PEFT finds them in what was saved, trained or not."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft_models import in_peft
from test_plans import unchanged
from torch import Tensor, nn

import loraparam as lp
from loraparam.testing.subjects import shake

LORA = lp.LoRA(r=2, alpha=5)
# {class: (task, its head)}
HEADS = {
    "BertForSequenceClassification": ("SEQ_CLS", "classifier"),
    "LlamaForSequenceClassification": ("SEQ_CLS", "score"),
    "RobertaForSequenceClassification": ("SEQ_CLS", "classifier"),  # of two layers
    "BertForTokenClassification": ("TOKEN_CLS", "classifier"),
    "BertForQuestionAnswering": ("QUESTION_ANS", "qa_outputs"),
    "BertModel": ("SEQ_CLS", None),
}
IDS = torch.arange(10).reshape(2, 5) + 2


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name.partition('For')[0].removesuffix('Model')}Config")(
        vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, pad_token_id=1
    )
    model: nn.Module = getattr(transformers, name)(config)
    return model.eval()


def attention(model: nn.Module) -> str:
    return "query" if any(name.endswith("query") for name, _ in model.named_modules()) else "q_proj"


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=IDS)
    return torch.cat([t.flatten() for t in found.to_tuple() if isinstance(t, Tensor)])


def same(base: nn.Module, model: nn.Module, folder: Path) -> None:
    expected = outputs(model)
    torch.testing.assert_close(outputs(in_peft(base, folder).eval()), expected, rtol=0, atol=1e-5)
    again = copy.deepcopy(base)
    lp.load(again, folder)
    torch.testing.assert_close(outputs(again), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trained", ["no", "as part of the base", "by an adapter", "its bias"])
@pytest.mark.parametrize("name", HEADS)
def test_peft_finds_the_head(name: str, trained: str, tmp_path: Path) -> None:
    base = model_of(name)
    task, head = HEADS[name]
    model, targets = copy.deepcopy(base), {attention(base): LORA}
    if head is not None and trained == "by an adapter":
        targets |= {f"{head}.**": lp.Full()}
    if head == "classifier" and trained == "its bias":
        targets |= {f"{head}.**.bias" if "Roberta" in name else f"{head}.bias": lp.Full()}
    lp.attach(model, targets, train=head if head is not None and trained == "as part of the base" else ())
    shake(model)
    if trained == "as part of the base":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 if parameter.requires_grad else 0
    with unchanged(model):
        lp.save(model, tmp_path, format="peft", task_type=task)
    same(base, model, tmp_path)


def test_scales_and_a_head(tmp_path: Path) -> None:
    base = model_of("BertForSequenceClassification")
    model = copy.deepcopy(base)
    lp.attach(model, lp.IA3(axis="in"), "query")
    shake(model)
    lp.save(model, tmp_path, format="peft", task_type="SEQ_CLS")
    same(base, model, tmp_path)


def test_a_head_under_lora_is_refused(tmp_path: Path) -> None:
    model = model_of("BertForSequenceClassification")
    lp.attach(model, LORA, ["query", "classifier"])
    match = r"'classifier\.weight': PEFT stores the head of task_type='SEQ_CLS' whole; give it lp\.Full\(\)"
    with unchanged(model), pytest.raises(lp.FormatError, match=match):
        lp.save(model, tmp_path / "out", format="peft", task_type="SEQ_CLS")
    assert not (tmp_path / "out").exists()
    lp.save(model, tmp_path / "out", format="peft")


def test_without_the_base_no_head_is_known(tmp_path: Path) -> None:
    model = model_of("BertForSequenceClassification")
    lp.attach(model, LORA, "query")
    lp.save(model, tmp_path / "own")
    options: dict[str, Any] = {"to": "peft", "options": {"task_type": "SEQ_CLS"}}
    match = r"task_type='SEQ_CLS': PEFT stores the model's head .*; the base is needed"
    with pytest.raises(lp.FormatError, match=match):
        lp.convert(tmp_path / "own", tmp_path / "out", **options)
    lp.convert(tmp_path / "own", tmp_path / "out", base=model, **options)
    same(plain_copy(model), model, tmp_path / "out")


def plain_copy(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model)
    lp.detach(plain)
    return plain
