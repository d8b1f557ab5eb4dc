"""What the samplers share: labels as a sparse matrix, and an epoch of indices that differs each time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import sparse

__all__ = ["Sampler", "as_labels"]


def as_labels(targets: Any) -> sparse.csr_matrix:
    """Targets of any kind as a canonical (n, C) bool matrix."""
    targets = targets.detach().cpu().numpy() if hasattr(targets, "detach") else targets
    if not sparse.issparse(targets):
        targets = np.asarray(targets)
        if targets.ndim not in (1, 2) or targets.dtype.kind not in ("biuf" if targets.ndim == 2 else "iu"):
            raise ValueError(
                f"targets of shape {targets.shape} and {targets.dtype} fit no task: give (n, C) of 0 and 1, dense or "
                "scipy.sparse, or (n,) integer class indices."
            )
        if targets.ndim == 1 and len(targets):
            if targets.min() < 0:
                raise ValueError(f"targets hold the class index {targets.min()}: indices start at 0.")
            shape = len(targets), int(targets.max()) + 1
            targets = sparse.csr_matrix((np.ones(len(targets), bool), (np.arange(len(targets)), targets)), shape=shape)
    if 0 in targets.shape:
        raise ValueError(f"targets of shape {targets.shape} are empty: give at least one sample and one label.")
    values = targets.data if sparse.issparse(targets) else targets
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"targets run from {values.min()} to {values.max()}: they must be in [0, 1]; only 1 counts.")
    labels = sparse.csr_matrix(targets == 1)
    labels.sort_indices()
    return labels


class Sampler:
    """An epoch of indices, another each time it is iterated."""

    def __init__(self, targets: Any, seed: int):
        if isinstance(seed, bool) or seed != int(seed) or seed < 0:
            raise ValueError(f"seed={seed!r}: give a whole number of at least 0.")
        self.labels, self.seed, self.epoch = as_labels(targets), int(seed), 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch, from 0, that the next iteration draws; each iteration moves on by one."""
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[int]:
        order = self.indices(self.epoch)
        self.epoch += 1
        return iter(order.tolist())

    def indices(self, epoch: int = 0) -> np.ndarray:
        """The epoch's indices, (len(self),) long: the same for the same arguments."""
        raise NotImplementedError

    def repeats(self, epoch: int = 0) -> np.ndarray:
        """How often an epoch draws each sample, (n,)."""
        return np.bincount(self.indices(epoch), minlength=self.labels.shape[0])

    def label_repeats(self, epoch: int = 0) -> np.ndarray:
        """Mean draws of the images of each label in an epoch, (C,); 0 for a label without images."""
        return self.labels.T @ self.repeats(epoch) / np.maximum(self.labels.getnnz(0), 1)
