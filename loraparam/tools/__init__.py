"""Operations on adapter files and checkpoints, without a model in memory: what the command line runs."""

from .merge_files import Merged as Merged
from .merge_files import merge_files as merge_files
