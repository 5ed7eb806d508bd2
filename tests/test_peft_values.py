"""What PEFT's files hold beside low-rank pairs, and where parameters hide: embeddings, rows, ties, bare parameters."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_files import Experts
from peft_models import Tied, base_and_input, chain, in_peft, language_model
from safetensors.torch import save_file
from test_peft_drawn import close, saved_and_merged, trained
from test_plans import unchanged
from torch import nn

import loraparam as lp
from loraparam.formats import peft as format_peft
from loraparam.formats.bases import FileBase, ModelBase
from loraparam.formats.content import attach_content
from loraparam.testing.subjects import shake

CAUSAL = {"task_type": "CAUSAL_LM"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "saved embeddings": ("Llama", CAUSAL | {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "rows of the input embedding": (
        "Llama",
        CAUSAL | {"target_modules": ["q_proj"], "trainable_token_indices": [5, 1]},
    ),
    "rows by module": (
        "Llama",
        CAUSAL
        | {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [3, 0]},
            "modules_to_save": ["lm_head", "norm"],
        },
    ),
    "a norm's statistics": ("statistics", {"target_modules": ["a"], "modules_to_save": ["norm"]}),
    "every bias, and copies": ("linear", {"target_modules": ["a"], "modules_to_save": ["b", "norm"], "bias": "all"}),
    "an attention's biases": ("attention", {"target_modules": ["attn"], "bias": "all"}),
    "an attention's own biases": ("attention", {"target_modules": ["attn", "head"], "bias": "lora_only"}),
    "an attention's lora_bias": ("attention", {"target_modules": ["attn", "head"], "lora_bias": True}),
    "an output projection alone": ("attention", {"target_modules": ["out_proj"], "bias": "lora_only"}),
    "an attention's rank": (
        "attention",
        {"target_modules": ["attn", "head"], "rank_pattern": {"attn": 3, "out_proj": 4}, "alpha_pattern": {"attn": 5}},
    ),
    "an attention's rank above its size": ("attention", {"target_modules": ["attn"], "rank_pattern": {"attn": 12}}),
    "weights as parameters": ("linear", {"target_parameters": ["a.weight", "b.weight"]}),
    "an embedding as parameter": ("embedding", {"target_parameters": ["tokens.weight"]}),
    "(in, out) as parameter": ("transposed", {"target_parameters": ["c.weight"]}),
    "an attention's parameter": ("attention", {"target_parameters": ["attn.in_proj_weight"]}),
    "three parameters of one module": (
        "wide attention",
        {"target_parameters": ["attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight"]},
    ),
    "experts and their gate": (
        "Mixtral",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_peft_merges_is_what_we_load(case: str, tmp_path: Path) -> None:
    name, settings = CASES[case]
    base, _ = base_and_input(name)
    settings = {"target_modules": []} | settings
    merged = saved_and_merged(trained(base, peft.LoraConfig(r=2, lora_alpha=3, **settings)), tmp_path)
    lp.load(base, tmp_path)
    close(lp.merged_state_dict(base), merged)


@pytest.mark.parametrize("name", ["wide attention", "Mixtral"])
def test_a_checkpoint_tells_wrappers_apart_by_shape_or_not_at_all(name: str, tmp_path: Path) -> None:
    base, _ = base_and_input(name)
    names = {"wide attention": ["q_proj_weight", "k_proj_weight"], "Mixtral": ["gate_up_proj", "down_proj"]}[name]
    merged = saved_and_merged(trained(base, peft.LoraConfig(r=2, target_modules=[], target_parameters=names)), tmp_path)
    save_file({key: value.clone() for key, value in base.state_dict().items()}, tmp_path / "base.safetensors")
    content = format_peft.read(tmp_path, FileBase(tmp_path / "base.safetensors"))
    attach_content(base, content, "read")
    close(lp.merged_state_dict(base), merged)
    save_file({"attn.q": torch.ones(4, 4), "attn.k": torch.ones(4, 4)}, tmp_path / "square.safetensors")
    pair = {"lora_A.weight": torch.ones(1, 4), "lora_B.weight": torch.ones(4, 1)}
    tensors = {f"attn.{inner}{leaf}": t.clone() for inner in ("", "base_layer.") for leaf, t in pair.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "target_parameters": ["attn.q", "attn.k"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(lp.FormatError, match="one of several parameters whose order only the model tells"):
        format_peft.read(tmp_path, FileBase(tmp_path / "square.safetensors"))


# --- embeddings -------------------------------------------------------------------------------------------------


def test_a_resized_vocabulary(tmp_path: Path) -> None:
    """The file then holds the embedding it was trained on, and its delta: together they are a new value."""
    base, _ = base_and_input("Llama")
    larger = copy.deepcopy(base)
    larger.resize_token_embeddings(36, mean_resizing=False)
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"], **CAUSAL)
    merged = saved_and_merged(trained(larger, config), tmp_path)
    with (
        unchanged(base),
        pytest.raises(lp.FormatError, match=r"is for shape \(36, 8\); '.*' has \(32, 8\)"),
    ):
        lp.load(base, tmp_path)
    base.resize_token_embeddings(36, mean_resizing=False)  # new rows at random, not those of the training
    plan = lp.load(base, tmp_path)
    assert {row.path: type(row.method).__name__ for row in plan if "self_attn" not in row.path} == {
        "model.embed_tokens.weight": "Full",
        "lm_head.weight": "Full",
    }
    close(lp.merged_state_dict(base), merged)


@pytest.mark.parametrize(
    ("settings", "whole"),
    [
        ({}, set()),
        ({"trainable_token_indices": [1, 5]}, {"model.embed_tokens.weight"}),
        ({"modules_to_save": ["lm_head"]}, {"lm_head.weight"}),
    ],
)
def test_embeddings_saved_on_request(settings: dict[str, Any], whole: set[str], tmp_path: Path) -> None:
    """Under three spellings of their keys; those that did not change are no part of the adapter."""
    base, _ = base_and_input("Llama")
    model = trained(base, peft.LoraConfig(r=2, target_modules=["q_proj"], **CAUSAL, **settings))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    merged = model.merge_and_unload().state_dict()
    plan = lp.load(base, tmp_path)
    assert {row.path for row in plan if type(row.method) is lp.Full} == whole
    close(lp.merged_state_dict(base), merged)


def test_ties(tmp_path: Path) -> None:
    """PEFT adapts one of two modules with one weight, which one weight cannot express; rows it keeps together."""
    base, other = Tied(), Tied()
    saved_and_merged(trained(base, peft.LoraConfig(r=2, target_modules=["tokens"])), tmp_path / "lora")
    saved_and_merged(
        trained(other, peft.LoraConfig(r=2, target_modules=["mix"], modules_to_save=["head"])), tmp_path / "saved"
    )
    for folder, match in (
        ("lora", r"is for 'tokens\.weight' alone, .* with 'head\.weight'"),
        ("saved", r"'head\.weight'.*tied"),
    ):
        with unchanged(base), pytest.raises(lp.FormatError, match=match):
            lp.load(base, tmp_path / folder)
    model = language_model("Llama", tie_word_embeddings=True)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5], **CAUSAL)
    merged = saved_and_merged(trained(model, config), tmp_path / "rows")
    lp.load(model, tmp_path / "rows")
    close(lp.merged_state_dict(model), merged)


def test_a_buffer_that_differs_is_refused(tmp_path: Path) -> None:
    base, _ = base_and_input("statistics")
    model = trained(base, peft.LoraConfig(r=2, target_modules=["a"], modules_to_save=["norm"]))
    saved_and_merged(model, tmp_path)
    base.norm.running_mean.add_(1)
    with unchanged(base), pytest.raises(lp.FormatError, match=r"another value of the buffer 'norm\.running_mean'"):
        lp.load(base, tmp_path)


# --- files of other times and tools -----------------------------------------------------------------------------


def test_the_paper_s_own_dora(tmp_path: Path) -> None:
    """NVlabs' code before PEFT had DoRA: another peft_type, m as a column, and layers with m alone."""
    base, _ = base_and_input("linear")
    A, B, m, n = torch.randn(2, 6), torch.randn(10, 2), torch.rand(10, 1), torch.rand(4, 1)
    start = "base_model.model."
    save_file(
        {
            f"{start}a.lora_A.weight": A,
            f"{start}a.lora_B.weight": B,
            f"{start}a.weight_m_wdecomp.weight": m,
            f"{start}b.weight_m_wdecomp.weight": n,
        },
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "DORA", "r": 2, "lora_alpha": 3, "Wdecompose_target_modules": ["b"], "dora_simple": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    V = base.a.weight + 1.5 * B @ A
    expected = {"a.weight": m * V / V.norm(dim=1, keepdim=True), "b.weight": n * base.b.weight}
    expected["b.weight"] = expected["b.weight"] / base.b.weight.norm(dim=1, keepdim=True)
    expected = base.state_dict() | {key: value.detach() for key, value in expected.items()}
    lp.load(base, tmp_path)
    close(lp.merged_state_dict(base), expected)


def test_a_pair_of_more_than_full_rank(tmp_path: Path) -> None:
    """r = 9 for a layer of 6 inputs: the same product at rank 6."""
    base, _ = base_and_input("linear")
    merged = saved_and_merged(trained(base, peft.LoraConfig(r=9, target_modules=["a"], use_dora=True)), tmp_path)
    assert [row.method.r for row in lp.load(base, tmp_path)] == [6]
    close(lp.merged_state_dict(base), merged)


@pytest.mark.parametrize(("version", "times"), [("0.21.2", 2), (None, 2), ("0.22.0", 1), ("0.9.1.dev0", 2)])
def test_how_often_an_output_projection_counts(version: str | None, times: int, tmp_path: Path) -> None:
    base, _ = base_and_input("attention")
    saved_and_merged(trained(base, peft.LoraConfig(r=2, target_modules=["attn"])), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps(
            {key: value for key, value in config.items() if key != "peft_version"}
            | ({"peft_version": version} if version else {})
        )
    )
    for hint, expected in (({}, times), ({"out_proj": "once"}, 1), ({"out_proj": "twice"}, 2)):
        plan = lp.load(base, tmp_path, **hint)
        alphas = {row.path: row.method.alpha for row in plan}
        assert alphas == {"attn.in_proj_weight": 8, "attn.out_proj.weight": 8 * expected}
        lp.detach(base)
    with pytest.raises(lp.FormatError, match="out_proj='both'; allowed: 'once', 'twice'"):
        lp.load(base, tmp_path, out_proj="both")


# --- our own files ----------------------------------------------------------------------------------------------


def test_a_dora_knows_its_base(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    lp.attach(model, lp.DoRA(r=2))
    shake(model)
    lp.save(model, tmp_path, format="peft")
    other = nn.Sequential(nn.Linear(4, 6))
    with unchanged(other), pytest.raises(lp.FormatError, match=r"'0\.weight': trained as DoRA on another base weight"):
        lp.load(other, tmp_path)
    lp.load(other, tmp_path, check_base=False)


@pytest.mark.parametrize("name", ["linear", "2d", "embedding", "transposed", "attention"])
def test_a_file_goes_through_without_a_model(name: str, tmp_path: Path) -> None:
    """PEFT to PEFT with neither model nor checkpoint at hand, where the file says enough."""
    base, _ = base_and_input(name)
    modules = {
        "linear": ["a", "b"],
        "2d": ["two"],
        "embedding": ["tokens", "head"],
        "transposed": ["c"],
        "attention": ["attn"],
    }
    merged = saved_and_merged(
        trained(base, peft.LoraConfig(r=2, lora_alpha=5, target_modules=modules[name])), tmp_path / "one"
    )
    content = format_peft.read(tmp_path / "one", None)
    format_peft.write(tmp_path / "two", content, None, out_proj="twice")
    lp.load(base, tmp_path / "two")
    close(lp.merged_state_dict(base), merged)


def test_a_grouped_convolution_comes_back_at_its_own_rank(tmp_path: Path) -> None:
    base, _ = base_and_input("groups")
    lp.attach(base, {"two": lp.LoRA(r=2, alpha=3), "one": lp.LoRA(r=1)})
    shake(base)
    lp.save(base, tmp_path, format="peft")
    ranks = {item.path: item.method.r for item in format_peft.read(tmp_path, ModelBase(base)).items}
    assert ranks == {"two.weight": 3, "one.weight": 2}  # the common rank 6, over 2 and 3 groups


def test_a_square_weight_of_a_checkpoint(tmp_path: Path) -> None:
    """fan_in_fan_out is that of PEFT's last layer; other shapes of the file tell whether it can be trusted."""
    base, _ = base_and_input("transposed")
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    checkpoint = FileBase(tmp_path / "base.safetensors")
    for modules, match in ((["a"], None), (["a", "c"], r"for the square 'a\.weight', of a Linear or a Conv1D")):
        saved_and_merged(trained(base, peft.LoraConfig(r=2, target_modules=modules)), tmp_path)
        if match is None:
            assert [item.layout.out for item in format_peft.read(tmp_path, checkpoint).items] == [0]
            continue
        with pytest.raises(lp.FormatError, match=match):
            format_peft.read(tmp_path, checkpoint)


def test_one_expert(tmp_path: Path) -> None:
    """A stack of one: PEFT adds its delta as it is, and fails, or worse, where it is to be transposed."""
    for transposed in (False, True):
        base = chain(experts=Experts(1, 6, 6, is_transposed=transposed))
        for parameter in base.parameters():
            parameter.data.normal_()
        model = copy.deepcopy(base)
        lp.attach(model, lp.LoRA(r=2), "experts.*")
        shake(model)
        if transposed:
            with pytest.raises(lp.FormatError, match="does not transpose the delta of a single expert"):
                lp.save(model, tmp_path / "no", format="peft")
            continue
        lp.save(model, tmp_path / "yes", format="peft")
        merged = lp.merged_state_dict(model)
        close(in_peft(base, tmp_path / "yes").merge_and_unload().state_dict(), merged)
        lp.load(base, tmp_path / "yes")
        close(lp.merged_state_dict(base), merged)
