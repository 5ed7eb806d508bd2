"""What people train and export with beside a plain loop: precision, checkpoints, averages, torch.func."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import loraparam as lp

EXACT = {"rtol": 0, "atol": 0}
TARGETS = {
    "self_attn[q,v]": lp.LoRA(r=2),
    "linear1": lp.DoRA(r=2),
    "linear2": lp.LoRA(r=2, dropout=0.25),
    "norm1": lp.Full(),
}


def base(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, **options), 2)


def adapted(**options: Any) -> nn.Module:
    model = base(**options)
    lp.attach(model, TARGETS)
    return model


X = torch.randn(6, 4, 5, 8, generator=torch.manual_seed(1))  # steps, batch, length, width


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Tensor) -> list[float]:
    losses = []
    for x in batches:
        loss = F.mse_loss(model(x), x.roll(1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(lp.param_groups(model, 0.02, lr_ratio=4, weight_decay=0.01))


# --- precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast_follows_float32(dtype: torch.dtype) -> None:
    model, expected = adapted().eval(), adapted().eval()  # without dropout
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    optimizer, plain = adamw(model), adamw(expected)
    for x in X:
        with torch.autocast("cpu", dtype):
            loss = F.mse_loss(model(x).float(), x.roll(1, 1))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        # bfloat16 keeps eight bits: losses agree to two digits.
        assert_close(loss.item(), steps(expected, plain, x[None])[0], rtol=0.02, atol=0)
    assert {factor.dtype for factor in lp.parameters(model)} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_base_trains_by_its_wide_factors(dtype: torch.dtype) -> None:
    model, expected = base().to(dtype).eval(), base().to(dtype).float().eval()
    for each in (model, expected):
        torch.manual_seed(1)
        lp.attach(each, TARGETS)
    assert {factor.dtype for factor in lp.parameters(model)} == {torch.float32}
    before = {key: value.clone() for key, value in lp.state_dict(model).items()}
    optimizer = torch.optim.SGD(lp.parameters(model), lr=1e-4)  # steps far below the base's own resolution
    for x in X:
        F.mse_loss(model(x.to(dtype)).float(), x.roll(1, 1)).backward()
    steps_of = {key: -1e-4 * factor.grad for key, factor in lp.named_parameters(model)}
    optimizer.step()
    for key, factor in lp.named_parameters(model):
        assert_close(factor.detach(), before[key] + steps_of[key])
    for x in X:
        F.mse_loss(expected(x), x.roll(1, 1)).backward()
    for (key, got), (_, wide) in zip(lp.named_parameters(model), lp.named_parameters(expected), strict=True):
        # Activations of eight (or eleven) bits: some roundings of them, through two blocks and back.
        assert (got.grad - wide.grad).norm() <= 16 * torch.finfo(dtype).eps * wide.grad.norm(), key


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_draws_the_same_dropout_again(use_reentrant: bool) -> None:
    def gradients(run: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
        model = adapted()
        x = X[0].clone().requires_grad_()
        torch.manual_seed(3)
        for layer in model.layers:
            x = run(layer, x)
        x.pow(2).sum().backward()
        return [factor.grad for factor in lp.parameters(model)]

    kept = gradients(lambda layer, x: layer(x))
    recomputed = gradients(lambda layer, x: checkpoint(layer, x, use_reentrant=use_reentrant))
    assert_close(recomputed, kept, **EXACT)


# --- checkpoints ------------------------------------------------------------------------------------------------


def test_an_optimizers_positions_hold_for_an_adapter_from_a_file(tmp_path: Path) -> None:
    """An optimizer's state goes by position, in groups, and loading has to give parameters in the same order."""
    model = adapted()
    optimizer = adamw(model)
    steps(model, optimizer, X[:3])
    lp.save(model, tmp_path / "adapter.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.manual_seed(4)
    steps(model, optimizer, X[3:])

    resumed = base()
    lp.load(resumed, tmp_path / "adapter.safetensors")
    assert [key for key, _ in lp.named_parameters(resumed)] == [key for key, _ in lp.named_parameters(model)]
    optimizer = adamw(resumed)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    torch.manual_seed(4)
    steps(resumed, optimizer, X[3:])
    assert_close(lp.state_dict(resumed), lp.state_dict(model), **EXACT)


def test_an_optimizers_positions_hold_through_attach_and_detach() -> None:
    model = base()
    optimizer = torch.optim.Adam(model.parameters())
    steps(model, optimizer, X[:2])
    kept, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    lp.attach(model, TARGETS)
    steps(model, adamw(model), X)
    lp.detach(model)
    for each in (model, kept):
        again = torch.optim.Adam(each.parameters())
        again.load_state_dict(copy.deepcopy(state))  # it keeps the tensors it is given
        steps(each, again, X[2:])
    assert_close(model.state_dict(), kept.state_dict(), **EXACT)


class Lit(nn.Module):
    """A training module as Lightning has it: the model is one of its attributes, and all of it is the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.model = base()
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model(x))


@pytest.mark.parametrize("strict", [True, False])
def test_lightnings_checkpoints_load(strict: bool, tmp_path: Path) -> None:
    trained, fresh, plain = Lit(), Lit(), Lit()
    for lit in (trained, fresh):
        lp.attach(lit.model, TARGETS)
    steps(trained, adamw(trained), X)
    torch.save({"state_dict": trained.state_dict(), "base": plain.state_dict()}, tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt")
    result = fresh.load_state_dict(saved["state_dict"], strict=strict)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_close(fresh.eval()(X[0]), trained.eval()(X[0]), **EXACT)
    # From before the adapters: the base comes back, and the factors stay.
    result = fresh.load_state_dict(saved["base"], strict=strict)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_close(lp.state_dict(fresh.model), lp.state_dict(trained.model), **EXACT)
    assert_close(dict(lp.base_state_dict(fresh)), dict(plain.state_dict()), **EXACT)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*parametrizations"):
        plain.load_state_dict(saved["state_dict"])


# --- averages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [None, 0.5])
def test_averaged_models(decay: float | None, tmp_path: Path) -> None:
    """SWA and EMA average every parameter of a deep copy, factors included; the copy is saved as any model."""
    model = adapted()
    average = AveragedModel(model, multi_avg_fn=None if decay is None else get_ema_multi_avg_fn(decay))
    optimizer, seen = adamw(model), []
    for x in X:
        steps(model, optimizer, x[None])
        average.update_parameters(model)
        seen.append({key: value.clone() for key, value in lp.state_dict(model).items()})
    expected = seen[0]
    for number, state in enumerate(seen[1:], 1):
        weight = 1 / (number + 1) if decay is None else 1 - decay
        expected = {key: (1 - weight) * expected[key] + weight * state[key] for key in state}
    assert_close(lp.state_dict(average), expected)
    assert_close(dict(lp.base_state_dict(average.module)), dict(base().state_dict()))
    lp.save(average, tmp_path / "average.safetensors")
    loaded = base()
    lp.load(loaded, tmp_path / "average.safetensors")
    assert_close(loaded.eval()(X[0]), average.eval()(X[0]), **EXACT)
    lp.detach(average)
    assert lp.adapters(model)["default"].keys() == lp.adapters(loaded)["default"].keys()


def test_averages_renew_batch_statistics() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    lp.attach(model, lp.LoRA(r=2, init="gaussian"))
    average = AveragedModel(model)
    average.update_parameters(model)
    update_bn([X[0].flatten(0, 1)], average)
    expected = model[0](X[0].flatten(0, 1))
    assert_close(average.module[1].running_mean, expected.mean(0).detach())


# --- weights that change places ---------------------------------------------------------------------------------


def exchange(parameters: list[nn.Parameter], others: list[Tensor]) -> None:
    """Swap values in place, as optimizers that keep averages do (torchcontrib's ``swap_swa_sgd``)."""
    for parameter, other in zip(parameters, others, strict=True):
        kept = parameter.data.clone()
        parameter.data.copy_(other)
        other.copy_(kept)


def test_averages_swapped_in_to_evaluate_and_out_to_go_on(tmp_path: Path) -> None:
    model, undisturbed = adapted(), adapted()
    optimizers = [adamw(each) for each in (model, undisturbed)]
    parameters = [parameter for group in optimizers[0].param_groups for parameter in group["params"]]
    averages = [parameter.detach().clone() for parameter in parameters]
    for x in X:
        for each, optimizer in zip((model, undisturbed), optimizers, strict=True):
            torch.manual_seed(4)
            steps(each, optimizer, x[None])
        for average, parameter in zip(averages, parameters, strict=True):
            average.lerp_(parameter.detach(), 0.5)
        model.eval()(x)  # what is kept of the factors must not outlive the swap
        exchange(parameters, averages)
        lp.save(model, tmp_path / "average.safetensors")
        lp.load(loaded := base().eval(), tmp_path / "average.safetensors")
        assert_close(model(x), loaded(x), **EXACT)
        exchange(parameters, averages)
        model.train()
    assert_close(lp.state_dict(model), lp.state_dict(undisturbed), **EXACT)


@pytest.fixture
def swapping() -> Iterator[None]:
    """``Module.to`` and ``load_state_dict`` exchange tensors (torch.utils.swap_tensors) instead of their data."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_an_optimizer_goes_on_where_torch_swaps_parameters(swapping: None, tmp_path: Path) -> None:
    model, plain = adapted(), adapted()
    optimizers = [adamw(each) for each in (model, plain)]
    for each, optimizer in zip((model, plain), optimizers, strict=True):
        torch.manual_seed(4)
        steps(each, optimizer, X[:3])
    torch.save(model.state_dict(), tmp_path / "model.pt")
    model.double().float()
    assert_close(model.load_state_dict(torch.load(tmp_path / "model.pt")), ([], []))
    for each, optimizer in zip((model, plain), optimizers, strict=True):
        torch.manual_seed(5)
        steps(each, optimizer, X[3:])
    assert_close(lp.state_dict(model), lp.state_dict(plain), **EXACT)
    lp.detach(model)
    assert_close(model.state_dict(), base().state_dict(), **EXACT)


# --- torch.func -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_per_sample_gradients_are_those_of_single_samples() -> None:
    model = adapted().eval()
    factors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(factors: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.mse_loss(torch.func.functional_call(model, factors, (x[None],)), x[None].roll(1, 1))

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(factors, X[0])
    for i, x in enumerate(X[0]):
        model.zero_grad()
        F.mse_loss(model(x[None]), x[None].roll(1, 1)).backward()
        alone = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert_close({name: gradient[i] for name, gradient in together.items()}, alone)


# --- export -----------------------------------------------------------------------------------------------------


def trained() -> nn.Module:
    model = adapted()
    steps(model, adamw(model), X)
    return model.eval()


def test_the_merged_model_exports_with_its_own_keys(tmp_path: Path) -> None:
    model = trained()
    output = model(X[0])
    batch = {"src": {0: torch.export.Dim("batch", min=2)}}
    with lp.merged(model):
        program = torch.export.export(model, (X[0],), dynamic_shapes=batch)
    assert program.state_dict.keys() == base().state_dict().keys()
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert_close(loaded(X[0]), output)
    assert_close(loaded(X[0][:2]), output[:2])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_merged_model_exports_to_onnx() -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model = trained()
    output = model(X[0])
    with lp.merged(model):
        program = torch.onnx.export(model, (X[0],), dynamo=True, verbose=False)
    names = {weight.name for weight in program.model_proto.graph.initializer}
    assert not any("parametrizations" in name for name in names)
    (feed,) = program.model_proto.graph.input
    (result,) = reference.ReferenceEvaluator(program.model_proto).run(None, {feed.name: X[0].numpy()})
    assert_close(torch.from_numpy(result), output, rtol=1e-4, atol=1e-5)
