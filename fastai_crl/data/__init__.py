"""Labelled multi-channel image sets: csv, splits, fastai's data blocks and loaders, reports on what is wrong."""

from .annotations import Annotations
from .leaks import find_leaks
from .loaders import HPADataLoaders, MultiChannelBlock, MultiChannelDataLoaders
from .report import FolderReport, check
from .splits import ColumnSplit, FoldSplit, GroupSplit, RandomSplit, StratifiedSplit
from .stratify import add_folds

__all__ = [
    "Annotations",
    "ColumnSplit",
    "FoldSplit",
    "FolderReport",
    "GroupSplit",
    "HPADataLoaders",
    "MultiChannelBlock",
    "MultiChannelDataLoaders",
    "RandomSplit",
    "StratifiedSplit",
    "add_folds",
    "check",
    "find_leaks",
]
