"""Real architectures, each from a tiny config and unmodified: the laws, saving, generating. See model_zoo.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from model_zoo import CLOSE, EXACT, FAMILIES, MATRIX, one_thread
from models_table import PATH, row, rows_of
from torch import nn
from torch.testing import assert_close
from zoo.entry import THIN, Entry, randomise

import loraparam as lp
from loraparam.testing import parametrize

pytestmark = [
    pytest.mark.matrix,
    # Notices that libraries print about their own code.
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

ADAPTED = {name: entry for name, entry in MATRIX.items() if not entry.refused}
# Seconds a model, for what test_laws.py shows on every kind of layer. Models run in float32.
SLOW = {"compiled_equals_eager", "finite_differences"}


def each(entries: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("entry", list(entries), ids=str)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@parametrize({name: entry.subject for name, entry in ADAPTED.items()}, without=SLOW)
def test_laws(law) -> None:
    law()


@each(MATRIX.values())
def test_table_is_current(entry: Entry) -> None:
    assert rows_of(PATH.read_text(encoding="utf-8")).get(entry.name) == row(entry), "run: python tests/models_table.py"


def test_table_has_no_other_rows() -> None:
    assert list(rows_of(PATH.read_text(encoding="utf-8"))) == list(MATRIX)


@each(entry for entry in ADAPTED.values() if entry not in FAMILIES["torch"])
def test_saved_merged_it_loads_as_the_plain_model(entry: Entry, tmp_path) -> None:
    model, plain = entry.model(), type(entry.model())
    subject = replace(entry.subject(), dtype=None, training=False)
    subject.adapted(model.eval())
    with lp.merged(model):
        model.save_pretrained(tmp_path)
        merged = subject.run(model)
    reloaded, report = plain.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_close(subject.run(reloaded.eval()), merged, **EXACT)


@each(entry for entry in ADAPTED.values() if entry.generates)
def test_it_generates_with_a_cache_what_the_merged_model_generates(entry: Entry) -> None:
    model, base = entry.subject().adapted().eval(), entry.model().eval()
    adapted = generate(entry, model)
    lp.merge(model)
    merged = generate(entry, model)
    assert_close(adapted.sequences, merged.sequences)
    assert_close(adapted.logits, merged.logits, **CLOSE)
    assert not torch.equal(adapted.logits[0], generate(entry, base).logits[0])


def generate(entry: Entry, model: Any) -> Any:
    inputs = {name: value for name, value in entry.inputs().items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 3, "do_sample": False, "use_cache": True, "output_logits": True}
    return model.generate(**inputs, **options, return_dict_in_generate=True)


@each(entry for entry in MATRIX.values() if entry.dead)
def test_check_names_the_targets_that_cannot_train(entry: Entry) -> None:
    model, subject = entry.model(), entry.subject()
    plan = lp.attach(model, THIN, subject.targets, exclude=tuple(entry.exclude))
    dead = {row.path for row in plan} - {row.path for row in subject.plan()}
    with pytest.raises(lp.AttachError, match="dead target") as caught:
        lp.check(model, **entry.inputs())
    assert set(caught.value.dead) == dead


@each(entry for entry in MATRIX.values() if entry.exclude)
def test_what_is_excluded_is_refused_where_the_model_writes_to_it(entry: Entry) -> None:
    for path in entry.exclude:
        model = entry.model()
        base = {key: value.clone() for key, value in model.state_dict().items()}
        lp.attach(model, lp.LoRA(r=1), path)
        randomise(lp.parameters(model))
        with pytest.raises(lp.AttachError, match=r"_\(\) on an effective weight: .* what is written is lost"):
            call_in_both_modes(entry, model)
        lp.detach(model)
        assert_close(model.state_dict(), base, **EXACT)


def call_in_both_modes(entry: Entry, model: nn.Module) -> None:
    for training in (True, False):
        entry.call(model.train(training))


@each(entry for entry in MATRIX.values() if entry.refused)
def test_what_cannot_be_adapted_is_refused_with_the_reason(entry: Entry) -> None:
    model: nn.Module = entry.model()
    subject = entry.subject()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(lp.AttachError, match=entry.refused):
        lp.attach(model, subject.method, subject.targets)
    assert_close(model.state_dict(), base, **EXACT)
