"""Real files of kohya's tools, LyCORIS and diffusers, changed at random: read, or refused with the model as it was."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_files import base_of, case
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_plans import assert_untouched, fingerprint
from torch import Tensor, nn

import loraparam as lp

FILES = (
    "lycoris/locon_tucker", "lycoris/dora_in", "lycoris/dora_out", "lycoris/full", "lycoris/locon_norm", "lycoris/loha",
    "lycoris/lokr",
    "diffusers/sd_peft_metadata", "diffusers/sd_legacy_attn_processor", "kohya/sd_unet_te",
)  # fmt: skip
DTYPES = (
    torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.uint8,
    torch.bool, torch.complex64, torch.int8, torch.uint16,
)  # fmt: skip
WORDS = (
    "alpha",
    "lora_up.weight",
    "lora_A.weight",
    "dora_scale",
    "diff",
    "w_norm",
    "lora_mid.weight",
    "lora_B.bias",
    "",
    ".",
    "x",
)
VALUES = (None, 0, -1, 1.5, 1e308, 10**400, "2", [2], {"a": 1}, True, {"(.*)*(.*)*!": 2}, {"to_q": 3}, "pissa", "\0")


@functools.cache
def _original(name: str) -> tuple[dict[str, Tensor], dict[str, str], nn.Module]:
    subject = case(name)
    with safe_open(str(subject.file), framework="pt") as file:
        header = file.metadata() or {}
    return load_file(subject.file), header, base_of(subject)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def mutate(data: st.DataObject, file: dict[str, Tensor]) -> None:
    """One change, in place."""
    key = data.draw(st.sampled_from(sorted(file)))
    tensor = file[key]
    head = key.rpartition(".")[0]
    kind = data.draw(st.sampled_from(["drop", "rename", "reshape", "resize", "retype", "values", "add"]))
    if kind == "drop":
        del file[key]
    elif kind == "rename":
        text = data.draw(st.sampled_from(WORDS) | st.text(max_size=8))
        at = data.draw(st.integers(0, len(key)))
        new = data.draw(
            st.sampled_from([f"{head}.{text}", key[:at] + text + key[at + 1 :], key.replace("lora_", text)])
        )
        file[new] = file.pop(key)
    elif kind == "reshape" and tensor.dim():
        file[key] = data.draw(
            st.sampled_from(
                [tensor.flatten(), tensor[None], tensor[..., None], tensor.transpose(0, -1), tensor.narrow(0, 0, 0)]
            )
        )
    elif kind == "resize":
        shape = data.draw(st.lists(st.integers(0, 5), max_size=6))
        file[key] = torch.ones(shape)
    elif kind == "retype":
        real = tensor.real if tensor.is_complex() else tensor  # an earlier change may have made it complex
        file[key] = real.to(data.draw(st.sampled_from(DTYPES)))
    elif kind == "values":
        value = data.draw(st.sampled_from([float("nan"), float("inf"), 1e38, -1e30, 0.0]))
        file[key] = torch.full(tensor.shape, value)
    else:
        file[f"{head}.{data.draw(st.sampled_from(WORDS))}"] = torch.ones(
            data.draw(st.lists(st.integers(1, 4), max_size=4))
        )


def mutate_header(data: st.DataObject, header: dict[str, str]) -> None:
    name = "lora_adapter_metadata"
    fields: Any = json.loads(header.get(name, "{}"))
    field = data.draw(
        st.sampled_from(sorted(fields) or ["unet.r"]) | st.sampled_from(["r", "unet.lora_alpha", "unet", ""])
    )
    fields[field] = data.draw(st.sampled_from(VALUES))
    text = json.dumps(fields)
    header[name] = data.draw(st.sampled_from([text, text[: len(text) // 2], "[" * 10**5, "null", ""]))


@given(st.data())
@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_read_or_refused(folder: Path, name: str, data: st.DataObject) -> None:
    original, header, model = _original(name)
    file, header = dict(original), dict(header)
    for _ in range(data.draw(st.integers(0, 3))):
        if file:
            mutate(data, file)
    if data.draw(st.booleans()):
        mutate_header(data, header)
    path = folder / "changed.safetensors"
    save_file({key: tensor.contiguous().clone() for key, tensor in file.items()}, path, header or None)
    if data.draw(st.sampled_from([False, False, False, True])):
        cut = data.draw(st.integers(0, path.stat().st_size))
        content = bytearray(path.read_bytes())
        content = content[:cut] if data.draw(st.booleans()) else content[:cut] + b"\xff" + content[cut + 1 :]
        path.write_bytes(content)
    format = data.draw(st.sampled_from([None, "kohya", "diffusers"]))
    prefix = data.draw(
        st.sampled_from([None, "lora_unet", "unet", "", {"unet": ""}, {"lora_unet_": "unet."}, {"lycoris": ""}])
    )
    before = fingerprint(model)
    try:
        lp.load(model, path, format=format, **({} if prefix is None or format is None else {"prefix": prefix}))
    except lp.LoraparamError:
        pass
    else:
        finite = all(bool(value.isfinite().all()) for value in lp.state_dict(model).values())
        lp.detach(model)
        assert finite
    assert_untouched(model, before)
