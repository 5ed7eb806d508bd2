"""transformers' Trainer and accelerate on adapted models: training, checkpoints, resuming, the best model's reload."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

import loraparam as lp
from loraparam.integrations.transformers import AdapterCheckpoints

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning"),
    # Its new name is not known to the first releases of transformers 5.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing\\w*. is deprecated:FutureWarning"),
]

EXACT = {"rtol": 0, "atol": 0}
CONFIG = transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
)
ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(32, (8, 6), generator=torch.manual_seed(3))]
TARGETS = {"q_proj": lp.LoRA(r=2), "v_proj": lp.DoRA(r=2, dropout=0.2), "norm": lp.Full()}


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(CONFIG)


def adapted(**options: Any) -> Any:
    model = llama()
    lp.attach(model, TARGETS, **options)
    return model


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    return TrainingArguments(str(folder), **{**quiet, **steps, "learning_rate": 0.05, **options})


def trainer(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    more = {key: options.pop(key) for key in ("compute_metrics",) if key in options}
    rows = {"train_dataset": ROWS, "eval_dataset": ROWS[:2]}
    return Trainer(model, arguments(folder, **options), **rows, **more, callbacks=[AdapterCheckpoints()])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(ROWS[0]["input_ids"][None]).logits


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def warnings_of_transformers() -> Iterator[list[str]]:
    """Collects what it logs as warnings; its loggers do not pass records on."""
    collected: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: collected.append(record.getMessage())
    logger, level = logging.getLogger("transformers"), transformers.logging.get_verbosity()
    logger.addHandler(handler)
    transformers.logging.set_verbosity_warning()
    try:
        yield collected
    finally:
        transformers.logging.set_verbosity(level)
        logger.removeHandler(handler)


# --- Trainer ----------------------------------------------------------------------------------------------------


def test_each_checkpoint_holds_the_adapter_of_its_step(tmp_path: Path) -> None:
    trainer(adapted(), tmp_path, lr_scheduler_type="constant").train()
    outputs = []
    for step in (2, 4):
        stopped, loaded = adapted(), llama()
        trainer(stopped, tmp_path / "other", max_steps=step, lr_scheduler_type="constant").train()
        lp.load(loaded, tmp_path / f"checkpoint-{step}" / "adapters" / "default.safetensors")
        outputs.append(logits(loaded))
        assert_close(outputs[-1], logits(stopped), **EXACT)
    assert not torch.equal(*outputs)


def test_a_checkpoint_has_what_trained_and_not_the_frozen_base(tmp_path: Path) -> None:
    model = adapted(train="layers.0.input_layernorm")
    lp.attach(model, lp.LoRA(r=1), "o_proj", name="second")
    trainer(model, tmp_path).train()
    assert {path.name for path in (tmp_path / "checkpoint-4" / "adapters").iterdir()} == {
        "default.safetensors",
        "second.safetensors",
    }
    assert load_file(tmp_path / "checkpoint-4" / "model.safetensors").keys() == trained_state(model).keys()


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}, {"train": "lm_head"}])
def test_resumed_training_ends_where_uninterrupted_training_does(tmp_path: Path, options: dict[str, Any]) -> None:
    attach = {key: options[key] for key in options if key == "train"}
    options = {key: options[key] for key in options if key not in attach}
    whole, first, second = (adapted(**attach) for _ in range(3))
    trainer(whole, tmp_path / "whole", **options).train()
    start, folder = trained_state(first), tmp_path / "parts"
    trainer(first, folder, **options).train()
    for file in (folder / "checkpoint-4").rglob("*"):
        file.unlink(missing_ok=True) if file.is_file() else None
    with warnings_of_transformers() as warned:
        trainer(second, folder, **options).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert warned == []
    assert_close(trained_state(second), trained_state(whole), **EXACT)
    assert not any(torch.equal(start[name], value) for name, value in trained_state(whole).items())


def test_the_best_checkpoint_is_reloaded(tmp_path: Path) -> None:
    model, scores = adapted(), iter([0.1, 0.9, 0.2, 0.3])

    def score(prediction: Any) -> dict[str, float]:
        return {"score": next(scores)}

    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "save_total_limit": 1}
    each = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "compute_metrics": score}
    run = trainer(model, tmp_path, **best, **each)
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    loaded = llama()
    lp.load(loaded, tmp_path / "checkpoint-2" / "adapters" / "default.safetensors")
    assert_close(logits(model), logits(loaded), **EXACT)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_in_a_trainer_changes_nothing(tmp_path: Path, use_reentrant: bool) -> None:
    plain, checkpointed = adapted(), adapted()
    checkpointed.enable_input_require_grads()
    trainer(plain, tmp_path / "plain").train()
    how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    trainer(checkpointed, tmp_path / "checkpointed", **how).train()
    assert_close(trained_state(checkpointed), trained_state(plain), **EXACT)


def test_generating_while_predicting(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32, decoder_start_token_id=0, **sizes)
    )
    lp.attach(model, {"q": lp.LoRA(r=2, init="gaussian"), "v": lp.DoRA(r=2), "lm_head": lp.LoRA(r=2)})
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    steps = {"max_steps": 4, "learning_rate": 0.05, "predict_with_generate": True}
    args = transformers.Seq2SeqTrainingArguments(str(tmp_path), **quiet, **steps)
    run = transformers.Seq2SeqTrainer(model, args, train_dataset=ROWS, callbacks=[AdapterCheckpoints()])
    prompt = torch.stack([row["input_ids"] for row in ROWS])
    before = model.eval().generate(prompt, max_new_tokens=5, do_sample=False)
    run.train()
    predicted = torch.from_numpy(run.predict(ROWS, max_new_tokens=5, do_sample=False).predictions)
    with lp.merged(model):
        expected = model.eval().generate(prompt, max_new_tokens=5, do_sample=False)
    assert_close(predicted[:, : expected.shape[1]], expected, **EXACT)  # it pads to a length of its own
    assert not torch.equal(expected, before)


class Classifier(nn.Module):
    """A model that is not transformers' own, as the Trainer takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.head = nn.Linear(8, 32)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.embedding(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_a_model_of_ones_own_checkpoints_and_resumes(tmp_path: Path) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Classifier())
        lp.attach(models[-1], lp.DoRA(r=2), "head")
    trainer(models[0], tmp_path).train()
    trainer(models[1], tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_close(trained_state(models[1]), trained_state(models[0]), **EXACT)
    lp.detach(models[1])
    lp.load(models[1], tmp_path / "checkpoint-4" / "adapters" / "default.safetensors")
    assert_close(trained_state(models[1]), trained_state(models[0]), **EXACT)


# --- nothing that reloads at random -----------------------------------------------------------------------------


def test_a_checkpoint_taken_for_a_model_is_refused(tmp_path: Path) -> None:
    trainer(adapted(), tmp_path).train()
    with pytest.raises(FileNotFoundError, match="only-adapters-here-attach-them-with-loraparam-load"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "checkpoint-4").hidden_size == 16


def save_state(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, state_dict=model.state_dict())


def save_inner(model: Any, folder: Path) -> None:
    model.model.save_pretrained(folder)


def save_as_trainer(model: Any, folder: Path) -> None:
    Trainer(model, arguments(folder)).save_model()


def train_without_the_callback(model: Any, folder: Path) -> None:
    Trainer(model, arguments(folder), train_dataset=ROWS).train()


@pytest.mark.parametrize(
    "save",
    [type(llama()).save_pretrained, save_state, save_inner, save_as_trainer, train_without_the_callback],
)
def test_saving_an_adapted_model_by_itself_is_refused(save: Any, tmp_path: Path) -> None:
    model = adapted()
    save = type(model).save_pretrained if save.__name__ == "save_pretrained" else save
    with pytest.raises(lp.AttachError, match=r"lp\.merged.*lp\.save.*AdapterCheckpoints"):
        save(model, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_after_training_saving_is_refused_again(tmp_path: Path) -> None:
    model = adapted()
    run = trainer(model, tmp_path)
    run.train()
    for folder in (tmp_path / "final", tmp_path / "checkpoint-4"):
        with pytest.raises(lp.AttachError, match="with adapters"):
            run.save_model(str(folder))
    output = logits(model)
    with lp.merged(model):
        run.save_model(str(tmp_path / "final"))
    assert_close(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "final")), output)


def test_merged_values_given_by_hand_are_saved(tmp_path: Path) -> None:
    model = adapted()
    for factor in lp.parameters(model):
        nn.init.normal_(factor)
    model.save_pretrained(tmp_path, state_dict=lp.merged_state_dict(model))
    assert_close(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_training_with_nothing_attached_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lp.AttachError, match=r"nothing is attached to this model; lp\.attach before training"):
        trainer(llama(), tmp_path).train()


def test_without_transformers_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['transformers'] = None; import loraparam.integrations.transformers"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: loraparam.integrations.transformers needs transformers" in result.stderr


# --- accelerate -------------------------------------------------------------------------------------------------


def accelerated(accelerator: Accelerator, rows: slice, *, start: Path | None = None, end: Path | None = None) -> Any:
    """Train on these rows, two to a step, from the state in one folder and into another."""
    accelerator.free_memory()
    model = adapted()
    optimizer = torch.optim.AdamW(lp.param_groups(model, 0.05, lr_ratio=4))
    model, optimizer = accelerator.prepare(model, optimizer)
    if start is not None:
        accelerator.load_state(str(start))
    for row in ROWS[rows]:
        with accelerator.accumulate(model):
            accelerator.backward(model(row["input_ids"][None], labels=row["labels"][None]).loss)
            accelerator.clip_grad_norm_(lp.parameters(model), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    if end is not None:
        accelerator.save_state(str(end))
    return model


@pytest.fixture(params=["no", "bf16"])
def accelerator(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    made = Accelerator(cpu=True, mixed_precision=request.param, gradient_accumulation_steps=2)
    yield made
    made.free_memory()
    type(made.state)._reset_state(reset_partial_state=True)


def test_accelerate_saves_and_resumes(accelerator: Accelerator, tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = trained_state(accelerated(accelerator, slice(8)))
    torch.manual_seed(1)
    accelerated(accelerator, slice(4), end=tmp_path / "state")
    resumed = accelerated(accelerator, slice(4, 8), start=tmp_path / "state")
    assert_close(trained_state(resumed), whole, **EXACT)
    with lp.merged(resumed):
        accelerator.save_model(resumed, str(tmp_path / "merged"))
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == llama().state_dict().keys()
    model = accelerator.unwrap_model(resumed, keep_fp32_wrapper=False)
    lp.save(model, tmp_path / "adapter.safetensors")
    loaded = llama()
    lp.load(loaded, tmp_path / "adapter.safetensors")
    assert_close(logits(loaded), logits(model), **EXACT)
