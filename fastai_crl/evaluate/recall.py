"""Thresholds that promise a recall: distribution-free, by exact binomial tails."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from fastai_crl._checks import offenders

from .shift import midway


@dataclass(frozen=True)
class RecallAtLeast:
    """For each label the largest threshold whose recall on new images is at least `recall`, for `fit_thresholds`.

    With probability `confidence` over the validation samples, if new images are drawn as these were, whatever the
    network: of n positives, at most k - 1 may be missed, k the largest with P(Binomial(n, 1 - recall) >= k) >=
    confidence, and the threshold is just below the k-th lowest score. This is the fixed-sequence test of Learn then
    Test (Angelopoulos et al., arXiv:2110.01052, section 2) from the lowest threshold up, with exact binomial p-values;
    equally the upper bound of Clopper and Pearson on the share that is missed. The confidence is that of each label by
    itself; for all C together give 1 - (1 - confidence)/C.

    Args:
        recall: in (0, 1).
        confidence: in (0, 1).

    Attributes:
        needed: positives of a label from which the recall can be promised.

    Example:
        >>> RecallAtLeast(0.9, confidence=0.95).needed
        29
        >>> from fastai_crl.evaluate import fit_thresholds
        >>> fitted = fit_thresholds([[i / 100] for i in range(100)], [[1]] * 100, RecallAtLeast(0.9, confidence=0.95))
        >>> fitted.thresholds.tolist(), fitted.report.promised.tolist()  # no more than 4 of 100 may be missed
        ([0.035], [True])
    """

    recall: float
    confidence: float = 0.9

    def __post_init__(self) -> None:
        for name in ("recall", "confidence"):
            if not isinstance(value := getattr(self, name), numbers.Real) or not 0 < value < 1:
                raise ValueError(f"{name}={value!r}: give a number above 0 and below 1.")

    @property
    def needed(self) -> int:
        return math.ceil(math.log1p(-self.confidence) / math.log(self.recall))

    def too_few(self, labels: Sequence[str]) -> str:
        """Return what to say of labels whose recall is not promised."""
        what = f"Labels whose recall of {self.recall:g} cannot be promised with confidence {self.confidence:g}"
        return offenders(what, labels, f"They need {self.needed} positives of scores above 0.")

    def fit(self, probs: np.ndarray, targets: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return thresholds (C,) of the samples `seen`, (n, C) bool, and for which of them the recall is promised.

        Too few positives: just below the lowest of them. None, or where the lowest is 0, which no threshold is below:
        0.5, or 0.
        """
        found = [self._fit(p[m], y[m]) for p, y, m in zip(probs.T, targets.T, seen.T, strict=True)]
        thresholds, promised = zip(*found, strict=True)
        return np.array(thresholds), np.array(promised)

    def _fit(self, p: np.ndarray, y: np.ndarray) -> tuple[float, bool]:
        scores = np.sort(p[y])
        if not len(scores):
            return 0.5, False
        enough = binom.sf(np.arange(len(scores)), len(scores), 1 - self.recall) >= self.confidence
        score = scores[max(np.count_nonzero(enough), 1) - 1]
        return float(midway(p[p < score].max(initial=0), score)), bool(enough[0] and score > 0)
