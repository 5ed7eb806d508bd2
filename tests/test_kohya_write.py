"""Writing kohya's format: right in LyCORIS itself, in ComfyUI's formulas, and when read back."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_plans import randomize
from torch import Tensor, nn

import loraparam as lp

EPS = 2.0**-23  # the resolution of float32, which the readers add to a norm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kohya")


# --- what the readers do with a module's tensors, in float64 -------------------------------------------------------


def lycoris(W: Tensor, group: Mapping[str, Tensor]) -> Tensor:
    """The weight as LyCORIS has it: the table of its algorithms."""
    group = {leaf: tensor.double() for leaf, tensor in group.items()}
    for leaf in ("diff", "w_norm"):
        if leaf in group:
            return W + group[leaf]
    if "lora_up.weight" not in group:
        return W
    V = W + pair_delta(group, W.shape)
    if "dora_scale" not in group:
        return V
    m = group["dora_scale"]
    axis = 0 if m.shape[0] == m.numel() == W.shape[0] else 1
    over = [dim for dim in range(W.dim()) if dim != axis]
    return V * (m / (V.pow(2).sum(over, keepdim=True).sqrt() + EPS))


def comfyui(W: Tensor, group: Mapping[str, Tensor]) -> Tensor:
    """The weight as ComfyUI has it: with a scale per output, the norm is that of W."""
    if "dora_scale" not in group or group["dora_scale"].shape[0] != W.shape[0]:
        return lycoris(W, group)
    group = {leaf: tensor.double() for leaf, tensor in group.items()}
    rest = (1,) * (W.dim() - 1)
    V = W + pair_delta(group, W.shape)
    # With one output, a scale per input is taken for one per output.
    return V * (group["dora_scale"] / (W.flatten(1).norm(dim=1).reshape(-1, *rest) + EPS))


def pair_delta(group: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    up, down = group["lora_up.weight"], group["lora_down.weight"]
    return float(group["alpha"]) / down.shape[0] * (up.flatten(1) @ down.flatten(1)).reshape(shape)


def groups(path: Path) -> dict[str, dict[str, Tensor]]:
    """{module's name in the file: {leaf: tensor}}"""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        head, _, leaf = key.partition(".")
        found.setdefault(head, {})[leaf] = tensor
    return found


def check_readers(model: nn.Module, path: Path, prefix: str, reader: Callable[..., Tensor]) -> None:
    """Every parameter is, by a reader's formula, what it is in the model."""
    base, merged, file = lp.base_state_dict(model), lp.merged_state_dict(model), groups(path)
    for name, value in merged.items():
        owner, _, kind = name.rpartition(".")
        group = file.get(prefix + owner.replace(".", "_"), {})
        W = base[name].double()
        if kind == "bias":
            diff = group.get("diff_b", group.get("b_norm", torch.zeros(())))
            found = W + diff.double()
        else:
            found = reader(W, group)
        torch.testing.assert_close(found.to(value.dtype), value, rtol=2e-5, atol=2e-6)


# --- any layer, any method ------------------------------------------------------------------------------------------


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 6),
    "square": lambda: nn.Linear(5, 5),
    "one output": lambda: nn.Linear(5, 1),
    "one input": lambda: nn.Linear(1, 5),
    "convolution": lambda: nn.Conv2d(3, 6, 3),
    "1x1": lambda: nn.Conv2d(3, 6, 1),
    "line": lambda: nn.Conv1d(4, 4, 2),
    "volume": lambda: nn.Conv3d(2, 4, (1, 2, 3)),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
}
scales = {"alpha": st.none() | st.floats(0.25, 16), "rslora": st.booleans()}
methods = st.one_of(
    st.builds(lp.LoRA, r=st.integers(1, 3), **scales),
    st.builds(lp.DoRA, r=st.integers(1, 3), eps=st.sampled_from([0.0, 0.5]), **scales),
    st.builds(lp.DoRA, r=st.integers(1, 3), axis=st.just("in"), **scales),
    st.builds(lp.Magnitude, axis=st.sampled_from(["out", "in"])),
    st.just(lp.Full()),
)


def adapted(layer: str, method: lp.Method, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.ModuleDict({"block_a": nn.ModuleDict({"to_out": LAYERS[layer]()})}).to(dtype)
    smallest = min(model["block_a"]["to_out"].weight.flatten(1).shape)  # type: ignore[index]
    if getattr(method, "r", 1) > smallest:
        method = type(method)(**{**method.config(), "r": smallest})
    lp.attach(model, method, "block_a.to_out.weight")
    randomize(model)
    return model


def has_kernel(model: nn.Module) -> bool:
    return bool(model.get_submodule("block_a.to_out").weight[0, 0].numel() > 1)  # type: ignore[index, operator]


@given(st.sampled_from(sorted(LAYERS)), methods, st.sampled_from([torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("flavor", ["lycoris", "comfyui"])
def test_what_is_written_means_the_same_to_its_reader_and_when_read_back(
    folder: Path, flavor: str, layer: str, method: lp.Method, dtype: torch.dtype
) -> None:
    model, path = adapted(layer, method, dtype), folder / "any.safetensors"
    if getattr(method, "axis", "out") == "in" and has_kernel(model):
        with pytest.raises(
            lp.FormatError, match=r"'block_a\.to_out\.weight': a DoRA with a magnitude per input and place"
        ):
            lp.save(model, path, format="kohya", flavor=flavor)
        return
    lp.save(model, path, format="kohya", flavor=flavor)
    check_readers(model, path, "lycoris_", lycoris if flavor == "lycoris" else comfyui)
    before = lp.merged_state_dict(model)
    lp.detach(model)
    lp.load(model, path)
    # Folding s rounds B in float32; a sum that lies between two bfloat16 values may then fall to the other one.
    rtol = 2**-7 if dtype is torch.bfloat16 else 2e-5
    for name, value in lp.merged_state_dict(model).items():
        torch.testing.assert_close(value, before[name], rtol=rtol, atol=2e-6)


@given(st.sampled_from(sorted(LAYERS)), st.integers(1, 3), st.floats(0.25, 8))
def test_ranks_and_shapes_stay_and_alpha_is_the_rank(folder: Path, layer: str, r: int, alpha: float) -> None:
    model, path = adapted(layer, lp.LoRA(r=r, alpha=alpha)), folder / "shapes.safetensors"
    lp.save(model, path, format="kohya")
    weight = model.get_submodule("block_a.to_out").weight
    (group,) = groups(path).values()
    r = min(r, *weight.flatten(1).shape)  # type: ignore[operator]
    ones = (1,) * (weight.dim() - 2)  # type: ignore[operator]
    assert {leaf: tuple(tensor.shape) for leaf, tensor in group.items()} == {
        "lora_down.weight": (r, *weight.shape[1:]),
        "lora_up.weight": (weight.shape[0], r, *ones),
        "alpha": (),
    }
    assert float(group["alpha"]) == r


# --- a whole model, by LyCORIS itself ---------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.short_cut = nn.Conv2d(8, 4, 1)
        self.to_out = nn.Sequential(nn.Linear(64, 6), nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.relu(self.conv_in(x)))
        return self.to_out(self.short_cut(hidden).flatten(1))  # type: ignore[no-any-return]


CONTENTS: dict[str, dict[Any, lp.Method]] = {
    "pairs": {
        "conv_in.weight": lp.LoRA(r=3, alpha=5),
        "short_cut.weight": lp.LoRA(r=2),
        "to_out.0": lp.LoRA(r=2, alpha=7, rslora=True),
    },
    "directions": {
        "conv_in.weight": lp.DoRA(r=3, alpha=5),
        "short_cut.weight": lp.DoRA(r=2, eps=0.1),
        "to_out.0": lp.Magnitude(),
    },
    "differences": {"conv_in": lp.Full(), "conv_in.bias": lp.Full(), "to_out.1": lp.Full()},
    "norms": {"norm.weight": lp.Full(), "norm.bias": lp.Full(), "to_out.0": lp.LoRA(r=1)},
    "a norm's bias alone": {"norm.bias": lp.Full()},
    "a bias beside a pair": {"to_out.0.weight": lp.LoRA(r=2, alpha=3), "to_out.0.bias": lp.Full()},
    "a bias beside a direction": {"to_out.0.weight": lp.DoRA(r=2, alpha=3), "to_out.0.bias": lp.Full()},
    "a bias alone": {"conv_in.bias": lp.Full()},
    "slices": {"to_out.0.weight[1/2]": lp.LoRA(r=1, alpha=4), "to_out.0.weight[2/2]": lp.LoRA(r=2)},
}


def blocks(name: str) -> Blocks:
    torch.manual_seed(0)
    model = Blocks()
    lp.attach(model, CONTENTS[name])
    randomize(model)
    return model


def by_lycoris(model: nn.Module, path: Path, x: Tensor) -> Tensor:
    """The output with LyCORIS' own reader at work."""
    lycoris_library = pytest.importorskip("lycoris")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    network, _ = lycoris_library.create_lycoris_from_weights(1.0, str(path), model)
    network.apply_to()
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CONTENTS)
def test_lycoris_reads_the_file_and_computes_the_same(folder: Path, name: str) -> None:
    model, path, x = blocks(name), folder / "library.safetensors", torch.randn(2, 3, 4, 4)
    lp.save(model, path, format="kohya")
    expected = model(x).detach()
    for reader in (lycoris, comfyui):
        if name != "directions" or reader is lycoris:
            check_readers(model, path, "lycoris_", reader)
    lp.detach(model)
    assert not torch.allclose(model(x), expected, atol=1e-3)
    torch.testing.assert_close(by_lycoris(model, path, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flavor", ["lycoris", "comfyui"])
@pytest.mark.parametrize("name", CONTENTS)
def test_it_reads_back(folder: Path, name: str, flavor: str) -> None:
    model, path, x = blocks(name), folder / "back.safetensors", torch.randn(2, 3, 4, 4)
    lp.save(model, path, format="kohya", flavor=flavor)
    expected = model(x).detach()
    lp.detach(model)
    lp.load(model, path)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
