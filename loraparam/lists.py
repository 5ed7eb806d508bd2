"""The list that parametrize keeps for an adapted tensor, and what may join the adapters there."""

from __future__ import annotations

import inspect

from torch import nn
from torch.nn.utils import parametrize

from .errors import AttachError


class AdaptedList(parametrize.ParametrizationList):
    """The parametrizations of a tensor that had none before its adapters came."""

    def append(self, module: nn.Module) -> AdaptedList:
        """Put a parametrization on top of the adapters.

        Raises:
            AttachError: it computes the weight from several tensors, where the adapters leave one.
        """
        needed = [
            name
            for name, parameter in inspect.signature(module.forward).parameters.items()
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        if len(needed) > 1:
            raise AttachError(
                f"{type(module).__name__.strip('_')} computes the weight from {' and '.join(needed)}, and cannot go on "
                "top of adapters, which leave one tensor; lp.detach, put it on, then attach"
            )
        super().append(module)
        return self
