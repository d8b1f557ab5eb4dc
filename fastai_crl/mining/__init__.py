"""Batch-wise class profiling and hard-sample mining (arXiv:1804.10851, sections 3.1 and 3.2)."""

from .mine import Mined, mine, minority_classes

__all__ = ["Mined", "mine", "minority_classes"]
