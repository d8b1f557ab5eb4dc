"""Metrics of imbalanced, multi-label tasks, from scikit-learn."""

from __future__ import annotations

import numpy as np
import pandas as pd
from fastai.metrics import AccumMetric, ActivationType
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support

__all__ = ["MacroF1", "MeanAP", "label_report"]


def macro_f1(pred: ArrayLike, targ: ArrayLike, thresh: float = 0.5) -> float:
    """Macro-averaged F1 of scores (n, C) cut at `thresh` against 0/1 targets (n, C); 0 to 1.

    The average is over all labels; one that neither occurs nor is predicted counts as 0 (scikit-learn's
    `zero_division=0`).
    """
    return float(f1_score(np.asarray(targ) > 0.5, np.asarray(pred) > thresh, average="macro", zero_division=0))


def mean_ap(pred: ArrayLike, targ: ArrayLike) -> float:
    """Mean average precision: over the labels that have a positive, for the others have none; 0 to 1, NaN without any.

    scores (n, C), 0/1 targets (n, C).
    """
    pred, targ = np.asarray(pred), np.asarray(targ) > 0.5
    known = targ.any(0)
    return float(average_precision_score(targ[:, known], pred[:, known], average="macro")) if known.any() else np.nan


def MacroF1(thresh: float = 0.5) -> AccumMetric:
    "`macro_f1` as a fastai metric of a multi-label learner, on sigmoid probabilities. Column `macro_f1`."
    return AccumMetric(macro_f1, activation=ActivationType.Sigmoid, flatten=False, thresh=thresh, name="macro_f1")


def MeanAP() -> AccumMetric:
    "`mean_ap` as a fastai metric of a multi-label learner. Column `mean_ap`."
    return AccumMetric(mean_ap, activation=ActivationType.Sigmoid, flatten=False, name="mean_ap")


def label_report(
    probs: ArrayLike,
    targets: ArrayLike,
    names: list[str] | None = None,
    thresh: float = 0.5,
    triplets: ArrayLike | None = None,
) -> pd.DataFrame:
    """One row per label: support (positives), precision, recall, F1 at `thresh`, AP, and mined triplets if given.

    Args:
        probs: (n, C) probabilities.
        targets: (n, C) 0/1, or (n,) class indices.
        names: C names for the rows; default the column numbers.
        thresh: a probability above it is a yes. With class indices the decision is the largest probability instead.
        triplets: (C,) numbers of mined triplets.

    Returns:
        A DataFrame; AP is NaN for a label without a positive.
    """
    probs, targets = np.asarray(probs), np.asarray(targets)
    n_classes = probs.shape[1]
    if targets.ndim == 1:
        decisions = np.eye(n_classes, dtype=bool)[probs.argmax(1)]
        targets = np.eye(n_classes, dtype=bool)[targets.astype(int)]
    else:
        decisions, targets = probs > thresh, targets > 0.5
    precision, recall, f1, support = precision_recall_fscore_support(targets, decisions, average=None, zero_division=0)
    ap = [average_precision_score(t, p) if t.any() else np.nan for t, p in zip(targets.T, probs.T, strict=True)]
    table = {"support": support, "precision": precision, "recall": recall, "F1": f1, "AP": ap}
    if triplets is not None:
        table["triplets"] = np.asarray(triplets)
    return pd.DataFrame(table, index=pd.Index(names or range(n_classes), name="label"))
