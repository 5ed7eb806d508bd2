"""PEFT's own files over drawn configs: what PEFT merges is what we load."""

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_models import base_and_input, chain, in_peft
from safetensors.torch import load_file, save_file
from test_plans import unchanged
from torch import nn

import loraparam as lp

# What may be adapted in each model, besides what may be stored whole.
TARGETS = {
    "linear": (["a", "b"], ["norm"]),
    "embedding": (["tokens", "head"], []),
    "convolutions": (["one", "head"], []),
    "2d": (["two"], []),
    "3d": (["three"], []),
    "transposed": (["c", "a"], []),
    "attention": (["attn", "head"], []),
    "statistics": (["a"], ["norm"]),
}


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A model's name, and a config of LoRA for it that PEFT takes."""
    name = draw(st.sampled_from(sorted(TARGETS)))
    modules, others = TARGETS[name]
    chosen = draw(st.lists(st.sampled_from(modules), min_size=1, unique=True))
    config: dict[str, Any] = {
        "r": draw(st.integers(1, 12)),
        "lora_alpha": draw(st.sampled_from([1, 6, 2.5, 0, -3])),
        "target_modules": draw(st.sampled_from([chosen, "|".join(chosen)])),
        "use_rslora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "init_lora_weights": draw(st.sampled_from([True, False, "gaussian"])),
        "lora_dropout": draw(st.sampled_from([0.0, 0.5])),
    }
    pattern = st.dictionaries(st.sampled_from([*modules, *(f"^{module}$" for module in modules)]), st.integers(1, 9))
    config["rank_pattern"], config["alpha_pattern"] = draw(pattern), draw(pattern)
    if "attn" not in chosen:
        config["use_dora"] = draw(st.booleans()) and config["init_lora_weights"] is not False
        biased = (
            not config["use_dora"]
            and not set(chosen) & {"b", "tokens"}
            and not (name == "convolutions" and "head" in chosen)
        )
        config["lora_bias"] = biased and draw(st.booleans()) and config["init_lora_weights"] != "gaussian"
    spare = [module for module in (*modules, *others) if module not in chosen]
    if spare and draw(st.booleans()):
        config["modules_to_save"] = draw(st.lists(st.sampled_from(spare), min_size=1, unique=True))
    return name, config


def trained(base: nn.Module, config: peft.PeftConfig) -> nn.Module:
    """PEFT's model with all that its optimizer would change at random values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    return model.eval()


def saved_and_merged(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        merged: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return merged


def close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """float32 sums in another order, of numbers up to a few hundred (alpha over the root of r)."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def unambiguous(config: dict[str, Any]) -> bool:
    """PEFT sorts patterns when it saves, so two for one module may change places."""
    return all(
        len({key.strip("^$") for key in config[name]}) == len(config[name])
        for name in ("rank_pattern", "alpha_pattern")
    )


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(configs().filter(lambda drawn: unambiguous(drawn[1])))
def test_what_peft_merges_is_what_we_load(drawn: tuple[str, dict[str, Any]]) -> None:
    name, config = drawn
    base, _ = base_and_input(name)
    model = trained(base, peft.LoraConfig(**config))
    with tempfile.TemporaryDirectory() as folder:
        merged = saved_and_merged(model, Path(folder))
        lp.load(base, folder)
    close(lp.merged_state_dict(base), merged)


@pytest.mark.parametrize(("name", "saved"), [("attention", "attn"), ("linear", "norm"), ("like names", "net")])
def test_with_every_bias_modules_to_save_are_in_the_file_three_times(name: str, saved: str, tmp_path: Path) -> None:
    """Of a module that is stored whole, bias="all" also stores the copy in use and the original, at any depth."""
    base, _ = base_and_input(name)
    head = {"attention": "head", "linear": "a", "like names": "^q$"}[name]
    model = trained(base, peft.LoraConfig(r=1, target_modules=head, bias="all", modules_to_save=[saved]))
    merged = saved_and_merged(model, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert any(".original_module." in key for key in keys)
    assert any(".modules_to_save." in key for key in keys)
    lp.load(base, tmp_path)
    close(lp.merged_state_dict(base), merged)


EXPERTS = ["experts", "experts, transposed", "Mixtral"]


@given(st.sampled_from(EXPERTS), st.integers(1, 5), st.booleans(), st.integers(1, 3), st.data())
def test_stacks_of_experts(name: str, r: int, rslora: bool, pattern: int, data: st.DataObject) -> None:
    """Wrappers have no names in the file: the order of registration and target_parameters tell which is which."""
    base, _ = base_and_input(name)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    config = peft.LoraConfig(
        r=r,
        lora_alpha=3,
        use_rslora=rslora,
        target_modules=data.draw(st.sampled_from([["a"], []])) if name != "Mixtral" else ["q_proj"],
        target_parameters=chosen,
        rank_pattern={"experts.down_proj": pattern} if data.draw(st.booleans()) else {},
        alpha_pattern={"gate_up_proj": 7} if data.draw(st.booleans()) else {},
    )
    model = trained(base, config)
    with tempfile.TemporaryDirectory() as folder:
        merged = saved_and_merged(model, Path(folder))
        lp.load(base, folder)
    close(lp.merged_state_dict(base), merged)


@given(st.sampled_from(["linear", "2d", "3d", "transposed"]), st.booleans(), st.booleans(), st.booleans(), st.data())
def test_ia3(name: str, as_text: bool, saves: bool, all_forward: bool, data: st.DataObject) -> None:
    base, _ = base_and_input(name)
    modules = TARGETS[name][0]
    forward = modules if all_forward else data.draw(st.lists(st.sampled_from(modules), unique=True))
    config = peft.IA3Config(
        target_modules=modules,
        feedforward_modules="|".join(forward) if as_text else forward,
        modules_to_save=TARGETS[name][1] if saves and TARGETS[name][1] else None,
    )
    model = trained(base, config)
    with tempfile.TemporaryDirectory() as folder:
        merged = saved_and_merged(model, Path(folder))
        lp.load(base, folder)
    close(lp.merged_state_dict(base), merged)


def test_ia3_before_a_grouped_convolution() -> None:
    """One number per input channel is not one per column of the grouped weight: it is kept as a new value."""
    base, _ = base_and_input("groups")
    model = trained(base, peft.IA3Config(target_modules=["two"], feedforward_modules=["two"]))
    with tempfile.TemporaryDirectory() as folder:
        merged = saved_and_merged(model, Path(folder))
        lp.load(base, folder)
    close(lp.merged_state_dict(base), merged)


# --- starts that change the base --------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pissa", "olora", "OLoRA", "pissa_niter_40"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("r", [1, 3, 6])
def test_starts_taken_from_the_base(start: str, dora: bool, r: int) -> None:
    base, _ = base_and_input("linear")
    with torch.no_grad():  # well-separated singular values, on which a random subspace converges
        U, _, V = torch.linalg.svd(base.a.weight, full_matrices=False)
        base.a.weight.copy_(U @ torch.diag(2.0 ** -torch.arange(6)) @ V)
    model = trained(
        base, peft.LoraConfig(r=r, lora_alpha=5, target_modules=["a"], init_lora_weights=start, use_dora=dora)
    )
    with tempfile.TemporaryDirectory() as folder:
        merged = saved_and_merged(model, Path(folder))
        lp.load(base, folder)
    close(lp.merged_state_dict(base), merged)


@pytest.mark.parametrize(
    ("start", "spoil", "match"),
    [
        ("pissa_niter_2", lambda W: None, r"'a\.weight': pissa_niter_2 starts from a random subspace that has not"),
        ("pissa", lambda W: W.copy_(torch.eye(10, 6)), "singular values 2 and 3 are equal, so pissa is not determined"),
    ],
)
def test_starts_that_the_base_does_not_determine(start: str, spoil: Any, match: str, tmp_path: Path) -> None:
    base, _ = base_and_input("linear")
    saved_and_merged(trained(base, peft.LoraConfig(r=2, target_modules=["a"], init_lora_weights=start)), tmp_path)
    with torch.no_grad():
        spoil(base.a.weight)
    with unchanged(base), pytest.raises(lp.FormatError, match=match):
        lp.load(base, tmp_path)


# --- the rest of what a directory may hold ----------------------------------------------------------------------


def test_overlapping_rank_patterns_that_changed_places(tmp_path: Path) -> None:
    """PEFT trains with the first one, sorts them when it saves, and cannot load the file; the tensors tell."""
    base, _ = base_and_input("linear")
    model = trained(base, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["a"], rank_pattern={"a": 3, "^a": 5}))
    merged = saved_and_merged(model, tmp_path)
    lp.load(base, tmp_path)
    close(lp.merged_state_dict(base), merged)


def test_adapters_with_names(tmp_path: Path) -> None:
    base, _ = base_and_input("linear")
    model = trained(base, peft.LoraConfig(r=2, target_modules=["a"]))
    model.add_adapter("style", peft.LoraConfig(r=1, target_modules=["b"]))
    model.save_pretrained(tmp_path)
    plans = {
        hint: lp.load(base, tmp_path, name=f"n{hint}", **({"adapter": hint} if hint else {})) for hint in ("", "style")
    }
    assert [[row.path for row in plan] for plan in plans.values()] == [["a.weight"], ["b.weight"]]
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_model.safetensors").unlink()
    assert [row.path for row in lp.load(base, tmp_path, name="alone")] == ["b.weight"]
    (tmp_path / "style").rename(tmp_path / "other")
    model.save_pretrained(tmp_path, selected_adapters=["style"])
    with pytest.raises(lp.FormatError, match=r"holds adapters 'other', 'style'; choose one with adapter="):
        lp.load(base, tmp_path, name="any")
    for bad in ("..", "a/b", "", "nope"):
        with pytest.raises(lp.FormatError, match=r"adapter name|holds no adapter 'nope'; it holds 'other', 'style'"):
            lp.load(base, tmp_path, name="any", adapter=bad)


def test_keys_without_the_prefix(tmp_path: Path) -> None:
    """As transformers and diffusers write them, where PEFT's layers are put into the model itself."""
    base, _ = base_and_input("linear")
    merged = saved_and_merged(trained(base, peft.LoraConfig(r=2, target_modules=["a"])), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key.removeprefix("base_model.model."): value for key, value in load_file(path).items()}, path)
    lp.load(base, path)
    close(lp.merged_state_dict(base), merged)


def test_a_pickle_is_read_when_the_format_is_named(tmp_path: Path) -> None:
    base, _ = base_and_input("linear")
    model = trained(base, peft.LoraConfig(r=2, target_modules=["a"]))
    model.save_pretrained(tmp_path, safe_serialization=False)
    merged = saved_and_merged(model, tmp_path / "safe")
    assert not (tmp_path / "adapter_model.safetensors").exists()
    with unchanged(base), pytest.raises(lp.FormatError, match=r"is a pickle; name format='peft'"):
        lp.load(base, tmp_path)
    lp.load(base, tmp_path, format="peft")
    close(lp.merged_state_dict(base), merged)


def test_part_of_a_larger_model(tmp_path: Path) -> None:
    base, _ = base_and_input("linear")
    whole = nn.ModuleDict({"first": copy.deepcopy(base), "second": nn.Linear(2, 2)})
    merged = saved_and_merged(trained(base, peft.LoraConfig(r=2, target_modules=["a"])), tmp_path)
    lp.load(whole, tmp_path, prefix={"": "first"})
    close(lp.merged_state_dict(whole["first"]), merged)


def test_the_first_alpha_pattern_counts(tmp_path: Path) -> None:
    """In the file's order, which is what PEFT reads again."""
    base, _ = base_and_input("linear")
    patterns = {".*a": 3, "[ab]": 5, "a": 7, "b": 9}
    saved_and_merged(trained(base, peft.LoraConfig(r=2, target_modules=["a", "b"], alpha_pattern=patterns)), tmp_path)
    merged = in_peft(base, tmp_path).merge_and_unload().state_dict()
    assert [row.method.alpha for row in lp.load(base, tmp_path)] == [3, 5]
    close(lp.merged_state_dict(base), merged)


def test_ia3_by_the_end_of_a_name(tmp_path: Path) -> None:
    """A square convolution's shape does not tell; PEFT's rule for feedforward_modules is the end of the path."""
    base = chain(net__up=nn.Conv2d(3, 3, 2), net__down=nn.Conv2d(3, 3, 2))
    config = peft.IA3Config(target_modules=["up", "down"], feedforward_modules=["down"])
    merged = saved_and_merged(trained(base, config), tmp_path)
    plan = lp.load(base, tmp_path)
    assert {row.path: row.method.axis for row in plan if row.path.endswith("weight")} == {
        "net.up.weight": "out",
        "net.down.weight": "in",
    }
    close(lp.merged_state_dict(base), merged)
