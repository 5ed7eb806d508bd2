"""What has no form in the files for kohya's tools and diffusers; and bases that are checkpoints, or missing."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_files import base_of, case
from test_kohya_names import Block, parts
from test_kohya_read import dense
from test_kohya_write import comfyui, groups, lycoris
from test_plans import randomize, unchanged
from torch import Tensor, nn

import loraparam as lp
from loraparam.formats import diffusers, kohya
from loraparam.formats.bases import FileBase, ModelBase
from loraparam.formats.content import content_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shift(lp.Method):
    """A method of a user's own."""

    def init(self, weight: Tensor, layout: lp.Layout, *, generator: Any = None) -> dict[str, Tensor]:
        return {"shift": torch.zeros((), dtype=weight.dtype, device=weight.device)}

    def apply(self, weight: Tensor, factors: dict[str, Tensor], layout: lp.Layout) -> Tensor:
        return weight + factors["shift"]


def experts() -> nn.Module:
    return nn.ParameterDict({"weight": nn.Parameter(torch.randn(2, 4, 4))})


def attention() -> nn.Module:
    return parts(attn=nn.MultiheadAttention(4, 2))


L, OTHER = lp.LoRA(r=1), r"; use format='peft' or 'loraparam'"
NO_FORM: dict[str, tuple[Callable[[], nn.Module], dict[str, lp.Method], str, str]] = {
    "attention": (
        attention,
        {"attn.in_proj_weight": L},
        rf"names stand for a module's weight.*{OTHER}",
        r"'in_proj_weight'.*" + OTHER,
    ),
    "slices of attention": (
        attention,
        {"attn.in_proj_weight[q]": L},
        r"'attn.in_proj_weight': kohya's names stand for",
        r"'in_proj_weight'",
    ),
    "its output": (
        attention,
        {"attn.out_proj": L},
        r"LyCORIS has no effect on .*flavor='comfyui'",
        r"output projection of a Multihead",
    ),
    "an embedding": (
        lambda: parts(e=nn.Embedding(4, 4)),
        {"e": L},
        rf"'e.weight': .* no form for an embedding{OTHER}",
        rf"an embedding alone.*{OTHER}",
    ),
    "a table": (
        lambda: parts(e=nn.Embedding(4, 4)),
        {"e": lp.Full()},
        r"no form for an embedding",
        r"no form for Full, only for low-rank",
    ),
    "experts": (
        lambda: parts(e=experts()),
        {"e.weight": L},
        rf"no low-rank form for a stack of matrices{OTHER}",
        r"a weight read as \(E, out, in\)",
    ),
    "a transposed convolution": (
        lambda: parts(e=nn.ConvTranspose1d(4, 4, 3)),
        {"e.weight": L},
        r"no low-rank form for a transposed convolution",
        r"a weight read as",
    ),
    "a user's method": (
        Block,
        {"to_q": Shift()},
        rf"'to_q.weight': kohya's format has no form for Shift{OTHER}",
        r"no form for Shift",
    ),
    "a scaled row": (Block, {"to_q.weight": lp.IA3()}, rf"no form for IA3{OTHER}", r"no form for IA3"),
    "a scaled bias": (
        Block,
        {"to_q.bias": lp.IA3()},
        rf"'to_q.bias': kohya's format has no form for IA3{OTHER}",
        r"'to_q.bias': diffusers has no form",
    ),
}


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", NO_FORM)
def test_what_has_no_form_is_refused(tmp_path: Path, name: str, format: str) -> None:
    make, methods, for_kohya, for_diffusers = NO_FORM[name]
    model, path = make(), tmp_path / "a.safetensors"
    lp.attach(model, methods)
    path.write_bytes(b"what was there")
    with unchanged(model), pytest.raises(lp.FormatError, match=for_kohya if format == "kohya" else for_diffusers):
        lp.save(model, path, format=format)
    assert path.read_bytes() == b"what was there"


REFUSED: dict[str, tuple[str, dict[str, lp.Method], dict[str, Any], str]] = {
    "a magnitude per input": (
        "diffusers",
        {"to_q": lp.DoRA(r=1, axis="in")},
        {},
        r"a magnitude per input; write its difference",
    ),
    "a difference": (
        "diffusers",
        {"to_q.weight": lp.Full()},
        {},
        r"no form for Full, only for low-rank pairs and biases",
    ),
    "a bias beside a DoRA": (
        "diffusers",
        {"to_q.weight": lp.DoRA(r=1), "ff.0.bias": lp.Full()},
        {},
        r"'ff.0': diffusers has no DoRA beside a trained bias",
    ),
    "a prefix that is none": ("diffusers", {"to_q": L}, {"prefix": 3}, r"prefix=3; allowed: a string, or a mapping"),
    "a prefix that is none, kohya": ("kohya", {"to_q": L}, {"prefix": {"to_q": 3}}, r"allowed: a string, or a mapping"),
    "no prefix for it": (
        "diffusers",
        {"to_q": L},
        {"prefix": {"ff": "x"}},
        r"'to_q': prefix=.* has no module path above it",
    ),
    "no prefix for it, kohya": (
        "kohya",
        {"to_q": L},
        {"prefix": {"ff": "x"}},
        r"'to_q': prefix=.* has no module path above it",
    ),
    "a part itself": (
        "diffusers",
        {"to_q": L},
        {"prefix": {"to_q": "unet"}},
        r"'to_q': diffusers adapts modules below a part",
    ),
    "a flavor": ("kohya", {"to_q": L}, {"flavor": "a1111"}, r"flavor='a1111'; allowed: 'lycoris', 'comfyui'"),
    "an option": (
        "kohya",
        {"to_q": L},
        {"flavour": "comfyui"},
        r"unknown option 'flavour' for kohya.*nearest: 'flavor'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    format, methods, options, message = REFUSED[name]
    model = Block()
    lp.attach(model, methods)
    with unchanged(model), pytest.raises(lp.FormatError, match=message):
        lp.save(model, tmp_path / "a.safetensors", format=format, **options)
    assert not list(tmp_path.iterdir())


# --- a base that is a checkpoint, or none -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["lycoris/dora_in", "lycoris/dora_out", "lycoris/locon_tucker", "lycoris/locon_norm", "lycoris/full"]
)
def test_from_a_checkpoint_and_back(tmp_path: Path, name: str) -> None:
    subject = case(name)
    for base in (FileBase(subject.base_file), ModelBase(base_of(subject))):
        content = kohya.read(subject.file, base)
        for flavor, reader in (("lycoris", lycoris), ("comfyui", comfyui)):
            kohya.write(tmp_path / "a.safetensors", content, base, flavor=flavor)  # type: ignore[arg-type]
            again = dense(kohya.read(tmp_path / "a.safetensors", base), base)
            for path, value in dense(content, base).items():
                torch.testing.assert_close(again[path], value, rtol=1e-5, atol=1e-5)
                group = groups(tmp_path / "a.safetensors")["lycoris_" + path.rpartition(".")[0].replace(".", "_")]
                if path.endswith("weight"):
                    torch.testing.assert_close(reader(base.tensor(path).double(), group), value, rtol=1e-5, atol=1e-5)


def test_comfyuis_own_values(tmp_path: Path) -> None:
    """The formula of ComfyUI gives what ComfyUI gave for this file, and with its flavor what was meant."""
    subject = case("lycoris/dora_out")
    base, file = FileBase(subject.base_file), groups(subject.file)
    kohya.write(tmp_path / "a.safetensors", kohya.read(subject.file, base), base, flavor="comfyui")
    ours = groups(tmp_path / "a.safetensors")
    for path, value in subject.wanted("comfy").items():
        head = "lycoris_" + path.rpartition(".")[0].replace(".", "_")
        W = base.tensor(path).double()
        torch.testing.assert_close(comfyui(W, file[head]), value.double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(comfyui(W, ours[head]), subject.wanted()[path].double(), rtol=1e-5, atol=1e-5)


def test_without_a_base(tmp_path: Path) -> None:
    model, path = Block(), tmp_path / "a.safetensors"
    lp.attach(model, {"to_q.weight": lp.DoRA(r=1), "ff.0.weight": lp.LoRA(r=2, alpha=1)})
    randomize(model)
    content = content_of(model, "default")
    kohya.write(path, content, None)
    assert set(groups(path)) == {"lycoris_to_q", "lycoris_ff_0"}
    with pytest.raises(
        lp.FormatError, match=r"'to_q.weight': the base is needed for the norms of its weight; or flavor="
    ):
        kohya.write(path, content, None, flavor="comfyui")
    with pytest.raises(lp.FormatError, match=r"'ff.0.weight': LoRA beside DoRAs.*the base is needed for the lengths"):
        diffusers.write(path, content, None)
    lp.detach(model)
    lp.attach(model, {"to_q.bias": lp.Full()})
    content = content_of(model, "default")
    kohya.write(path, content, None, flavor="comfyui")
    with pytest.raises(lp.FormatError, match=r"'to_q.bias': LyCORIS reads no bias without its weight"):
        kohya.write(path, content, None)
    with pytest.raises(lp.FormatError, match=r"'to_q.weight': the base is needed to write a pair beside"):
        diffusers.write(path, content, None)
    replaced = dataclasses.replace(content, replaced={"to_q.weight": torch.zeros(4, 4)})
    for writer in (kohya, diffusers):
        with pytest.raises(lp.FormatError, match=r"replaces 'to_q.weight' as a whole; the base is needed"):
            writer.write(path, replaced, None)  # type: ignore[attr-defined]
