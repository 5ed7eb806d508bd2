"""Laws that every method, layer and model must obey, and strategies that draw them; for users' own as well.

Needs Hypothesis: ``pip install loraparam[test]``.

Example:
    >>> import loraparam as lp
    >>> from loraparam.testing import check_layer, check_method
    >>> check_method(lp.LoRA(r=1))
    >>> check_layer(lambda: nn.Linear(4, 3), lambda: (torch.randn(2, 4),), methods=[lp.DoRA(r=1)])
"""

try:
    import hypothesis as hypothesis
except ImportError as error:
    raise ImportError("loraparam.testing needs hypothesis: pip install 'loraparam[test]'") from error

import torch as torch
from torch import nn as nn

from .checks import check_layer as check_layer
from .checks import check_method as check_method
from .checks import check_model as check_model
from .checks import laws as laws
from .layer_cases import LayerCase as LayerCase
from .layers import layers as layers
from .parametrization import parametrize as parametrize
from .strategies import layouts as layouts
from .strategies import methods as methods
from .strategies import weights as weights
from .subjects import Subject as Subject

__all__ = [
    "LayerCase",
    "Subject",
    "check_layer",
    "check_method",
    "check_model",
    "laws",
    "layers",
    "layouts",
    "methods",
    "parametrize",
    "weights",
]
