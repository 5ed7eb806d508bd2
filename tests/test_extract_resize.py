"""Low-rank approximations: the best of their rank, honest about what they leave out, exact where they can be."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import adapted, content, every_interruption, many, save_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from peft_models import base_and_input, in_peft, output
from torch import Tensor, nn

import loraparam as lp
from loraparam.formats import read_content
from loraparam.formats.content import Item
from loraparam.tools import spectra
from loraparam.tools.fitting import change

counter = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def fresh(folder: Path) -> Path:
    return folder / str(next(counter))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def items(path: Path) -> dict[str, Item]:
    return {item.path: item for item in read_content(path, None).items}


def deltas(path: Path) -> dict[str, Tensor]:
    return {name: change(item, None) for name, item in items(path).items()}


sizes = st.integers(1, 6)
batches = st.sampled_from([(), (2,), (3,)])


# --- singular values ------------------------------------------------------------------------------------------------


@given(batch=batches, out=sizes, in_=sizes, r=sizes)
def test_the_svd_of_a_product_is_that_of_the_dense_matrix(batch: tuple[int, ...], out: int, in_: int, r: int) -> None:
    A, B = randn(*batch, r, in_), randn(*batch, out, r, seed=1)
    U, S, Vh = spectra.product_svd(A, B)
    k = min(r, out, in_)
    torch.testing.assert_close(S, torch.linalg.svdvals(B @ A)[..., :k])
    torch.testing.assert_close((U * S.unsqueeze(-2)) @ Vh, B @ A)
    torch.testing.assert_close(U.mT @ U, torch.eye(k, dtype=torch.float64).expand(*batch, k, k))
    torch.testing.assert_close(Vh @ Vh.mT, torch.eye(k, dtype=torch.float64).expand(*batch, k, k))


@given(
    matrix=st.builds(randn, sizes, sizes, sizes, seed=st.integers(0, 99)),
    cut=st.builds(lambda k: {"rank": k}, st.integers(1, 7))
    | st.builds(lambda share: {"energy": share}, st.floats(0.01, 1))
    | st.builds(lambda share: {"error": share}, st.floats(0, 0.99)),
)
def test_a_cut_keeps_as_little_as_it_may_and_what_is_kept_is_the_best(matrix: Tensor, cut: dict[str, Any]) -> None:
    U, S, Vh = spectra.cut_svd(matrix, spectra.Cut(**cut))
    k, full = S.shape[-1], torch.linalg.svdvals(matrix)
    total = float((full**2).sum())
    A, B = spectra.pair_of((U, S, Vh), torch.float64)
    residual = float(torch.linalg.vector_norm(matrix - B @ A))
    best = float(torch.linalg.vector_norm(full[..., k:]))
    assert residual == pytest.approx(best, abs=1e-9 * math.sqrt(total))  # Eckart and Young, batch by batch
    assert spectra.left_out(matrix, A, B) == pytest.approx(residual / math.sqrt(total), abs=1e-12)
    allowed = {"rank": math.inf, "energy": 1 - cut.get("energy", 0), "error": cut.get("error", 0) ** 2}[next(iter(cut))]
    assert residual**2 <= allowed * total + 1e-12 * total
    if "rank" in cut:
        assert k == min(cut["rank"], *matrix.shape[-2:])
    elif k > 1:
        fewer = float((full[..., k - 1 :] ** 2).sum())
        assert fewer > allowed * total * (1 - 1e-9)


@given(matrix=st.builds(randn, sizes, sizes, sizes), block=st.integers(1, 40))
def test_what_is_left_out_is_summed_over_blocks(matrix: Tensor, block: int) -> None:
    A, B = randn(matrix.shape[0], 2, matrix.shape[2]), randn(matrix.shape[0], matrix.shape[1], 2)
    expected = float(torch.linalg.vector_norm(matrix - B @ A) / torch.linalg.vector_norm(matrix))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectra, "BLOCK", block)
        assert spectra.left_out(matrix, A, B) == pytest.approx(expected)


def decaying(out: int, in_: int, decay: float) -> Tensor:
    U, V = (torch.linalg.qr(randn(n, min(out, in_), seed=n))[0] for n in (out, in_))
    return (U * decay ** torch.arange(min(out, in_), dtype=torch.float64)) @ V.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("out", "in_"), [(700, 600), (600, 900)])
@pytest.mark.parametrize("decay", [0.999, 0.95, 0.5])
def test_random_projection_is_close_to_the_best(out: int, in_: int, decay: float, dtype: torch.dtype) -> None:
    matrix = decaying(out, in_, decay).to(dtype)
    assert min(matrix.shape) > spectra.EXACT
    k = 16
    U, S, Vh = spectra.leading_svd(matrix, k)
    best = math.sqrt(sum(decay ** (2 * i) for i in range(k, min(out, in_))))
    residual = float(torch.linalg.vector_norm(matrix.double() - (U * S) @ Vh))
    floor = 20 * torch.finfo(dtype).eps  # where the best is below the rounding of the matrix itself
    assert residual <= 1.01 * best + floor
    again = spectra.leading_svd(matrix, k)
    assert all(torch.equal(a, b) for a, b in zip((U, S, Vh), again, strict=True))


@pytest.mark.parametrize("cut", [{"error": 0.2}, {"energy": 0.9}, {"error": 1e-3}])
def test_random_projection_goes_on_until_enough_is_held(cut: dict[str, float]) -> None:
    matrix = decaying(600, 560, 0.98)
    A, B = spectra.pair_of(spectra.cut_svd(matrix, spectra.Cut(**cut)), torch.float64)
    residual = spectra.left_out(matrix, A, B)
    assert residual**2 <= spectra.Cut(**cut).allowed
    # σᵢ² falls by 0.98² each: the rank that would do is known.
    least = math.ceil(math.log(spectra.Cut(**cut).allowed) / (2 * math.log(0.98)))
    assert A.shape[0] in (least, least + 1)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6))
def test_effective_ranks_lie_between_one_and_the_rank(values: list[float]) -> None:
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = int((S > 0).sum())
    for measure in (spectra.effective_rank, spectra.stable_rank):
        assert min(1, rank) - 1e-9 <= measure(S) <= rank + 1e-9
        assert measure(7 * S) == pytest.approx(measure(S))
    equal = torch.ones(len(values))
    assert spectra.effective_rank(equal) == pytest.approx(len(values))
    assert spectra.stable_rank(equal) == pytest.approx(len(values))


@pytest.mark.parametrize(
    ("given_", "match"),
    [
        ({}, "nothing given; allowed: exactly one of rank, energy and error"),
        ({"rank": 2, "error": 0.1}, "exactly one of"),
        ({"rank": 0}, "rank=0; allowed: an integer from 1"),
        ({"rank": 1.5}, "rank=1.5; allowed"),
        ({"energy": 0.0}, "energy=0.0; allowed: 0 < energy <= 1"),
        ({"energy": math.nan}, "energy=nan; allowed"),
        ({"error": 1.0}, "error=1.0; allowed: 0 <= error < 1"),
        ({"error": -0.1}, "error=-0.1; allowed"),
    ],
)
def test_how_much_to_keep_is_said_once_and_makes_sense(tmp_path: Path, given_: dict[str, Any], match: str) -> None:
    for call in (lp.extract, lp.resize):
        arguments = ["a", "b", tmp_path / "out"] if call is lp.extract else ["a", tmp_path / "out"]
        with pytest.raises(lp.LoraparamError, match=match):
            call(*arguments, **given_)


# --- extract --------------------------------------------------------------------------------------------------------


def tuned(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with every floating-point tensor moved, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor))
    return model


@given(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    shards=st.integers(0, 2),
    models=st.booleans(),
    cut=st.sampled_from([{"rank": 99}, {"energy": 1.0}, {"error": 0.0}]),
)
def test_all_of_a_fine_tune_comes_back(
    folder: Path, dtype: torch.dtype, shards: int, models: bool, cut: dict[str, Any]
) -> None:
    place = fresh(folder)
    place.mkdir()
    base, new = many(dtype), tuned(many(dtype))
    files = [save_checkpoint(m.state_dict(), place / name, shards=shards) for m, name in ((base, "a"), (new, "b"))]
    done = lp.extract(*((base, new) if models else files), place / "adapter", full=True, **cut)
    assert max(row.residual for row in done.rows) < 1e-5
    assert set(done.left_out) == (set() if models else {"norm.running_mean", "norm.running_var"})
    lp.load(base, place / "adapter")
    lp.merge(base)
    eps = torch.finfo(dtype).eps
    for name, parameter in new.named_parameters():
        # B·A is computed in float32, then added and rounded to the dtype.
        torch.testing.assert_close(base.get_parameter(name), parameter, rtol=4 * eps, atol=1e-5 * (eps < 1e-3) + eps)


def test_each_tensor_is_the_best_of_its_rank_and_the_report_is_true(tmp_path: Path) -> None:
    base, new = many(), tuned(many())
    done = lp.extract(base, new, tmp_path / "adapter", rank=2)
    found = deltas(tmp_path / "adapter")
    assert set(found) == {row.path for row in done.rows}
    expected = {name: (p - base.get_parameter(name)).detach().double() for name, p in new.named_parameters()}
    assert set(done.left_out) == {name for name, delta in expected.items() if delta.dim() == 1}
    assert all("full=True" in why for why in done.left_out.values())
    layouts = {row.path: row.layout for row in lp.plan(base, lp.LoRA(r=1), re_all())}
    for row in done.rows:
        matrix = layouts[row.path].matrix(expected[row.path])
        S = torch.linalg.svdvals(matrix)
        best = float(torch.linalg.vector_norm(S[..., 2:])) / float(torch.linalg.vector_norm(S))
        lost = torch.linalg.vector_norm(found[row.path] - expected[row.path]) / torch.linalg.vector_norm(matrix)
        assert row.residual == pytest.approx(float(lost), rel=1e-4, abs=1e-6)
        assert row.residual == pytest.approx(best, rel=1e-4, abs=1e-6)
        assert row.norm == pytest.approx(float(torch.linalg.vector_norm(matrix)), rel=1e-5)
        assert row.rank == min(2, *matrix.shape[-2:])


def re_all() -> list[str]:
    return ["tokens", "linear", "attention", "conv", "up", "experts.gate"]


def test_layouts_told_from_a_checkpoint(tmp_path: Path) -> None:
    shapes = {"conv1d.weight": (6, 4, 3), "mlp.experts.gate_up": (3, 6, 4), "mlp.experts.weight": (3, 6, 4)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    new = {name: torch.randn(shape) for name, shape in shapes.items()}
    files = [save_checkpoint(state, tmp_path / name) for state, name in ((base, "a"), (new, "b"))]
    lp.extract(*files, tmp_path / "adapter", rank=2)
    stack = lp.Layout(out=1, batch=(0,))
    assert {name: item.layout for name, item in items(tmp_path / "adapter").items()} == {
        "conv1d.weight": lp.Layout(),
        "mlp.experts.gate_up": stack,
        "mlp.experts.weight": stack,
    }
    lp.extract(*files, tmp_path / "other", rank=2, layouts={"conv*": lp.Layout(out=1)})
    assert items(tmp_path / "other")["conv1d.weight"].layout == lp.Layout(out=1)


def test_embeddings_and_transposed_weights_told_from_a_checkpoint(tmp_path: Path) -> None:
    """By an embedding's usual names, and by the sizes of biases, also for the square weights of such a name."""
    shapes = {"wte.weight": (9, 4), "wte_like.weight": (9, 4), "embed_tokens.weight": (4, 9), "emb.weight": (4, 4, 3)}
    shapes |= {"a.c_fc.weight": (4, 12), "a.c_fc.bias": (12,), "a.c_proj.weight": (4, 4), "a.c_proj.bias": (4,)}
    shapes |= {"b.c_proj.weight": (12, 4), "b.c_proj.bias": (4,), "b.lin.weight": (4, 4), "b.lin.bias": (4,)}
    shapes |= {"b.mix.weight": (4, 12), "b.mix.bias": (12,), "c.mix.weight": (12, 4), "c.mix.bias": (12,)}
    shapes |= {"d.mix.weight": (4, 4), "d.mix.bias": (4,), "tokens": (9, 4)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    new = {name: torch.randn(shape) for name, shape in shapes.items()}
    files = [save_checkpoint(state, tmp_path / name) for state, name in ((base, "a"), (new, "b"))]
    lp.extract(*files, tmp_path / "adapter", rank=2)
    found = {name: item.layout for name, item in items(tmp_path / "adapter").items()}
    looked_up = {name for name, layout in found.items() if layout == lp.Layout(out=1, lookup=True)}
    transposed = {name for name, layout in found.items() if layout == lp.Layout(out=1)}
    assert looked_up == {"wte.weight", "embed_tokens.weight"}
    assert transposed == {"a.c_fc.weight", "a.c_proj.weight", "b.c_proj.weight", "b.mix.weight"}
    assert len(found) == 14 - 2


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_what_is_extracted_from_checkpoints_acts_the_same_in_peft(kind: str, tmp_path: Path) -> None:
    base, x = base_and_input(kind)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith(("c_attn.weight", "c_proj.weight", "wpe.weight", "q_proj.weight", "embed_tokens.weight")):
                parameter += torch.randn_like(parameter) * 0.1
    names = {"a": base, "b": tuned}
    a, b = (
        save_checkpoint({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / n)
        for n, model in names.items()
    )
    lp.extract(a, b, tmp_path / "adapter", rank=8, to="peft")
    torch.testing.assert_close(output(in_peft(base, tmp_path / "adapter"), x), output(tuned, x), rtol=1e-4, atol=1e-5)


def test_checkpoints_that_do_not_match(tmp_path: Path) -> None:
    a = save_checkpoint({"w": torch.zeros(4, 3), "only": torch.zeros(2), "head": torch.zeros(5, 2)}, tmp_path / "a")
    b = save_checkpoint({"w": torch.eye(4, 3), "new": torch.zeros(2), "head": torch.zeros(6, 2)}, tmp_path / "b")
    before = content(tmp_path)
    match = r"differ in 'only: only in the base', 'new: only in the tuned one', 'head: shape \(5, 2\) against \(6, 2\)'"
    with pytest.raises(lp.FormatError, match=match):
        lp.extract(a, b, tmp_path / "out", rank=1)
    with pytest.raises(lp.FormatError, match="nothing to extract: no weight differs among the 3"):
        lp.extract(a, a, tmp_path / "out", rank=1)
    assert content(tmp_path) == before
    done = lp.extract(a, b, tmp_path / "out", rank=1, strict=False)
    assert [row.path for row in done.rows] == ["w"]
    assert set(done.left_out) == {"only", "new", "head"}


def test_what_no_adapter_can_hold(tmp_path: Path) -> None:
    state = {"w": torch.zeros(4, 3), "bn.running_mean": torch.zeros(3), "ids": torch.arange(3), "same": torch.ones(2)}
    a = save_checkpoint(state, tmp_path / "a")
    b = save_checkpoint(
        {**state, "w": torch.eye(4, 3), "bn.running_mean": torch.ones(3), "ids": torch.arange(1, 4)}, tmp_path / "b"
    )
    done = lp.extract(a, b, tmp_path / "out", rank=1, full=True)
    assert [row.path for row in done.rows] == ["w"]
    assert done.left_out["bn.running_mean"] == "changed; a buffer, which no adapter holds"
    assert "dtype torch.int64" in done.left_out["ids"]
    c = save_checkpoint({**state, "w": torch.full((4, 3), math.nan)}, tmp_path / "c")
    with pytest.raises(lp.FormatError, match="'w' holds NaN or infinity"):
        lp.extract(a, c, tmp_path / "nan", rank=1)
    assert not (tmp_path / "nan").exists()


# --- resize ---------------------------------------------------------------------------------------------------------

TARGETS: dict[Any, lp.Method] = {
    "tokens": lp.LoRA(r=4, alpha=3),
    "linear": lp.LoRA(r=5, rslora=True, dropout=0.1),
    "attention.in_proj_weight[q]": lp.LoRA(r=3),
    "conv": lp.DoRA(r=4, alpha=2),
    "experts.gate": lp.LoRA(r=3),
    "norm.weight": lp.Full(),
    "up": lp.Magnitude(),
}


def saved(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    lp.save(adapted(many(dtype), TARGETS), path)
    return path


def pairs(path: Path) -> dict[str, tuple[lp.Method, Tensor]]:
    """{target: (method, s·B·A in float64)} of the targets that have a rank."""
    return {
        name: (item.method, item.method.scale * item.factors["lora_B"].double() @ item.factors["lora_A"].double())
        for name, item in items(path).items()
        if isinstance(item.method, (lp.LoRA, lp.DoRA))
    }


@given(rank=st.integers(1, 8), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_resizing_is_the_best_of_its_rank(folder: Path, rank: int, dtype: torch.dtype) -> None:
    place = fresh(folder)
    place.mkdir()
    done = lp.resize(saved(place / "old", dtype), place / "new", rank=rank)
    old, new = pairs(place / "old"), pairs(place / "new")
    rows = {row.path: row for row in done.rows}
    for name, (method, matrix) in old.items():
        out, in_ = matrix.shape[-2:]
        assert new[name][0].r == min(rank, out, in_)
        assert new[name][0].dropout == method.dropout
        S, norm = torch.linalg.svdvals(matrix), float(torch.linalg.vector_norm(matrix))
        best = float(torch.linalg.vector_norm(S[..., rank:])) / norm
        lost = float(torch.linalg.vector_norm(new[name][1] - matrix)) / norm
        # Of two factors in float32: 1e-7 each, and a few of them add up.
        assert lost == pytest.approx(best, rel=1e-5, abs=1e-6)
        assert rows[name].residual == pytest.approx(lost, rel=1e-6, abs=1e-9)
        assert rows[name].norm == pytest.approx(norm)
    for name in ("norm.weight", "up.weight"):
        assert rows[name].note == "has no rank; kept as it is"


@pytest.mark.parametrize("rank", [5, 6, 40])
def test_resizing_up_changes_nothing(tmp_path: Path, rank: int) -> None:
    model = adapted(many(), TARGETS)
    lp.save(model, tmp_path / "old")
    done = lp.resize(tmp_path / "old", tmp_path / "new", rank=rank)
    assert max(row.residual for row in done.rows) < 1e-7  # B takes up the change of alpha/r, and is rounded
    for name, item in items(tmp_path / "new").items():
        assert getattr(item.method, "alpha", None) == getattr(items(tmp_path / "old")[name].method, "alpha", None)
    other = many()
    lp.load(other, tmp_path / "new")
    for name, weight in lp.merged_state_dict(model).items():
        torch.testing.assert_close(lp.merged_state_dict(other)[name], weight)


@given(share=st.floats(0.05, 0.99), kind=st.sampled_from(["energy", "error"]))
def test_energy_and_error_are_honoured(folder: Path, share: float, kind: str) -> None:
    place = fresh(folder)
    place.mkdir()
    lp.resize(saved(place / "old", torch.float64), place / "new", **{kind: share})
    allowed = 1 - share if kind == "energy" else share**2
    new = pairs(place / "new")
    for name, (_, matrix) in pairs(place / "old").items():
        S = torch.linalg.svdvals(matrix).reshape(-1, min(matrix.shape[-2:]))
        tails = [float((S[:, k:] ** 2).sum() / (S**2).sum()) for k in range(S.shape[1] + 1)]
        expected = next(k for k in range(1, len(tails)) if tails[k] <= allowed + 1e-12)
        assert new[name][0].r == expected


def test_a_shortened_dora_keeps_its_lengths_and_says_so(tmp_path: Path) -> None:
    model = adapted(many(), {"linear": lp.DoRA(r=4)})
    lp.save(model, tmp_path / "old")
    done = lp.resize(tmp_path / "old", tmp_path / "new", rank=2)
    assert "lengths kept" in done.rows[0].note
    assert done.rows[0].residual > 0.01
    other = many()
    lp.load(other, tmp_path / "new")
    lengths = [torch.linalg.vector_norm(m.linear.weight.detach().clone(), dim=1) for m in (model, other)]
    torch.testing.assert_close(*lengths)
    assert not torch.allclose(model.linear.weight, other.linear.weight, rtol=1e-2)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_each_block_of_a_merged_linear_is_resized(tmp_path: Path, shared: bool, rank: int) -> None:
    method = lp.BlockLoRA(r=3, alpha=2, blocks=(True, False, True), shared=shared)
    model = adapted(many(), {"attention.in_proj_weight": method})
    lp.save(model, tmp_path / "old")
    row = lp.resize(tmp_path / "old", tmp_path / "new", rank=rank).rows[0]
    (item,) = items(tmp_path / "new").values()
    assert (type(item.method), item.method.blocks, item.method.shared) == (lp.BlockLoRA, method.blocks, shared)
    assert (item.method.r, row.rank) == (rank, rank)
    old, new = (deltas(tmp_path / name)["attention.in_proj_weight"] for name in ("old", "new"))
    matrices = [old] if shared else list(old.chunk(3))
    best = math.sqrt(sum(float((torch.linalg.svdvals(m)[rank:] ** 2).sum()) for m in matrices))
    assert float(torch.linalg.vector_norm(new - old)) == pytest.approx(best, rel=1e-5, abs=1e-5)
    assert row.residual == pytest.approx(best / float(torch.linalg.vector_norm(old)), rel=1e-5, abs=1e-6)
    lp.load(many(), tmp_path / "new")


def test_resizing_in_place_and_over_what_is_there(tmp_path: Path) -> None:
    path = saved(tmp_path / "adapter")
    before = content(tmp_path)
    with pytest.raises(lp.FormatError, match=r"adapter' exists; give another path, or force=True"):
        lp.resize(path, path, rank=1)
    assert content(tmp_path) == before
    count = every_interruption(
        lambda: lp.resize(path, path, rank=1, force=True), lambda: content(tmp_path) == before or pytest.fail("changed")
    )
    assert count >= 2
    assert {item.method.r for item in items(path).values() if hasattr(item.method, "r")} == {1}


def test_nothing_to_resize(tmp_path: Path) -> None:
    lp.save(adapted(many(), {"up": lp.Magnitude()}), tmp_path / "adapter")
    with pytest.raises(lp.FormatError, match="holds no low-rank pair"):
        lp.resize(tmp_path / "adapter", tmp_path / "out", rank=1)


@pytest.mark.parametrize("alpha", [1e-90, 1e30, -1.0])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_scale_of_any_size_stays_in_alpha(tmp_path: Path, alpha: float, rank: int) -> None:
    """Split over both factors, its root would vanish in float32, or the rest of it would be infinite."""
    model = nn.Linear(6, 8)
    lp.attach(model, lp.LoRA(r=2, alpha=alpha))
    entry = model.parametrizations.weight[0].default
    with torch.no_grad():
        entry.lora_A[1] = entry.lora_A[0] * 2  # of rank 1, so that nothing is left out
        entry.lora_B.normal_()
    lp.save(model, tmp_path / "a")
    done = lp.resize(tmp_path / "a", tmp_path / "b", rank=rank)
    item = read_content(tmp_path / "b", None).items[0]
    assert item.method == lp.LoRA(r=rank, alpha=alpha)
    expected = (entry.lora_B.double() @ entry.lora_A.double()).detach() / 2
    torch.testing.assert_close(
        item.factors["lora_B"].double() @ item.factors["lora_A"].double() / rank, expected, rtol=1e-5, atol=1e-6
    )
    assert done.rows[0].residual < 1e-6
    assert done.rows[0].norm == pytest.approx(abs(alpha) * float(expected.norm()), rel=1e-6)
