"""Values of each label, (C,), from bool targets and decisions, or scores, (n, C): those of scikit-learn.

Where a target is unknown, targets and decisions are False; `known`, (n, C) bool, says where it is not.
scikit-learn takes labels one by one, which for hundreds of them costs ten times as much.
"""

import numpy as np


def ratio(part: np.ndarray, whole: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """Return counts `part` over counts `whole`, `empty` where there is none."""
    return np.where(whole > 0, part / np.maximum(whole, 1), empty)


def f1_by_label(targ: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """F1 of (n, C) bool decisions."""
    return ratio(2 * (targ & chosen).sum(0), targ.sum(0) + chosen.sum(0))


def recall_by_label(targ: np.ndarray, chosen: np.ndarray, empty: float = np.nan) -> np.ndarray:
    """Share of the positives that (n, C) bool decisions find; `empty` for a label without one."""
    return ratio((targ & chosen).sum(0), targ.sum(0), empty)


def balanced_by_label(targ: np.ndarray, chosen: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(True positive rate + true negative rate)/2 of (n, C) bool decisions; NaN for a label without both sides."""
    return (recall_by_label(targ, chosen) + recall_by_label(known & ~targ, ~chosen)) / 2


def ranking_by_label(pred: np.ndarray, targ: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average precision and area under the ROC curve of each label; NaN for one without a positive, or without both.

    Per label one sort of the scores, in which the positives look up their places. Equal scores share one place: they
    are cut off together.
    """
    positives, sizes = targ.sum(0), known.sum(0)
    ap, auroc = np.full((2, len(sizes)), np.nan)
    for c in np.flatnonzero(positives):
        n, scores, own = sizes[c], np.sort(pred[known[:, c], c]), np.sort(pred[targ[:, c], c])
        below, own_below = np.searchsorted(scores, own), np.searchsorted(own, own)
        ap[c] = np.mean((positives[c] - own_below) / (n - below))  # precision with each positive as the lowest yes
        if positives[c] < n:
            upto, own_upto = np.searchsorted(scores, own, side="right"), np.searchsorted(own, own, side="right")
            lost = (below - own_below) + (upto - own_upto)  # twice the negatives below, those of equal score half
            auroc[c] = np.mean(lost) / (2 * (n - positives[c]))
    return ap, auroc


def calibration_by_label(confidence: np.ndarray, hit: np.ndarray, bins: int, known: np.ndarray) -> np.ndarray:
    """Σ_b n_b/n·|mean confidence - share of hits| over equal bins (Guo et al., arXiv:1706.04599), (C,), or NaN."""
    n_classes = confidence.shape[1]
    confidence = confidence.astype(float)
    which = np.searchsorted(np.arange(1, bins) / bins, confidence)  # an edge belongs to the bin below it
    gap = np.where(known, confidence - hit, 0).ravel()
    gap = np.bincount((which + bins * np.arange(n_classes)).ravel(), gap, bins * n_classes)
    return ratio(np.abs(gap).reshape(n_classes, bins).sum(1), known.sum(0), np.nan)
