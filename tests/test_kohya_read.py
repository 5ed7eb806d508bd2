"""Reading kohya's, LyCORIS' and ComfyUI's files: effective weights, names, and what is refused."""

import math
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from diffusion_files import CASES, Case, base_of, case
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_plans import unchanged
from torch import Tensor, nn

import loraparam as lp
from loraparam.formats import kohya
from loraparam.formats.bases import Base, FileBase
from loraparam.formats.content import Content

REFUSED = {"lycoris/diag_oft": "OFT"}
READ = [name for name in CASES if name.partition("/")[0] != "diffusers" and name not in REFUSED]


def dense(content: Content, base: Base) -> dict[str, Tensor]:
    """{parameter: effective value in float64} of what a file changes."""
    found = {}
    for item in content.items:
        weight = base.tensor(item.parameter).double()
        factors = {key: factor.double() for key, factor in item.factors.items()}
        found[item.parameter] = item.method.apply(weight, factors, item.layout)
    return found | {path: value.double() for path, value in content.replaced.items()}


def without_level(name: str) -> str:
    return name.replace(".text_model.", ".")


# --- files of the tools themselves ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READ)
def test_effective_weights_are_the_tools_own(name: str) -> None:
    subject = case(name)
    base = FileBase(subject.base_file)
    found = dense(kohya.read(subject.file, base), base)
    assert set(found) == set(subject.spec["changed"])
    for path, value in subject.wanted().items():
        torch.testing.assert_close(found[path], value.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", READ)
def test_loaded_into_a_model_it_computes_what_the_tool_computes(name: str) -> None:
    subject = case(name)
    model = base_of(subject)
    lp.load(model, subject.file)
    merged = lp.merged_state_dict(model)
    for path, value in subject.wanted().items():
        found = merged.get(path, merged.get(without_level(path)))
        torch.testing.assert_close(found, value.float(), rtol=1e-5, atol=1e-6)
    check_output(model, subject)


@torch.no_grad()
def check_output(model: nn.Module, subject: Case) -> None:
    """The model's output is the tool's own."""
    torch.testing.assert_close(_output(model, subject), subject.expected["output"], rtol=1e-4, atol=1e-4)


def _output(model: nn.Module, subject: Case) -> Tensor:
    if "kind" in subject.spec["base"]:
        return model(subject.expected["input"])  # type: ignore[no-any-return]
    hidden = model["text_encoder"](subject.expected["ids"]).last_hidden_state  # type: ignore[index]
    torch.testing.assert_close(hidden, subject.expected["text_hidden"], rtol=1e-4, atol=1e-4)
    unet = model["unet"]  # type: ignore[index]
    return unet(subject.expected["input"], subject.expected["timestep"], hidden).sample  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", REFUSED)
def test_other_algorithms_are_refused_by_name(name: str) -> None:
    subject = case(name)
    model = base_of(subject)
    with unchanged(model), pytest.raises(lp.FormatError, match=rf"'lycoris_\w+\.\w+': {REFUSED[name]}.* is not read; "):
        lp.load(model, subject.file)


# --- any layer, rank, spelling and scale, against the formulas written out ------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kohya_read")


SPELLINGS = (
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A", "lora_B"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
)
SHAPES = {"linear": (6, 5), "line": (4, 3, 3), "1x1": (5, 4, 1, 1), "image": (4, 3, 2, 3), "volume": (3, 2, 1, 2, 2)}


def named(head: str, leaf: str) -> str:
    return head + leaf if leaf.startswith("_") else f"{head}.{leaf}"


class Plain(nn.Module):
    """One weight, as a Linear or a convolution of this shape has it, below two names."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        kinds: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
        layer = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else kinds[len(shape)](shape[1], shape[0], shape[2:])
        self.mid_block = nn.ModuleDict({"to_q": layer.double()})

    @property
    def weight(self) -> Tensor:
        return self.mid_block["to_q"].weight  # type: ignore[return-value]


@given(st.data())
def test_a_pair_means_what_its_formula_says(folder: Path, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(sorted(SHAPES.values())))
    out, in_, *kernel = shape
    r = data.draw(st.integers(1, 7))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    ones = [1] * len(kernel)
    tucker = bool(kernel) and data.draw(st.booleans())
    down_end, up_end = SPELLINGS[0] if tucker else data.draw(st.sampled_from(SPELLINGS))
    down, up = torch.randn(r, in_, *(ones if tucker else kernel)).to(dtype), torch.randn(out, r, *ones).to(dtype)
    head = data.draw(st.sampled_from(["lora_unet_mid_block_to_q", "diffusion_model.mid_block.to_q"]))
    file = {named(head, down_end): down, named(head, up_end): up}
    delta = torch.einsum("or,ri...->oi...", up.double().reshape(out, r), down.double())
    if tucker:
        mid = file[f"{head}.lora_mid.weight"] = torch.randn(r, r, *kernel).to(dtype)
        inner = down.double().reshape(r, in_)
        delta = torch.einsum("mn...,om,ni->oi...", mid.double(), up.double().reshape(out, r), inner)
    alpha = data.draw(st.none() | st.integers(0, 9))
    if alpha is not None:
        kind = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.float64, torch.uint8]))
        file[f"{head}.alpha"] = torch.tensor(alpha, dtype=kind)
    V = (model := Plain(shape)).weight.detach() + (alpha or r) / r * delta
    axis = data.draw(st.sampled_from([None, 0, 1]))
    if axis is not None:
        sizes = [size if dim == axis else 1 for dim, size in enumerate(shape)]
        m = file[f"{head}.dora_scale"] = torch.rand(sizes).to(dtype)
        V = V * m.double() / (V.pow(2).sum([d for d in range(len(shape)) if d != axis], keepdim=True).sqrt() + 2.0**-23)
    save_file(file, folder / "pair.safetensors")
    lp.load(model, folder / "pair.safetensors")
    # The factors are float32 at least, and a rank above min(out, in) is multiplied out.
    torch.testing.assert_close(lp.merged_state_dict(model)["mid_block.to_q.weight"], V, rtol=1e-4, atol=1e-4)


def drawn_operand(
    data: st.DataObject, out: int, in_: int, kernel: list[int]
) -> tuple[dict[str, Tensor], Tensor, int | None]:
    """({leaf: tensor}, the matrix (out, in, *k), its rank) of one side of a LoHa or LoKr."""
    kind = data.draw(st.sampled_from(["whole", "pair", "core"]))
    r = data.draw(st.integers(1, 3))
    if kind == "whole":
        W = torch.randn(out, in_, *kernel)
        return {"": W}, W.double(), None
    if kind == "pair" or not kernel:
        a, b = torch.randn(out, r), torch.randn(r, in_ * math.prod(kernel))
        return {"_a": a, "_b": b}, (a.double() @ b.double()).reshape(out, in_, *kernel), r
    a, b, t = torch.randn(r, out), torch.randn(r, in_), torch.randn(r, r, *kernel)
    return {"_a": a, "_b": b, "t": t}, torch.einsum("ij...,ip,jr->pr...", t.double(), a.double(), b.double()), r


@given(st.data())
def test_products_mean_what_their_formulas_say(folder: Path, data: st.DataObject) -> None:
    hadamard, kernel = data.draw(st.booleans()), data.draw(st.sampled_from([[], [1], [2, 3]]))
    a, c = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    b, d = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    head, file = "lora_unet_mid_block_to_q", {}
    sides = []
    for side, sizes in (
        ((1, (a * b, c * d, kernel)), (2, (a * b, c * d, kernel)))
        if hadamard
        else ((1, (a, c, [])), (2, (b, d, kernel)))
    ):
        leaves, W, r = drawn_operand(data, *sizes)
        hypothesis.assume(r is not None or not hadamard)
        sides.append((W, r))
        stem = "hada_" if hadamard else "lokr_"
        for leaf, tensor in leaves.items():
            file[f"{head}.{stem}{f't{side}' if leaf == 't' else f'w{side}{leaf}'}"] = tensor
    (W1, r1), (W2, r2) = sides
    if hadamard:
        hypothesis.assume(r1 == r2)
        delta = W1 * W2
    else:
        delta = torch.einsum("ac,bd...->abcd...", W1, W2).reshape(a * b, c * d, *kernel)
    alpha = data.draw(st.none() | st.integers(0, 5))
    if alpha is not None:
        file[f"{head}.alpha"] = torch.tensor(alpha)
    r = (r1 if hadamard else r2 or r1) or 1
    scale = (alpha or r) / r if r1 or r2 else 1
    model = Plain((a * b, c * d, *kernel))
    V = model.weight.detach() + scale * delta
    if data.draw(st.booleans()):
        m = file[f"{head}.dora_scale"] = torch.rand(a * b, *[1] * (V.dim() - 1))
        V = V * m.double() / (V.flatten(1).norm(dim=1).reshape(m.shape) + 2.0**-23)
    save_file(file, folder / "product.safetensors")
    lp.load(model, folder / "product.safetensors")
    torch.testing.assert_close(lp.merged_state_dict(model)["mid_block.to_q.weight"], V, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64, torch.int64, torch.bfloat16])
def test_a_products_alpha_may_have_any_dtype(folder: Path, dtype: torch.dtype) -> None:
    head = "lora_unet_mid_block_to_q"
    file = {f"{head}.hada_w{side}_{half}": torch.ones(4, 4) for side in "12" for half in "ab"}
    save_file({**file, f"{head}.alpha": torch.tensor(2).to(dtype)}, folder / "alpha.safetensors")
    model = Plain((4, 4)).float()
    base = model.weight.detach().clone()
    lp.load(model, folder / "alpha.safetensors")
    assert {factor.dtype for factor in lp.state_dict(model).values()} == {torch.float32}
    torch.testing.assert_close(lp.merged_state_dict(model)["mid_block.to_q.weight"], base + 2 / 4 * 16)
