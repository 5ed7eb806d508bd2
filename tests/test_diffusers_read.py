"""Reading diffusers' files: effective weights, scales, the spellings of a pair, parts, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_files import CASES, base_of, case
from safetensors import torch as safetensors
from test_kohya_read import check_output, dense, without_level
from torch import Tensor, nn

import loraparam as lp
from loraparam.formats import diffusers
from loraparam.formats.bases import FileBase


def save_file(tensors: dict[str, Tensor], path: Path, header: dict[str, str] | None = None) -> None:
    safetensors.save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, header)


FILES = [name for name in CASES if name.startswith("diffusers/")]


@pytest.mark.parametrize("name", FILES)
def test_effective_weights_are_diffusers_own(name: str) -> None:
    subject = case(name)
    base = FileBase(subject.base_file)
    alpha = subject.spec.get("network_alphas")  # diffusers keeps the alphas of the oldest spelling beside the file
    found = dense(diffusers.read(subject.file, base, alpha=alpha), base)
    assert set(found) == set(subject.spec["changed"])
    for path, value in subject.wanted().items():
        torch.testing.assert_close(found[path], value.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_loaded_into_a_model_it_computes_what_diffusers_computes(name: str) -> None:
    subject = case(name)
    model = base_of(subject)
    alpha = subject.spec.get("network_alphas")
    lp.load(model, subject.file, **({} if alpha is None else {"alpha": alpha}))
    merged = lp.merged_state_dict(model)
    for path, value in subject.wanted().items():
        found = merged.get(path, merged.get(without_level(path)))
        torch.testing.assert_close(found, value.float(), rtol=1e-5, atol=1e-6)
    check_output(model, subject)


# --- spellings, scales and shapes, against the formulas written out --------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diffusers_read")


class Attention(nn.Module):
    """The names of diffusers' attention, or of CLIP's."""

    def __init__(self, text: bool) -> None:
        super().__init__()
        names = ("q_proj", "k_proj", "v_proj", "out_proj") if text else ("to_q", "to_k", "to_v")
        for name in names:
            self.add_module(name, nn.Linear(4, 6))
        if not text:
            self.to_out = nn.ModuleList([nn.Linear(4, 6)])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attention(text=False)
        self.self_attn = Attention(text=True)
        self.conv1 = nn.Conv2d(4, 6, 3)
        self.depth = nn.Conv2d(4, 6, 3, groups=2)
        self.table = nn.Embedding(7, 4)


# {spelling: (keys of the halves, the module's path)}
SPELLINGS = {
    "PEFT": ("attn1.to_q.lora_{AB}.weight", "attn1.to_q"),
    "PEFT, with the adapter's name": ("attn1.to_q.lora_{AB}.default.weight", "attn1.to_q"),
    "PEFT, bare": ("attn1.to_q.lora_{AB}", "attn1.to_q"),
    "diffusers": ("attn1.to_out.0.lora.{updown}.weight", "attn1.to_out.0"),
    "diffusers, text": ("self_attn.q_proj.lora_linear_layer.{updown}.weight", "self_attn.q_proj"),
    "processor": ("attn1.processor.to_v_lora.{updown}.weight", "attn1.to_v"),
    "processor, output": ("attn1.processor.to_out_lora.{updown}.weight", "attn1.to_out.0"),
    "processor, text": ("self_attn.to_k_lora.{updown}.weight", "self_attn.k_proj"),
    "processor, text output": ("self_attn.to_out_lora.{updown}.weight", "self_attn.out_proj"),
    "processor without its level": ("attn1.to_q_lora.{updown}.weight", "attn1.to_q"),
}


def spelled(key: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    return {key.format(AB=ab, updown=word): tensor for ab, word, tensor in (("A", "down", A), ("B", "up", B))}


@pytest.mark.parametrize("part", ["", "unet.", "transformer.", "text_encoder_2."])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_pair_is_found_in_every_spelling(tmp_path: Path, spelling: str, part: str) -> None:
    key, path = SPELLINGS[spelling]
    A, B = torch.randn(2, 4), torch.randn(6, 2)
    save_file(spelled(part + key, A, B), tmp_path / "a.safetensors")
    for model, start in ((Net(), ""), (nn.ModuleDict({part[:-1]: Net()}) if part else Net(), part)):
        weight = model.get_parameter(f"{start}{path}.weight").detach().clone()
        # Bare halves are loralib's spelling as well, whose files hold no scale.
        named = "diffusers" if spelling == "PEFT, bare" else None
        (row,) = lp.load(model, tmp_path / "a.safetensors", format=named)
        assert row.path == f"{start}{path}.weight"
        torch.testing.assert_close(model.get_submodule(f"{start}{path}").weight, weight + B @ A)


HEADERS: dict[str, tuple[dict[str, Any], float]] = {
    "no header": ({}, 1),
    "alpha": ({"r": 2, "lora_alpha": 6}, 3),
    "the defaults of a header": ({"r": 2}, 4),
    "rank-stabilized": ({"r": 2, "lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5),
    "rank by pattern": ({"r": 8, "lora_alpha": 6, "rank_pattern": {"to_q": 2}}, 3),
    "alpha by pattern": ({"r": 2, "lora_alpha": 6, "alpha_pattern": {"^attn1.to_q": 5}}, 2.5),
    "both, the other module's": (
        {"r": 2, "lora_alpha": 6, "rank_pattern": {"to_k": 1}, "alpha_pattern": {"to_k": 1}},
        3,
    ),
    "fields without effect": ({"r": 2, "lora_alpha": 4, "target_modules": "(.*)*(.*)*!", "lora_dropout": 0.5}, 2),
}


@pytest.mark.parametrize("part", ["", "unet."])
@pytest.mark.parametrize("name", HEADERS)
def test_the_scale_is_the_headers(tmp_path: Path, name: str, part: str) -> None:
    fields, scale = HEADERS[name]
    A, B = torch.randn(2, 4), torch.randn(6, 2)
    header = (
        {"lora_adapter_metadata": json.dumps({part + key: value for key, value in fields.items()})} if fields else None
    )
    save_file(spelled(f"{part}attn1.to_q.lora_{{AB}}.weight", A, B), tmp_path / "a.safetensors", header)
    model = Net()
    weight = model.attn1.to_q.weight.detach().clone()  # type: ignore[union-attr]
    lp.load(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(model.attn1.to_q.weight, weight + scale * B @ A)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "alpha",
    [
        5,
        {"unet.attn1.processor.to_q_lora.down.weight.alpha": 5},
        {"unet.attn1.to_q": 5.0},
        {"unet.attn1.to_q.alpha": 5},
    ],
)
def test_an_alpha_beside_the_file(tmp_path: Path, alpha: Any) -> None:
    A, B = torch.randn(2, 4), torch.randn(6, 2)
    save_file(spelled("unet.attn1.processor.to_q_lora.{updown}.weight", A, B), tmp_path / "a.safetensors")
    model = Net()
    weight = model.attn1.to_q.weight.detach().clone()  # type: ignore[union-attr]
    lp.load(model, tmp_path / "a.safetensors", alpha=alpha)
    torch.testing.assert_close(model.attn1.to_q.weight, weight + 2.5 * B @ A)  # type: ignore[union-attr]


def test_shapes_other_than_a_linears(tmp_path: Path) -> None:
    """A convolution with a magnitude, a grouped one, an embedding with a magnitude, a bias."""
    model = Net()
    base = lp.merged_state_dict(model)
    A, B = torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1)
    m, dim = torch.rand(1, 6, 1, 1), torch.rand(4)
    groups = torch.zeros(4, 4, 3, 3)
    own = torch.randn(2, 2, 3, 3)
    groups[:2, :2], groups[2:, 2:] = own, own
    file = {
        "conv1.lora_A.weight": A,
        "conv1.lora_B.weight": B,
        "conv1.lora_magnitude_vector": m,
        "depth.lora_A.weight": groups,  # PEFT's: dense, then grouped
        "depth.lora_B.weight": B,
        "table.lora_embedding_A": A[:, 0, :1].reshape(2, 3).repeat(1, 3)[:, :7].contiguous(),
        "table.lora_embedding_B": torch.ones(4, 2),
        "table.lora_magnitude_vector": dim,
        "attn1.to_q.lora_A.weight": torch.ones(1, 4),
        "attn1.to_q.lora_B.weight": torch.ones(6, 1),
        "attn1.to_q.lora_B.bias": torch.arange(6.0),
    }
    save_file(file, tmp_path / "a.safetensors")
    lp.load(model, tmp_path / "a.safetensors")
    V = base["conv1.weight"] + torch.einsum("or,rikl->oikl", B[:, :, 0, 0], A)
    E = base["table.weight"] + (file["table.lora_embedding_B"] @ file["table.lora_embedding_A"]).T
    expected = {
        "conv1.weight": V * m.reshape(6, 1, 1, 1) / V.flatten(1).norm(dim=1).reshape(6, 1, 1, 1),
        "depth.weight": base["depth.weight"] + torch.einsum("or,rikl->oikl", B[:, :, 0, 0], own),
        "table.weight": E * dim / E.norm(dim=0),
        "attn1.to_q.weight": base["attn1.to_q.weight"] + 1,
        "attn1.to_q.bias": base["attn1.to_q.bias"] + torch.arange(6.0),
    }
    for name, value in lp.merged_state_dict(model).items():
        torch.testing.assert_close(value, expected.get(name, base[name]), rtol=1e-5, atol=1e-5)


def test_padding_to_a_common_rank_is_dropped(tmp_path: Path) -> None:
    A, B = torch.zeros(5, 4), torch.zeros(6, 5)
    A[:2], B[:, :2] = torch.randn(2, 4), torch.randn(6, 2)
    save_file(spelled("attn1.to_q.lora_{AB}.weight", A, B), tmp_path / "a.safetensors")
    model = Net()
    weight = model.attn1.to_q.weight.detach().clone()  # type: ignore[union-attr]
    lp.load(model, tmp_path / "a.safetensors", alpha=10)
    assert lp.adapters(model)["default"]["attn1.to_q.weight"] == lp.LoRA(r=2, alpha=4)
    torch.testing.assert_close(model.attn1.to_q.weight, weight + 2 * B @ A)  # type: ignore[union-attr]


def test_without_a_base_the_shapes_are_the_files(tmp_path: Path) -> None:
    A, B = torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1)
    save_file(spelled("unet.conv1.lora_{AB}.weight", A, B), tmp_path / "a.safetensors")
    for prefix, path in ((None, "unet.conv1.weight"), ("unet", "conv1.weight")):
        (item,) = diffusers.read(tmp_path / "a.safetensors", None, prefix=prefix).items
        assert (item.path, item.shape, item.layout) == (path, (6, 4, 3, 3), lp.Layout())
