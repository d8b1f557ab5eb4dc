"""Thresholds for a measure of one's own: any function of targets and decisions."""

from collections.abc import Callable

import numpy as np
from scipy.special import expit

from .decisions import as_array
from .shift import log_odds, midway

Measure = Callable[[np.ndarray, np.ndarray], float]

_CUTS, _ROUNDS = 15, 2  # cuts of each label that are tried in a round


def measured(measure: Measure, targets: np.ndarray, chosen: np.ndarray) -> float:
    """Return what a measure says of decisions; raise ValueError for what is no finite number."""
    value = as_array(measure(targets, chosen))
    if value.ndim or value.dtype.kind not in "biuf" or not np.isfinite(value):
        raise ValueError(
            f"how={measure!r} gave {value.tolist()!r}: let it return one finite number, the higher the better, of "
            "targets and decisions, (n, C) bool each."
        )
    return float(value)


def fit_measure(measure: Measure, probs: np.ndarray, targets: np.ndarray, shrink: float) -> np.ndarray:
    """Return thresholds (C,) of a high measure: the best one for all labels, from which each label's own moves in turn.

    Each own threshold is drawn towards the common one, as for F1 (see `fit_thresholds`). Tried are those below a
    positive's score, and that above all, where a measure that no yes to a negative raises has its best.
    """
    common, best = 0.5, -np.inf
    for cut in _cuts(probs, targets, 50):
        if (value := measured(measure, targets, probs > cut)) > best:
            common, best = cut, value
    own = np.full(probs.shape[1], common)
    chosen = probs > own
    cuts = [_cuts(p, y, _CUTS) for p, y in zip(probs.T, targets.T, strict=True)]
    for _ in range(_ROUNDS):
        before = own.copy()
        for c, of_label in enumerate(cuts):
            for cut in of_label:
                was = chosen[:, c].copy()
                chosen[:, c] = probs[:, c] > cut
                if (value := measured(measure, targets, chosen)) > best + 1e-12:
                    own[c], best = cut, value
                else:
                    chosen[:, c] = was
        if np.array_equal(own, before):
            break
    weight = 1 / (1 + shrink / np.maximum(targets.sum(0), 1))
    return expit(weight * log_odds(own) + (1 - weight) * log_odds(common))


def _cuts(probs: np.ndarray, targets: np.ndarray, most: int) -> np.ndarray:
    """Return cuts just below the scores of positives, evenly among them, and one above all."""
    scores = np.unique(np.r_[0, probs.ravel()])
    edges = probs[targets & (probs > 0)]
    edges = np.unique(np.quantile(edges, np.linspace(0, 1, most), method="lower")) if len(edges) else edges
    return np.r_[midway(scores[np.searchsorted(scores, edges) - 1], edges), 1.0]
