"""Merging on disk: what ``lp.merge`` does in memory, with little of it; whole or not at all; nothing else changed."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TARGETS, adapted, content, every_interruption, many, save_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import loraparam as lp
from loraparam.formats import streams
from loraparam.formats.bases import ModelBase
from loraparam.formats.content import content_of
from loraparam.testing.strategies import methods
from loraparam.testing.subjects import shake
from loraparam.tools import fitting

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
counter = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merging")


def fresh(folder: Path) -> Path:
    """A new folder of its own for each example of Hypothesis."""
    path = folder / str(next(counter))
    path.mkdir()
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0, msg=key)


# --- the result -----------------------------------------------------------------------------------------------------


@given(
    dtype=DTYPES,
    shards=st.integers(0, 3),
    weights=st.lists(st.sampled_from([1.0, 0.5, -1.25, 0.0]), min_size=1, max_size=3),
    data=st.data(),
)
def test_it_is_what_merge_does_to_the_model(
    folder: Path, dtype: torch.dtype, shards: int, weights: list[float], data: st.DataObject
) -> None:
    place = fresh(folder)
    model = many(dtype)
    base = save_checkpoint(model.state_dict(), place / "base", shards=shards)
    before = content(base)
    for i in range(len(weights)):
        targets = data.draw(st.lists(st.sampled_from(sorted(TARGETS)), min_size=1, unique=True))
        lp.attach(model, {target: TARGETS[target] for target in targets}, name=f"adapter{i}")
    shake(model)
    files = {place / f"{i}.safetensors": weight for i, weight in enumerate(weights)}
    for i, file in enumerate(files):
        lp.save(model, file, name=f"adapter{i}")
    # A fresh DoRA's base is the weight below it; in the file it is the checkpoint's.
    lp.merge_files(base, files, place / "out", check_base=False)
    lp.activate(model, {f"adapter{i}": weight for i, weight in enumerate(weights)})
    lp.merge(model)
    assert_same(read(place / "out"), model.state_dict())
    assert content(base) == before


def test_everything_else_is_carried_over(tmp_path: Path) -> None:
    model = many()
    base = save_checkpoint(model.state_dict(), tmp_path / "base", shards=2)
    adapted(model, {"linear": lp.LoRA(r=2)})
    lp.save(model, tmp_path / "adapter")
    done = lp.merge_files(base, tmp_path / "adapter", tmp_path / "out")
    assert done.merged == ("linear.weight",)
    assert done.copied == len(many().state_dict()) - 1
    assert done.carried == ("config.json", "model.safetensors.index.json", "tokenizer")
    assert done.left_out == ("pytorch_model.bin",)
    old, new = content(base), content(tmp_path / "out")
    shards = {name for name in old if name.endswith(".safetensors")}
    assert set(new) == set(old) - {"pytorch_model.bin"}
    assert {name for name in new if new[name] != old[name]} <= shards
    for name in shards:
        with safe_open(base / name, "pt") as a, safe_open(tmp_path / "out" / name, "pt") as b:
            assert a.metadata() == b.metadata() == {"format": "pt", "made by": "a test"}
            assert list(a.keys()) == list(b.keys())


def test_tensors_that_torch_does_not_know_keep_their_bytes(tmp_path: Path) -> None:
    header = b'{"packed":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[24,28]},'
    header += b'"linear.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    header += b" " * (-len(header) % 8)
    values = torch.arange(6.0).reshape(2, 3)
    base = tmp_path / "base.safetensors"
    base.write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes() + bytes([1, 2, 3, 255]))
    model = nn.ModuleDict({"linear": nn.Linear(3, 2, bias=False)})
    model["linear"].weight = nn.Parameter(values)
    lp.save(adapted(model, {"linear": lp.LoRA(r=1)}), tmp_path / "adapter")
    lp.merge_files(base, tmp_path / "adapter", tmp_path / "out")
    lp.merge(model)
    assert (tmp_path / "out").read_bytes()[: 8 + len(header)] == base.read_bytes()[: 8 + len(header)]
    assert (tmp_path / "out").read_bytes()[-4:] == bytes([1, 2, 3, 255])
    with safe_open(tmp_path / "out", "pt") as file:
        torch.testing.assert_close(file.get_tensor("linear.weight"), model["linear"].weight.detach(), rtol=0, atol=0)


@given(method=methods(max_r=2), layer=st.sampled_from(["tokens", "linear", "conv", "up", "experts.gate"]), dtype=DTYPES)
def test_blocks_of_rows_give_the_whole(method: lp.Method, layer: str, dtype: torch.dtype) -> None:
    model = many(dtype)
    lp.attach(model, method, layer)
    shake(model)
    base = ModelBase(model)
    (target,) = fitting.fit(content_of(model, "default"), base)
    weight = base.tensor(target.item.parameter)
    whole = fitting.update(weight.clone(), [target])
    # Products of blocks may round otherwise than those of the whole, by units in the last place of the dtype.
    eps = torch.finfo(dtype).eps
    for block in (1, 7, 20):
        found = fitting.update(weight.clone(), [target], block=block)
        torch.testing.assert_close(found, whole, rtol=4 * eps, atol=4 * eps * float(whole.abs().max()))


def test_factors_of_another_dtype_are_taken_as_load_takes_them(tmp_path: Path) -> None:
    lp.save(adapted(many(torch.float64)), tmp_path / "adapter")
    model = many()
    base = save_checkpoint(model.state_dict(), tmp_path / "base")
    lp.merge_files(base, tmp_path / "adapter", tmp_path / "out")
    lp.load(model, tmp_path / "adapter")
    lp.merge(model)
    assert_same(read(tmp_path / "out"), model.state_dict())


def test_slices_are_not_cut() -> None:
    model = adapted(many(), {"attention.in_proj_weight[k,v]": lp.LoRA(r=2), "experts.gate[1]": lp.DoRA(r=2)})
    targets = fitting.by_parameter(fitting.fit(content_of(model, "default"), ModelBase(model)))
    for path, own in targets.items():
        weight = ModelBase(model).tensor(path)
        found = fitting.update(weight.clone(), own, block=7)
        torch.testing.assert_close(found, lp.merged_state_dict(model)[path], rtol=0, atol=0)


@pytest.mark.parametrize("method", [lp.LoRA(r=2), lp.DoRA(r=2), lp.BlockLoRA(r=1, blocks=(True, False))])
def test_weights_read_flat_are_not_cut(method: lp.Method) -> None:
    model = many()
    lp.attach(model, method, "conv", layout=lp.Layout(rows=18))
    shake(model)
    weight = model.conv.parametrizations.weight.original.detach()
    found = fitting.update(weight.clone(), fitting.fit(content_of(model, "default"), ModelBase(model)), block=7)
    torch.testing.assert_close(found, lp.merged_state_dict(model)["conv.weight"], rtol=0, atol=0)


def test_large_weights_do_go_through_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(nn.Linear(6, 8), {"weight": lp.DoRA(r=2)})
    base = ModelBase(model)
    targets = fitting.fit(content_of(model, "default"), base)
    seen, real = [], fitting.apply_steps

    def spy(weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(tuple(weight.shape))
        return real(weight, *args, **kwargs)

    monkeypatch.setattr(fitting, "apply_steps", spy)
    fitting.update(base.tensor("weight").clone(), targets, block=18)
    assert seen == [(3, 6), (3, 6), (2, 6)]


def test_twins_are_named(tmp_path: Path) -> None:
    weight = torch.randn(40, 16)
    other = torch.randn(200, 16)
    state = {"embed.weight": weight, "head.weight": weight.clone(), "one.weight": other, "near.weight": other.clone()}
    state["near.weight"][-1, -1] += 1  # beyond the bytes that are looked at first
    sizes = {"embed": 40, "head": 40, "one": 200, "near": 200}
    model = nn.ModuleDict({name: nn.Linear(16, size, bias=False) for name, size in sizes.items()})
    base = save_checkpoint(state, tmp_path / "base")
    model.load_state_dict(state)
    adapted(model, {"head": lp.LoRA(r=1), "one": lp.LoRA(r=1)})
    lp.save(model, tmp_path / "adapter")
    done = lp.merge_files(base, tmp_path / "adapter", tmp_path / "out")
    assert done.twins == {"head.weight": ("embed.weight",)}
    assert "had the same values as 'embed.weight'" in str(done)


# --- memory ---------------------------------------------------------------------------------------------------------

PEAK = """
import re, sys
import torch
import loraparam as lp
torch.set_num_threads(1)
warm = torch.randn(64, 64); (warm @ warm).numpy()
# Not resource.ru_maxrss, which starts at that of the process that started this one.
kib = lambda name: int(re.search(rf"{name}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = kib("VmRSS")
lp.merge_files(*sys.argv[1:4])
print(kib("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's own figures are needed")
def test_memory_stays_a_small_multiple_of_the_largest_tensor(tmp_path: Path) -> None:
    layers, width = 24, 2048  # 24 tensors of 8 MiB
    weights = {
        str(i): nn.utils.skip_init(nn.Linear, width, width, bias=False, dtype=torch.bfloat16) for i in range(layers)
    }
    model = nn.ModuleDict(weights)
    for weight in model.parameters():
        nn.init.constant_(weight, 0.5)
    base = save_checkpoint(model.state_dict(), tmp_path / "base", shards=2)
    lp.save(adapted(model, {"all-linear": lp.LoRA(r=2)}), tmp_path / "adapter")
    args = [str(base), str(tmp_path / "adapter"), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", PEAK, *args], capture_output=True, text=True, check=True)
    peak, largest, whole = int(done.stdout) / 1024, 2 * width**2 / 2**20, 2 * layers * width**2 / 2**20
    # Measured: 80 to 90 MiB, of which float32 copies of one block, and what malloc keeps, are most.
    assert peak < 14 * largest < whole, f"{peak:.0f} MiB"


# --- whole or not at all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [0, 2])
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_an_interruption_leaves_the_old_or_the_new(
    tmp_path: Path, shards: int, exists: bool, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr(streams, "_exchanged_at_once", lambda *_: False)
    model = many()
    base = save_checkpoint(model.state_dict(), tmp_path / "base", shards=shards)
    lp.save(adapted(model), tmp_path / "adapter")
    out = tmp_path / "results" / "out"
    out.parent.mkdir()
    if exists:
        save_checkpoint(many(seed=1).state_dict(), out, shards=shards)
    old = content(out)

    def check() -> None:
        assert content(out) == old
        assert {path.name for path in out.parent.iterdir()} <= {"out"}

    count = every_interruption(lambda: lp.merge_files(base, tmp_path / "adapter", out, force=True), check)
    assert count > 5
    lp.merge(model)
    assert_same(read(out), model.state_dict())
    assert {path.name for path in out.parent.iterdir()} == {"out"}


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("up.weight", r"'up\.weight' reads back as other bytes"),
        ("linear.bias", r"'linear\.bias' reads back as other bytes"),
        (None, "the header reads back as other bytes"),
    ],
)
def test_what_was_written_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, match: str
) -> None:
    model = many()
    base = save_checkpoint(model.state_dict(), tmp_path / "base")
    lp.save(adapted(model), tmp_path / "adapter")
    header, tensors = streams.header_of(base)
    at = next((tensor.start for tensor in tensors if tensor.name == name), len(header) - 1)
    monkeypatch.setattr(streams.os, "fsync", lambda file: os.pwrite(file, b"\x07", at))  # a disk with a bad spot
    with pytest.raises(lp.FormatError, match=match):
        lp.merge_files(base, tmp_path / "adapter", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


# --- refused, with nothing written ----------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    model = many()
    save_checkpoint(model.state_dict(), tmp_path / "base", shards=2)
    save_checkpoint(model.state_dict(), tmp_path / "one.safetensors")
    lp.save(adapted(model), tmp_path / "adapter.safetensors")
    return tmp_path


def other_adapter(place: Path, model: nn.Module, targets: Any = None, value: float | None = None) -> Path:
    adapted(model, targets or {"linear": lp.LoRA(r=2)})
    if value is not None:
        with torch.no_grad():
            for factor in lp.parameters(model):
                factor.fill_(value)
    lp.save(model, place / "other.safetensors")
    return place / "other.safetensors"


def refused(place: Path, match: str, *args: Any, **options: Any) -> None:
    before = content(place)
    with pytest.raises(lp.LoraparamError, match=match):
        lp.merge_files(*args, **options)
    assert content(place) == before


def test_where_the_result_may_not_go(place: Path) -> None:
    base, one, adapter = place / "base", place / "one.safetensors", place / "adapter.safetensors"
    for out in (base, base / "merged", base / ".." / "base", place, adapter):
        refused(place, "is, is inside, or holds the input", base, adapter, out, force=True)
    refused(place, "is, is inside, or holds the input", one, adapter, one, force=True)
    (place / "taken").mkdir()
    (place / "taken" / "x").touch()
    refused(place, r"'.*taken' exists; give another path, or force=True", base, adapter, place / "taken")
    refused(place, "is not a file, as the base is", one, adapter, place / "taken", force=True)
    (place / "file").touch()
    refused(place, "is not a directory, as the base is", base, adapter, place / "file", force=True)
    (place / "empty").mkdir()
    lp.merge_files(base, adapter, place / "empty")
    assert (place / "empty" / "config.json").exists()


def test_adapters_that_do_not_fit(place: Path) -> None:
    base, out = place / "base", place / "out"
    wrong = other_adapter(place, nn.ModuleDict({"lineer": nn.Linear(6, 8)}), {"lineer": lp.LoRA(r=1)})
    refused(
        place, r"adapts 'lineer\.weight'; the base has no such parameter; nearest: 'linear\.weight'", base, wrong, out
    )
    wrong = other_adapter(place, nn.ModuleDict({"linear": nn.Linear(6, 4)}))
    refused(place, r"adapts 'linear\.weight' of shape \(4, 6\); the base has \(8, 6\)", base, wrong, out)
    wrong = other_adapter(place, many(seed=5), {"linear": lp.DoRA(r=1)})
    refused(place, r"'linear\.weight': trained as DoRA on another base", base, wrong, out)
    wrong = other_adapter(place, many(), value=1e30)
    refused(place, r"'linear\.weight': the merged weight is not finite in F32", base, wrong, out)
    (place / "junk").write_bytes(b"junk")
    refused(place, "junk' is not a readable safetensors file", base, place / "junk", out)
    refused(place, "does not exist", base, place / "nothing", out)
    refused(place, "does not exist", place / "nothing", wrong, out)


def test_weights_that_are_none(place: Path) -> None:
    base, adapter, out = place / "base", place / "adapter.safetensors", place / "out"
    refused(place, r"weight nan; allowed: a finite number", base, {adapter: float("nan")}, out)
    refused(place, "2 weights for 1 adapters", base, adapter, out, weights=[1, 2])
    refused(place, "no adapter given", base, [], out)
    refused(place, "weights= beside a mapping", base, {adapter: 1.0}, out, weights=[1.0])
    refused(place, "unknown hint 'prefx' for loraparam; allowed: 'prefix'", base, adapter, out, prefx="x")


def test_quantized_weights(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(8, 6, dtype=torch.int8)}, tmp_path / "base")
    adapter = other_adapter(tmp_path, nn.Linear(6, 8), {"weight": lp.LoRA(r=1)})
    refused(tmp_path, "'weight' has dtype I8; allowed: F64, F32", tmp_path / "base", adapter, tmp_path / "out")


def test_a_truncated_checkpoint(place: Path) -> None:
    shard = next((place / "base").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-5])
    refused(place, "not a readable safetensors file", place / "base", place / "adapter.safetensors", place / "out")


def test_a_checkpoint_of_which_there_are_two(place: Path) -> None:
    """Two indexes, or two values for one tensor: no choice is made."""
    base, adapter, out = place / "base", place / "adapter.safetensors", place / "out"
    index = base / "model.safetensors.index.json"
    shutil.copy(index, base / "other.safetensors.index.json")
    refused(place, "holds 2 indexes; give the path of one", base, adapter, out)
    (base / "other.safetensors.index.json").unlink()
    mapping = json.loads(index.read_text())
    shard = next(iter(mapping["weight_map"].values()))
    shutil.copy(base / shard, base / "again.safetensors")
    mapping["weight_map"]["one more"] = "again.safetensors"
    index.write_text(json.dumps(mapping))
    refused(place, rf"is in both .*'({shard}|again\.safetensors)'", base, adapter, out)
