"""Labelled multi-channel image sets: csv, splits, fastai's data blocks and loaders, reports on what is wrong."""

from .leaks import find_leaks
from .loaders import HPADataLoaders, MultiChannelBlock
from .report import FolderReport, check
from .splits import add_folds

__all__ = [
    "FolderReport",
    "HPADataLoaders",
    "MultiChannelBlock",
    "add_folds",
    "check",
    "find_leaks",
]
