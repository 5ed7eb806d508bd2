"""Operations on adapter files and checkpoints, without a model in memory: what the command line runs."""

from .combine import combine as combine
from .convert import Converted as Converted
from .convert import convert as convert
from .extract import extract as extract
from .inspect import Inspection as Inspection
from .inspect import inspect_file as inspect_file
from .merge_files import Merged as Merged
from .merge_files import merge_files as merge_files
from .reports import Change as Change
from .reports import Changes as Changes
from .resize import resize as resize
from .verify import Verified as Verified
from .verify import verify as verify
