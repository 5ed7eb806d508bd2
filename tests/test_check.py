"""check: how often each target was read, whether gradient arrived, what is dead; and that it leaves no trace."""

from typing import Any

import pytest
import torch
from test_plans import bits, randomize, two_layers, unchanged
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import loraparam as lp
from loraparam.watching import watched


class Net(nn.Module):
    """One layer used twice, one never, one behind a detach, and one whose output is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.cut, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.twice(self.twice(x))
        return {"out": [self.last(x + self.cut(x).detach()), 1], "index": x.argmax(), "none": None}


def rows(report: lp.Report) -> dict[str, tuple[int, str]]:
    return {row.path: (row.reads, row.gradient) for row in report}


def test_reads_are_counted_and_gradients_seen() -> None:
    model = Net()
    lp.attach(model, lp.LoRA(r=1), ["twice", "last[1/2,2/2]"])
    report = lp.check(model, torch.ones(2, 4))
    assert rows(report) == {
        "twice.weight": (2, "arrived"),
        "last.weight[1/2]": (1, "arrived"),
        "last.weight[2/2]": (1, "arrived"),
    }
    assert len(report) == 3
    assert (report["twice.weight"].adapter, report["twice.weight"].dead) == ("default", False)
    assert "twice.weight      default      2  " in str(report)


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (
            ["twice", "never"],
            r"dead target: never read by this forward: 'never\.weight'\. Adapt the parameter .*exclude=",
        ),
        (["twice", "cut"], r"dead target: read, but no gradient arrived: 'cut\.weight'\. "),
        ("all-linear", r"dead targets: never read .*'never\.weight'; read, but no gradient arrived: 'cut\.weight'"),
        ("never", r"the outputs do not depend differentiably on any factor"),
    ],
)
def test_dead_targets_are_named(targets: Any, match: str) -> None:
    model = Net()
    lp.attach(model, lp.LoRA(r=1), targets)
    with unchanged(model), pytest.raises(lp.AttachError, match=match):
        lp.check(model, torch.ones(2, 4))


def test_a_report_says_which_targets_it_has() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    lp.attach(model, lp.LoRA(r=1))
    report = lp.check(model, torch.ones(1, 2))
    assert report["0.weight"].reads == 1
    with pytest.raises(lp.TargetError, match=r"no target 'O\.weight' was checked; nearest: '0\.weight'"):
        report["O.weight"]


def test_the_error_has_every_dead_target_however_many() -> None:
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(9)])
    model.forward = lambda x: model[0](x)
    lp.attach(model, lp.LoRA(r=1))
    with pytest.raises(lp.AttachError, match="and 3 more") as caught:
        lp.check(model, torch.ones(1, 2))
    assert caught.value.dead == tuple(f"{i}.weight" for i in range(1, 9))


def test_an_embedding_that_only_lends_its_weight_is_dead() -> None:
    """T5's ``shared``: encoder and decoder own modules with the same parameter; nothing calls ``shared`` itself."""

    class Lender(nn.Module):
        def __init__(self, is_tied: bool) -> None:
            super().__init__()
            self.shared, self.embed = nn.Embedding(5, 4), nn.Embedding(5, 4)
            if is_tied:
                self.embed.weight = self.shared.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.embed(tokens)

    alone, whole, tokens = Lender(False), Lender(True), torch.arange(3)
    lp.attach(alone, lp.LoRA(r=1), ["shared", "embed"])
    with pytest.raises(lp.AttachError, match=r"dead target: never read by this forward: 'shared\.weight'"):
        lp.check(alone, tokens)
    lp.attach(whole, lp.LoRA(r=1), "shared")
    (row,) = lp.check(whole, tokens)
    assert (row.path, row.reads, row.unread) == ("shared.weight", 1, ("shared.weight",))
    assert str(lp.check(whole, tokens)).splitlines()[1].endswith("shared.weight")


def test_a_gradient_of_zeros_has_arrived_but_is_told() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    nn.init.constant_(model[0].bias, -1e3)  # nothing passes the ReLU
    lp.attach(model, lp.LoRA(r=1))
    assert rows(lp.check(model, torch.ones(2, 4))) == {"0.weight": (1, "zero"), "2.weight": (1, "zero")}


def test_the_loss_is_no_sum_which_a_normalisation_would_make_constant() -> None:
    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y - y.mean(-1, keepdim=True)  # of four: the gradient of the sum is 1 - 4·¼, exactly 0

    model = Centred(4, 4)
    lp.attach(model, lp.LoRA(r=1))
    assert rows(lp.check(model, torch.randn(2, 4))) == {"weight": (1, "arrived")}


def test_frozen_and_inactive_adapters_are_told_and_not_dead() -> None:
    model = two_layers()
    for name in ("on", "off", "frozen"):
        lp.attach(model, lp.LoRA(r=1), "0", name=name)
    lp.activate(model, {"on": 1.0, "frozen": 1.0})
    for factor in lp.parameters(model, "frozen"):
        factor.requires_grad_(False)
    report = lp.check(model, torch.ones(2, 6))
    assert {row.adapter: row.gradient for row in report} == {"on": "arrived", "off": "off", "frozen": "frozen"}
    assert {row.adapter: row.factored for row in report} == {"on": 1, "off": 0, "frozen": 1}
    with lp.disabled(model):
        assert {row.gradient for row in lp.check(model, torch.ones(2, 6))} == {"off"}


def test_without_adapters_there_is_nothing_to_check() -> None:
    with pytest.raises(lp.AttachError, match=r"nothing is attached to this model; lp\.attach first"):
        lp.check(two_layers(), torch.ones(2, 6))


# --- check changes nothing --------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """A forward that writes wherever torch's layers do: statistics, a renormalised table, RNG states, modes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6, max_norm=0.5)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(1))

    def forward(self, tokens: Tensor, *, scale: Tensor) -> Tensor:
        self.calls += 1
        self.cache = torch.randn(3)  # a new tensor, not a write
        x, _ = self.lstm(self.embed(tokens) * scale)
        x = self.dropout(self.norm(x[:, -1]))
        self.norm.eval()
        return self.head(self.spectral(x))


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_check_changes_nothing(mode: bool, fails: bool) -> None:
    model, tokens = Stateful().train(mode), torch.randint(7, (4, 3))
    lp.attach(model, lp.LoRA(r=2, dropout=0.5), ["lstm", "spectral", "head"], train="norm")
    randomize(model)
    scale = torch.ones((), requires_grad=True)
    model(tokens, scale=scale).sum().backward()
    model.train(mode)
    model.embed.weight.data.mul_(10)  # there is something to renormalise
    if fails:
        lp.attach(model, lp.LoRA(r=1), "embed", name="faulty", freeze=False)
        for factor in lp.parameters(model, "faulty"):
            factor.register_hook(_fail)
    grad, state = bits(scale.grad), torch.get_rng_state()
    with unchanged(model):
        if fails:
            with pytest.raises(RuntimeError, match="in the middle of backward"):
                lp.check(model, tokens, scale=scale)
        else:
            lp.check(model, tokens, scale=scale)
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)  # bytes of the generator
    assert (bits(scale.grad), scale.requires_grad) == (grad, True)
    assert not watched()  # or each read from now on would take longer


def _fail(gradient: Tensor) -> None:
    raise RuntimeError("in the middle of backward")


def test_check_draws_the_dropout_that_the_next_forward_draws() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5))
    lp.attach(model, lp.LoRA(r=1))
    torch.manual_seed(3)
    expected = model(torch.ones(2, 4)).detach()
    torch.manual_seed(3)
    lp.check(model, torch.ones(2, 4))
    torch.testing.assert_close(model(torch.ones(2, 4)).detach(), expected, rtol=0, atol=0)  # the same computation


def test_check_under_no_grad_and_with_checkpointing_sees_the_gradients() -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    model = Checkpointed(nn.Linear(4, 4))
    lp.attach(model, lp.LoRA(r=1))
    with torch.no_grad():
        report = lp.check(model, torch.ones(2, 4))
        assert not torch.is_grad_enabled()
    assert rows(report) == {"0.weight": (2, "arrived")}  # once, and again when backward recomputes the block
