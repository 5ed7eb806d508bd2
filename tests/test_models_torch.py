"""torch's own transformer layers, whose fast paths read weights past the layers' forwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from model_zoo import CLOSE, one_thread
from torch import Tensor, nn
from torch.testing import assert_close
from zoo.entry import randomise

import loraparam as lp

FAST_PATHS = ["_transformer_encoder_layer_fwd", "_native_multi_head_attention"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def fast_path_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the native fast paths, as torch takes them."""
    calls: list[str] = []

    def spy(name: str) -> Callable[..., Any]:
        native = getattr(torch, name)
        return lambda *args, **kwargs: (calls.append(name), native(*args, **kwargs))[1]

    for name in FAST_PATHS:
        monkeypatch.setattr(torch, name, spy(name))
    return calls


def adapted(module: nn.Module, method: lp.Method, targets: Any = "all-linear") -> nn.Module:
    randomise(module.parameters())
    lp.attach(module, method, targets)
    randomise(lp.parameters(module))
    return module


def in_every_mode(model: nn.Module, call: Callable[[], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What a call gives in train and eval mode, with and without gradients."""
    for training in (True, False):
        model.train(training)
        for grad_mode in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
            with grad_mode():
                output = call().detach()
            yield f"training={training}, {grad_mode.__name__}", output


def agrees_in_every_mode(model: nn.Module, call: Callable[[], Tensor]) -> None:
    """With adapters every mode gives the output that the merged model gives in plain training."""
    with lp.merged(model.train()):
        expected = call().detach()
    with lp.detached(model):
        assert (call() - expected).abs().max() > 0.1
    for mode, output in in_every_mode(model, call):
        assert_close(output, expected, **CLOSE, msg=lambda text, mode=mode: f"{mode}: {text}")


ENCODER_LAYERS = {
    "post-norm": {},
    "norm-first": {"norm_first": True},
    "gelu": {"activation": "gelu"},
    "without bias": {"bias": False},
}
METHODS = {
    "LoRA": (lp.LoRA(r=2), "all-linear"),
    "DoRA": (lp.DoRA(r=2), "all-linear"),
    "slices": (lp.LoRA(r=2), "self_attn[q,v]"),
    "norms and biases": (lp.Full(), lambda path, module, name: getattr(module, name).dim() == 1),
}


@pytest.mark.parametrize("options", ENCODER_LAYERS.values(), ids=ENCODER_LAYERS)
@pytest.mark.parametrize(("method", "targets"), METHODS.values(), ids=METHODS)
def test_encoder_layer_with_adapters_is_the_same_in_every_mode(options, method, targets) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True, **options)
    x = torch.randn(2, 5, 16)
    model = adapted(layer, method, targets)
    agrees_in_every_mode(model, lambda: model(x))


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}])
def test_the_encoder_layers_above_would_take_the_fast_path(options, fast_path_calls) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True, **options)
    model = adapted(layer, lp.LoRA(r=2)).eval()
    with lp.merged(model), torch.no_grad():
        model(torch.randn(2, 5, 16))
    assert fast_path_calls == ["_transformer_encoder_layer_fwd"]


def test_encoder_with_padding_is_the_same_where_torch_packs_it_as_a_nested_tensor(fast_path_calls) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True)
    model = adapted(nn.TransformerEncoder(layer, 2), lp.DoRA(r=2))
    x, padded = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    # What comes out at padded positions is not defined, and differs between the paths without adapters too.
    agrees_in_every_mode(model, lambda: model(x, src_key_padding_mask=padded)[~padded])
    fast_path_calls.clear()
    with lp.merged(model), torch.no_grad():
        model(x, src_key_padding_mask=padded)
    assert fast_path_calls == ["_transformer_encoder_layer_fwd"] * 2


def test_causal_encoder_and_decoder_are_the_same_in_every_mode() -> None:
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    encoder = adapted(nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True), lp.DoRA(r=2))
    agrees_in_every_mode(encoder, lambda: encoder(x, src_mask=mask, is_causal=True))
    decoder = adapted(nn.TransformerDecoderLayer(16, 2, 32, dropout=0, batch_first=True), lp.DoRA(r=2))
    agrees_in_every_mode(decoder, lambda: decoder(x, memory, tgt_mask=mask, tgt_is_causal=True))


ATTENTION = {
    "packed": {},
    "other key and value sizes": {"kdim": 6, "vdim": 10},
    "bias_k and bias_v": {"add_bias_kv": True},
    "without bias": {"bias": False},
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
def test_attention_with_adapters_is_the_same_in_every_mode(options, need_weights) -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True, **options)
    model = adapted(attention, lp.DoRA(r=2))
    query = torch.randn(2, 5, 16)
    key, value = torch.randn(2, 3, options.get("kdim", 16)), torch.randn(2, 3, options.get("vdim", 16))
    agrees_in_every_mode(model, lambda: model(query, key, value, need_weights=need_weights)[0])
    for row in lp.check(model, query, key, value, need_weights=need_weights):
        assert row.gradient == "arrived"


@pytest.mark.parametrize("need_weights", [True, False])
def test_self_attention_is_the_same_where_torch_takes_the_native_path(need_weights, fast_path_calls) -> None:
    model = adapted(nn.MultiheadAttention(16, 2, batch_first=True), lp.LoRA(r=2))
    x = torch.randn(2, 5, 16)
    agrees_in_every_mode(model, lambda: model(x, x, x, need_weights=need_weights)[0])
    fast_path_calls.clear()
    with lp.merged(model), torch.no_grad():
        model(x, x, x, need_weights=need_weights)
    assert fast_path_calls == ["_native_multi_head_attention"]


def test_layers_of_an_encoder_get_factors_of_their_own() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3)
    plan = lp.attach(encoder, lp.LoRA(r=2), "linear1")
    assert [row.path for row in plan] == [f"layers.{i}.linear1.weight" for i in range(3)]
    assert len({id(factor) for factor in lp.parameters(encoder)}) == 6


def test_an_encoder_built_from_an_adapted_layer_has_independent_copies() -> None:
    layer = adapted(nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True), lp.LoRA(r=2))
    encoder, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 16)
    expected = layer.eval()(layer(x))
    assert_close(encoder(x), expected, **CLOSE)
    lp.detach(encoder)
    assert type(encoder.layers[0].linear1) is nn.Linear
    assert_close(layer(layer(x)), expected, **CLOSE)
