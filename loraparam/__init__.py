"""Adapters (LoRA, DoRA and more) on any parameter of any existing PyTorch model, through ``parametrize``."""

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
from .tools import combine as combine
from .tools import convert as convert
from .tools import extract as extract
from .tools import inspect_file as inspect_file
from .tools import merge_files as merge_files
from .tools import resize as resize
from .tools import verify as verify
from .training import named_parameters as named_parameters
from .training import param_groups as param_groups
from .training import parameters as parameters
from .training import summary as summary

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
