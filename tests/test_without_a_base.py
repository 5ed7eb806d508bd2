"""What a file cannot be written from without the base: the error says so, and with the base it can."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import loraparam as lp
from loraparam.testing.subjects import shake

LORA, DORA = lp.LoRA(r=1), lp.DoRA(r=1)


class Experts(nn.Module):
    """Matrices (in, out), as the module alone says."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 5, 4))


def two() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 4)})


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, lp.Method], str, str]] = {
    "a bias, loralib": (
        two,
        {"a.weight": LORA, "a.bias": lp.Full()},
        "loralib",
        r"'a\.bias': loralib stores biases whole",
    ),
    "a bias, PEFT": (
        two,
        {"a.weight": LORA, "a.bias": lp.Full()},
        "peft",
        r"'a\.bias': PEFT stores new values, not differences",
    ),
    "a bias alone, diffusers": (two, {"a.bias": lp.Full()}, "diffusers", r"'a\.weight': .* beside the trained bias"),
    "an epsilon": (two, {"a.weight": lp.DoRA(r=1, eps=0.1)}, "peft", r"'a\.weight': .* PEFT's DoRA has no eps=0\.1"),
    "a LoRA beside a DoRA": (
        two,
        {"a.weight": DORA, "b.weight": LORA},
        "peft",
        r"'b\.weight': .* beside a DoRA it needs a magnitude",
    ),
    "a DoRA on some rows": (two, {"a.weight[1/2]": DORA}, "kohya", r"'a\.weight': .* the lengths of the other rows"),
    "which way experts are read": (
        lambda: nn.ModuleDict({"experts": Experts()}),
        {"experts.stack": LORA},
        "peft",
        r"'experts\.stack': .* transposed is not known; save it from the model",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_needs_the_base_says_so(case: str, tmp_path: Path) -> None:
    make, methods, to, match = CASES[case]
    hints, name = ({"alpha": 1}, "out.pt") if to == "loralib" else ({}, "out")
    file, out = tmp_path / "file.safetensors", tmp_path / name
    torch.manual_seed(0)
    model = make()
    other = make()
    other.load_state_dict(model.state_dict())
    lp.attach(model, methods)
    shake(model)
    lp.save(model, file)
    with pytest.raises(lp.FormatError, match=match):
        lp.convert(file, out, to=to)
    assert list(tmp_path.iterdir()) == [file]
    lp.convert(file, out, to=to, base=other)
    lp.load(other, out, format=to, **hints)
    # Products of rank 1, folded and read back in float32.
    torch.testing.assert_close(lp.merged_state_dict(other), lp.merged_state_dict(model), rtol=1e-5, atol=1e-6)
