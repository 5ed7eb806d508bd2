"""What goes wrong with plain ``parametrize``: copies, caches, assignments, other parametrizations, classes.

Each docstring says what happens without this library's care. Ties, state dicts and checkpoints are in
test_hazards_state.py, layers and gradients in test_hazards_layers.py, compilers and distributed training in
test_hazards_systems.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from hazards import EXACT, adapted, factors_of, x
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import loraparam as lp

# --- copies (S01, S02, S23) --------------------------------------------------------------------------------


def test_detaching_a_copy_leaves_the_original_alone() -> None:
    """A deepcopy shares its class with the original, so removing the copy's parametrization removes both."""
    model = adapted()
    output = model(x())
    twin = copy.deepcopy(model)
    lp.detach(twin)
    assert type(twin) is nn.Linear
    assert_close(model(x()), output, **EXACT)


def test_adapting_more_of_a_copy_leaves_the_original_alone() -> None:
    """A second parametrization on a copy puts a property on the shared class that the original cannot serve."""
    model = adapted()
    output = model(x())
    twin = copy.deepcopy(model)
    lp.attach(twin, lp.Full(), "bias")
    assert_close(model(x()), output, **EXACT)
    assert model.bias is model._parameters["bias"]


def test_a_deepcopy_of_a_weight_normed_model_shares_nothing_either() -> None:
    """torch's own weight_norm gives a copy the original's class: taking an adapter off one may break both."""
    model = parametrizations.weight_norm(nn.Linear(4, 4))
    output = model(x())
    for finish in (lp.detach, lp.merge):
        twin = copy.deepcopy(model)
        lp.attach(twin, lp.LoRA(r=2))
        other = copy.deepcopy(twin)
        finish(other)
        finish(twin)
        # merge computes magnitude and direction anew from the weight.
        assert_close(twin(x()), output)
        assert_close(other(x()), output)
        assert_close(model(x()), output, **EXACT)


def test_a_shallow_copy_shares_the_adapter_and_says_so() -> None:
    """copy.copy of a parametrized module cannot even be pickled; taken apart it would break its twin."""
    model = adapted()
    twin = copy.copy(model)
    assert_close(twin(x()), model(x()), **EXACT)
    with pytest.raises(lp.AttachError, match="tied with 1 place outside of this module"):
        lp.detach(twin)
    assert_close(twin(x()), model(x()), **EXACT)


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def make_lstm() -> nn.Module:
    return adapted(nn.LSTM(4, 4, num_layers=2, bidirectional=True), targets=nn.LSTM)


@pytest.mark.parametrize("make", [adapted, make_lstm])
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: pickle.loads(ForkingPickler.dumps(model)),
        through_torch_save,
    ],
    ids=["deepcopy", "pickle", "fork", "torch.save"],
)
def test_modules_copy_after_a_forward(make, duplicate) -> None:
    """Parametrized modules refuse pickle; an LSTM keeps its last weights, graph included, and refuses deepcopy."""
    model = make()
    inputs = x().unsqueeze(1)
    output = first(model(inputs))
    output.sum().backward()
    twin = duplicate(model)
    assert_close(first(twin(inputs)), output, **EXACT)
    lp.detach(twin)
    lp.detach(model)
    assert_close(first(twin(inputs)), first(model(inputs)), **EXACT)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


# --- torch.nn.utils.parametrize.cached (S02, S03, S04) -----------------------------------------------------


def test_cached_keeps_a_copy_apart_from_the_original() -> None:
    """The cache's key is the original's id, so a deepcopy inside cached() reads the original's weight."""
    model = adapted()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.parametrizations.weight.original.zero_()
    expected = model(x()), twin(x())
    with parametrize.cached():
        assert_close((model(x()), twin(x())), expected, **EXACT)


def test_cached_around_a_reentrant_checkpoint_keeps_the_gradients() -> None:
    """The cached weight was computed without a graph in the checkpoint's forward: gradients are None, no error."""
    model, inputs = adapted(), x().requires_grad_()
    model(inputs).sum().backward()
    expected = {name: factor.grad for name, factor in factors_of(model).items()}
    model.zero_grad()
    with parametrize.cached():
        checkpoint(model, inputs, use_reentrant=True).sum().backward()
    assert_close({name: factor.grad for name, factor in factors_of(model).items()}, expected)


def test_cached_sees_changed_factors_and_switches() -> None:
    """Inside cached() functional_call with other factors, activate and disabled would all give the first value."""
    model = adapted()
    key = "parametrizations.weight.0.default.lora_B"
    B = dict(model.named_parameters())[key].detach()
    with parametrize.cached():
        outputs = [torch.func.functional_call(model, {key: s * B}, (x(),)) for s in (1.0, 5.0)]
        with lp.disabled(model):
            outputs.append(model(x()))
        lp.activate(model, {"default": 2.0})
        outputs.append(model(x()))
    base = outputs[2]
    assert_close(outputs[1] - base, 5 * (outputs[0] - base))
    assert_close(outputs[3] - base, 2 * (outputs[0] - base))
    assert (outputs[0] - base).abs().max() > 0.1


# --- writing to the computed weight (S05, S06, S20) --------------------------------------------------------


@torch.no_grad()
def fill(module: nn.Linear) -> None:
    module.weight.zero_()


def replace_data(module: nn.Linear) -> None:
    module.weight.data = torch.zeros(4, 4)


@torch.no_grad()
def fill_data(module: nn.Linear) -> None:
    module.weight.data.zero_()


def initialise(module: nn.Linear) -> None:
    nn.init.zeros_(module.weight)


@pytest.mark.parametrize("write", [fill, fill_data, replace_data, initialise, nn.Linear.reset_parameters])
def test_writing_into_the_computed_weight_is_refused(write: Callable[[nn.Linear], None]) -> None:
    """In-place writes, init functions and .data= act on a temporary and vanish without a word."""
    model = adapted()
    output = model(x())
    with pytest.raises(lp.AttachError, match=r"on an effective weight: it is computed .* what is written is lost"):
        write(model)
    assert_close(model(x()), output, **EXACT)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w[0].zero_(),
        lambda w: w[0, 1:].copy_(torch.zeros(3)),
        lambda w: w.view(-1).zero_(),
        lambda w: w.flatten()[2:].fill_(0),
        lambda w: w.diagonal().zero_(),
        lambda w: w.unbind()[1].mul_(2),
        lambda w: w.T[0].zero_(),
        lambda w: w[0].data.zero_(),
        lambda w: nn.init.zeros_(w[:, 1]),
    ],
)
def test_writing_into_a_part_of_the_computed_weight_is_refused(write: Callable[[Tensor], None]) -> None:
    """A view of a temporary takes the write, and vanishes with it."""
    model = adapted()
    with torch.no_grad(), pytest.raises(lp.AttachError, match="on an effective weight"):
        write(model.weight)


def test_an_array_of_the_computed_weight_is_read_only() -> None:
    """An array shares memory with the temporary it was made from."""
    model = adapted()
    with torch.no_grad():
        array = model.weight.numpy()
    torch.testing.assert_close(torch.from_numpy(array.copy()), lp.effective_weight(model, "weight").detach())
    with pytest.raises(ValueError, match="read-only"):
        array.fill(0)


@pytest.mark.parametrize(
    "assign",
    [
        lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(4, 4))),
        lambda m: setattr(m, "weight", torch.zeros(4, 4)),
        lambda m: setattr(m, "weight", None),
        lambda m: m.register_parameter("weight", nn.Parameter(torch.zeros(4, 4))),
        lambda m: torch.func.functional_call(m, {"weight": torch.zeros(4, 4)}, (x(),)),
    ],
    ids=["Parameter", "tensor", "None", "register_parameter", "functional_call"],
)
def test_assigning_the_computed_weight_is_refused_by_name(assign: Callable[[nn.Module], None]) -> None:
    """Without right_inverse the error is about right_inverse; with one the base is overwritten silently."""
    model = adapted()
    output, base = model(x()), model.parametrizations.weight.original
    bits = base.detach().clone()
    with pytest.raises(lp.AttachError, match=r"'weight' of Linear carries adapters.*cannot be assigned"):
        assign(model)
    assert model.parametrizations.weight.original is base
    assert_close(base.detach(), bits, **EXACT)
    assert_close(model(x()), output, **EXACT)


# --- what is not ours (S07) --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_detach_keeps_the_models_own_parametrization(norm) -> None:
    """remove_parametrizations takes spectral_norm off with the adapter, and refuses for weight_norm."""
    model = norm(nn.Linear(4, 4)).eval()
    kind, keys, output = type(model), list(model.state_dict()), model(x())
    adapted(model)
    assert not torch.equal(model(x()), output)
    lp.detach(model)
    assert type(model) is kind
    assert list(model.state_dict()) == keys
    assert_close(model(x()), output, **EXACT)


def test_merge_keeps_weight_norm_and_refuses_spectral_norm() -> None:
    """leave_parametrized=True bakes the model's own weight_norm and spectral_norm in as well."""
    model = adapted(parametrizations.weight_norm(nn.Linear(4, 4)))
    output = model(x())
    lp.merge(model)
    assert parametrize.is_parametrized(model, "weight")
    assert_close(model(x()), output)
    model = adapted(parametrizations.spectral_norm(nn.Linear(4, 4)).eval())
    output = model(x())
    with pytest.raises(lp.AttachError, match="SpectralNorm on the same weight cannot hold the merged value"):
        lp.merge(model)
    assert_close(model(x()), output, **EXACT)


def test_spectral_norm_put_on_top_of_an_adapter_survives_its_removal() -> None:
    """It stands after the adapter in the list, and would go with it."""
    model = parametrizations.spectral_norm(adapted()).eval()
    expected = parametrizations.spectral_norm(nn.Linear(4, 4)).eval()
    lp.detach(model)
    assert list(model.state_dict()) == list(expected.state_dict())
    assert type(model.parametrizations.weight) is parametrize.ParametrizationList
    assert model(x()).isfinite().all()


def test_weight_norm_on_top_of_an_adapter_is_refused() -> None:
    """It registers, and each later forward raises TypeError about a missing 'weight_v'."""
    model = adapted()
    output, state = model(x()), list(model.state_dict())
    with pytest.raises(lp.AttachError, match="WeightNorm computes the weight from weight_g and weight_v"):
        parametrizations.weight_norm(model)
    assert list(model.state_dict()) == state
    assert_close(model(x()), output, **EXACT)


class Times(nn.Module):
    """A parametrization with more to its signature than the tensor."""

    def forward(self, X: torch.Tensor, by: float = 2.0, *rest: Any, **options: Any) -> torch.Tensor:
        return by * X


def test_a_parametrization_of_one_tensor_goes_on_top_of_an_adapter() -> None:
    model = adapted()
    weight = model.weight.detach().clone()
    parametrize.register_parametrization(model, "weight", Times())
    assert_close(model.weight, 2 * weight)


def test_foreign_parametrizations_on_one_instance_leave_others_alone() -> None:
    """All Linears share one guarded class here: torch adding or removing a property must not reach the others."""
    one, other = adapted(), adapted()
    output = other(x())
    parametrizations.spectral_norm(one)
    parametrize.register_parametrization(one, "bias", nn.Tanh())
    parametrize.remove_parametrizations(one, "bias")
    parametrize.remove_parametrizations(one, "weight")
    assert type(one) is nn.Linear
    assert one(x()).isfinite().all()
    assert_close(other(x()), output, **EXACT)
    assert list(other.parametrizations) == ["weight"]


# --- classes (S08, S10) ------------------------------------------------------------------------------------


def test_an_error_inside_a_method_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """An AttributeError in a parametrization turns into "'ParametrizedLinear' object has no attribute 'weight'"."""
    model = adapted()
    monkeypatch.setattr(lp.LoRA, "apply", lambda self, weight, factors, layout: weight.nope)
    message = r"computing the effective 'weight' of Linear failed.*nope"
    with lp.execution("merged"), pytest.raises(RuntimeError, match=message) as error:
        model(x())
    assert isinstance(error.value.__cause__, AttributeError)
    assert hasattr(model, "weight")


def test_an_adapted_module_keeps_the_name_of_its_class() -> None:
    """Each module gets a class of its own, ParametrizedLinear of torch.nn.utils.parametrize."""
    one, other = adapted(), adapted()
    assert isinstance(one, nn.Linear)
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(one), attribute) == getattr(nn.Linear, attribute)
    assert type(one) is type(other)


def test_an_adapted_bias_on_one_layer_leaves_the_bias_of_others_an_attribute() -> None:
    """The shared class has a property for every name adapted anywhere; FSDP1 sets and deletes plain attributes."""
    one, other = adapted(), adapted()
    lp.attach(one, lp.Full(), "bias")
    del other.bias
    assert not hasattr(other, "bias")
    with pytest.raises(AttributeError, match="bias"):
        del other.bias
    other.bias = torch.ones(4)
    assert_close(other(x()) - x() @ other.weight.T, torch.ones(2, 4))
    del other.bias
    other.bias = nn.Parameter(torch.zeros(4))
    assert "bias" in dict(other.named_parameters())


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_deleting_the_computed_weight_is_refused(name: str) -> None:
    """The property has no deleter; a name that torch's own layers delete must say why it cannot go."""
    model = adapted(method=lp.Full(), targets=["weight", "bias"])
    output = model(x())
    with pytest.raises((lp.AttachError, AttributeError), match=name):
        delattr(model, name)
    assert_close(model(x()), output, **EXACT)
