"""All labels equally often, however rare they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from .base import EpochSampler, register_sampler


class ClassAwareSampler(EpochSampler):
    """Draw a label, then one of its images: all labels equally often, and the images of a label equally often.

    Source: Shen, Lin & Huang (ECCV 2016, arXiv:1512.05830), class-aware sampling. Labels come in turn, in a new order
    each round, and so do the images of each label. Images without a label are a class of their own. An image of several
    labels is drawn for each of them, so the other labels of rare images come more often than the rare ones.

    An epoch has as many indices as there are images. Of n images and K classes, an image of a class of m images comes
    n/(K·m) times in it: of HPA's rarest label 101 times, of its commonest in one epoch of twelve. A batch of fewer
    than 2·K images does not hold two of every label, and two of any label are not promised.

    Args:
        targets: (n, C) of 0 and 1, of any dtype, NumPy, PyTorch or scipy.sparse; or (n,) class indices.
        seed: of all epochs, at least 0.

    Raises:
        ValueError: a negative seed, targets of no known shape, outside [0, 1] or empty.

    Example:
        >>> targets = np.array([0] * 90 + [1] * 7 + [2] * 2)
        >>> np.bincount(targets[ClassAwareSampler(targets).indices()]).tolist()
        [33, 33, 33]
    """

    def __init__(self, targets: Any, seed: int = 0):
        super().__init__(targets, seed)
        unlabelled = sparse.csr_matrix(self.labels.getnnz(1) == 0).T
        columns = sparse.hstack([self.labels, unlabelled]).tocsc()
        self.members = [own for own in np.split(columns.indices, columns.indptr[1:-1]) if len(own)]

    def __len__(self) -> int:
        return self.labels.shape[0]

    def indices(self, epoch: int = 0) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        classes = _in_turn(rng, len(self.members), len(self))
        draws = np.bincount(classes, minlength=len(self.members))
        order = np.empty(len(self), np.int64)
        order[np.argsort(classes, kind="stable")] = np.concatenate(
            [own[_in_turn(rng, len(own), k)] for own, k in zip(self.members, draws, strict=True)]
        )
        return order


def _in_turn(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """Return `k` numbers below `n`, (k,): all of them in random order, then all in another, and so on."""
    return rng.permuted(np.tile(np.arange(n), (-(-k // n), 1)), axis=1).ravel()[:k]


register_sampler("class_aware", ClassAwareSampler)
