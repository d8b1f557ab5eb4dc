"""How a learner decides: the thresholds in its loss function, and the labels that they are for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.learner import Learner
from numpy.typing import ArrayLike

from fastai_crl._checks import offenders
from fastai_crl.losses import CompleteLoss, CRLLoss
from fastai_crl.task import is_single_label

from .decisions import as_array, check_thresholds


def set_thresholds(learn: Learner, thresholds: float | ArrayLike | Mapping[Any, float] | pd.Series) -> None:
    """Make any learner decide by `thresholds`; see `decide`.

    They are kept in its loss function, a copy of the one it had, whose `decodes` makes the decisions of `predict`,
    `show_results` and `get_preds(with_decoded=True)`, and travel with `export`. (`save` and `load` keep weights only.)
    They remember the labels that they are for.

    A loss of torch or timm, which makes no decisions, is completed (see `CompleteLoss`), and so is one of a
    single-label task, which decides without thresholds, and one that gets a threshold per label.

    Args:
        learn: its loss function is replaced.
        thresholds: one number, (C,), or a mapping or Series from each label of the vocab, in [0, 1]; or what
            `fit_thresholds` returned.

    Raises:
        ValueError: what `check_thresholds` raises; a multi-label loss function that decides without thresholds.
    """
    vocab = labels_of(learn.dls)
    values = check_thresholds(getattr(thresholds, "thresholds", thresholds), len(vocab) if vocab else None, vocab)
    learn.loss_func = deciding_by(values, vocab, learn.loss_func, is_single_label(learn.dls))


def labels_of(dls: Any) -> list[str] | None:
    """Return the labels that loaders have, in the order of the columns; None where they do not say."""
    vocab = getattr(dls, "vocab", None)
    return [str(v) for v in vocab] if vocab else None


def warn_of_other_labels(before: list[str] | None, now: list[str] | None, what: str) -> None:
    """Warn where the labels `now`, which `what` has, are others than those `before`; None are not compared."""
    if before and now and before != now:
        fix = f"{what} {', '.join(now)}: weights, label weights and thresholds stay those of the first."
        warnings.warn(offenders("The network was made for other labels", before, fix), stacklevel=3)


def deciding_by(values: np.ndarray, labels: list[str] | None, loss: Any, single_label: bool) -> Any:
    """Return a copy of `loss` that decides by the thresholds `values` of `labels`: see `set_thresholds`."""
    name, loss = type(loss).__name__, deepcopy(loss)  # a copy: fastai's data blocks share their default one
    if _decider(loss) is None and (single_label or not hasattr(loss, "activation")):
        loss = _completed(loss, single_label)
    decider = _decider(loss)
    if decider is None or (getattr(decider, "single_label", False) and not single_label):
        raise ValueError(
            f"{name} takes no thresholds: use a multi-label loss of fastai or of make_loss, such as "
            "BCEWithLogitsLossFlat()."
        )
    if values.ndim and not isinstance(decider, CompleteLoss):  # fastai's compares on the device of the probabilities
        loss = _completed(loss, single_label)
        decider = _decider(loss)
    # In float64: float32 could round a threshold onto a score.
    decider.thresh, decider.labels = torch.from_numpy(values) if values.ndim else float(values), labels
    return loss


def keep_thresholds(before: Any, loss: Any) -> Any:
    """Return `loss`, which takes the place of the loss `before`, with the thresholds (C,) of that one.

    A loss that `set_thresholds` made has its own. Where thresholds are lost, a warning says so.
    """
    old, new = _decider(before), _decider(loss)
    if old is None or not np.ndim(old.thresh) or hasattr(new, "labels"):
        return loss
    try:
        if (own := getattr(new, "thresh", 0.5)) != 0.5:
            raise ValueError(f"The new loss decides by its own thresh={own}.")
        labels, single_label = getattr(old, "labels", None), getattr(old, "single_label", False)
        return deciding_by(as_array(old.thresh), labels, loss, single_label)
    except ValueError as error:
        warnings.warn(f"The learner's thresholds go with its loss. {error}", stacklevel=3)
        return loss


def threshold_in_use(learn: Learner) -> float | np.ndarray:
    """Return what a learner decides by, see `decide`: one number, 0.5 where its loss has none, or (C,) thresholds.

    Raises:
        ValueError: thresholds that were set for other labels than the learner's loaders have now.
    """
    decider = _decider(learn.loss_func)
    thresh = as_array(getattr(decider, "thresh", 0.5)).copy()
    if not thresh.ndim:
        return float(thresh)
    if (before := getattr(decider, "labels", None)) and (now := labels_of(learn.dls)) and before != now:
        fix = f"The data have {', '.join(now)}. Fit or set thresholds for these."
        raise ValueError(offenders("The learner's thresholds are for other labels", before, fix))
    return thresh


def _completed(loss: Any, single_label: bool) -> Any:
    """Return a loss that decides by thresholds: `loss`, or the one inside a `CRLLoss`, completed."""
    if not isinstance(loss, CRLLoss):
        return CompleteLoss(loss, single_label)
    if loss.single_label is None:
        loss.settle(single_label)
    loss.base_loss = _completed(loss.base_loss, single_label)
    return loss


def _decider(loss: Any) -> Any:
    """Return the loss, under a `CRLLoss` too, that cuts probabilities at `thresh`; None if there is none."""
    while loss is not None and not hasattr(loss, "thresh"):
        loss = getattr(loss, "base_loss", None)
    return loss
