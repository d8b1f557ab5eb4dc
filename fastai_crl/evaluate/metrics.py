"""Metrics of imbalanced tasks, from scikit-learn: as functions of predictions, as fastai metrics, and as a table.

The functions take probabilities (n, C) and targets, (n, C) of 0 and 1 (multi-label), or (n,) or (n, 1) class indices
(single-label: the decision is the likeliest class), as arrays or tensors. Of a probability that is NaN or infinite
every one of them makes NaN. Where a label leaves a value undefined:

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
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    multilabel_confusion_matrix,
    precision_recall_fscore_support,
    recall_score,
    roc_auc_score,
)

from fastai_crl._fastai import activation_of
from fastai_crl.task import is_single_label

from .decisions import as_array, as_probabilities, as_targets, check_thresholds, decisions, likeliest, threshold_in_use

GROUPS = ("head", "medium", "tail")


def _sklearn(score: Callable[..., Any], targ: np.ndarray, chosen: np.ndarray, **options: Any) -> Any:
    """`score` of (n, C) decisions. scikit-learn takes one column for two classes: only positives are scored."""
    if targ.shape[1] == 1:
        return score(targ[:, 0], chosen[:, 0], labels=[True], **options)
    return score(targ, chosen, **options)


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else np.nan


# ---- values of each label, (C,) ----
def f1_by_label(targ: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """F1 of (n, C) bool decisions."""
    return _sklearn(f1_score, targ, chosen, average=None, zero_division=0)


def balanced_by_label(targ: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(True positive rate + true negative rate)/2 of (n, C) bool decisions; NaN for a label without both sides."""
    matrix = _sklearn(multilabel_confusion_matrix, targ, chosen).astype(float)  # (C, true no/yes, predicted no/yes)
    with np.errstate(invalid="ignore"):
        return (matrix[:, 0, 0] / matrix[:, 0].sum(1) + matrix[:, 1, 1] / matrix[:, 1].sum(1)) / 2


def _by_label(score: Callable[..., float], pred: np.ndarray, targ: np.ndarray, defined: np.ndarray) -> np.ndarray:
    columns = zip(targ.T, pred.T, defined, strict=True)
    return np.array([score(t, p) if ok else np.nan for t, p, ok in columns])


def _ap(pred: np.ndarray, targ: np.ndarray) -> np.ndarray:
    return _by_label(average_precision_score, pred, targ, targ.any(0))


def _auroc(pred: np.ndarray, targ: np.ndarray) -> np.ndarray:
    return _by_label(roc_auc_score, pred, targ, targ.any(0) & ~targ.all(0))


def _binned_gap(confidence: np.ndarray, hit: np.ndarray, bins: int) -> float:
    """Σ_b n_b/n·|mean confidence - share of hits| over equal bins (Guo et al., arXiv:1706.04599)."""
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # bins are open on the left
    gap = np.bincount(which, confidence.astype(float) - hit, minlength=bins)
    return float(np.abs(gap).sum() / len(which))


# ---- functions ----
def _nan_of_nan(metric: Callable[..., float]) -> Callable[..., float]:
    """Return `metric`, NaN where a prediction is not finite: a network that diverged has no score."""

    @wraps(metric)
    def checked(pred: ArrayLike, targ: ArrayLike, *args: Any, **kwargs: Any) -> float:
        pred = as_array(pred)
        return metric(pred, targ, *args, **kwargs) if np.isfinite(pred).all() else np.nan

    return checked


@_nan_of_nan
def macro_f1(pred: ArrayLike, targ: ArrayLike, thresh: float | ArrayLike = 0.5) -> float:
    """Macro-averaged F1 of probabilities (n, C) cut at `thresh`, a number or (C,), against targets; 0 to 1.

    The average is over all labels; one that neither occurs nor is predicted counts as 0 (scikit-learn's
    `zero_division=0`).
    """
    return float(f1_by_label(*decisions(pred, targ, thresh)[:2]).mean())


@_nan_of_nan
def micro_f1(pred: ArrayLike, targ: ArrayLike, thresh: float | ArrayLike = 0.5) -> float:
    """F1 of all decisions of all labels counted together, as `macro_f1`; 0 to 1. With class indices: the accuracy."""
    return float(_sklearn(f1_score, *decisions(pred, targ, thresh)[:2], average="micro", zero_division=0))


@_nan_of_nan
def class_balanced_accuracy(pred: ArrayLike, targ: ArrayLike, thresh: float | ArrayLike = 0.5) -> float:
    """The CRL paper's measure (arXiv:1804.10851, section 4); 0 to 1, NaN where no label has both sides.

    Multi-label: the mean over labels of (true positive rate + true negative rate)/2, without the labels that have no
    positive or no negative. Single-label: balanced accuracy, the mean over classes that occur of their recall.
    """
    targets, chosen, single_label = decisions(pred, targ, thresh)
    if not single_label:
        return _mean(balanced_by_label(targets, chosen))
    return _mean(_sklearn(recall_score, targets, chosen, average=None, zero_division=np.nan))


@_nan_of_nan
def mean_ap(pred: ArrayLike, targ: ArrayLike, labels: ArrayLike | None = None) -> float:
    """Mean average precision: over the labels that have a positive, for the others have none; 0 to 1, NaN without any.

    Args:
        pred: (n, C) scores.
        targ: (n, C) of 0 and 1, or (n,) class indices.
        labels: indices, or (C,) bool, of the labels to average over; default all.
    """
    pred = as_array(pred)
    targets = as_targets(targ, pred.shape)[0]
    picked = slice(None) if labels is None else as_array(labels)
    return _mean(_ap(pred[:, picked], targets[:, picked]))


@_nan_of_nan
def mean_auroc(pred: ArrayLike, targ: ArrayLike) -> float:
    """Mean area under the ROC curve over the labels that have a positive and a negative; 0 to 1, NaN without any."""
    pred = as_array(pred)
    return _mean(_auroc(pred, as_targets(targ, pred.shape)[0]))


@_nan_of_nan
def calibration_error(pred: ArrayLike, targ: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error (Guo et al., arXiv:1706.04599), `bins` equal bins; 0 (calibrated) to 1.

    Multi-label: that of each label's probability, mean over all labels. Single-label: that of the likeliest class.
    """
    pred = as_probabilities(pred, "pred")
    targets, single_label = as_targets(targ, pred.shape)
    if single_label:
        return _binned_gap(pred.max(1), (targets & likeliest(pred)).any(1), bins)
    return float(np.mean([_binned_gap(p, t, bins) for p, t in zip(pred.T, targets.T, strict=True)]))


def frequency_groups(counts: ArrayLike, cuts: tuple[float, float] = (20, 100)) -> np.ndarray:
    """Return the group of each label, (C,) of str, by its positives in the training set.

    Args:
        counts: (C,) positives in the training set.
        cuts: "tail" has fewer than the first, "head" more than the second, "medium" the rest. The default is that of
            ImageNet-LT (Liu et al., arXiv:1904.05160) and of the multi-label VOC-MLT and COCO-MLT (arXiv:2007.09654).

    Raises:
        ValueError: cuts that descend, counts that are None.

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
    if not cuts[0] <= cuts[1]:
        raise ValueError(f"cuts={cuts}: give the count where tail ends and the one where head begins, in that order.")
    return np.where(counts > cuts[1], "head", np.where(counts < cuts[0], "tail", "medium"))


# ---- fastai metrics ----
class _ProbabilityMetric(AccumMetric):
    """A function of (probabilities, targets) over an epoch: the probabilities are those of the learner's own loss.

    Args:
        func: of (probs, targets), and `options`.
        name: of the column.
        single_label: the kind of task. Default: what the targets show.
        **options: of `func`. A `thresh` of None follows the learner: what its loss decides by.
    """

    def __init__(self, func: Callable[..., float], name: str, single_label: bool | None = None, **options: Any):
        super().__init__(func, flatten=False, name=name)
        self.kwargs = options  # not passed on above: fastai's own `thresh` takes one number, and cuts at >=
        self.single_label, self.follows = single_label, options.get("thresh", 0.5) is None
        if self.follows:
            self.kwargs["thresh"] = 0.5  # until a learner says otherwise
        elif "thresh" in options:
            check_thresholds(options["thresh"])

    def accumulate(self, learn: Learner) -> None:
        if self.follows:
            self.kwargs["thresh"] = threshold_in_use(learn)
        single_label = (
            is_single_label(learn.y, learn.pred.shape[-1]) if self.single_label is None else self.single_label
        )
        self.accum_values(activation_of(learn.loss_func, single_label)(to_float(learn.pred)), learn.y, learn)


def MacroF1(thresh: float | ArrayLike | None = None, single_label: bool | None = None) -> AccumMetric:
    """`macro_f1` as a fastai metric, column `macro_f1`.

    Args:
        thresh: a probability above it, one or (C,), is a yes. None: what the learner's loss decides by, so 0.5 until
            thresholds are set or fitted. Single-label tasks have none.
        single_label: the kind of task. Default: what the targets show.
    """
    return _ProbabilityMetric(macro_f1, "macro_f1", single_label, thresh=thresh)


def MicroF1(thresh: float | ArrayLike | None = None, single_label: bool | None = None) -> AccumMetric:
    """`micro_f1` as a fastai metric; arguments as for `MacroF1`. Column `micro_f1`."""
    return _ProbabilityMetric(micro_f1, "micro_f1", single_label, thresh=thresh)


def ClassBalancedAccuracy(thresh: float | ArrayLike | None = None, single_label: bool | None = None) -> AccumMetric:
    """`class_balanced_accuracy` as a fastai metric; arguments as for `MacroF1`. Column `balanced_accuracy`."""
    return _ProbabilityMetric(class_balanced_accuracy, "balanced_accuracy", single_label, thresh=thresh)


def MeanAP(labels: ArrayLike | None = None, name: str = "mean_ap", single_label: bool | None = None) -> AccumMetric:
    """`mean_ap` over all or some labels as a fastai metric. Column `name`."""
    return _ProbabilityMetric(mean_ap, name, single_label, labels=labels)


def MeanAPByGroup(
    counts: ArrayLike, cuts: tuple[float, float] = (20, 100), single_label: bool | None = None
) -> list[AccumMetric]:
    """Return `MeanAP` of each of the `frequency_groups` that has a label: `map_head`, `map_medium`, `map_tail`.

    Args:
        counts: (C,) positives in the training set: `label_counts(dls.train, dls.c)`.
        cuts: see `frequency_groups`.
        single_label: the kind of task. Default: what the targets show.

    Raises:
        ValueError: what `frequency_groups` raises.
    """
    groups = frequency_groups(counts, cuts)
    return [MeanAP(groups == g, f"map_{g}", single_label) for g in GROUPS if (groups == g).any()]


def MeanAUROC(single_label: bool | None = None) -> AccumMetric:
    """`mean_auroc` as a fastai metric. Column `auroc`."""
    return _ProbabilityMetric(mean_auroc, "auroc", single_label)


def CalibrationError(bins: int = 15, single_label: bool | None = None) -> AccumMetric:
    """`calibration_error` as a fastai metric. Column `ece`."""
    return _ProbabilityMetric(calibration_error, "ece", single_label, bins=bins)


def label_report(
    probs: ArrayLike,
    targets: ArrayLike,
    names: Sequence[str] | None = None,
    thresh: float | ArrayLike = 0.5,
    triplets: ArrayLike | None = None,
    counts: ArrayLike | None = None,
    cuts: tuple[float, float] = (20, 100),
) -> pd.DataFrame:
    """One row per label, of the columns below.

    `support` (positives); `train`, `group` if `counts` are given; `precision`, `recall`, `F1`, `balanced` (accuracy) of
    decisions at `threshold`; `AP`, `AUROC` and `ECE` of probabilities; `triplets` if given.

    Args:
        probs: (n, C) probabilities.
        targets: (n, C) 0/1, or (n,) class indices.
        names: C names for the rows; default the column numbers.
        thresh: a probability above it, one or (C,), is a yes. With class indices the decision is the largest
            probability instead, and there is no column `threshold`.
        triplets: (C,) numbers of mined triplets.
        counts: (C,) positives in the training set.
        cuts: of `frequency_groups`.

    Returns:
        A DataFrame; AP is NaN for a label without a positive, AUROC and balanced also for one without a negative.

    Raises:
        ValueError: values that are no probabilities, targets or thresholds that do not fit them.
    """
    probs = as_probabilities(probs)
    true, chosen, single_label = decisions(probs, targets, thresh)
    precision, recall, f1, support = _sklearn(
        precision_recall_fscore_support, true, chosen, average=None, zero_division=0
    )
    table = {"support": support}
    if counts is not None:
        table |= {"train": as_array(counts), "group": frequency_groups(counts, cuts)}
    table |= {"precision": precision, "recall": recall, "F1": f1, "balanced": balanced_by_label(true, chosen)}
    if not single_label:
        table["threshold"] = np.broadcast_to(check_thresholds(thresh), len(support))
    ece = [_binned_gap(p, t, 15) for p, t in zip(probs.T, true.T, strict=True)]
    table |= {"AP": _ap(probs, true), "AUROC": _auroc(probs, true), "ECE": ece}
    if triplets is not None:
        table["triplets"] = as_array(triplets)
    return pd.DataFrame(table, index=pd.Index(range(len(support)) if names is None else names, name="label"))
