"""Images of rare labels repeated, each label by its frequency."""

from __future__ import annotations

from typing import Any

import numpy as np

from .base import EpochSampler, register_sampler


class RepeatFactorSampler(EpochSampler):
    """Repeat samples of rare labels: factor max(1, √(t/f_c)) per label c of frequency f_c, per sample the maximum.

    Source: Gupta, Dollár & Girshick, LVIS (CVPR 2019), section 6. Every sample comes floor(factor) times in each epoch,
    and once more with the probability of the fraction: systematic sampling, so that all epochs have the same length,
    the sum of the factors, rounded. A label's frequency is its share of the samples.

    Attributes:
        factors: the expected draws of each sample in any epoch, (n,).

    Args:
        targets: (n, C) of 0 and 1, of any dtype, NumPy, PyTorch or scipy.sparse; or (n,) class indices.
        t: the frequency below which labels are repeated, in (0, 1]. Default: the median frequency of the labels that
            occur, so half of them are (HPA: 0.031; its rarest images come 9.3 times). The paper has 0.001 for a
            thousand labels.
        seed: of all epochs, at least 0.

    Raises:
        ValueError: t outside (0, 1], a negative seed, targets of no known shape, outside [0, 1] or empty.

    Example:
        >>> RepeatFactorSampler([0] * 8 + [1] * 2, t=0.8).factors.tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0]
    """

    def __init__(self, targets: Any, t: float | None = None, seed: int = 0):
        super().__init__(targets, seed)
        n = self.labels.shape[0]
        f = self.labels.getnnz(0) / n
        if t is None:
            t = float(np.median(f[f > 0])) if f.any() else 1.0
        if not 0 < t <= 1:
            raise ValueError(f"t={t!r}: the frequency below which labels are repeated must be in (0, 1]; try 0.01.")
        self.t = t
        label = np.sqrt(t / np.where(f > 0, f, t))
        self.factors = np.ones(n)
        np.maximum.at(self.factors, np.repeat(np.arange(n), np.diff(self.labels.indptr)), label[self.labels.indices])
        self.length = round(float(self.factors.sum()))

    def __len__(self) -> int:
        return self.length

    def indices(self, epoch: int = 0) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        draws = np.floor(self.factors).astype(np.int64)
        more, shuffled = self.length - int(draws.sum()), rng.permutation(len(draws))
        if more > 0:
            # Equally spaced points on the line of all fractions: each is hit with its own length's probability.
            line = np.cumsum((self.factors - draws)[shuffled])
            points = (np.arange(more) + rng.random()) * (line[-1] / more)
            draws[shuffled[np.searchsorted(line, points, side="right").clip(max=len(line) - 1)]] += 1
        return rng.permutation(np.repeat(np.arange(len(draws)), draws))


register_sampler("repeat_factor", RepeatFactorSampler)
