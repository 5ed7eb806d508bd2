"""Writing diffusers' files: equal in diffusers itself, and when read back; and reading what diffusers writes."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_files import build, case
from test_plans import randomize
from torch import Tensor, nn

import loraparam as lp

SPEC = case("diffusers/sd_peft_metadata").spec["base"]
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
CONTENTS: dict[str, dict[Any, lp.Method]] = {
    "pairs": {
        f"{BLOCK}.attn1.to_q": lp.LoRA(r=2, alpha=7),
        f"{BLOCK}.attn1.to_out.0": lp.LoRA(r=3, alpha=2, rslora=True),
        "down_blocks.0.resnets.0.conv1.weight": lp.LoRA(r=4, alpha=1),
        "down_blocks.0.attentions.0.proj_in.weight": lp.LoRA(r=1),
    },
    "directions": {
        f"{BLOCK}.attn1.to_q": lp.DoRA(r=2, alpha=7),
        f"{BLOCK}.attn1.to_k": lp.DoRA(r=1, eps=0.3),
        f"{BLOCK}.attn1.to_v": lp.Magnitude(),
        "down_blocks.0.resnets.0.conv1.weight": lp.DoRA(r=3),
    },
    "a pair beside directions": {f"{BLOCK}.attn1.to_q": lp.DoRA(r=2), f"{BLOCK}.attn1.to_k": lp.LoRA(r=1, alpha=3)},
    "biases": {
        f"{BLOCK}.attn1.to_out.0.weight": lp.LoRA(r=2, alpha=5),
        f"{BLOCK}.attn1.to_out.0.bias": lp.Full(),
        f"{BLOCK}.ff.net.2.bias": lp.Full(),
        "down_blocks.0.resnets.0.conv1": lp.LoRA(r=2),
        "down_blocks.0.resnets.0.conv1.bias": lp.Full(),
    },
    "slices": {
        f"{BLOCK}.attn1.to_q.weight[1/2]": lp.LoRA(r=1, alpha=3),
        f"{BLOCK}.attn1.to_q.weight[2/2]": lp.LoRA(r=2),
    },
}


@functools.cache
def _base(part: str) -> nn.Module:
    torch.manual_seed(0)
    model = build(SPEC[part]).eval()
    randomized = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=randomized) * 0.3)
    return model


def base(part: str = "unet") -> Any:
    return copy.deepcopy(_base(part))


def output(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, hidden = (torch.randn(shape, generator=generator) for shape in ((1, 4, 4, 4), (1, 5, 6)))
    with torch.no_grad():
        if hasattr(model, "conv_in"):
            return model(x, torch.tensor([3]), hidden).sample  # type: ignore[no-any-return]
        return model(torch.arange(5)[None]).last_hidden_state  # type: ignore[no-any-return]


def fused(model: Any) -> dict[str, Tensor]:
    """A model's weights with diffusers' adapter folded in."""
    model.fuse_lora()
    state = model.state_dict()
    return {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diffusers")


@pytest.mark.parametrize("prefix", [None, ""])
@pytest.mark.parametrize("name", CONTENTS)
def test_diffusers_reads_the_file_and_has_the_same_weights(folder: Path, name: str, prefix: str | None) -> None:
    model, path = base(), folder / "unet.safetensors"
    lp.attach(model, CONTENTS[name])
    randomize(model)
    expected, weights = output(model), lp.merged_state_dict(model)
    lp.save(model, path, format="diffusers", prefix=prefix)
    lp.detach(model)
    theirs = base()
    theirs.load_lora_adapter(str(path.parent), weight_name=path.name, prefix="unet" if prefix is None else None)
    torch.testing.assert_close(output(theirs), expected, rtol=1e-4, atol=1e-4)
    same(fused(theirs), weights)
    lp.load(model, path)
    same(lp.merged_state_dict(model), weights)


# --- pipelines: several parts in one file -----------------------------------------------------------------------------


def pipeline() -> nn.ModuleDict:
    return nn.ModuleDict({"unet": base(), "text_encoder": base("text_encoder")})


def test_parts_of_a_pipeline_go_where_diffusers_looks_for_them(folder: Path) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    model, path = pipeline(), folder / "parts.safetensors"
    lp.attach(model, {f"unet.{BLOCK}.attn1.to_q": lp.LoRA(r=1, alpha=3), "text_encoder.**.q_proj": lp.DoRA(r=2)})
    randomize(model)
    weights = lp.merged_state_dict(model)
    lp.save(model, path, format="diffusers")
    theirs: Any = pipeline()
    state, alphas, metadata = Loader.lora_state_dict(str(path), return_lora_metadata=True)
    assert (alphas, metadata) == (None, None)
    Loader.load_lora_into_unet(state, alphas, theirs["unet"])
    Loader.load_lora_into_text_encoder(state, alphas, theirs["text_encoder"])
    theirs["text_encoder"].fuse_lora = functools.partial(_fuse, theirs["text_encoder"])
    for part in ("unet", "text_encoder"):
        same(
            fused(theirs[part]), {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
        )


def _fuse(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 2, "lora_alpha": 6},
    "patterns": {
        "r": 2,
        "lora_alpha": 6,
        "rank_pattern": {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 3, "to_k": 1},
        "alpha_pattern": {"to_k": 5, "down_blocks.0.resnets.0.conv1": 1},
    },
    "rank-stabilized": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "directions": {"r": 2, "lora_alpha": 6, "use_dora": True},
    "biases": {"r": 2, "lora_alpha": 6, "lora_bias": True, "target_modules": ["to_out.0", "conv1"]},
    "gaussian": {"r": 2, "lora_alpha": 3, "init_lora_weights": "gaussian"},
}


def trained(part: str, config: dict[str, Any]) -> Any:
    """A base with diffusers' adapter of random values on it."""
    from peft import LoraConfig

    model = base(part)
    targets = ["q_proj", "v_proj"] if part == "text_encoder" else ["to_q", "to_k", "to_out.0", "conv1"]
    model.add_adapter(LoraConfig(**{"target_modules": targets, **config}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.4)
    return model


# PEFT takes the bias of a pair for an unsharded factor.
@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape:peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_what_diffusers_saves_of_one_model_is_read(tmp_path: Path, name: str) -> None:
    theirs, model = trained("unet", CONFIGS[name]), base()
    theirs.save_lora_adapter(str(tmp_path))
    lp.load(model, tmp_path)  # the folder, or the file in it
    same(lp.merged_state_dict(model), fused(theirs))


@pytest.mark.parametrize("spelling", ["peft", "diffusers"])
@pytest.mark.parametrize("metadata", [True, False])
def test_what_a_pipeline_saves_is_read(tmp_path: Path, spelling: str, metadata: bool) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    parts = {
        "unet": trained("unet", CONFIGS["patterns"]),
        "text_encoder": trained("text_encoder", {"r": 3, "lora_alpha": 2}),
    }
    states = {part: get_peft_model_state_dict(model, adapter_name="default") for part, model in parts.items()}
    if spelling == "diffusers":
        states = {part: convert_state_dict_to_diffusers(state) for part, state in states.items()}
    headers = {f"{part}_lora_adapter_metadata": model.peft_config["default"].to_dict() for part, model in parts.items()}
    StableDiffusionPipeline.save_lora_weights(
        str(tmp_path),
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states["text_encoder"],
        **(headers if metadata else {}),
    )
    model = pipeline()
    lp.load(model, tmp_path / "pytorch_lora_weights.safetensors")
    if not metadata:  # then the reader takes alpha for the rank
        for part in parts.values():
            for module in part.modules():
                for adapter in getattr(module, "scaling", {}):
                    module.scaling[adapter] = 1.0
    parts["text_encoder"].fuse_lora = functools.partial(_fuse, parts["text_encoder"])
    expected = {f"{part}.{name}": value for part, theirs in parts.items() for name, value in fused(theirs).items()}
    same(lp.merged_state_dict(model), expected)
