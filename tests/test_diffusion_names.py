"""Names in the files that are written for kohya's tools and diffusers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_kohya_names import Colliding, Deep, Text, parts
from test_plans import randomize
from torch import nn

import loraparam as lp


class UNet2DConditionModel(Deep):
    """Told by its name, as diffusers' own."""


class CLIPTextModelWithProjection(Text):
    pass


class FluxTransformer2DModel(Deep):
    pass


def written(model: nn.Module, path: Path, format: str, targets: Any, **options: Any) -> set[str]:
    """The names in the file, whose adapter the model then no longer has."""
    lp.attach(model, lp.LoRA(r=1), targets)
    try:
        lp.save(model, path, format=format, **options)
    finally:
        lp.detach(model)
    ends = (".alpha", ".lora_up.weight", ".lora_down.weight", ".lora_A.weight", ".lora_B.weight")
    return {key.removesuffix(end) for key in load_file(path) for end in ends if key.endswith(end)}


Q, FF = "down_blocks.0.to_q", "down_blocks_1_ff_0"
# {what: (model, targets, options, the names for kohya's tools, those for diffusers)}
NAMES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], set[str], set[str]]] = {
    "any model": (Deep, [Q], {}, {"lycoris_down_blocks_0_to_q"}, {Q}),
    "a unet": (UNet2DConditionModel, [Q], {}, {"lora_unet_down_blocks_0_to_q"}, {f"unet.{Q}"}),
    "a transformer": (FluxTransformer2DModel, [Q], {}, {"lora_transformer_down_blocks_0_to_q"}, {f"transformer.{Q}"}),
    "torch's transformer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8),
        ["linear1"],
        {},
        {"lycoris_linear1"},
        {"linear1"},
    ),
    "a text encoder": (
        lambda: CLIPTextModelWithProjection(True),
        ["**.fc_1"],
        {},
        {"lora_te_text_model_encoder_fc_1"},
        {"text_encoder.text_model.encoder.fc_1"},
    ),
    "two parts": (
        lambda: parts(unet=Deep(), text_encoder=Text(False)),
        [f"unet.{Q}", "**.fc_1"],
        {},
        {"lora_unet_down_blocks_0_to_q", "lora_te_encoder_fc_1"},
        {f"unet.{Q}", "text_encoder.encoder.fc_1"},
    ),
    "the first of two text encoders": (
        lambda: parts(text_encoder=Text(False), text_encoder_2=Text(False)),
        ["text_encoder.**.fc_1"],
        {},
        {"lora_te1_encoder_fc_1"},
        {"text_encoder.encoder.fc_1"},
    ),
    "the second": (
        lambda: parts(text_encoder=Text(False), text_encoder_2=Text(False)),
        ["text_encoder_2.**.fc_1"],
        {},
        {"lora_te2_encoder_fc_1"},
        {"text_encoder_2.encoder.fc_1"},
    ),
    "parts and others": (
        lambda: parts(unet=Deep(), more=Text(False)),
        [f"unet.{Q}", "**.fc_1"],
        {},
        {"lycoris_unet_down_blocks_0_to_q", "lycoris_more_encoder_fc_1"},
        {f"unet.{Q}", "more.encoder.fc_1"},
    ),
    "a prefix": (Deep, [Q], {"prefix": "unet"}, {"unet_down_blocks_0_to_q"}, {f"unet.{Q}"}),
    "a prefix with its separator": (Deep, [Q], {"prefix": "unet."}, {f"unet.{Q}"}, {f"unet.{Q}"}),
    "none": (UNet2DConditionModel, [Q], {"prefix": ""}, {"down_blocks_0_to_q"}, {Q}),
    "a map": (
        lambda: parts(image=Deep(), words=Text(False)),
        [f"image.{Q}", "**.fc_1"],
        {"prefix": {"image": "a", "words.": "b_c"}},
        {"a_down_blocks_0_to_q", "b_c_encoder_fc_1"},
        {f"a.{Q}", "b_c.encoder.fc_1"},
    ),
}


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", NAMES)
def test_names(tmp_path: Path, name: str, format: str) -> None:
    make, targets, options, for_kohya, for_diffusers = NAMES[name]
    found = written(make(), tmp_path / "a.safetensors", format, targets, **options)
    assert found == (for_kohya if format == "kohya" else for_diffusers)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"a prefix", "none", "a map", "a prefix with its separator"}))
def test_what_is_named_by_default_is_found_again(tmp_path: Path, name: str, format: str) -> None:
    make, targets, *_ = NAMES[name]
    model = make()
    written(model, tmp_path / "a.safetensors", format, targets)
    assert {row.path for row in lp.plan(model, lp.LoRA(r=1), targets)} == {
        row.path for row in lp.load(model, tmp_path / "a.safetensors", format=format)
    }


def test_dotted_names_can_name_any_parameter(tmp_path: Path) -> None:
    model = parts(attn=nn.MultiheadAttention(4, 2), norm=nn.LayerNorm(4))
    lp.attach(model, {"attn.in_proj_weight": lp.LoRA(r=1), "attn.in_proj_bias": lp.Full(), "norm.bias": lp.Full()})
    randomize(model)
    before = lp.merged_state_dict(model)
    lp.save(model, tmp_path / "a.safetensors", format="kohya", prefix="diffusion_model.", flavor="comfyui")
    keys = set(load_file(tmp_path / "a.safetensors"))
    assert {"diffusion_model.attn.in_proj_weight.lora_up.weight", "diffusion_model.attn.in_proj_bias.diff"} <= keys
    lp.detach(model)
    lp.load(model, tmp_path / "a.safetensors")
    for key, value in lp.merged_state_dict(model).items():
        torch.testing.assert_close(value, before[key])


def test_the_model_itself_has_a_name_for_kohyas_tools_only(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    assert written(model, tmp_path / "a.safetensors", "kohya", ["weight"]) == {"lycoris_"}
    assert [row.path for row in lp.load(model, tmp_path / "a.safetensors")] == ["weight"]
    lp.detach(model)
    with pytest.raises(lp.FormatError, match="'the model': diffusers adapts modules below a part"):
        written(model, tmp_path / "a.safetensors", "diffusers", ["weight"])


def test_two_modules_of_one_name_are_refused(tmp_path: Path) -> None:
    model, path = Colliding(), tmp_path / "a.safetensors"
    with pytest.raises(lp.FormatError, match=r"'a_b.c' and 'a.b_c' are one name, 'lycoris_a_b_c', once '.' is '_'"):
        written(model, path, "kohya", ["a_b.c"])
    assert written(model, path, "kohya", ["d"]) == {"lycoris_d"}
    assert written(model, path, "kohya", ["a_b.c"], prefix="diffusion_model.") == {"diffusion_model.a_b.c"}
    assert [row.path for row in lp.load(model, path)] == ["a_b.c.weight"]
