"""What transformers does with a model beyond calling it: saving, generating, checkpointing, tying, resizing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from model_zoo import CLOSE, EXACT, MATRIX, TRANSFORMERS, effective_weights, one_thread
from torch import nn
from torch.testing import assert_close
from zoo.entry import Entry

import loraparam as lp

every_model = pytest.mark.parametrize("entry", TRANSFORMERS, ids=str)
every_decoder = pytest.mark.parametrize("entry", [entry for entry in TRANSFORMERS if entry.generates], ids=str)
two_recipes = pytest.mark.parametrize("recipe", ["lora", "dora-everywhere"])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def named(name: str) -> Entry:
    return next(entry for entry in TRANSFORMERS if entry.name == name)


@every_model
@two_recipes
@pytest.mark.parametrize("block", [lp.merged, lp.detached])
def test_saved_inside_a_block_loads_as_a_plain_model(entry: Entry, recipe: str, block, tmp_path) -> None:
    model = entry.model().eval()
    plain, base = type(model), entry.call(model)
    entry.adapt(model, recipe)
    output = entry.call(model) if block is lp.merged else base
    with block(model):
        model.save_pretrained(tmp_path)
    reloaded, report = plain.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [plain.__name__]
    assert_close(entry.call(reloaded), output, **CLOSE)


@every_model
def test_the_class_of_an_adapted_model_builds_and_loads_plain_ones(entry: Entry, tmp_path) -> None:
    model, plain = entry.adapted("dora-everywhere").eval(), entry.model().eval()
    plain.save_pretrained(tmp_path)
    assert_close(entry.call(type(model).from_pretrained(tmp_path)), entry.call(plain), **CLOSE)
    assert lp.adapters(type(model)(model.config)) == {}


@every_decoder
@two_recipes
def test_generating_with_a_cache_gives_what_the_merged_model_gives(entry: Entry, recipe: str) -> None:
    model, base = entry.adapted(recipe).eval(), entry.model().eval()
    cached, uncached = generate(entry, model), generate(entry, model, use_cache=False)
    assert_close(cached.sequences, uncached.sequences)
    lp.merge(model)
    merged = generate(entry, model)
    assert_close(cached.sequences, merged.sequences)
    assert_close(cached.logits, merged.logits, **CLOSE)
    assert not torch.equal(cached.logits[0], generate(entry, base).logits[0])


def generate(entry: Entry, model: Any, **options: Any) -> Any:
    inputs = {name: value for name, value in entry.inputs().items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(**inputs, **options, output_logits=True)


@every_model
@two_recipes
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(entry: Entry, recipe: str, use_reentrant: bool) -> None:
    model = entry.adapted(recipe)
    # A reentrant checkpoint passes no gradient on unless one of its inputs wants one.
    model.enable_input_require_grads()
    expected, reads = gradients(entry, model), number_of_reads(entry, model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_close(gradients(entry, model), expected, **CLOSE)
    assert number_of_reads(entry, model) > reads


def gradients(entry: Entry, model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    entry.call(model).pow(2).mean().backward()
    return {key: factor.grad.clone() for key, factor in lp.named_parameters(model)}


def number_of_reads(entry: Entry, model: nn.Module) -> int:
    return sum(row.reads for row in lp.check(model, **entry.inputs()))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("recipe", ["lora-everywhere", "dora-everywhere"])
def test_every_way_to_run_experts_reads_the_effective_weights(name: str, implementation: str, recipe: str) -> None:
    entry = named(name)
    model, plain = entry.adapted(recipe), entry.plain()
    for each in (model, plain):
        each.set_experts_implementation(implementation)
        assert each.config._experts_implementation == implementation
    output = entry.call(model)
    weights = effective_weights(plain, model, lp.state_dict(model))
    assert_close(output, entry.call_with(plain, weights), **CLOSE)
    assert lp.check(model, **entry.inputs())["model.layers.0.mlp.experts.down_proj"].gradient == "arrived"


def test_plans_say_how_expert_stacks_are_read() -> None:
    shown = {}
    for name in ("mixtral", "qwen3-moe", "gpt-oss", "llama4"):
        plan = named(name).attach(named(name).model(), "lora-everywhere")
        shown[name] = {str(row.layout) for row in plan if row.path.endswith(("gate_up_proj", "experts.down_proj"))}
    read = {"mixtral": "(E, out, in)", "qwen3-moe": "(E, out, in)", "gpt-oss": "(E, in, out)", "llama4": "(E, in, out)"}
    assert shown == {name: {layout} for name, layout in read.items()}


def csm_head() -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers.models.csm.modeling_csm import CsmCodebooksHead

    return CsmCodebooksHead(8, 4, 12), (torch.randn(5, 3, 8), torch.arange(1, 4))


def convbert_groups() -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers.models.convbert.modeling_convbert import GroupedLinearLayer

    return GroupedLinearLayer(16, 24, 2), (torch.randn(5, 1, 16),)


def nucleus_experts() -> tuple[nn.Module, tuple[Any, ...]]:
    from diffusers.models.transformers.transformer_nucleusmoe_image import SwiGLUExperts

    return SwiGLUExperts(12, 8, 3), (torch.randn(6, 12), torch.tensor([2, 2, 2]))


STACKS = {
    "CSM": (csm_head, "weight"),
    "ConvBERT": (convbert_groups, "weight"),
    "Nucleus": (nucleus_experts, "down_proj"),
}


@pytest.mark.parametrize(("build", "name"), STACKS.values(), ids=STACKS)
def test_a_row_of_each_matrix_in_a_stack_makes_one_output(build, name: str) -> None:
    stack, inputs = build()
    for parameter in stack.parameters():
        nn.init.normal_(parameter)
    (row,) = lp.plan(stack, lp.LoRA(r=2), name)
    weight = stack.get_parameter(name)
    with torch.no_grad():
        before = stack(*inputs)
        matrix = row.layout.matrix(weight).clone()
        matrix[:, 3] += 1
        weight.copy_(row.layout.tensor(matrix, weight.shape))
        moved = (stack(*inputs) - before).abs().flatten(0, -2).amax(0)
    assert moved.nonzero().flatten().remainder(matrix.shape[1]).unique().tolist() == [3]


@pytest.mark.parametrize(("name", "path"), [("xlnet", "rel_attn.q"), ("funnel", "r_kernel")])
def test_attention_stored_by_heads_is_one_matrix(name: str, path: str) -> None:
    for row in lp.plan(MATRIX[name].model(), lp.LoRA(r=8), path):
        assert row.layout == lp.Layout()


TIED = {
    "gpt2": {"transformer.wte.weight", "lm_head.weight"},
    "t5": {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"},
    "whisper": {"model.decoder.embed_tokens.weight", "proj_out.weight"},
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_weight_is_adapted_once_for_all_its_readers(name: str) -> None:
    entry = named(name)
    for path in TIED[name]:
        model = entry.model().eval()
        (row,) = lp.attach(model, lp.LoRA(r=2, init="gaussian"), path)
        assert {row.path, *row.shared_with} == TIED[name]
        with torch.no_grad():
            for factor in lp.parameters(model):
                factor.fill_(0.2)
        values = [model.get_submodule(other.rpartition(".")[0]).weight for other in TIED[name]]
        assert all(torch.equal(value, values[0]) for value in values)
        output = entry.call(model)
        lp.merge(model)
        assert len({id(model.get_parameter(other)) for other in TIED[name]}) == 1
        assert_close(entry.call(model), output, **CLOSE)


@pytest.mark.parametrize("name", TIED)
def test_tying_again_changes_nothing(name: str) -> None:
    entry = named(name)
    model = entry.adapted("dora-everywhere").eval()
    output = entry.call(model)
    model.tie_weights()
    assert_close(entry.call(model), output, **EXACT)
    for block in (lp.merged, lp.detached):
        with block(model):
            model.tie_weights()
        assert_close(entry.call(model), output, **EXACT)


@pytest.mark.parametrize("name", ["llama", *TIED])
def test_resizing_adapted_embeddings_is_refused_and_changes_nothing(name: str) -> None:
    refuses_to_resize(named(name), "dora-everywhere")


def test_resizing_an_adapted_head_is_refused_and_changes_nothing() -> None:
    # Llama's head is a Linear of its own, so "all-linear" includes it, and resizing replaces it.
    refuses_to_resize(named("llama"), "lora")


def refuses_to_resize(entry: Entry, recipe: str) -> None:
    model = entry.adapted(recipe).eval()
    output = entry.call(model)
    with pytest.raises(lp.AttachError, match=r"resize_token_embeddings\(\) would replace"):
        model.resize_token_embeddings(70)
    assert_close(entry.call(model), output, **EXACT)
    assert model.config.vocab_size == 64


@pytest.mark.parametrize("name", ["llama", *TIED])
def test_embeddings_resize_after_merging(name: str) -> None:
    entry = named(name)
    model = entry.adapted("dora-everywhere")
    lp.merge(model)
    model.resize_token_embeddings(70)
    assert entry.call(model).shape[-1] == 70


@pytest.mark.parametrize(
    ("name", "target"), [("llama", "q_proj"), ("gpt2", "c_attn"), ("t5", "SelfAttention.q"), ("whisper", "q_proj")]
)
def test_embeddings_resize_where_adapters_are_elsewhere(name: str, target: str) -> None:
    entry = named(name)
    model = entry.model()
    lp.attach(model, lp.LoRA(r=2), target)
    attached = lp.adapters(model)
    model.resize_token_embeddings(70)
    assert entry.call(model).shape[-1] == 70
    assert lp.adapters(model) == attached


def test_clip_keeps_its_name_with_an_adapter_on_the_root_module(tmp_path) -> None:
    entry = named("clip")
    model = entry.model()
    lp.attach(model, lp.Full(), "logit_scale")
    assert type(model).__name__ == type(model).__qualname__ == "CLIPModel"
    with lp.merged(model):
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["CLIPModel"]


def test_mamba_kernel_path_reads_the_effective_output_projection() -> None:
    entry = named("mamba")
    model = entry.model()
    lp.attach(model, lp.LoRA(r=2), "out_proj")
    report = lp.check(model, **entry.inputs())
    assert [row.gradient for row in report] == ["arrived", "arrived"]
