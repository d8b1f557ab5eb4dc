"""Probabilities for labels of other frequencies: one number shifts all decisions; the way back of adjusted logits.

A network's log-odds of a label are those of the evidence plus those of the label's frequency in training. Adding
s·logit(frequency) asks for another frequency: s = -1 is every label at one half, s = 0 is as trained. Single-label, it
is s·log(frequency), and s = -1 is every class as frequent as the others.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import expit, logit, softmax

from fastai_crl._checks import whole_number
from fastai_crl.losses.frequency import frequency_log_odds

from .decisions import as_array, as_probabilities

_TINY = np.finfo(float).tiny


def log_odds(p: ArrayLike) -> np.ndarray:
    """Return the log-odds of probabilities, finite for those of 0 and 1, too."""
    return logit(np.clip(p, _TINY, 1 - np.finfo(float).epsneg))


def midway(low: ArrayLike, high: ArrayLike) -> np.ndarray:
    """Return what lies midway, but below `high` even where no number lies between."""
    middle = (np.asarray(low, float) + high) / 2
    return np.where(middle < high, middle, low)


def frequency_odds(
    frequency: ArrayLike, n_classes: int, single_label: bool = False, n: int | ArrayLike | None = None
) -> np.ndarray:
    """Return the log-odds (C,) of frequencies, as losses have them; single-label, their logarithms.

    Args:
        frequency: (C,) shares of the training samples with each label.
        n_classes: C.
        single_label: the shares are those of classes.
        n: number of training samples, or (C,) of those of which a label is known: a label counts as there once, and
            missing once, at least. It may be None where no share is 0 or 1.

    Raises:
        ValueError: not one share in [0, 1] per label; shares of 0 or 1 without n; n that is no whole number above 1.
    """
    frequency = as_array(frequency)
    fits = frequency.shape == (n_classes,) and frequency.dtype.kind in "iuf"
    if not fits or not ((frequency >= 0) & (frequency <= 1)).all():
        raise ValueError(
            f"frequency={frequency.tolist()} does not fit {n_classes} labels: give one share in [0, 1] per label, "
            "positives / samples in training."
        )
    if n is None and ((frequency == 0) | (frequency == 1)).any():
        raise ValueError(
            f"frequency={frequency.tolist()}: labels of 0 never occur, those of 1 always; they count as there, or "
            "missing, in one sample. Give n=, the number of training samples."
        )
    sizes = torch.full((n_classes,), 2.0**53, dtype=torch.float64)
    if n is not None:
        rule = "give the number of training samples, at least 2, or one for each label"
        each = as_array(n).ravel()
        sizes[:] = torch.tensor([whole_number("n", v, 0 if len(each) > 1 else 2, rule) for v in each]).clamp_min(2)
    return frequency_log_odds(torch.from_numpy(frequency.astype(float)), sizes, single_label).numpy()


def shift_thresholds(
    shift: float, frequency: ArrayLike, single_label: bool = False, n: int | ArrayLike | None = None
) -> np.ndarray:
    """Return the thresholds (C,) that decide as logits + shift·logit(frequency) do at one half.

    Args:
        shift: s, one number for all labels; below 0 rare labels are predicted more often.
        frequency: (C,) shares of the training samples with each label.
        single_label: thresholds by which the class of the highest probability / threshold is that of the highest logit
            + shift·log(frequency). The highest is 1.
        n: number of training samples, needed where a share is 0 or 1: a label counts as there once, and missing once,
            at least.

    Example:
        >>> shift_thresholds(-1, [0.5, 0.1]).round(3).tolist()
        [0.5, 0.1]
    """
    odds = frequency_odds(frequency, len(as_array(frequency)), single_label, n)
    return np.exp(-shift * odds - np.max(-shift * odds)) if single_label else expit(-shift * odds)


def shifted_classes(probs: np.ndarray, odds: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Return the classes (S, n) of the highest log-probability + s·odds, for each s of `shifts` (S,)."""
    scores = np.log(probs.clip(_TINY))
    return np.stack([(scores + s * odds).argmax(1) for s in shifts])


def training_probabilities(
    probs: ArrayLike,
    frequency: ArrayLike,
    tau: float = 1.0,
    single_label: bool = False,
    n: int | ArrayLike | None = None,
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
        n: number of training samples, needed where a share is 0 or 1: a label counts as there once, and missing once,
            at least, as in the loss.

    Returns:
        Probabilities (n, C), float64.

    Example:
        >>> training_probabilities([[0.5, 0.5]], [0.5, 0.01]).round(3).tolist()
        [[0.5, 0.01]]
    """
    probs = as_probabilities(probs).astype(float)
    odds = frequency_odds(frequency, probs.shape[1], single_label, n)
    if single_label:
        return softmax(np.log(probs.clip(_TINY)) + tau * odds, axis=1)
    return expit(log_odds(probs) + tau * odds)
