"""What a network decides: probabilities, targets and thresholds in one form, and the decision.

Everything that decides (metrics, thresholds, interpretation, pictures, submissions) does so through `decide`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fastai_crl._checks import offenders
from fastai_crl.unknown import UNKNOWN

_ROUNDING = 1e-6  # beyond 0 and 1, as a mean of probabilities may be


# ---------------------------------------------------------------- arrays


def as_array(x: ArrayLike | Tensor) -> np.ndarray:
    """Return `x` as a NumPy array: tensors of any device, precision and subclass, with or without gradient.

    Half precision, which NumPy lacks or is slow in, becomes float32, exactly.
    """
    if isinstance(x, list | tuple) and any(isinstance(part, Tensor) for part in x):
        x = np.array([as_array(part) for part in x])
    if isinstance(x, Tensor):
        x = x.detach().as_subclass(Tensor).cpu()
        x = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).numpy()
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype == np.float16 else x


def as_probabilities(probs: ArrayLike, name: str = "probs", rows: Sequence[str] | None = None) -> np.ndarray:
    """Return probabilities (n, C), finite and in [0, 1]; what rounding put beyond is brought back.

    `name` and `rows`, names of the samples, are for errors.

    Raises:
        ValueError: another shape, values that are not finite or out of range, as logits are.
    """
    probs = _as_scores(probs, name)
    if bad := np.flatnonzero(~np.isfinite(probs).all(1)).tolist():
        fix = "Give probabilities. Has the training diverged?"
        raise ValueError(
            offenders(f"{name} hold NaN or infinity in rows", [rows[i] for i in bad] if rows else bad, fix)
        )
    low, high = (float(probs.min()), float(probs.max())) if probs.size else (0.0, 1.0)
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise ValueError(
            f"{name} run from {low:.3g} to {high:.3g}: give probabilities, in [0, 1]. Of logits they are, multi-label, "
            "logits.sigmoid(); single-label, logits.softmax(1)."
        )
    return probs if low >= 0 and high <= 1 else probs.clip(0, 1)


def _as_scores(scores: ArrayLike, name: str = "pred") -> np.ndarray:
    scores = as_array(scores)
    if scores.ndim != 2 or scores.shape[1] < 1 or scores.dtype.kind not in "biuf":
        raise ValueError(f"{name} of shape {scores.shape}, {scores.dtype}: give numbers (n, C), a column per label.")
    return scores if scores.dtype.kind == "f" else scores.astype(float)


class Truth(NamedTuple):
    """Targets of predictions.

    Attributes:
        targets: (n, C) bool, the labels; False where unknown.
        known: (n, C) bool. Every measure of a label of which nothing is known is NaN.
        single_label: they came as class indices.
    """

    targets: np.ndarray
    known: np.ndarray
    single_label: bool


def as_targets(targets: ArrayLike, shape: tuple[int, ...]) -> Truth:
    """Return targets, which are known, and whether the task is single-label.

    Args:
        targets: (n, C) of 0 and 1, and ½ where unknown; (n,) or (n, 1) class indices. With C = 1 always the former.
        shape: (n, C) of the predictions.

    Raises:
        ValueError: another shape; values other than 0, ½ and 1, or other than whole numbers from 0 to C - 1.
    """
    targets, (n, n_classes) = as_array(targets), shape
    single_label = n_classes > 1 and targets.shape in ((n,), (n, 1))
    if targets.dtype.kind not in "biuf" or (targets.shape != shape and not single_label and targets.shape != (n,)):
        raise ValueError(
            f"targets of shape {targets.shape}, {targets.dtype}, do not fit predictions of shape {shape}: give (n, C) "
            "of 0 and 1, or (n,) class indices."
        )
    targets = targets.reshape(n) if single_label else targets.reshape(shape)
    wrong = ~np.isin(targets, np.arange(n_classes) if single_label else (0, UNKNOWN, 1))
    if wrong.any():
        rule = (
            f"are class indices, 0 to {n_classes - 1}"
            if single_label
            else "are 0 and 1, and 0.5 where unknown; round fractions yourself"
        )
        bad = np.unique(targets[wrong]).tolist()
        raise ValueError(
            offenders("Targets that are no labels", bad, f"Targets of predictions of shape {shape} {rule}.")
        )
    if not single_label:
        return Truth(targets == 1, targets != UNKNOWN, False)
    return Truth(np.eye(n_classes, dtype=bool)[targets.astype(int)], np.ones(shape, bool), True)


# ---------------------------------------------------------------- thresholds and decisions


def check_thresholds(
    thresholds: float | ArrayLike | Mapping[Any, float] | pd.Series,
    n_classes: int | None = None,
    names: Sequence[Any] | None = None,
) -> np.ndarray:
    """Return thresholds as float64: (), one for all labels, or (C,), one for each.

    Args:
        thresholds: a number, C numbers, or a mapping or Series of pandas from every label to its own, in any order.
        n_classes: C; where it is not given, any number of thresholds will do.
        names: of the labels, in the order of the columns. A Series without them goes by column numbers.

    Raises:
        ValueError: text, another number of thresholds than of labels, one out of [0, 1], labels missing or unknown.
    """
    if isinstance(thresholds, pd.Series):
        thresholds, names = _by_label(thresholds, names)
    if isinstance(thresholds, Mapping):
        if names is None:
            raise ValueError("thresholds by label need the names of the labels: give numbers, in the columns' order.")
        given, names = {str(k): v for k, v in thresholds.items()}, [str(name) for name in names]
        if wrong := sorted(given.keys() ^ set(names)):
            fix = "Give each label of the vocab, and no other, its threshold."
            raise ValueError(offenders("Labels without threshold, or thresholds without label", wrong, fix))
        thresholds = [given[name] for name in names]
    try:
        cuts = as_array(thresholds)
    except ValueError:  # a list of lists of different lengths
        cuts = np.array(None)
    rule = "give one number, or one per label" + (f", {n_classes}" if n_classes else "") + ", in [0, 1]"
    if cuts.dtype.kind not in "iuf":
        raise ValueError(f"thresholds={thresholds!r} are not numbers: {rule}.")
    if cuts.ndim > 1 or (cuts.ndim and n_classes not in (None, len(cuts))):
        raise ValueError(f"thresholds of shape {cuts.shape} do not fit {n_classes or 'the'} labels: {rule}.")
    if bad := [float(c) for c in cuts.ravel() if not 0 <= c <= 1]:
        raise ValueError(offenders("Thresholds out of range", bad, "They cut probabilities: give 0 to 1."))
    return cuts.astype(np.float64)


def _by_label(series: pd.Series, names: Sequence[Any] | None) -> tuple[Any, Sequence[Any]]:
    """Return thresholds by label and the labels' names; a Series that was never given an index is a plain list."""
    numbers = [str(i) for i in range(len(series))]
    names = numbers if names is None else names
    if series.index.map(str).tolist() == numbers and set(map(str, names)) != set(numbers):
        return series.to_numpy(), names
    if series.index.has_duplicates:
        fix = "Give each label one threshold."
        raise ValueError(
            offenders("Labels with several thresholds", list(series.index[series.index.duplicated()]), fix)
        )
    return series.to_dict(), names


def decide(
    probs: ArrayLike,
    thresholds: float | ArrayLike | Mapping[Any, float] = 0.5,
    at_least_one: bool = False,
    single_label: bool = False,
) -> np.ndarray:
    """Return the labels that are predicted, (n, C) bool: those of a probability above the threshold.

    Args:
        probs: (n, C) probabilities.
        thresholds: one for all labels, or (C,).
        at_least_one: a sample without any such label gets its likeliest.
        single_label: each sample gets one class, that of the highest probability / threshold: with one number for all
            the likeliest.

    Raises:
        ValueError: see `check_thresholds`.

    Example:
        >>> decide([[0.6, 0.3], [0.2, 0.1]], [0.5, 0.2]).tolist()
        [[True, True], [False, False]]
    """
    probs = _as_scores(probs, "probs")
    cuts = check_thresholds(thresholds, probs.shape[1])
    if single_label:
        return likeliest(probs / cuts.clip(np.finfo(float).tiny) if cuts.ndim else probs)
    # As a loss of torch compares: with one number in the precision of the probabilities, with several in float64.
    chosen = probs > (cuts if cuts.ndim else cuts.astype(probs.dtype))
    if at_least_one:
        alone = ~chosen.any(1)
        chosen[alone] = likeliest(probs[alone])
    return chosen


def likeliest(probs: np.ndarray) -> np.ndarray:
    """Return for each sample the class of the highest probability, (n, C) bool."""
    return np.eye(probs.shape[1], dtype=bool)[probs.argmax(1)]


def decisions(
    pred: ArrayLike, targ: ArrayLike, thresh: float | ArrayLike, names: Sequence[Any] | None = None
) -> tuple[Truth, np.ndarray]:
    """Return targets, and decisions, (n, C) bool; where the target is unknown, False: neither hit nor false."""
    pred = as_probabilities(pred, "pred")
    truth = as_targets(targ, pred.shape)
    cuts = check_thresholds(thresh, pred.shape[1], names)
    return truth, decide(pred, cuts, single_label=truth.single_label) & truth.known
