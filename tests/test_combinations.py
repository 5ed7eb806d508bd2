"""Two things that each work alone, together."""

import pytest
import torch
from test_plans import randomize, unchanged
from test_state import tied
from torch import nn

import loraparam as lp

# --- a part of a model, and the whole of it ---------------------------------------------------------------------


@pytest.mark.parametrize("target", ["0", "1"])
def test_a_weight_that_carries_adapters_at_one_of_its_places_takes_no_more(target: str) -> None:
    model = nn.Sequential(*tied(), nn.Linear(5, 5))
    lp.attach(model[1], lp.LoRA(r=2))
    match = r"'0\.weight', '1\.weight' are one parameter, and the adapters on '1\.weight' .*lp\.detach or lp\.merge"
    with unchanged(model), pytest.raises(lp.AttachError, match=match):
        lp.attach(model, lp.LoRA(r=2), [target, "2"], name="second")
    lp.detach(model[1])
    with unchanged(model):
        lp.attach(model, lp.LoRA(r=2), target)
        lp.detach(model)


def test_a_weight_that_is_tied_to_an_adapted_one_later_takes_no_more() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    lp.attach(model, lp.LoRA(r=2), "1")
    model[0].weight = model[1].parametrizations.weight.original
    with unchanged(model), pytest.raises(lp.AttachError, match=r"'1\.weight' came on before it was tied"):
        lp.attach(model, lp.LoRA(r=2), "0", name="second")
