"""kohya files whose tensors do not fit are refused, with the model as it was; and differences of every kind."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_kohya_names import BLOCK, FIRST, Deep, pair
from test_plans import unchanged
from torch import Tensor

import loraparam as lp

HEAD = f"lora_unet_{FIRST}"
DOWN, UP = f"{HEAD}.lora_down.weight", f"{HEAD}.lora_up.weight"
NAN, INF = torch.tensor(float("nan")), torch.tensor(float("inf"))
BROKEN: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no up": ({UP: None}, rf"'{DOWN}': half a pair; '{UP}' is missing"),
    "no down": ({DOWN: None}, rf"'{UP}': half a pair; '{DOWN}' is missing"),
    "two spellings of a half": ({f"{HEAD}.lora_B.weight": torch.ones(4, 1)}, r"are the same of one module; keep one"),
    "halves of two spellings": (
        {UP: None, f"{HEAD}.lora_B.weight": torch.ones(4, 1)},
        r"is the other half of another spelling",
    ),
    "ranks": ({UP: torch.ones(4, 2)}, r"lora_up.weight': shape \(4, 2\); for r=1 and out=4 it is \(4, 1\)"),
    "inputs": ({DOWN: torch.ones(1, 3)}, r"lora_down.weight': shape \(1, 3\); the layer takes \(1, 4\)"),
    "outputs": ({UP: torch.ones(5, 1)}, r"lora_up.weight': shape \(5, 1\)"),
    "a kernel on a Linear": ({DOWN: torch.ones(1, 4, 3, 3)}, r"shape \(1, 4, 3, 3\); the layer takes \(1, 4\)"),
    "one dim": ({UP: torch.ones(4)}, r"shape \(4,\)"),
    "rank 0": ({DOWN: torch.ones(0, 4), UP: torch.ones(4, 0)}, r"shape \((0, 4|4, 0)\) is empty"),
    "NaN": ({DOWN: NAN.expand(1, 4).clone()}, r"lora_down.weight': holds NaN or infinity"),
    "infinity": ({UP: INF.expand(4, 1).clone()}, r"lora_up.weight': holds NaN or infinity"),
    "integers": ({DOWN: torch.ones(1, 4, dtype=torch.int32)}, r"dtype torch.int32; allowed: a floating-point dtype"),
    "complex": ({DOWN: torch.ones(1, 4, dtype=torch.complex64)}, r"dtype torch.complex64"),
    "alpha NaN": ({f"{HEAD}.alpha": NAN}, r"alpha': nan; allowed: a finite number"),
    "alpha infinite": ({f"{HEAD}.alpha": INF}, r"alpha': inf; allowed: a finite number"),
    "alpha beyond float32": (
        {f"{HEAD}.alpha": torch.tensor(1e300, dtype=torch.float64)},
        r"alpha': the scale 1e\+300 makes",
    ),
    "alphas": (
        {f"{HEAD}.alpha": torch.ones(2)},
        r"alpha': shape \(2,\), dtype torch.float32; allowed: one real number",
    ),
    "no alpha": ({f"{HEAD}.alpha": torch.ones(0)}, r"alpha': shape \(0,\)"),
    "alpha true": ({f"{HEAD}.alpha": torch.tensor(True)}, r"alpha': shape \(\), dtype torch.bool"),
    "alpha complex": ({f"{HEAD}.alpha": torch.tensor(1j)}, r"alpha': shape \(\), dtype torch.complex64"),
    "alpha alone": ({"lora_unet_conv_in.alpha": torch.ones(())}, r"conv_in.alpha': there is no pair of factors for it"),
    "a core alone": ({"lora_unet_conv_in.lora_mid.weight": torch.ones(1, 1)}, r"lora_mid.weight': there is no pair"),
    "a core of another rank": ({f"{HEAD}.lora_mid.weight": torch.ones(2, 2)}, r"lora_mid.weight': shape \(2, 2\)"),
    "a core with a kernel": ({f"{HEAD}.lora_mid.weight": torch.ones(1, 1, 3)}, r"lora_mid.weight': shape \(1, 1, 3\)"),
    "a scale alone": ({"lora_unet_conv_in.dora_scale": torch.ones(4, 1)}, r"dora_scale': there is no pair"),
    "a scale of another size": (
        {f"{HEAD}.dora_scale": torch.ones(3, 1)},
        r"dora_scale': shape \(3, 1\); allowed: \(4, 1\), one per output, or \(1, 4\), one per input channel",
    ),
    "a scale for each weight": ({f"{HEAD}.dora_scale": torch.ones(4, 4)}, r"dora_scale': shape \(4, 4\)"),
    "a pair and a difference": ({f"{HEAD}.diff": torch.ones(4, 4)}, r"are for one parameter; keep one"),
    "two differences": (
        {f"{HEAD}.diff_b": torch.ones(4), f"{HEAD}.b_norm": torch.ones(4)},
        r"for one parameter; keep one",
    ),
    "a difference's shape": (
        {"lora_unet_conv_in.diff": torch.ones(4, 5)},
        r"conv_in.diff': shape \(4, 5\); 'conv_in.weight' has",
    ),
    "a norm's shape": ({"lora_unet_down_blocks_0_ff_1.w_norm": torch.ones(5)}, r"w_norm': shape \(5,\); "),
    "an unknown leaf": (
        {f"{HEAD}.lora_left.weight": torch.ones(1, 4)},
        rf"unknown keys '{HEAD}.lora_left.weight'; known ends of",
    ),
    "no leaf": ({"lora_unet": torch.ones(1)}, r"unknown keys 'lora_unet'"),
    "a leaf alone": ({".lora_up.weight": torch.ones(1)}, r"unknown keys '.lora_up.weight'"),
    "a grown layer": ({f"{HEAD}.reshape_weight": torch.tensor([8, 4])}, r"reshape_weight': it grows the layer"),
    "a vector": ({f"{HEAD}.lora_magnitude_vector": torch.ones(4)}, r"a DoRA here has 'dora_scale'"),
    "half a LoHa": ({"lora_unet_conv_in.hada_w1_a": torch.ones(4, 1)}, r"'lora_unet_conv_in.hada_w1_b' is missing"),
    "a pair and a LoHa": (
        {f"{HEAD}.hada_w{side}_{half}": torch.ones(4, 4) for side in "12" for half in "ab"},
        r"for one parameter; keep one",
    ),
    "LoHa and LoKr": (
        {"lora_unet_conv_in.hada_w1_a": torch.ones(4, 1), "lora_unet_conv_in.lokr_w1": torch.ones(1, 1)},
        r"LoHa and LoKr on one",
    ),
    "half a LoKr": ({"lora_unet_conv_in.lokr_w1": torch.ones(4, 1)}, r"'lora_unet_conv_in.lokr_w2_a' is missing"),
    "a LoKr with too much": (
        {f"lora_unet_conv_in.{leaf}": torch.ones(4, 1) for leaf in ("lokr_w1", "lokr_w1_a", "lokr_w2")},
        r"lokr_w1_a': 'lora_unet_conv_in.lokr_w1' is the whole of it; keep one",
    ),
    "a LoKr's ranks": (
        {
            "lora_unet_conv_in.lokr_w1": torch.ones(1, 1),
            "lora_unet_conv_in.lokr_w2_a": torch.ones(4, 2),
            "lora_unet_conv_in.lokr_w2_b": torch.ones(3, 4),
        },
        r"lokr_w2_a': shape \(4, 2\), beside \(3, 4\): ranks that differ",
    ),
    "a LoKr's size": (
        {"lora_unet_conv_in.lokr_w1": torch.ones(2, 1), "lora_unet_conv_in.lokr_w2": torch.ones(4, 4)},
        r"the product is \(8, 4\); the layer is \(4, 4\)",
    ),
    "a LoKr's kernel": (
        {"lora_unet_conv_in.lokr_w1": torch.ones(1, 1), "lora_unet_conv_in.lokr_w2": torch.ones(4, 2, 2)},
        r"the product is \(4, 4, 'kernel \(2,\)'\)",
    ),
    "a LoHa's core": (
        {f"lora_unet_conv_in.hada_{leaf}": torch.ones(2, 4) for leaf in ("w1_a", "w1_b", "w2_a", "w2_b")}
        | {f"lora_unet_conv_in.hada_t{side}": torch.ones(2, 3, 1) for side in "12"},
        r"hada_t1': shape \(2, 3, 1\), beside",
    ),
    "a LoHa's vector": (
        {f"lora_unet_conv_in.hada_{leaf}": torch.ones(4) for leaf in ("w1_a", "w1_b", "w2_a", "w2_b")},
        r"allowed: a matrix",
    ),
    "a LoHa of two sizes": (
        {f"lora_unet_conv_in.hada_w1_{half}": torch.ones(4, 4) for half in "ab"}
        | {"lora_unet_conv_in.hada_w2_a": torch.ones(4, 4), "lora_unet_conv_in.hada_w2_b": torch.ones(4, 5)},
        r"its two sides have different sizes",
    ),
    "GLoRA": ({f"{HEAD}.a1.weight": torch.ones(4, 1)}, r"GLoRA is not read"),
    "IA3": ({f"{HEAD}.on_input": torch.tensor(1)}, r"LyCORIS's \(IA\)\^3 is not read"),
    "BOFT": ({f"{HEAD}.oft_blocks": torch.ones(1, 2, 2, 2)}, r"BOFT \(a rotation of the output\) is not read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tensors_are_refused(tmp_path: Path, name: str) -> None:
    changes, message = BROKEN[name]
    file = {DOWN: torch.ones(1, 4), UP: torch.ones(4, 1)} | changes
    path = tmp_path / "broken.safetensors"
    save_file({key: value for key, value in file.items() if value is not None}, path)
    model = Deep()
    with unchanged(model), pytest.raises(lp.FormatError, match=message):
        lp.load(model, path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(lp.FormatError, match="the file holds no tensors"):
        lp.load(Deep(), tmp_path / "empty.safetensors", format="kohya")


def test_values_and_differences_of_every_kind(tmp_path: Path) -> None:
    model = Deep()
    base = lp.merged_state_dict(model)
    norm, conv = "lora_unet_down_blocks_0_ff_1", "lora_unet_conv_in"
    file = {
        **{f"{HEAD}.{leaf}": tensor for leaf, tensor in pair().items()},
        f"{HEAD}.diff_b": torch.tensor([1.0, 2, 3, 4]),
        f"{norm}.w_norm": torch.full((4,), 0.5),
        f"{norm}.b_norm": torch.full((4,), 2.0),
        f"{conv}.diff": torch.ones(4, 4),  # a Linear's, for a 1×1 convolution
        f"{conv}.alpha": torch.tensor(3.0),  # some trainers write it; no reader uses it
        "diffusion_model.down_blocks.0.to_q.set_weight": torch.eye(4),
        "diffusion_model.down_blocks.0.to_q.bias.diff": torch.ones(4),
    }
    save_file(file, tmp_path / "a.safetensors")
    lp.load(model, tmp_path / "a.safetensors")
    expected = {
        f"{BLOCK}.weight": base[f"{BLOCK}.weight"] + 1,
        f"{BLOCK}.bias": base[f"{BLOCK}.bias"] + torch.tensor([1.0, 2, 3, 4]),
        "down_blocks.0.ff.1.weight": base["down_blocks.0.ff.1.weight"] + 0.5,
        "down_blocks.0.ff.1.bias": base["down_blocks.0.ff.1.bias"] + 2,
        "conv_in.weight": base["conv_in.weight"] + 1,
        "down_blocks.0.to_q.weight": torch.eye(4),
        "down_blocks.0.to_q.bias": base["down_blocks.0.to_q.bias"] + 1,
    }
    merged = lp.merged_state_dict(model)
    for name, value in base.items():
        torch.testing.assert_close(merged[name], expected.get(name, value))
