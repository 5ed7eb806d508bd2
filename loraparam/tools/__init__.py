"""Operations on adapter files and checkpoints, without a model in memory: what the command line runs."""

from .combine import combine as combine
from .extract import extract as extract
from .merge_files import Merged as Merged
from .merge_files import merge_files as merge_files
from .reports import Change as Change
from .reports import Changes as Changes
from .resize import resize as resize
