"""Labelled multi-channel image sets: csv, splits, fastai's data blocks and loaders, reports on what is wrong."""

from .annotations import Annotations
from .audit import FolderReport, check
from .leaks import find_leaks
from .loaders import HPADataLoaders, MultiChannelBlock, MultiChannelDataLoaders
from .splits import ColumnSplit, FoldSplit, GroupSplit, RandomSplit, StratifiedSplit
from .stratify import make_folds

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
    "check",
    "find_leaks",
    "make_folds",
]
