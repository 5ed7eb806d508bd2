"""minLoRA: one parametrization that adds B·A to a weight as it is stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..case import Case
from .base import Factors, PeerError, StateDicts, copy_into, places


class MinLoRA(StateDicts):
    """cccntu/minLoRA, which is on no package index; it runs if it can be imported."""

    name = "minLoRA"
    package = "minlora"

    def attach(self, model: nn.Module, case: Case, method: str) -> nn.Module:
        """Its parametrization on each target; its ``add_lora`` goes by exact types."""
        for place in list(places(model, case)):
            make = self.module().LoRAParametrization
            weight = getattr(place.module, place.name)
            options = {"rank": case.r, "lora_alpha": case.r}
            if isinstance(place.module, nn.Embedding):
                made = make.from_embedding(place.module, **options)
            elif weight.dim() == 2 or isinstance(place.module, nn.Conv2d):
                out, *rest = weight.shape
                made = make(torch.Size(rest).numel(), out, **options)
            else:
                raise PeerError(f"has no form for {type(place.module).__name__}.{place.name}")
            parametrize.register_parametrization(place.module, place.name, made.to(weight.dtype))
        return model

    def fill(self, model: nn.Module, base: nn.Module, case: Case, factors: dict[str, Factors]) -> None:
        """A and B as ours, turned where it reads the weight the other way round."""
        for place in places(base, case):
            own, module = place.factors(factors), model.get_submodule(place.module_path)
            made: Any = module.parametrizations[place.name][0]  # type: ignore[index, union-attr]
            if isinstance(place.module, nn.Embedding):
                own = {name: factor.mT for name, factor in own.items()}
            elif type(place.module).__name__ == "Conv1D":
                own = {"lora_A": own["lora_B"].mT, "lora_B": own["lora_A"].mT}
            copy_into((getattr(made, name), own[name]) for name in ("lora_A", "lora_B"))

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """``get_lora_state_dict``."""
        state: dict[str, Tensor] = self.module().get_lora_state_dict(model)
        return state

    def add(self, model: nn.Module, case: Case) -> None:
        """``load_multiple_lora``."""
        self.module().load_multiple_lora(model, [self.state(model)] * 2)

    def switch(self, model: nn.Module, second: bool) -> None:
        """``select_lora``."""
        self.module().select_lora(model, int(second))

    def merge(self, model: nn.Module) -> None:
        """``merge_lora``."""
        self.module().merge_lora(model)
