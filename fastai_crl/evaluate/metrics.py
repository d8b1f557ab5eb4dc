"""Metrics of imbalanced tasks: as functions of predictions, as fastai metrics, and as a table.

The functions take probabilities (n, C) and targets, (n, C) of 0 and 1 (multi-label), or (n,) or (n, 1) class indices
(single-label: the decision is the likeliest class), as arrays or tensors. Targets of ½ are unknown: such entries are
left out, and a label of which nothing is known is NaN, and left out of every mean. Of a probability that is NaN
or infinite every one of them makes NaN. Where a label leaves a value undefined:

- F1, precision, recall: 0 for a label that neither occurs nor is predicted (scikit-learn's `zero_division=0`), and it
  counts in the mean;
- average precision: a label without a positive is left out of the mean, and NaN in the table;
- AUROC, balanced accuracy: a label without a positive or without a negative, likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import numpy as np
import pandas as pd
from fastai.learner import Learner
from fastai.metrics import AccumMetric
from fastai.torch_core import to_float
from numpy.typing import ArrayLike

from fastai_crl._checks import whole_number
from fastai_crl._fastai import activation_of
from fastai_crl.task import is_single_label
from fastai_crl.unknown import hardened

from .by_label import (
    balanced_by_label,
    calibration_by_label,
    f1_by_label,
    ranking_by_label,
    ratio,
    recall_by_label,
)
from .decider import threshold_in_use
from .decisions import as_array, as_probabilities, as_targets, check_thresholds, decisions, likeliest


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else np.nan


# ---- functions ----
def _nan_of_nan(metric: Callable[..., float]) -> Callable[..., float]:
    """Return `metric`, NaN where a prediction is not finite: a network that diverged has no score."""

    @wraps(metric)
    def checked(pred: ArrayLike, targ: ArrayLike, *args: Any, **kwargs: Any) -> float:
        pred = as_array(pred)
        if not len(pred):
            raise ValueError("pred holds no sample: there is nothing to measure.")
        return metric(pred, targ, *args, **kwargs) if np.isfinite(pred).all() else np.nan

    return checked


@_nan_of_nan
def macro_f1(pred: ArrayLike, targ: ArrayLike, thresh: float | ArrayLike = 0.5) -> float:
    """Macro-averaged F1 of probabilities (n, C) cut at `thresh`, a number or (C,), against targets; 0 to 1.

    The average is over all labels; one that neither occurs nor is predicted counts as 0 (scikit-learn's
    `zero_division=0`).
    """
    (targets, known, _), chosen = decisions(pred, targ, thresh)
    return _mean(np.where(known.any(0), f1_by_label(targets, chosen), np.nan))


@_nan_of_nan
def micro_f1(pred: ArrayLike, targ: ArrayLike, thresh: float | ArrayLike = 0.5) -> float:
    """F1 of all decisions of all labels counted together, as `macro_f1`; 0 to 1. With class indices: the accuracy."""
    (targets, known, _), chosen = decisions(pred, targ, thresh)
    return float(ratio(2 * (targets & chosen).sum(), targets.sum() + chosen.sum())) if known.any() else np.nan


@_nan_of_nan
def class_balanced_accuracy(pred: ArrayLike, targ: ArrayLike, thresh: float | ArrayLike = 0.5) -> float:
    """The CRL paper's measure (arXiv:1804.10851, section 4); 0 to 1, NaN where no label has both sides.

    Multi-label: the mean over labels of (true positive rate + true negative rate)/2, without the labels that have no
    positive or no negative. Single-label: balanced accuracy, the mean over classes that occur of their recall.
    """
    (targets, known, single_label), chosen = decisions(pred, targ, thresh)
    return _mean(recall_by_label(targets, chosen) if single_label else balanced_by_label(targets, chosen, known))


@_nan_of_nan
def mean_ap(pred: ArrayLike, targ: ArrayLike, labels: ArrayLike | None = None) -> float:
    """Mean average precision: over the labels that have a positive, for the others have none; 0 to 1, NaN without any.

    Args:
        pred: (n, C) scores.
        targ: (n, C) of 0 and 1, or (n,) class indices.
        labels: indices, or (C,) bool, of the labels to average over; default all.
    """
    pred = as_array(pred)
    targets, known, _ = as_targets(targ, pred.shape)
    picked = slice(None) if labels is None else _check_labels(as_array(labels), pred.shape[1])
    return _mean(ranking_by_label(pred[:, picked], targets[:, picked], known[:, picked])[0])


def _check_labels(labels: np.ndarray, n_classes: int) -> np.ndarray:
    fits = labels.shape == (n_classes,) if labels.dtype == bool else labels.dtype.kind in "iu" and labels.ndim == 1
    picked = np.flatnonzero(labels) if labels.dtype == bool else labels
    if not fits or not len(picked) or not np.isin(picked, np.arange(n_classes)).all():
        raise ValueError(
            f"labels={labels.tolist()} picks no label, or one that is not there: give indices, 0 to {n_classes - 1}, "
            f"or {n_classes} bools."
        )
    return labels


@_nan_of_nan
def mean_auroc(pred: ArrayLike, targ: ArrayLike) -> float:
    """Mean area under the ROC curve over the labels that have a positive and a negative; 0 to 1, NaN without any."""
    pred = as_array(pred)
    return _mean(ranking_by_label(pred, *as_targets(targ, pred.shape)[:2])[1])


@_nan_of_nan
def calibration_error(pred: ArrayLike, targ: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error (Guo et al., arXiv:1706.04599), `bins` equal bins; 0 (calibrated) to 1.

    Multi-label: that of each label's probability, mean over all labels. Single-label: that of the likeliest class.
    """
    bins = whole_number("bins", bins, 1, "give a whole number of bins, at least 1")
    pred = as_probabilities(pred, "pred")
    targets, known, single_label = as_targets(targ, pred.shape)
    if single_label:
        pred, targets = pred.max(1, keepdims=True), (targets & likeliest(pred)).any(1, keepdims=True)
    return _mean(calibration_by_label(pred, targets, bins, known[:, : pred.shape[1]]))


def frequency_groups(counts: ArrayLike, cuts: tuple[float, float] = (20, 100)) -> np.ndarray:
    """Return the group of each label, (C,) of str, by its positives in the training set.

    Args:
        counts: (C,) positives in the training set.
        cuts: "tail" has fewer than the first, "head" more than the second, "medium" the rest. The default is that of
            ImageNet-LT (Liu et al., arXiv:1904.05160) and of the multi-label VOC-MLT and COCO-MLT (arXiv:2007.09654).

    Raises:
        ValueError: cuts that descend, counts that are None, NaN or below 0.

    Example:
        >>> frequency_groups([500, 100, 20, 19]).tolist()
        ['head', 'medium', 'medium', 'tail']
    """
    if counts is None:
        raise ValueError(
            "counts=None: give (C,) positives in the training set. Of a data set that does not tell its labels without "
            "opening its images, `label_counts` is None: count them yourself."
        )
    counts = as_array(counts)
    if not np.all(counts >= 0):
        raise ValueError(f"counts={counts.tolist()}: give numbers of positives, 0 or more.")
    if not cuts[0] <= cuts[1]:
        raise ValueError(f"cuts={cuts}: give the count where tail ends and the one where head begins, in that order.")
    return np.where(counts > cuts[1], "head", np.where(counts < cuts[0], "tail", "medium"))


# ---- fastai metrics ----
class _ProbabilityMetric(AccumMetric):
    """A function of (probabilities, targets) over an epoch: the probabilities are those of the learner's own loss.

    Args:
        func: of (probs, targets), and `options`.
        name: of the column.
        **options: of `func`. A `thresh` of None follows the learner: what its loss decides by.
    """

    def __init__(self, func: Callable[..., float], name: str, **options: Any):
        super().__init__(func, flatten=False, name=name)
        self.kwargs = options  # not passed on above: fastai's own `thresh` takes one number, and cuts at >=
        self.follows = options.get("thresh", 0.5) is None
        if self.follows:
            self.kwargs["thresh"] = 0.5  # until a learner says otherwise
        elif "thresh" in options:
            check_thresholds(options["thresh"])

    def accumulate(self, learn: Learner) -> None:
        if self.follows:
            self.kwargs["thresh"] = threshold_in_use(learn)
        activation = activation_of(learn.loss_func, is_single_label(learn.y, learn.pred.shape[-1]))
        self.accum_values(activation(to_float(learn.pred)), hardened(learn.y), learn)


def MacroF1(thresh: float | ArrayLike | None = None) -> AccumMetric:
    """`macro_f1` as a fastai metric, column `macro_f1`.

    Args:
        thresh: a probability above it, one or (C,), is a yes. None: what the learner's loss decides by, so 0.5 until
            thresholds are set or fitted. Single-label tasks have none.
    """
    return _ProbabilityMetric(macro_f1, "macro_f1", thresh=thresh)


def MicroF1(thresh: float | ArrayLike | None = None, name: str = "micro_f1") -> AccumMetric:
    """`micro_f1` as a fastai metric; `thresh` as for `MacroF1`. Column `name`."""
    return _ProbabilityMetric(micro_f1, name, thresh=thresh)


def ClassBalancedAccuracy(thresh: float | ArrayLike | None = None) -> AccumMetric:
    """`class_balanced_accuracy` as a fastai metric; `thresh` as for `MacroF1`. Column `balanced_accuracy`."""
    return _ProbabilityMetric(class_balanced_accuracy, "balanced_accuracy", thresh=thresh)


def MeanAP(labels: ArrayLike | None = None, name: str = "mean_ap") -> AccumMetric:
    """`mean_ap` over all or some labels as a fastai metric. Column `name`."""
    return _ProbabilityMetric(mean_ap, name, labels=labels)


def MeanAPByGroup(counts: ArrayLike, cuts: tuple[float, float] = (20, 100)) -> list[AccumMetric]:
    """Return `MeanAP` of each of the `frequency_groups` that has a label: `map_head`, `map_medium`, `map_tail`.

    Args:
        counts: (C,) positives in the training set: `label_counts(dls.train, dls.c)`.
        cuts: see `frequency_groups`.

    Raises:
        ValueError: what `frequency_groups` raises.
    """
    groups = frequency_groups(counts, cuts)
    return [MeanAP(groups == g, f"map_{g}") for g in ("head", "medium", "tail") if (groups == g).any()]


def MeanAUROC() -> AccumMetric:
    """`mean_auroc` as a fastai metric. Column `auroc`."""
    return _ProbabilityMetric(mean_auroc, "auroc")


def CalibrationError(bins: int = 15) -> AccumMetric:
    """`calibration_error` as a fastai metric. Column `ece`."""
    return _ProbabilityMetric(calibration_error, "ece", bins=bins)


def label_report(
    probs: ArrayLike,
    targets: ArrayLike,
    names: Sequence[str] | None = None,
    thresh: float | ArrayLike = 0.5,
    counts: ArrayLike | None = None,
) -> pd.DataFrame:
    """One row per label, of the columns below.

    `support` (positives); `known` if some targets are unknown; `train`, `group` if `counts` are given; `precision`,
    `recall`, `F1`, `balanced` (accuracy) of decisions at `threshold`; `AP`, `AUROC` and `ECE` of probabilities.

    Args:
        probs: (n, C) probabilities.
        targets: (n, C) 0/1, ½ where unknown, or (n,) class indices.
        names: C names for the rows; default the column numbers.
        thresh: a probability above it, one or (C,), is a yes. With class indices the decision is the largest
            probability instead, and there is no column `threshold`.
        counts: (C,) positives in the training set.

    Returns:
        A DataFrame; AP is NaN for a label without a positive, AUROC and balanced also for one without a negative,
        all measures for one of which nothing is known.

    Raises:
        ValueError: values that are no probabilities; targets, thresholds, names or counts that do not fit.
    """
    probs = as_probabilities(probs)
    (true, known, single_label), chosen = decisions(probs, targets, thresh, names)
    n_classes = probs.shape[1]
    for name, values in {"names": names, "counts": counts}.items():
        if values is not None and len(values) != n_classes:
            raise ValueError(f"{name} has {len(values)} entries for {n_classes} labels: give one for each, in order.")
    table = {"support": true.sum(0)} | ({} if known.all() else {"known": known.sum(0)})
    if counts is not None:
        table |= {"train": as_array(counts), "group": frequency_groups(counts)}
    table |= {"precision": recall_by_label(chosen, true, 0), "recall": recall_by_label(true, chosen, 0)}
    table |= {"F1": f1_by_label(true, chosen), "balanced": balanced_by_label(true, chosen, known)}
    for name in ("precision", "recall", "F1"):
        table[name] = np.where(known.any(0), table[name], np.nan)
    if not single_label:
        table["threshold"] = np.broadcast_to(check_thresholds(thresh, n_classes, names), n_classes)
    table["AP"], table["AUROC"] = ranking_by_label(probs, true, known)
    table["ECE"] = calibration_by_label(probs, true, 15, known)
    return pd.DataFrame(table, index=pd.Index(range(n_classes) if names is None else names, name="label"))
