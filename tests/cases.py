"""The one table of methods and layers: each row is drawn from, so a new method or layer is one row."""

from __future__ import annotations

from hypothesis import strategies as st
from third_party import THIRD_PARTY_LAYERS

import loraparam as lp
from loraparam.testing import LayerCase
from loraparam.testing.layers import LAYERS as TORCH_LAYERS
from loraparam.testing.strategies import methods

LOW_RANK = {"alpha": st.none() | st.sampled_from([0.5, 3]), "rslora": st.booleans()}

METHODS: dict[str, st.SearchStrategy[lp.Method]] = {
    "lora": st.builds(lp.LoRA, r=st.just(1), init=st.sampled_from(["kaiming", "gaussian"]), **LOW_RANK),
    "dora": st.builds(
        lp.DoRA,
        r=st.just(1),
        axis=st.sampled_from(["out", "in"]),
        detach_norm=st.booleans(),
        eps=st.sampled_from([0.0, 1e-10]),
        **LOW_RANK,
    ),
    # One block divides every weight; tests/test_methods.py has more, and larger ranks.
    "blocks": st.builds(lp.BlockLoRA, r=st.just(1), shared=st.booleans(), init=st.just("gaussian"), **LOW_RANK),
    "magnitude": st.builds(lp.Magnitude, axis=st.sampled_from(["out", "in"])),
    "ia3": st.builds(lp.IA3, axis=st.sampled_from(["out", "in"])),
    "full": st.just(lp.Full()),
}

LAYERS: dict[str, st.SearchStrategy[LayerCase]] = {**TORCH_LAYERS, **THIRD_PARTY_LAYERS}

__all__ = ["LAYERS", "METHODS", "methods"]
