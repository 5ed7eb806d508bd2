"""Combining adapters: sums of what they add, without cross terms; TIES and DARE as their papers have them."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Many, content, every_interruption, items, many, save_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import loraparam as lp
from loraparam.formats.portable import plain
from loraparam.testing.subjects import shake
from loraparam.tools.entrywise import dare, generator_for, ties, trimmed

counter = itertools.count()

ADDITIVE: dict[Any, lp.Method] = {
    "tokens": lp.LoRA(r=2, alpha=3),
    "linear": lp.LoRA(r=3, rslora=True),
    "attention.in_proj_weight[q,v]": lp.LoRA(r=2),
    "attention.in_proj_weight[0:4]": lp.LoRA(r=1),
    "attention.in_proj_weight": lp.LoRA(r=2, alpha=1),
    "attention.in_proj*weight": lp.BlockLoRA(r=2, alpha=3, blocks=(True, False, True)),
    "conv": lp.LoRA(r=4),
    "up": lp.Full(),
    "up.weight": lp.LoRA(r=1),
    "experts.gate": lp.LoRA(r=2, alpha=1),
    "experts.gate[1]": lp.LoRA(r=1),
    "norm.weight": lp.Full(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("combining")


def fresh(folder: Path) -> Path:
    path = folder / str(next(counter))
    path.mkdir()
    return path


def several(place: Path, targets: list[dict[Any, lp.Method]], model: Many | None = None) -> tuple[Many, list[Path]]:
    """A model with one adapter for each dict, and their files."""
    model = model or many()
    for i, own in enumerate(targets):
        lp.attach(model, own, name=f"a{i}")
    shake(model)
    for i in range(len(targets)):
        lp.save(model, place / f"a{i}", name=f"a{i}")
    return model, [place / f"a{i}" for i in range(len(targets))]


def differences(model: Many, weights: dict[str, float]) -> dict[str, Tensor]:
    """What adapters of these weights add, by the model itself, in float64."""
    lp.activate(model, weights)
    base, new = lp.base_state_dict(model), lp.merged_state_dict(model)
    return {name: new[name].double() - tensor.double() for name, tensor in base.items() if tensor.is_floating_point()}


def added(path: Path) -> dict[str, Tensor]:
    model = many()
    lp.load(model, path)
    return differences(model, {"default": 1.0})


target_sets = st.lists(
    st.lists(st.sampled_from(sorted(ADDITIVE)), min_size=1, max_size=5, unique=True), min_size=1, max_size=3
)


@given(names=target_sets, how=st.sampled_from(["cat", "linear"]), data=st.data())
def test_a_sum_adds_what_its_parts_add(folder: Path, names: list[list[str]], how: Any, data: st.DataObject) -> None:
    place = fresh(folder)
    model, files = several(place, [{name: ADDITIVE[name] for name in own} for own in names])
    weights = [data.draw(st.sampled_from([1.0, 0.5, -2.0, 0.0])) for _ in files]
    done = lp.combine(files, place / "out", weights=weights, how=how)
    expected = differences(model, {f"a{i}": weight for i, weight in enumerate(weights)})
    for name, delta in added(place / "out").items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-5, atol=2e-6, msg=name)  # float32 sums of size 1
    assert max(row.residual for row in done.rows) < 1e-6


def test_cat_keeps_the_factors_and_linear_the_least_rank(tmp_path: Path) -> None:
    _, (a, b) = several(tmp_path, [{"linear": lp.LoRA(r=2, alpha=4)}, {"linear": lp.LoRA(r=3)}])
    lp.combine({a: 0.7, b: 0.3}, tmp_path / "cat")
    (item,) = items(tmp_path / "cat").values()
    A_a, A_b = (items(path)["linear.weight"].factors["lora_A"] for path in (a, b))
    torch.testing.assert_close(item.factors["lora_A"], torch.cat([A_a, A_b]), rtol=0, atol=0)
    B_a, B_b = (items(path)["linear.weight"].factors["lora_B"] for path in (a, b))
    torch.testing.assert_close(item.factors["lora_B"], torch.cat([1.4 * B_a, 0.3 * B_b], 1))
    assert item.method == lp.LoRA(r=5)
    assert lp.combine({a: 1, b: 1}, tmp_path / "linear", how="linear").rows[0].rank == 5
    assert lp.combine([a, a, a], tmp_path / "same", how="linear", weights=[1, 1, 0.5]).rows[0].rank == 2
    assert lp.combine([a, a, a], tmp_path / "full", weights=[1, 1, 0.5]).rows[0].rank == 6  # min(out, in)
    assert lp.combine([b, b], tmp_path / "none", how="linear", weights=[1, -1]).rows[0].norm < 1e-12


@given(rank=st.none() | st.integers(1, 6), names=target_sets)
def test_svd_is_the_best_of_its_rank(folder: Path, rank: int | None, names: list[list[str]]) -> None:
    place = fresh(folder)
    _, files = several(place, [{name: ADDITIVE[name] for name in own} for own in names])
    done = lp.combine(files, place / "out", how="svd", rank=rank)
    lp.combine(files, place / "exact", how="cat")
    found, whole = items(place / "out"), items(place / "exact")
    for row in done.rows:
        item = plain(whole[row.path])
        if "diff" in item.factors and row.rank is None:
            continue
        if "diff" in item.factors:
            matrix = item.layout.matrix(item.factors["diff"].double())
        else:
            matrix = item.method.scale * item.factors["lora_B"].double() @ item.factors["lora_A"].double()
        pair = found[row.path].factors
        S, norm = torch.linalg.svdvals(matrix), float(torch.linalg.vector_norm(matrix))
        k = pair["lora_A"].shape[-2]
        lost = float(torch.linalg.vector_norm(pair["lora_B"].double() @ pair["lora_A"].double() - matrix)) / norm
        assert rank is None or k == min(rank, S.shape[-1]) or lost < 2e-6
        assert lost == pytest.approx(float(torch.linalg.vector_norm(S[..., k:])) / norm, rel=1e-4, abs=2e-6)
        assert row.residual == pytest.approx(lost, rel=1e-4, abs=2e-6)


# --- TIES and DARE, by entries --------------------------------------------------------------------------------------

vectors = st.lists(st.sampled_from([-3.0, -2.0, -1.0, 0.0, 0.5, 1.5, 2.5]), min_size=4, max_size=4)


def ties_by_hand(deltas: list[list[float]], density: float) -> list[float]:
    """The paper's three steps, entry by entry."""
    kept = []
    for delta in deltas:
        order = sorted(range(len(delta)), key=lambda i: -abs(delta[i]))[: max(1, round(density * len(delta)))]
        kept.append([value if i in order else 0.0 for i, value in enumerate(delta)])
    result = []
    for values in zip(*kept, strict=True):
        sign = math.copysign(1, sum(values)) if sum(values) else 0
        agreeing = [value for value in values if value and math.copysign(1, value) == sign]
        result.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return result


@given(st.lists(vectors, min_size=1, max_size=4), st.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_ties_is_the_papers(deltas: list[list[float]], density: float) -> None:
    # Entries of one size would make which of them are trimmed a matter of taste.
    deltas = [[value * (1 + i / 100) for i, value in enumerate(delta)] for delta in deltas]
    found = ties([torch.tensor(delta, dtype=torch.float64) for delta in deltas], density)
    torch.testing.assert_close(found, torch.tensor(ties_by_hand(deltas, density), dtype=torch.float64))


@given(st.integers(1, 30), st.floats(0.01, 1))
def test_trimming_keeps_the_share_and_the_largest(n: int, density: float) -> None:
    delta = torch.randn(n, generator=torch.Generator().manual_seed(n))
    found = trimmed(delta, density)
    kept = found != 0
    assert int(kept.sum()) == max(1, round(density * n))
    assert torch.equal(found[kept], delta[kept])
    if not bool(kept.all()):
        assert found[kept].abs().min() >= delta[~kept].abs().max()


def test_dare_drops_a_share_and_keeps_the_mean() -> None:
    delta = torch.ones(100_000, dtype=torch.float64)
    found = dare(delta, 0.3, generator_for(0, "a"))
    assert set(found.unique().tolist()) == {0.0, 1 / 0.3}
    # Five standard deviations of the share kept.
    assert abs(float((found != 0).double().mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 100_000)
    assert torch.equal(found, dare(delta, 0.3, generator_for(0, "a")))
    assert not torch.equal(found, dare(delta, 0.3, generator_for(1, "a")))
    assert not torch.equal(found, dare(delta, 0.3, generator_for(0, "b")))
    assert torch.equal(dare(delta, 1.0, generator_for(0)), delta)


@given(names=target_sets, density=st.sampled_from([0.2, 0.6, 1.0]))
def test_ties_of_adapters_is_ties_of_what_they_add(folder: Path, names: list[list[str]], density: float) -> None:
    names = [sorted({name.partition("[")[0] for name in own}) for own in names]  # whole parameters only
    place = fresh(folder)
    targets = [{name: ADDITIVE[name] for name in own if name != "up.weight"} or {"up": lp.Full()} for own in names]
    model, files = several(place, targets)
    weights = [0.5 + i for i in range(len(files))]
    lp.combine(files, place / "out", how="ties", weights=weights, density=density)
    singles = [differences(model, {f"a{i}": weight}) for i, weight in enumerate(weights)]
    adapted = [set(lp.adapters(model)[f"a{i}"]) for i in range(len(files))]
    for name, delta in added(place / "out").items():
        own = [singles[i][name] for i in range(len(files)) if name in adapted[i]]
        expected = ties(own, density) if own else torch.zeros_like(delta)
        close = (delta - expected).abs() < 1e-5
        # Differences of merged float32 weights are off by 1e-7: near the threshold one entry more or less is kept.
        assert int((~close).sum()) <= 2 * len(own), name


def test_density_one_is_the_sum_for_dare_and_the_result_can_be_low_rank(tmp_path: Path) -> None:
    model, (a, b) = several(tmp_path, [{"linear": lp.LoRA(r=2)}, {"linear": lp.LoRA(r=3), "tokens": lp.LoRA(r=1)}])
    lp.combine({a: 0.7, b: 0.3}, tmp_path / "dare", how="dare", density=1.0)
    expected = differences(model, {"a0": 0.7, "a1": 0.3})
    for name, delta in added(tmp_path / "dare").items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-5, atol=2e-6)
    full = lp.combine({a: 0.7, b: 0.3}, tmp_path / "whole", how="dare", density=0.5, seed=3)
    assert [row.method for row in full.rows] == ["Full", "Full"]
    low = lp.combine({a: 0.7, b: 0.3}, tmp_path / "low", how="dare", density=0.5, seed=3, rank=2)
    assert [(row.method, row.rank) for row in low.rows] == [("LoRA", 2), ("LoRA", 2)]
    wanted, found = added(tmp_path / "whole")["linear.weight"], added(tmp_path / "low")["linear.weight"]
    S = torch.linalg.svdvals(wanted)
    best = float(torch.linalg.vector_norm(S[2:]) / torch.linalg.vector_norm(S))
    assert low.rows[0].residual == pytest.approx(best, rel=1e-4)
    assert float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted)) == pytest.approx(
        best, rel=1e-3
    )
    other = lp.combine({a: 0.7, b: 0.3}, tmp_path / "other", how="dare", density=0.5, seed=4)
    assert other.rows[0].norm != full.rows[0].norm


def test_targets_of_one_shape_are_dropped_from_apart(tmp_path: Path) -> None:
    targets = {"attention.in_proj_weight[q]": lp.Full(), "attention.in_proj_weight[k]": lp.Full()}
    _, (a,) = several(tmp_path, [targets])
    lp.combine([a], tmp_path / "out", how="dare", density=0.5)
    kept = [item.factors["diff"] != 0 for item in items(tmp_path / "out").values()]
    assert [int(mask.sum()) for mask in kept] != [36, 36]
    assert not torch.equal(*kept)


# --- methods that depend on the base --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cat", "linear", "svd"])
def test_a_dora_adds_what_it_adds_to_this_base(tmp_path: Path, how: Any) -> None:
    model, (a,) = several(tmp_path, [{"linear": lp.LoRA(r=2)}])
    doras = many()
    lp.attach(doras, {"linear": lp.DoRA(r=2), "up": lp.Magnitude()})
    shake(doras)
    lp.save(doras, tmp_path / "dora")
    base = save_checkpoint(many().state_dict(), tmp_path / "base")
    before = content(tmp_path)
    match = r"'linear\.weight': what a DoRA adds depends on the base weight; give the base"
    with pytest.raises(lp.FormatError, match=match):
        lp.combine({a: 1.0, tmp_path / "dora": 0.5}, tmp_path / "out", how=how)
    assert content(tmp_path) == before
    options = {"rank": 6} if how == "svd" else {}
    lp.combine({a: 1.0, tmp_path / "dora": 0.5}, tmp_path / "out", how=how, base=base, **options)
    assert {item.fingerprint for item in items(tmp_path / "out").values()} == {None}  # a sum goes onto any base
    one, other = differences(model, {"a0": 1.0}), differences(doras, {"default": 0.5})
    for name, delta in added(tmp_path / "out").items():
        torch.testing.assert_close(delta, one[name] + other[name], rtol=1e-5, atol=2e-6)


def test_a_target_of_one_adapter_alone_stays_as_it_is(tmp_path: Path) -> None:
    _, (a, b) = several(tmp_path, [{"linear": lp.DoRA(r=2), "up": lp.Magnitude()}, {"conv": lp.LoRA(r=1)}])
    lp.combine([a, b], tmp_path / "out")
    found, old = items(tmp_path / "out"), items(a)
    for name in ("linear.weight", "up.weight"):
        assert found[name].method == old[name].method
        assert found[name].fingerprint == old[name].fingerprint
        for key, factor in old[name].factors.items():
            torch.testing.assert_close(found[name].factors[key], factor, rtol=0, atol=0)


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"how": "tiez"}, "how='tiez'; allowed: 'cat', 'linear', 'svd', 'ties', 'dare'; nearest: 'ties'"),
        ({"how": "cat", "rank": 2}, "how='cat' keeps all of the sum; how='svd' takes a rank"),
        ({"how": "linear", "error": 0.5}, "how='linear' keeps all of the sum"),
        ({"how": "ties", "density": 0.0}, "density=0.0; allowed: 0 < density <= 1"),
        ({"how": "ties", "density": math.nan}, "density=nan; allowed"),
        ({"density": 0.2}, "density=0.2 is for how='ties' and 'dare'; how='cat' keeps all entries"),
        ({"how": "dare", "seed": -1}, "seed=-1; allowed: an integer from 0"),
        ({"how": "svd", "rank": 1, "energy": 0.5}, "exactly one of"),
        ({"weights": [math.inf, 1]}, "weight inf; allowed: a finite number"),
        ({"to": "nothing"}, "unknown format 'nothing'"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    _, files = several(tmp_path, [{"linear": lp.LoRA(r=2)}, {"linear": lp.LoRA(r=1)}])
    before = content(tmp_path)
    with pytest.raises(lp.LoraparamError, match=match):
        lp.combine(files, tmp_path / "out", **options)
    assert content(tmp_path) == before


def test_adapters_of_different_models(tmp_path: Path) -> None:
    _, (a,) = several(tmp_path, [{"linear": lp.LoRA(r=2)}])
    other = many()
    other.linear = torch.nn.Linear(5, 8)
    lp.attach(other, lp.LoRA(r=2), "linear")
    lp.save(other, tmp_path / "b")
    match = r"'linear\.weight' is \(8, 5\) read as \(out, in\) and \(8, 6\) read as .*: adapters of different models"
    with pytest.raises(lp.FormatError, match=match):
        lp.combine([a, tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    _, files = several(tmp_path, [{"linear": lp.LoRA(r=2)}, {"linear": lp.LoRA(r=1)}])
    (tmp_path / "out").write_bytes(b"old")
    before = content(tmp_path)

    def check() -> None:
        assert content(tmp_path) == before

    assert every_interruption(lambda: lp.combine(files, tmp_path / "out", force=True), check) >= 2
    assert items(tmp_path / "out")["linear.weight"].method == lp.LoRA(r=3)


@pytest.mark.parametrize("how", ["cat", "linear", "svd", "ties", "dare"])
def test_a_sum_beyond_float32_is_refused(tmp_path: Path, how: Any) -> None:
    _, files = several(tmp_path, [{"linear": lp.LoRA(r=2)}] * 2)
    before = content(tmp_path)
    with pytest.raises(lp.LoraparamError, match=r"'linear.weight': the sum is not finite in float32; give smaller"):
        lp.combine(files, tmp_path / "sum", weights=[1e300, 1], how=how)
    assert content(tmp_path) == before
