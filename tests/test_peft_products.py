"""PEFT's LoHa, LoKr, VeRA and MiSS over drawn configs: what PEFT merges is what we load."""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from peft_models import base_and_input, in_peft, output
from test_peft_drawn import TARGETS, close, saved_and_merged, trained
from test_plans import unchanged

import loraparam as lp
from loraparam.formats.peft_products import product
from loraparam.formats.products import kron


def same_as_peft(name: str, config: Any) -> list[str]:
    """Load PEFT's file, compare with what PEFT merges; the methods that it became."""
    base, _ = base_and_input(name)
    model = trained(base, config)
    with tempfile.TemporaryDirectory() as folder:
        try:
            merged = saved_and_merged(model, Path(folder))
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
            lp.load(base, folder)
            reject()  # PEFT fails to merge what it trained: torch.kron of some strides
        plan = lp.load(base, folder)
    close(lp.merged_state_dict(base), merged)
    return [type(row.method).__name__ for row in plan if row.path.partition(".")[0] in TARGETS[name][0]]


@given(st.sampled_from(["linear", "2d", "convolutions", "statistics"]), st.booleans(), st.integers(1, 9), st.data())
def test_loha_and_lokr(name: str, kron: bool, r: int, data: st.DataObject) -> None:
    modules, others = TARGETS[name]
    settings: dict[str, Any] = {
        "r": r,
        "alpha": data.draw(st.sampled_from([1, 6, 0.5])),
        "target_modules": modules,
        "use_effective_conv2d": data.draw(st.booleans()),
        "rank_pattern": {modules[0]: data.draw(st.integers(1, 4))} if data.draw(st.booleans()) else {},
        "alpha_pattern": {modules[0]: 3} if data.draw(st.booleans()) else {},
        "modules_to_save": others or None,
    }
    if kron:
        settings |= {
            "decompose_both": data.draw(st.booleans()),
            "decompose_factor": data.draw(st.sampled_from([-1, 2])),
        }
    kinds = same_as_peft(name, (peft.LoKrConfig if kron else peft.LoHaConfig)(**settings))
    assert set(kinds) <= {"LoRA", "Full"}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.LoHaConfig(r=1, alpha=3), "LoRA"),
        (peft.LoHaConfig(r=3, alpha=3), "Full"),  # of rank 9, which is larger than the matrix itself
        (peft.LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=2), "LoRA"),
        (peft.LoKrConfig(r=8, alpha=3), "Full"),
    ],
)
def test_a_product_is_a_pair_where_that_is_smaller(config: peft.PeftConfig, kind: str, tmp_path: Path) -> None:
    """And then any format can hold it, PEFT's LoRA among them."""
    base, x = base_and_input("linear")
    config.target_modules = {"a"}
    merged = saved_and_merged(trained(base, config), tmp_path / "theirs")
    assert [type(row.method).__name__ for row in lp.load(base, tmp_path / "theirs")] == [kind]
    close(lp.merged_state_dict(base), merged)
    if kind == "LoRA":
        lp.save(base, tmp_path / "ours", format="peft")
        expected = output(base, x)
        lp.detach(base)
        torch.testing.assert_close(output(in_peft(base, tmp_path / "ours"), x), expected)


@given(st.integers(1, 7), st.sampled_from(["none", "all", "vera_only"]))
def test_vera(r: int, bias: str) -> None:
    assert set(same_as_peft("linear", peft.VeraConfig(r=r, target_modules=["a", "b"], bias=bias))) <= {"LoRA", "Full"}


@given(st.integers(1, 6), st.sampled_from([True, False, "mini"]))
def test_miss(r: int, variant: bool | str) -> None:
    config = peft.MissConfig(r=r, target_modules=["a", "b"], init_weights=variant, mini_r=2)
    assert set(same_as_peft("linear", config)) == {"LoRA"}


@pytest.mark.parametrize(
    ("kind", "settings", "match"),
    [
        ("Miss", {"init_weights": "bat"}, r"init_weights='bat'; allowed: true, false, 'mini'"),
        ("Vera", {"save_projection": False}, r"no vera_A and vera_B \(save_projection=false\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Specified to not save vera_A and vera_B")
def test_variants_that_are_refused(kind: str, settings: dict[str, Any], match: str, tmp_path: Path) -> None:
    base, _ = base_and_input("linear")
    config = getattr(peft, f"{kind}Config")(r=2, target_modules=["a"], **settings)
    saved_and_merged(trained(base, config), tmp_path)
    with unchanged(base), pytest.raises(lp.FormatError, match=match):
        lp.load(base, tmp_path)


def test_sizes_are_checked_before_anything_is_multiplied() -> None:
    """Vectors of a million elements, whose product would have 10¹² of them."""
    long, one = torch.zeros(10**6, 1), torch.zeros(1, 1)
    for tensors in (
        {"lokr_w1": long, "lokr_w2": long.T},
        {"lokr_w1": one, "lokr_w2_a": long, "lokr_w2_b": long.T},
        {"hada_w1_a": long, "hada_w1_b": long.T, "hada_w2_a": long, "hada_w2_b": long.T},
    ):
        with pytest.raises(lp.FormatError, match=r"are not for shape \(4, 6\)"):
            product(tensors, (4, 6))


def test_products_of_kronecker_by_hand() -> None:
    """A kernel rebuilt from a core, each element by its indices."""
    t = {"lokr_w1": torch.randn(2, 3), "lokr_t2": torch.randn(2, 2, 3, 2)}
    t |= {"lokr_w2_a": torch.randn(2, 4), "lokr_w2_b": torch.randn(2, 5)}
    w2 = torch.einsum("ijkl,ib,jd->bdkl", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    expected = torch.einsum("ac,bdkl->abcdkl", t["lokr_w1"], w2).reshape(8, 15, 3, 2)
    torch.testing.assert_close(product(t, (8, 15, 3, 2)).float(), expected)


@given(st.lists(st.integers(1, 3), min_size=2, max_size=4), st.data())
def test_kronecker_products_of_any_strides(sizes: list[int], data: st.DataObject) -> None:
    """Each element by its indices; a matrix beside a kernel is one of as many dims, ones first."""
    fewer = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=len(sizes)))
    X, Y = (torch.randn(shape[::-1]).permute(*reversed(range(len(shape)))) for shape in (fewer, sizes))
    found = kron(X, Y)
    fewer = [1] * (len(sizes) - len(fewer)) + fewer
    assert list(found.shape) == [m * n for m, n in zip(fewer, sizes, strict=True)]
    for at in itertools.product(*map(range, found.shape)):
        left, right = zip(*(divmod(i, size) for i, size in zip(at, sizes, strict=True)), strict=True)
        assert found[at] == X.reshape(fewer)[left] * Y[right]
