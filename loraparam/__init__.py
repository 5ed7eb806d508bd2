"""Adapters (LoRA, DoRA and more) on any parameter of any existing PyTorch model, through ``parametrize``."""

import importlib as _importlib
import typing as _typing

from . import functional as functional
from .adapters import activate as activate
from .adapters import adapters as adapters
from .adapters import attach as attach
from .adapters import detach as detach
from .check import Report as Report
from .check import check as check
from .effective import EffectiveWeight as EffectiveWeight
from .errors import AttachError as AttachError
from .errors import FormatError as FormatError
from .errors import LoraparamError as LoraparamError
from .errors import RankError as RankError
from .errors import StateError as StateError
from .errors import TargetError as TargetError
from .execution import execution as execution
from .formats import load as load
from .formats import save as save
from .handmade import from_layer as from_layer
from .layouts import Layout as Layout
from .merging import detached as detached
from .merging import disabled as disabled
from .merging import effective_weight as effective_weight
from .merging import merge as merge
from .merging import merged as merged
from .methods import IA3 as IA3
from .methods import BlockLoRA as BlockLoRA
from .methods import DoRA as DoRA
from .methods import Full as Full
from .methods import LoRA as LoRA
from .methods import Magnitude as Magnitude
from .methods import Method as Method
from .plans import Plan as Plan
from .plans import plan as plan
from .state import base_state_dict as base_state_dict
from .state import load_state_dict as load_state_dict
from .state import merged_state_dict as merged_state_dict
from .state import state_dict as state_dict
from .training import named_parameters as named_parameters
from .training import param_groups as param_groups
from .training import parameters as parameters
from .training import summary as summary

if _typing.TYPE_CHECKING:
    from .tools.combine import combine as combine
    from .tools.convert import convert as convert
    from .tools.extract import extract as extract
    from .tools.inspect import inspect_file as inspect_file
    from .tools.merge_files import merge_files as merge_files
    from .tools.resize import resize as resize
    from .tools.verify import verify as verify

__version__ = "0.1.0"

__all__ = [
    "IA3",
    "AttachError",
    "BlockLoRA",
    "DoRA",
    "EffectiveWeight",
    "FormatError",
    "Full",
    "Layout",
    "LoRA",
    "LoraparamError",
    "Magnitude",
    "Method",
    "Plan",
    "RankError",
    "Report",
    "StateError",
    "TargetError",
    "activate",
    "adapters",
    "attach",
    "base_state_dict",
    "check",
    "combine",
    "convert",
    "detach",
    "detached",
    "disabled",
    "effective_weight",
    "execution",
    "extract",
    "from_layer",
    "functional",
    "inspect_file",
    "load",
    "load_state_dict",
    "merge",
    "merge_files",
    "merged",
    "merged_state_dict",
    "named_parameters",
    "param_groups",
    "parameters",
    "plan",
    "resize",
    "save",
    "state_dict",
    "summary",
    "verify",
]

_TOOLS = ("combine", "convert", "extract", "inspect_file", "merge_files", "resize", "verify")


def __getattr__(name: str) -> _typing.Any:
    """The operations on files, imported when the first is asked for: models need none of them."""
    if name not in _TOOLS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_importlib.import_module(f"{__name__}.tools"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_TOOLS})
