"""Hostile and broken PEFT files: read, or refused by name; never another exception, a hang or a trace."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from peft_files import Case, case
from safetensors.torch import load_file, save_file
from test_plans import assert_untouched, fingerprint, unchanged
from torch import Tensor

import loraparam as lp
from loraparam.formats import peft
from loraparam.formats.bases import FileBase

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# One of each kind of content.
SUBJECTS = (
    "lora_linear",
    "dora_linear",
    "dora_embedding",
    "dora_conv2d",
    "lora_mha",
    "lora_rslora_patterns",
    "lora_bias_all",
    "lora_modules_to_save",
    "lora_trainable_tokens",
    "lora_target_parameters",
    "lora_conv2d_grouped",
    "ia3_linear",
    "loha_linear",
    "lokr_linear",
    "vera_linear",
    "miss_linear",
)
CASES = {name: case(name) for name in SUBJECTS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "adapter"


def copied(subject: Case, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copy(subject.folder / name, folder / name)
    return folder


def read_or_refused(subject: Case, folder: Path, **hints: Any) -> None:
    """Load a file that may be anything: it is either read, and the model works, or refused by name without a trace."""
    model = subject.model()
    before = fingerprint(model)
    try:
        lp.load(model, folder, **hints)
    except lp.LoraparamError as error:
        assert str(folder) in str(error), error  # noqa: PT017
        assert len(str(error)) < 2000  # noqa: PT017
        read = False
    else:
        with torch.no_grad():
            model(subject.input)
        lp.detach(model)
        read = True
    assert_untouched(model, before)
    event("read" if read else "refused")
    for base in (None, FileBase(subject.folder / "base.safetensors")):
        with contextlib.suppress(lp.FormatError):
            peft.read(folder, base)


# --- bytes, tensors and configs that were changed ---------------------------------------------------------------


@given(st.sampled_from(SUBJECTS), st.sampled_from([CONFIG, WEIGHTS]), st.floats(0, 1), st.binary(max_size=3))
def test_damaged_bytes(folder: Path, name: str, file: str, where: float, new: bytes) -> None:
    """Cut off after some byte, or some bytes replaced."""
    path = copied(CASES[name], folder) / file
    content = path.read_bytes()
    start = int(where * len(content))
    path.write_bytes(content[:start] + new + content[start + len(new) :] if new else content[:start])
    read_or_refused(CASES[name], folder)


DTYPES = [torch.int64, torch.bool, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]
TENSOR_EDITS: dict[str, Callable[[st.DataObject, Tensor], Tensor]] = {
    "dtype": lambda data, t: t if t.is_complex() else t.to(data.draw(st.sampled_from(DTYPES))),
    "cut": lambda data, t: t[: data.draw(st.integers(0, max(t.shape[0] - 1, 0)))].clone(),
    "longer": lambda data, t: torch.cat([t, t], data.draw(st.integers(0, t.dim() - 1))),
    "flat": lambda data, t: t.flatten(),
    "transposed": lambda data, t: t.transpose(0, -1).contiguous(),
    "more dims": lambda data, t: t[None] if data.draw(st.booleans()) else t[..., None],
    "one number": lambda data, t: t.flatten()[0].clone(),
    "empty": lambda data, t: t[..., :0].clone(),
    "not finite": lambda data, t: (
        t if t.itemsize == 1 else t * data.draw(st.sampled_from([float("nan"), float("inf"), 1e39]))
    ),
}

PARTS = [
    "base_model",
    "model",
    "net",
    "fc1",
    "tok",
    "attn",
    "experts",
    "lora_A",
    "lora_B",
    "weight",
    "bias",
    "base_layer",
    "default",
    "lora_magnitude_vector",
    "lora_embedding_A",
    "ia3_l",
    "token_adapter",
    "trainable_tokens_delta",
    "modules_to_save",
    "0",
]


@given(st.data())
def test_changed_tensors(folder: Path, data: st.DataObject) -> None:
    """Tensors dropped, renamed, copied, reshaped and retyped."""
    name = data.draw(st.sampled_from(SUBJECTS))
    path = copied(CASES[name], folder) / WEIGHTS
    tensors = load_file(path)
    for _ in range(data.draw(st.integers(1, 3))):
        if not tensors:
            break
        key = data.draw(st.sampled_from(sorted(tensors)))
        kind = data.draw(st.sampled_from(["drop", "rename", "copy", *TENSOR_EDITS]))
        if kind in TENSOR_EDITS:
            if tensors[key].dim() and tensors[key].numel():
                tensors[key] = TENSOR_EDITS[kind](data, tensors[key])
            continue
        tensor = tensors[key] if kind == "copy" else tensors.pop(key)
        if kind != "drop":
            parts = key.split(".")
            at = data.draw(st.integers(0, len(parts)))
            parts[at : at + data.draw(st.integers(0, 1))] = data.draw(st.lists(st.sampled_from(PARTS), max_size=2))
            tensors[".".join(parts)] = tensor.clone()
    save_file(tensors, path)
    read_or_refused(CASES[name], folder)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(
        ["LORA", "IA3", "DORA", "pissa", "olora", "pissa_niter_4", "all", "net.fc1", "weight", "(.*)*(.*)*!", 10**400]
    ),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["net.fc1", "tok", ".*", "(a|b)*", "fc", "["]), inner, max_size=2)
    ),
    max_leaves=4,
)


@given(st.data())
def test_changed_configs(folder: Path, data: st.DataObject) -> None:
    """Fields replaced by anything, dropped, and the whole replaced."""
    name = data.draw(st.sampled_from(SUBJECTS))
    path = copied(CASES[name], folder) / CONFIG
    config = json.loads(path.read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from([*sorted(config), "target_parameters", "feedforward_modules", "new"]))
        if data.draw(st.booleans()):
            config[key] = data.draw(VALUES)
        else:
            config.pop(key, None)
    path.write_text(json.dumps(config if data.draw(st.integers(0, 9)) else data.draw(VALUES)))
    read_or_refused(CASES[name], folder)


# --- contents that contradict themselves or the model -----------------------------------------------------------


def edited(name: str, folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> Path:
    copied(CASES[name], folder)
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    change(config, tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return folder


P, FC1 = "base_model.model.", "base_model.model.net.fc1."


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        (
            "dora_linear",
            lambda c, t: c.update(use_dora=False),
            r"fc1\.lora_A\.weight' has 'magnitude' beside it, which the config",
        ),
        ("lora_linear", lambda c, t: c.update(use_dora=True), r"fc1\.lora_A\.weight' has no 'magnitude' beside it"),
        ("lora_linear", lambda c, t: c.update(lora_bias=True), r"fc1\.lora_A\.weight' has no 'bias' beside it"),
        (
            "lora_linear",
            lambda c, t: t.update({FC1 + "lora_B.bias": torch.ones(10)}),
            r"has 'bias' beside it, which the config",
        ),
        (
            "lora_linear",
            lambda c, t: c.update(init_lora_weights="corda"),
            r"init_lora_weights='corda'; allowed: .*another one may change the base",
        ),
        ("lora_linear", lambda c, t: c.update(init_lora_weights="loftq"), r"init_lora_weights='loftq'; allowed"),
        (
            "lora_linear",
            lambda c, t: c.update(alora_invocation_tokens=[1]),
            r"alora_invocation_tokens=\[1\]; allowed: not set",
        ),
        ("lora_linear", lambda c, t: c.update(layer_replication=[[0, 1]]), r"layer_replication=.*changes the model"),
        ("lora_linear", lambda c, t: c.update(peft_type="lora"), r"peft_type='lora'; allowed: 'LORA'"),
        ("lora_linear", lambda c, t: c.update(bias="some"), r"bias='some'; allowed: 'none', 'all', 'lora_only'"),
        (
            "lora_linear",
            lambda c, t: t.update({"net.fc1.lora_A.weight": torch.ones(2, 6)}),
            r"is in the file twice, with and without",
        ),
        (
            "lora_linear",
            lambda c, t: t.update({P + "net.fc2.ia3_l": torch.ones(4, 1)}),
            r"fc2\.\w+(\.weight)?' has 'ia3' beside it",
        ),
        (
            "lora_linear",
            lambda c, t: c.update(modules_to_save=["fc2"]),
            r"lacks 'net\.fc2\.weight', of modules_to_save",
        ),
        (
            "lora_modules_to_save",
            lambda c, t: t.update({P + "net.fc2.weight": torch.ones(4, 11)}),
            r"has shape \(4, 11\); 'net\.fc2\.weight' of the model has \(4, 10\)",
        ),
        (
            "lora_trainable_tokens",
            lambda c, t: c.update(trainable_token_indices={"tok": [1]}),
            r"has shape \(2, 6\) for 1 ids up to 1",
        ),
        (
            "lora_trainable_tokens",
            lambda c, t: c.update(trainable_token_indices={"tok": [1, 11]}),
            r"for 2 ids up to 11; 'tok\.weight' has \(11, 6\)",
        ),
        (
            "lora_trainable_tokens",
            lambda c, t: c.update(trainable_token_indices={"tok": [1, 1]}),
            r"allowed: a list of different ids",
        ),
        (
            "lora_trainable_tokens",
            lambda c, t: c.update(trainable_token_indices={"x": [1, 2]}),
            r"trainable_token_indices do not name 'tok'",
        ),
        (
            "lora_target_parameters",
            lambda c, t: c.update(target_parameters=["experts.down_proj"]),
            r"one of more wrappers than target_parameters name",
        ),
        (
            "lora_target_parameters",
            lambda c, t: c.update(target_parameters=None),
            r"a wrapper inside another, which only target_parameters",
        ),
        (
            "dora_linear",
            lambda c, t: t.update({FC1 + "lora_magnitude_vector": torch.ones(9)}),
            r"a magnitude of shape \(9,\) beside it; allowed: \(10,\)",
        ),
        (
            "lora_linear",
            lambda c, t: t.update({"base_model.vera_A": torch.ones(1, 1)}),
            r"'vera_A' belong to VeRA, not to 'LORA'",
        ),
        ("lora_linear", lambda c, t: c.update(use_more=True), r"use_more=True; allowed: not set, because this release"),
        ("lora_linear", lambda c, t: c.update(rank_pattern=[2]), r"rank_pattern=\[2\]; allowed: an object of names to"),
        ("lora_linear", lambda c, t: c.update(rank_pattern={"(": 2}), r"pattern '\('; allowed: module paths"),
        ("lora_linear", lambda c, t: c.update(alpha_pattern={"(": 2}), r"pattern '\('; allowed: module paths"),
        (
            "lora_target_parameters",
            lambda c, t: c.update(init_lora_weights="pissa"),
            r"cannot start as pissa, which is for linear layers",
        ),
        (
            "ia3_linear",
            lambda c, t: t.update({FC1 + "ia3_l": torch.ones(1, 10)}),
            r"has shape \(1, 10\); 'net\.fc1\.weight' has \(10, 6\)",
        ),
    ],
)
def test_contradictions(name: str, change: Any, match: str, folder: Path) -> None:
    edited(name, folder, change)
    model = CASES[name].model()
    with unchanged(model), pytest.raises(lp.FormatError, match=match) as caught:
        lp.load(model, folder)
    assert str(folder) in str(caught.value)


def test_float8_is_read_as_what_it_holds(folder: Path) -> None:
    """Which torch computes little with: a grouped convolution's blocks, for one, are compared."""
    subject = CASES["lora_conv2d_grouped"]
    path = copied(subject, folder) / WEIGHTS
    A = torch.zeros(2, 2, 2, 2, 3, 3)
    A[0, :, 0] = A[1, :, 1] = torch.randn(2, 2, 3, 3)
    pair = {"A": A.reshape(4, 4, 3, 3), "B": torch.randn(6, 2, 1, 1)}
    narrow = {f"{P}c.lora_{name}.weight": tensor.to(torch.float8_e4m3fn) for name, tensor in pair.items()}
    save_file(narrow, path)
    model = subject.model()
    lp.load(model, folder)
    A8, B8 = (tensor.float() for tensor in narrow.values())
    B8, A8 = B8.flatten(1), A8.reshape(2, 2, 2, 2, 3, 3)[0, :, 0].flatten(1)
    expected = subject.model().c.weight + 1.5 * (B8 @ A8).view(6, 2, 3, 3)
    torch.testing.assert_close(lp.effective_weight(model, "c.weight"), expected)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ("[]", r"header 'loraparam'; allowed: an object, with bases of 9 numbers each"),
        ('{"bases": {"net.fc1.weight": [1, 2]}}', "bases of 9 numbers each"),
        ('{"out_proj": "thrice"}', "out_proj; allowed: null, 'once', 'twice'"),
    ],
)
def test_a_header_of_ours_that_is_none(header: str, match: str, folder: Path) -> None:
    copied(CASES["lora_linear"], folder)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt", "loraparam": header})
    model = CASES["lora_linear"].model()
    with unchanged(model), pytest.raises(lp.FormatError, match=match):
        lp.load(model, folder)
