"""Which modules the names in a kohya file mean, and which part of a file ``prefix`` selects."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_files import case
from safetensors.torch import load_file, save_file
from test_kohya_read import READ
from test_plans import unchanged
from torch import Tensor, nn

import loraparam as lp
from loraparam.formats import kohya


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(4, 4)
        self.ff = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


class Deep(nn.Module):
    """Names with "_" and "." in many places."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([Block(), Block()])
        self.conv_in = nn.Conv2d(4, 4, 1)


class Text(nn.Module):
    def __init__(self, level: bool) -> None:
        super().__init__()
        inner = nn.ModuleDict({"encoder": nn.ModuleDict({"fc_1": nn.Linear(4, 4)})})
        if level:
            self.text_model = inner
        else:
            self.encoder = inner["encoder"]


def pair(r: int = 1) -> dict[str, Tensor]:
    return {"lora_down.weight": torch.ones(r, 4), "lora_up.weight": torch.ones(4, r)}


def file_of(path: Path, *heads: str, **more: Tensor) -> Path:
    save_file({f"{head}.{leaf}": tensor for head in heads for leaf, tensor in pair().items()} | more, path)
    return path


def targets(model: nn.Module, path: Path, **hints: Any) -> list[str]:
    """The parameters a file is for; the model is left as it was."""
    plan = lp.load(model, path, **hints)
    lp.detach(model)
    return [row.path for row in plan]


def parts(**children: nn.Module) -> nn.Module:
    return nn.ModuleDict(children)


BLOCK, FIRST = "down_blocks.1.ff.0", "down_blocks_1_ff_0"
FOUND: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "the model itself": (Deep, f"lora_unet_{FIRST}", f"{BLOCK}.weight"),
    "a child": (lambda: parts(unet=Deep()), f"lora_unet_{FIRST}", f"unet.{BLOCK}.weight"),
    "a transformer": (lambda: parts(transformer=Deep()), f"lora_unet_{FIRST}", f"transformer.{BLOCK}.weight"),
    "OneTrainer": (lambda: parts(transformer=Deep()), f"lora_transformer_{FIRST}", f"transformer.{BLOCK}.weight"),
    "LyCORIS": (Deep, f"lycoris_{FIRST}", f"{BLOCK}.weight"),
    "LyCORIS, of a part": (lambda: parts(transformer=Deep()), f"lycoris_{FIRST}", f"transformer.{BLOCK}.weight"),
    "LyCORIS, of a whole": (lambda: parts(unet=Deep()), f"lycoris_unet_{FIRST}", f"unet.{BLOCK}.weight"),
    "ComfyUI": (Deep, f"diffusion_model.{BLOCK}", f"{BLOCK}.weight"),
    "ComfyUI, literally": (
        lambda: parts(diffusion_model=Deep()),
        f"diffusion_model.{BLOCK}",
        f"diffusion_model.{BLOCK}.weight",
    ),
    "ComfyUI, a parameter": (Deep, f"diffusion_model.{BLOCK}.weight", f"{BLOCK}.weight"),
    "no prefix": (Deep, FIRST, f"{BLOCK}.weight"),
    "no prefix, dotted": (Deep, BLOCK, f"{BLOCK}.weight"),
    "text": (lambda: Text(True), "lora_te_text_model_encoder_fc_1", "text_model.encoder.fc_1.weight"),
    "text, without its level": (lambda: Text(False), "lora_te1_text_model_encoder_fc_1", "encoder.fc_1.weight"),
    "text, with one more level": (lambda: Text(True), "lora_te_encoder_fc_1", "text_model.encoder.fc_1.weight"),
    "the second text encoder": (
        lambda: parts(text_encoder=Text(True), text_encoder_2=Text(False)),
        "lora_te2_text_model_encoder_fc_1",
        "text_encoder_2.encoder.fc_1.weight",
    ),
    "ComfyUI's text encoder": (
        lambda: parts(text_encoder=Text(False)),
        "text_encoders.clip_l.transformer.text_model.encoder.fc_1",
        "text_encoder.encoder.fc_1.weight",
    ),
    "a checkpoint's name": (
        lambda: parts(model=parts(diffusion_model=Deep())),
        f"lora_unet_{FIRST}",
        f"model.diffusion_model.{BLOCK}.weight",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_name_is_found(tmp_path: Path, name: str) -> None:
    make, head, expected = FOUND[name]
    assert targets(make(), file_of(tmp_path / "a.safetensors", head), format="kohya") == [expected]


@pytest.mark.parametrize(
    "prefix",
    [
        "lora_unet",
        "lora_unet_",
        "unet",
        {"lora_unet_": ""},
        {"lora_unet": ""},
        {"unet": ""},
        {"lora_unet_down_blocks": "down_blocks"},
    ],
)
def test_a_prefix_selects_a_part(tmp_path: Path, prefix: Any) -> None:
    path = file_of(tmp_path / "a.safetensors", f"lora_unet_{FIRST}", "lora_te_text_model_encoder_fc_1")
    assert targets(Deep(), path, prefix=prefix) == [f"{BLOCK}.weight"]


def test_a_map_places_parts(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.safetensors", f"lora_unet_{FIRST}", "lora_te1_encoder_fc_1", "lora_te2_encoder_fc_1")
    model = parts(image=Deep(), words=Text(True), more=Text(False))
    prefix = {"lora_unet_": "image.", "lora_te1_": "words.", "lora_te2": "more"}
    expected = {f"image.{BLOCK}.weight", "words.text_model.encoder.fc_1.weight", "more.encoder.fc_1.weight"}
    assert set(targets(model, path, prefix=prefix)) == expected
    assert targets(model, path, prefix={"lora_te": "words", "lora_te2": "more"}) == ["more.encoder.fc_1.weight"]


def test_one_text_encoder_is_not_the_start_of_another(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.safetensors", "lora_te_encoder_fc_1", "lora_te1_encoder_fc_1")
    assert targets(Text(False), path, prefix="lora_te") == ["encoder.fc_1.weight"]


class Colliding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a_b = nn.ModuleDict({"c": nn.Linear(4, 4)})
        self.a = nn.ModuleDict({"b_c": nn.Linear(4, 4)})
        self.d = nn.Linear(4, 4)


REFUSALS: dict[str, tuple[Callable[[], nn.Module], list[str], dict[str, Any], str]] = {
    "two modules of one name": (
        Colliding,
        ["lora_unet_a_b_c"],
        {},
        r"'lora_unet_a_b_c' may be any of 'a_b.c', 'a.b_c'",
    ),
    "an unknown module": (
        Deep,
        [f"lora_unet_{FIRST}", "lora_unet_conv_on"],
        {},
        r"1 of 2 modules of 'lora_unet_' are not in the model: 'lora_unet_conv_on'; nearest: 'conv_in'",
    ),
    "no known module": (
        Deep,
        ["lora_unet_conv_on"],
        {},
        r"not in the model: 'lora_unet_' \(1 modules\), such as .*nearest: 'conv_in'",
    ),
    "an absent part": (
        Deep,
        [f"lora_unet_{FIRST}", "lora_te_encoder_fc_1", "lora_te_encoder_fc_2"],
        {},
        r"parts that are not in the model: 'lora_te_' \(2 modules\).*; prefix='lora_unet_' loads that part alone",
    ),
    "two parts for one model": (
        lambda: Text(False),
        ["lora_te1_encoder_fc_1", "lora_te2_encoder_fc_1"],
        {},
        r"'lora_te1_encoder_fc_1' and 'lora_te2_encoder_fc_1' both are 'encoder.fc_1'",
    ),
    "one module twice": (
        lambda: Text(False),
        ["lora_te_encoder_fc_1", "lora_te_text_model_encoder_fc_1"],
        {},
        r"both are 'encoder.fc_1'",
    ),
    "a prefix of nothing": (
        Deep,
        [f"lora_unet_{FIRST}"],
        {"prefix": "lora_te"},
        r"prefix='lora_te' selects nothing; in the file: 'lora_unet_'",
    ),
    "a prefix for no module": (
        Deep,
        [f"lora_unet_{FIRST}"],
        {"prefix": {"lora_unet": "unett"}},
        r"the model has no module 'unett'",
    ),
    "a prefix that is none": (
        Deep,
        [f"lora_unet_{FIRST}"],
        {"prefix": 3},
        r"prefix=3; allowed: a string, or a mapping",
    ),
    "a flavor": (Deep, [f"lora_unet_{FIRST}"], {"flavor": "a1111"}, r"flavor='a1111'; allowed: 'lycoris', 'comfyui'"),
    "a name with a dot after its prefix": (Deep, [f"lora_unet_{BLOCK}"], {}, r"not in the model"),
    "attention": (
        lambda: parts(attn=nn.MultiheadAttention(4, 2)),
        ["lora_unet_attn"],
        {},
        r"'attn' has no parameter 'weight'",
    ),
    "an embedding": (
        lambda: parts(table=nn.Embedding(4, 4)),
        ["lora_unet_table"],
        {},
        r"'table.weight' is the .* of a Embedding",
    ),
    "a transposed convolution": (
        lambda: parts(up=nn.ConvTranspose1d(4, 4, 1)),
        ["lora_unet_up"],
        {},
        r"'up.weight' is the \(4, 4, 1\) parameter of a ConvTr",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_names_are_refused(tmp_path: Path, name: str) -> None:
    make, heads, hints, message = REFUSALS[name]
    model, path = make(), file_of(tmp_path / "a.safetensors", *heads)
    with unchanged(model), pytest.raises(lp.FormatError, match=message):
        lp.load(model, path, format="kohya", **hints)


def test_a_collision_elsewhere_does_not_matter(tmp_path: Path) -> None:
    assert targets(Colliding(), file_of(tmp_path / "a.safetensors", "lora_unet_d")) == ["d.weight"]


def test_without_a_base_names_mean_nothing(tmp_path: Path) -> None:
    head = f"lora_unet_{FIRST}"
    with pytest.raises(
        lp.FormatError, match=rf"names such as '{head}' mean the modules of one model; the base is needed"
    ):
        kohya.read(file_of(tmp_path / "a.safetensors", head), None)


# --- names as they are in the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READ)
def test_a_file_can_be_looked_at_without_its_base(name: str) -> None:
    subject = case(name)
    look = lp.inspect_file(subject.file)
    known = {row.path: row for row in lp.inspect_file(subject.file, base=subject.base_file).rows}
    assert len(look.rows) == len(known) == len(subject.spec["changed"])
    by_name = {path.replace(".", "_"): row for path, row in known.items()}
    for row in look.rows:
        start = row.path.replace("lycoris_", "").replace("lora_te_", "text_encoder_").replace("lora_unet_", "unet_")
        other = by_name[start.replace(".", "_")]
        assert (row.rank, row.method, row.norm) == (other.rank, other.method, other.norm)
        # A LoHa or LoKr of a convolution does not show the kernel.
        assert row.shape == other.shape or name in ("lycoris/loha", "lycoris/lokr")


def test_a_file_keeps_its_names_when_it_is_resized(tmp_path: Path) -> None:
    subject = case("kohya/sd_unet_te")
    lp.resize(subject.file, tmp_path / "a.safetensors", rank=1, names="file")
    heads = {key.partition(".")[0] for key in load_file(subject.file)}
    assert {key.partition(".")[0] for key in load_file(tmp_path / "a.safetensors")} == heads


def test_without_a_base_no_part_is_selected(tmp_path: Path) -> None:
    file = file_of(tmp_path / "a.safetensors", "lora_unet_x", "lora_te_x")
    assert len(lp.inspect_file(file).rows) == 2
    with pytest.raises(lp.FormatError, match=r"prefix='lora_unet' selects a part of a model, and without the base"):
        lp.inspect_file(file, prefix="lora_unet")


@pytest.mark.parametrize(
    ("names", "message"),
    [("model", r"or the hint names='file' to leave them as they are"), ("files", r"allowed: 'model', 'file'")],
)
def test_how_names_are_read(tmp_path: Path, names: Any, message: str) -> None:
    with pytest.raises(lp.FormatError, match=message):
        kohya.read(file_of(tmp_path / "a.safetensors", "lora_unet_x"), None, names=names)


LONG = 20_000
GROWING = {
    "a core": {
        "lora_down.weight": torch.ones(1, LONG, 1),
        "lora_up.weight": torch.ones(1, 1, 1),
        "lora_mid.weight": torch.ones(1, 1, LONG),
    },
    "a scale per input channel": {
        "lora_down.weight": torch.ones(1, 1, LONG),
        "lora_up.weight": torch.ones(LONG, 1, 1),
        "dora_scale": torch.ones(1, 1, 1),
    },
}


@pytest.mark.parametrize("name", GROWING)
def test_nothing_large_is_made_of_a_small_file(tmp_path: Path, name: str) -> None:
    save_file({f"lora_unet_x.{leaf}": tensor for leaf, tensor in GROWING[name].items()}, tmp_path / "a.safetensors")
    with pytest.raises(lp.FormatError, match=r"400000000 numbers would be made of \d+; the base is needed"):
        kohya.read(tmp_path / "a.safetensors", None, names="file")
