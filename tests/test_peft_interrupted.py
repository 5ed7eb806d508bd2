"""Writes of PEFT's two files that are interrupted: the old adapter is there, or the new one, whole."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_files import case
from test_peft_hostile import CONFIG, copied
from torch import nn

import loraparam as lp
from loraparam.formats import files
from loraparam.testing.subjects import shake


class Stop(BaseException):
    """An interruption."""


@contextlib.contextmanager
def interrupted_at(nth: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The nth call of what touches files does not return."""
    calls = iter(range(10**6))

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == nth:
                raise Stop
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "mkdir"), (files, "open")):
            patch.setattr(owner, name, counted(getattr(owner, name, open)), raising=False)
        yield


@pytest.mark.parametrize("old", ["lora_linear", "ia3_linear", None])
def test_an_interrupted_write_leaves_the_old_adapter_or_the_new(
    old: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = case("lora_linear")
    model = subject.model()
    lp.attach(model, lp.LoRA(r=3, alpha=7), ["fc1", "fc2"])
    shake(model)
    new, seen = lp.merged_state_dict(model), set()
    before = subject.model().state_dict() | (case(old).merged if old else {})
    for nth in range(20):
        folder = tmp_path / str(nth)
        if old:
            copied(case(old), folder)
            (folder / "README.md").write_text("a card")
        with interrupted_at(nth, monkeypatch), contextlib.suppress(Stop):
            lp.save(model, folder, format="peft")
        read = subject.model()
        if old or (folder.exists() and any(folder.iterdir())):
            lp.load(read, folder)
        merged = lp.merged_state_dict(read)
        is_new = all(torch.allclose(merged[key], value, atol=1e-5) for key, value in new.items())
        assert is_new or all(torch.allclose(merged[key], value, atol=1e-5) for key, value in before.items())
        seen.add(is_new)
        assert not list(folder.glob("*.tmp"))
        assert not old or (folder / "README.md").read_text() == "a card"
    assert seen == {False, True}


def test_a_config_edited_afterwards_counts(tmp_path: Path) -> None:
    """The copy in the header is for interrupted writes only."""
    model = nn.Sequential(nn.Linear(4, 6))
    lp.attach(model, lp.LoRA(r=2))
    shake(model)
    for _ in range(2):
        lp.save(model, tmp_path, format="peft")
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    lp.detach(model)
    lp.load(model, tmp_path)
    assert lp.adapters(model)["default"]["0.weight"].alpha == 4
