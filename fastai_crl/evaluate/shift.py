"""Probabilities for labels of other frequencies: one number shifts all decisions; the way back of adjusted logits.

A network's log-odds of a label are those of the evidence plus those of the label's frequency in training. Adding
s·logit(frequency) asks for another frequency: s = -1 is every label at one half, s = 0 is as trained. Single-label, it
is s·log(frequency), and s = -1 is every class as frequent as the others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit, softmax

from .decisions import as_array, as_probabilities

_TINY = np.finfo(float).tiny


def log_odds(p: ArrayLike) -> np.ndarray:
    """Return the log-odds of probabilities, finite for those of 0 and 1, too."""
    return logit(np.clip(p, _TINY, 1 - np.finfo(float).epsneg))


def midway(low: ArrayLike, high: ArrayLike) -> np.ndarray:
    """Return what lies midway, but below `high` even where no number lies between."""
    middle = (np.asarray(low, float) + high) / 2
    return np.where(middle < high, middle, low)


def frequency_odds(frequency: ArrayLike, n_classes: int, single_label: bool = False) -> np.ndarray:
    """Return the log-odds (C,) of frequencies; single-label, their logarithms.

    A label that never, or always, occurs counts as half the rarest side.

    Raises:
        ValueError: not one share in [0, 1] per label, or none between.
    """
    frequency = as_array(frequency)
    fits = frequency.shape == (n_classes,) and frequency.dtype.kind in "iuf"
    sides = np.minimum(frequency, 1 - frequency) if fits else np.zeros(0)
    if not (sides >= 0).all() or not sides.any():
        raise ValueError(
            f"frequency={frequency.tolist()} does not fit {n_classes} labels: give one share in [0, 1] per label, "
            "positives / samples in training, not all 0 or 1."
        )
    least = sides[sides > 0].min() / 2
    frequency = frequency.clip(least, 1 - least)
    return np.log(frequency) if single_label else logit(frequency)


def shift_thresholds(shift: float, frequency: ArrayLike, single_label: bool = False) -> np.ndarray:
    """Return the thresholds (C,) that decide as logits + shift·logit(frequency) do at one half.

    Args:
        shift: s, one number for all labels; below 0 rare labels are predicted more often.
        frequency: (C,) shares of the training samples with each label.
        single_label: thresholds by which the class of the highest probability / threshold is that of the highest logit
            + shift·log(frequency). The highest is 1.

    Example:
        >>> shift_thresholds(-1, [0.5, 0.1]).round(3).tolist()
        [0.5, 0.1]
    """
    odds = frequency_odds(frequency, len(as_array(frequency)), single_label)
    return np.exp(-shift * odds - np.max(-shift * odds)) if single_label else expit(-shift * odds)


def shifted_classes(probs: np.ndarray, odds: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Return the classes (S, n) of the highest log-probability + s·odds, for each s of `shifts` (S,)."""
    scores = np.log(probs.clip(_TINY))
    return np.stack([(scores + s * odds).argmax(1) for s in shifts])


def training_probabilities(
    probs: ArrayLike, frequency: ArrayLike, tau: float = 1.0, single_label: bool = False
) -> np.ndarray:
    """Return probabilities at the frequencies of training, of a network trained with a logit-adjusted loss.

    Such a network predicts as if labels were balanced: its probabilities are right where every label comes half the
    time (single-label: equally often), and too high for rare labels elsewhere. The loss added tau·logit(frequency) to
    its logits (single-label: tau·log frequency); added here too, they are those that the loss calibrated. Any other
    loss that is proper, such as plain cross entropy, needs none of this.

    Args:
        probs: (n, C) probabilities of the network.
        frequency: (C,) shares of the training samples with each label.
        tau: that of the loss.
        single_label: softmax probabilities, which sum to 1.

    Returns:
        Probabilities (n, C), float64.

    Example:
        >>> training_probabilities([[0.5, 0.5]], [0.5, 0.01]).round(3).tolist()
        [[0.5, 0.01]]
    """
    probs = as_probabilities(probs).astype(float)
    odds = frequency_odds(frequency, probs.shape[1], single_label)
    if single_label:
        return softmax(np.log(probs.clip(_TINY)) + tau * odds, axis=1)
    return expit(log_odds(probs) + tau * odds)
