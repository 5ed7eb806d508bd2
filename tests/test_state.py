"""State dicts, copies, and what is shared: factors, original checkpoints, base and merged values."""

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_plans import bits, randomize, two_layers, unchanged
from torch import Tensor, nn

import loraparam as lp

TARGETS = {"0[1/2]": lp.LoRA(r=1), "0[2/2]": lp.DoRA(r=2), "0.bias": lp.Full(), "1": lp.Magnitude()}
KEYS = [
    *(f"0.weight[1/2].lora_{factor}" for factor in "AB"),
    *(f"0.weight[2/2].{factor}" for factor in ("lora_A", "lora_B", "magnitude")),
    "0.bias.diff",
    "1.weight.magnitude",
]
# A float32 or bfloat16 value loaded into a factor of its own dtype is copied bit for bit.
EXACT = {"rtol": 0, "atol": 0}


def adapted(seed: int = 0, name: str = "default") -> nn.Sequential:
    model = two_layers()
    lp.attach(model, TARGETS, name=name)
    randomize(model, name, seed)
    return model


def values(state: dict[str, Tensor]) -> dict[str, bytes | None]:
    return {key: bits(tensor) for key, tensor in state.items()}


# --- an adapter's own state -------------------------------------------------------------------------------------


def test_keys_are_the_path_the_slice_and_the_factor() -> None:
    model = adapted()
    state = lp.state_dict(model)
    assert list(state) == KEYS
    factors = dict(lp.named_parameters(model))
    for key, tensor in state.items():
        assert (tensor.data_ptr(), tensor.requires_grad) == (factors[key].data_ptr(), False)
    keys = set(model.state_dict())
    assert {"0.parametrizations.weight.original", "0.parametrizations.weight.0.default[1/2].lora_A"} < keys


methods = st.one_of(
    st.builds(lp.LoRA, r=st.integers(1, 2), alpha=st.none() | st.floats(0.1, 8), rslora=st.booleans()),
    st.builds(lp.DoRA, r=st.integers(1, 2), axis=st.sampled_from(["out", "in"]), detach_norm=st.booleans()),
    st.builds(lp.Magnitude, axis=st.sampled_from(["out", "in"])),
    st.builds(lp.Full),
)
parts = st.sampled_from(["weight", "weight[1/3,3/3]", "weight[1:4]", "weight[0:2,3:6]"])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@given(methods, parts, dtypes, st.integers(0, 99))
def test_a_state_that_is_loaded_is_the_state_that_was_taken(
    method: lp.Method, target: str, dtype: torch.dtype, seed: int
) -> None:
    models = [nn.Linear(5, 6).to(dtype) for _ in range(2)]
    for i, model in enumerate(models):
        lp.attach(model, method, target)
        randomize(model, seed=seed + i)
    models[1].load_state_dict(lp.base_state_dict(models[0]))
    state = lp.state_dict(models[0])
    assert lp.load_state_dict(models[1], state) == ([], [])
    assert values(lp.state_dict(models[1])) == values(state)
    torch.testing.assert_close(models[1].weight, models[0].weight, **EXACT)


def test_loading_copies_and_leaves_the_callers_tensors_alone() -> None:
    model, state = adapted(), {key: tensor.double() for key, tensor in lp.state_dict(adapted(seed=1)).items()}
    before, factors = values(state), [id(factor) for factor in lp.parameters(model)]
    lp.load_state_dict(model, state)
    assert [id(factor) for factor in lp.parameters(model)] == factors
    assert all(factor.dtype == torch.float32 and factor.requires_grad for factor in lp.parameters(model))
    with torch.no_grad():
        for factor in lp.parameters(model):
            factor.zero_()
    assert values(state) == before


def test_strict_names_what_is_missing_and_unexpected_and_loads_nothing() -> None:
    model, state = adapted(), lp.state_dict(adapted(seed=1))
    state["0.weigth.lora_A"] = state.pop("0.weight[1/2].lora_A")
    match = r"'default': missing '0\.weight\[1/2\]\.lora_A'; unexpected '0\.weigth\.lora_A'; nearest: .*; strict=False"
    with unchanged(model), pytest.raises(lp.StateError, match=match):
        lp.load_state_dict(model, state)
    with unchanged(model), pytest.raises(lp.StateError, match=r"'default': unexpected 'more'; strict=False loads what"):
        lp.load_state_dict(model, {**lp.state_dict(adapted(seed=1)), "more": torch.zeros(1)})
    short = {key: tensor for key, tensor in lp.state_dict(adapted(seed=1)).items() if key != LAST}
    with unchanged(model), pytest.raises(lp.StateError, match=rf"'default': missing '{re.escape(LAST)}'; strict=False"):
        lp.load_state_dict(model, short)
    kept = bits(lp.state_dict(model)["0.weight[1/2].lora_A"])
    found = lp.load_state_dict(model, state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["0.weight[1/2].lora_A"], ["0.weigth.lora_A"])
    now = lp.state_dict(model)
    assert bits(now.pop("0.weight[1/2].lora_A")) == kept
    assert values(now) == {key: bits(state[key]) for key in now}


@pytest.mark.parametrize(
    ("state", "match"),
    [(None, "state is a NoneType; allowed: a mapping"), ([1], "state is a list; allowed"), ({1: 2}, "unexpected 1;")],
)
def test_a_state_that_is_none(state: Any, match: str) -> None:
    model = adapted()
    with unchanged(model), pytest.raises(lp.StateError, match=match):
        lp.load_state_dict(model, state)


LAST = "1.weight.magnitude"  # so that the tensors before it are fine


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(4), r"has shape \(4,\); the model takes \(3,\)"),
        (torch.zeros(3, 1), r"has shape \(3, 1\); the model takes \(3,\)"),
        (torch.tensor([0.0, float("nan"), 0.0]), "holds NaN or infinity; a finite tensor is needed"),
        (torch.tensor([0.0, float("inf"), 0.0], dtype=torch.bfloat16), "holds NaN or infinity"),
        (torch.zeros(3, dtype=torch.int64), r"has dtype torch\.int64; allowed: a floating-point dtype"),
        (torch.zeros(3, dtype=torch.complex64), r"has dtype torch\.complex64; allowed: a floating-point dtype"),
        ([0.0, 0.0, 0.0], r"is a list; allowed: a tensor of shape \(3,\)"),
        (None, r"is a NoneType; allowed: a tensor of shape \(3,\)"),
        # Finite, until it is float32 as the factor is.
        (torch.full((3,), 1e300, dtype=torch.float64), "NaN or infinity"),
        (torch.zeros(3, device="meta"), "meta"),
        (torch.zeros(3).to_sparse(), "sparse"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_tensor_that_does_not_fit_leaves_every_factor_as_it_was(tensor: Any, match: str, strict: bool) -> None:
    model, state = adapted(), {**lp.state_dict(adapted(seed=1)), LAST: tensor}
    with unchanged(model), pytest.raises(lp.StateError, match=rf"'1\.weight\.magnitude'.*{match}"):
        lp.load_state_dict(model, state, strict=strict)


def test_an_eight_bit_float_is_loaded_or_refused() -> None:
    model, state = adapted(), lp.state_dict(adapted())
    state[LAST] = torch.ones(3).to(torch.float8_e4m3fn)
    try:
        lp.load_state_dict(model, state)
    except lp.StateError as error:
        assert LAST in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(lp.state_dict(model)[LAST], torch.ones(3), **EXACT)


def test_an_interrupt_between_two_copies_leaves_every_factor_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, state, calls = adapted(), lp.state_dict(adapted(seed=1)), []

    def copy_(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    original = Tensor.copy_
    with unchanged(model):
        monkeypatch.setattr(Tensor, "copy_", copy_)
        with pytest.raises(KeyboardInterrupt):
            lp.load_state_dict(model, state)
        monkeypatch.undo()


# --- the model's own state --------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Nested modules, attention, a recurrent layer, buffers, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.LSTM(4, 4, batch_first=True), nn.BatchNorm1d(4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(()))


EVERYTHING = {"encoder.0[i,g]": lp.LoRA(r=1), "attention": lp.DoRA(r=2), "embed": lp.LoRA(r=1), "**.bias": lp.Full()}


def adapted_plain() -> Plain:
    model = Plain()
    lp.attach(model, EVERYTHING)
    randomize(model)
    return model


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}, {"strict": False, "assign": True}])
def test_an_original_checkpoint_loads_into_an_adapted_model(options: dict[str, bool]) -> None:
    checkpoint, model = Plain().state_dict(), adapted_plain()
    factors, given = values(lp.state_dict(model)), copy.deepcopy(checkpoint)
    assert model.load_state_dict(given, **options) == ([], [])
    assert list(given) == list(checkpoint)
    assert values(lp.state_dict(model)) == factors
    assert values(lp.base_state_dict(model)) == values(checkpoint)
    fresh = Plain()
    fresh.load_state_dict(checkpoint)
    lp.attach(fresh, EVERYTHING)
    lp.load_state_dict(fresh, lp.state_dict(model))
    # A DoRA's norm is that of the new base.
    assert values(lp.merged_state_dict(model)) == values(lp.merged_state_dict(fresh))
    lp.detach(model)
    assert values(model.state_dict()) == values(checkpoint)
    assert (model.head.weight is model.embed.weight) != options.get("assign", False)  # assigning unties a plain model


def test_an_original_checkpoint_with_faults_is_reported_as_for_the_plain_model() -> None:
    model, checkpoint = adapted(), two_layers().state_dict()
    missing = {key: tensor for key, tensor in checkpoint.items() if key != "0.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.parametrizations\.weight\.original"):
        model.load_state_dict(missing)
    assert model.load_state_dict(missing, strict=False).unexpected_keys == []
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.wieght"):
        model.load_state_dict({**checkpoint, "0.wieght": torch.zeros(4, 6)})
    with pytest.raises(RuntimeError, match="size mismatch for 0"):
        model.load_state_dict({**checkpoint, "0.weight": torch.zeros(4, 7)})


@pytest.mark.parametrize("assign", [True, False])
def test_the_full_state_of_an_adapted_model_loads_into_its_like(assign: bool) -> None:
    model, other = adapted(), adapted(seed=1)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert other.load_state_dict(state, assign=assign) == ([], [])
    assert values(other.state_dict()) == values(model.state_dict())
    assert values(lp.state_dict(other)) == values(lp.state_dict(model))
    torch.testing.assert_close(other(torch.ones(1, 6)), model(torch.ones(1, 6)), **EXACT)


def test_base_and_merged_state_dicts_have_the_original_keys_in_order() -> None:
    plain = Plain()
    original = values(plain.state_dict())
    lp.attach(plain, EVERYTHING)
    randomize(plain)
    effective = {key: bits(plain.get_buffer(key)) for key, _ in plain.named_buffers() if "parametrizations" not in key}
    effective |= {key: bits(lp.effective_weight(plain, key)) for key in original if key not in effective}
    with unchanged(plain):
        base, merged = lp.base_state_dict(plain), lp.merged_state_dict(plain)
    assert list(base) == list(merged) == list(original)
    assert values(base) == original
    assert values(merged) == effective
    assert base._metadata == merged._metadata == Plain().state_dict()._metadata
    assert not any(tensor.requires_grad for tensor in [*base.values(), *merged.values()])
    Plain().load_state_dict(merged)


# --- copies -----------------------------------------------------------------------------------------------------


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded])
def test_a_copy_is_equal_and_independent(copy_of: Callable[[nn.Module], nn.Module]) -> None:
    model, x = adapted_plain(), torch.randn(2, 3, 4)
    lp.attach(model, lp.LoRA(r=1), "head", name="second")
    lp.activate(model, {"second": 0.5, "default": 1.0})
    model.encoder[0](x)  # an LSTM keeps the weights that it read, with their graph
    with unchanged(model):
        replica = copy_of(model)
        assert values(replica.state_dict()) == values(model.state_dict())
        assert lp.adapters(replica) == lp.adapters(model)
        assert [type(module) for module in replica.modules()] == [type(module) for module in model.modules()]
        assert replica.head.weight is not model.head.weight
        torch.testing.assert_close(replica.encoder[0](x)[0], model.encoder[0](x)[0], **EXACT)
        lp.activate(replica, {"second": 1.0})
        lp.detach(replica, "default")
        lp.merge(replica)
        assert replica.head.weight is replica.embed.weight
        assert [type(module) for module in replica.modules()] == [type(module) for module in Plain().modules()]
    lp.detach(model)


# --- what is shared stays shared --------------------------------------------------------------------------------


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("target", ["0", "1", ["0", "1"]])
def test_a_tied_weight_is_adapted_once_for_every_reader(target: Any) -> None:
    model, tokens = tied(), torch.arange(5)
    weight = model[0].weight
    with unchanged(model):
        lp.attach(model, lp.LoRA(r=2), target)
        randomize(model)
        A, B = lp.state_dict(model).values()
        # An embedding's output dim is its last; of two rules the later one says how the weight is read.
        delta = (B @ A).T if target == "0" else B @ A
        # The same product of two float32 matrices.
        torch.testing.assert_close(model[0](tokens), weight + delta, **EXACT)
        torch.testing.assert_close(model[1].weight, weight + delta, **EXACT)
        with lp.merged(model):
            assert model[0].weight is model[1].weight
        with lp.detached(model):
            assert model[0].weight is model[1].weight is weight
        lp.detach(model)
    lp.attach(model, lp.LoRA(r=2), target)
    lp.merge(model)
    assert model[0].weight is model[1].weight


def test_a_tied_weight_that_an_assigning_load_has_torn_apart() -> None:
    model = tied()
    lp.attach(model, lp.LoRA(r=2), "0")
    model.load_state_dict(
        {"0.weight": torch.zeros(5, 4), "1.weight": torch.ones(5, 4), "1.bias": torch.zeros(5)}, assign=True
    )
    embedding, head = (layer.weight.detach().clone() for layer in model)
    try:
        lp.merge(model)
    except lp.AttachError:
        return
    torch.testing.assert_close(model[0].weight.detach(), embedding, **EXACT)
    torch.testing.assert_close(model[1].weight.detach(), head, **EXACT)


def test_a_tied_weight_that_a_load_has_made_two_equal_ones_is_tied_again_when_merged() -> None:
    model = tied()
    lp.attach(model, lp.LoRA(r=2), "0")
    randomize(model)
    expected = lp.effective_weight(model, "0.weight").detach()
    value = lp.base_state_dict(model)["0.weight"]
    state = {"0.weight": value.clone(), "1.weight": value.clone(), "1.bias": torch.zeros(5)}
    model.load_state_dict(state, assign=True)
    lp.merge(model)
    assert model[0].weight is model[1].weight
    torch.testing.assert_close(model[0].weight.detach(), expected, **EXACT)


def test_a_module_used_twice_is_adapted_once() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    with unchanged(model):
        (row,) = lp.attach(model, lp.LoRA(r=1))
        assert (row.path, row.shared_with) == ("0.weight", ("2.weight",))
        randomize(model)
        report = lp.check(model, torch.ones(1, 4))
        assert report["0.weight"].reads == 2
        lp.detach(model)


def test_a_copy_of_a_layer_that_refers_to_itself_refers_to_itself() -> None:
    model = adapted()
    model[0].layers = [model[0]]
    replica = copy.deepcopy(model)
    assert replica[0].layers[0] is replica[0] is not model[0]


def test_adapters_move_with_their_layers() -> None:
    layers = adapted(name="style")
    parent = nn.ModuleDict({"body": nn.ModuleList([layers[1]]), "tail": layers[0]})
    (adapter,) = lp.adapters(parent).values()
    assert list(adapter) == ["body.0.weight", "tail.weight[1/2]", "tail.weight[2/2]", "tail.bias"]
    assert {path.rpartition(".")[0] for path in lp.state_dict(parent, "style")} == set(adapter)
    lp.detach(parent)
    assert all(parameter.requires_grad for parameter in layers.parameters())
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Linear]
