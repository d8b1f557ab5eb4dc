"""Other losses for imbalanced data, each by its name: to compare with CRL, and to put under it as L_base."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from fastai.data.core import DataLoaders
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from fastai_crl.task import single_label_if_known

from .complete import CompleteLoss, complete
from .frequency import check_counts, frequency_log_odds


def _timm(name: str, *args: Any, **options: Any) -> CompleteLoss:
    """A loss of `timm.loss`: timm is optional, and versions before 1.0.31 lack some losses."""
    try:
        import timm.loss

        make = getattr(timm.loss, name)
    except (ImportError, AttributeError) as e:
        raise ImportError(
            f'This loss needs {name} of timm.loss, in timm 1.0.31 and later: pip install -U "timm>=1.0.31".'
        ) from e
    return CompleteLoss(make(*args, **options))


# ---- multi-label: counts are (C,) positives, n samples ----
def _weighted_bce(counts: Tensor, n: int | Tensor, power: float = 0.5, max_weight: float | None = None) -> Any:
    counts = counts.clamp(1).clamp(max=n - 1)  # a label that is always there weighed 0, and would never be learned
    return BCEWithLogitsLossFlat(pos_weight=(((n - counts) / counts) ** power).clamp(max=max_weight or torch.inf))


def _focal(gamma: float = 2.0, balance: float = -1.0) -> CompleteLoss:
    return CompleteLoss(partial(sigmoid_focal_loss, alpha=balance, gamma=gamma, reduction="mean"))


def _db(counts: Tensor, n: int | Tensor, **options: Any) -> CompleteLoss:
    most = int(torch.as_tensor(n).max())
    return _timm("DistributionBalancedLoss", counts / n * most, most, **options)


def _logit_adjusted_bce(counts: Tensor, n: int | Tensor, tau: float = 1.0) -> CompleteLoss:
    return CompleteLoss(nn.BCEWithLogitsLoss(), shift=tau * frequency_log_odds(counts / n, n))


# ---- single-label: counts are (C,) samples of each class, n their sum ----
def _class_balanced(counts: Tensor, n: int, beta: float = 0.999, max_weight: float | None = None) -> Any:
    if not 0 < beta < 1:
        raise ValueError(f"beta={beta}: give a number between 0 and 1, such as 0.999.")
    weights = (1 - beta) / (1 - beta ** counts.double().clamp(1))  # single precision would lose 1 - 0.9999^1
    return CrossEntropyLossFlat(weight=(weights / weights.mean()).clamp(max=max_weight or torch.inf).float())


def _logit_adjusted_ce(counts: Tensor, n: int, tau: float = 1.0) -> CompleteLoss:
    return CompleteLoss(nn.CrossEntropyLoss(), single_label=True, shift=tau * frequency_log_odds(counts / n, n, True))


_MULTI: dict[str, Callable[..., Any]] = {
    "bce": BCEWithLogitsLossFlat,
    "weighted_bce": _weighted_bce,
    "focal": _focal,
    "asl": partial(_timm, "AsymmetricLossMultiLabel", reduction="mean"),
    "db": _db,
    "two_way": partial(_timm, "TwoWayLoss"),
    "zlpr": partial(_timm, "ZlprLoss"),
    "logit_adjusted": _logit_adjusted_bce,
}
_SINGLE: dict[str, Callable[..., Any]] = {
    "ce": CrossEntropyLossFlat,
    "class_balanced": _class_balanced,
    "focal": FocalLossFlat,
    "logit_adjusted": _logit_adjusted_ce,
}
MULTI_LABEL_LOSSES, SINGLE_LABEL_LOSSES = tuple(_MULTI), tuple(_SINGLE)


def make_loss(
    name: str,
    counts: Sequence[float] | Tensor | None = None,
    n: int | Tensor | None = None,
    single_label: bool | None = None,
    dls: DataLoaders | None = None,
    unknown: float | None = None,
    **options: Any,
) -> Any:
    """Return a loss for imbalanced data by its name, complete for fastai (`reduction`, `activation`, `decodes`).

    Each is the work of PyTorch, torchvision, fastai or timm (`pip install 'fastai_crl[rivals]'`), with the library's
    defaults unless said otherwise. Any of them may be the `loss_func` of `crl_learner`, or the base of `CRLCallback`
    and `CRLLoss`.

    Multi-label, (n, C) targets:

    - `"bce"`: binary cross entropy. (fastai)
    - `"weighted_bce"`: its positive terms weighted by (negatives / positives)^`power` of each label, at most
      `max_weight`. power=0.5, the square root, max_weight=None. (PyTorch)
    - `"focal"`: sigmoid focal loss, `gamma`=2; `balance`=-1, no weight of positives (RetinaNet: 0.25). Lin et al.,
      arXiv:1708.02002. (torchvision)
    - `"asl"`: asymmetric loss, `gamma_neg`=4, `gamma_pos`=1, `clip`=0.05. Ridnik et al., arXiv:2009.14119. (timm, there
      by default with `reduction="batchmean"`: the sum over labels)
    - `"db"`: distribution-balanced loss; map_alpha, map_beta, map_mu, neg_scale, init_bias, focal_gamma, focal_balance,
      smoothing, reduction. Wu et al., arXiv:2007.09654. (timm)
    - `"two_way"`: two-way multi-label loss, temperatures `tp`=4, `tn`=1. Kobayashi, CVPR 2023. Scores rank, they are no
      probabilities: fit thresholds. (timm)
    - `"zlpr"`: log-sum-exp pairwise ranking around 0. Su et al., arXiv:2208.02955. (timm)
    - `"logit_adjusted"`: binary cross entropy of logits + `tau`·log-odds of each label's frequency, tau=1: predictions
      are what they would be with every label at one half. After Menon et al., arXiv:2007.07314, for the sigmoid.

    Single-label, (n,) class indices:

    - `"ce"`: cross entropy. (fastai)
    - `"class_balanced"`: weights from effective numbers, `beta`=0.999, mean 1, at most `max_weight`=None. Cui et al.,
      arXiv:1901.05555. (PyTorch)
    - `"focal"`: `gamma`=2. (fastai)
    - `"logit_adjusted"`: logits + `tau`·log frequency, tau=1. Menon et al., arXiv:2007.07314.

    All average over the items, and multi-label ones, but for two_way and zlpr, over the labels too: α of CRL then
    means the same with each. Labels that never (or always) occur count as if they did (did not) once.

    Args:
        name: one of the above.
        counts: (C,) positives per label in the training set, for weighted_bce, db, class_balanced, logit_adjusted.
        n: number of training samples; in single-label tasks the sum of counts; (C,) of those of which a label is known,
            where some targets are unknown.
        single_label: the kind of task. Default: that of dls, else multi-label where the name has both.
        dls: data loaders to take counts, n and the kind of task from.
        unknown: the value of unknown targets in dls, see `read_labels`. The loss returned still takes all targets as
            known: `crl_learner(unknown=)` has it leave those out.
        **options: of the loss.

    Returns:
        A callable of (logits, targets).

    Raises:
        ValueError: a name that is unknown or of the other kind of task, counts or n that are missing or do not fit.
        TypeError: an unknown option. ImportError: timm missing or too old.

    Example:
        >>> loss = make_loss("logit_adjusted", counts=[50, 2], n=100)
        >>> [round(float(s), 2) for s in loss.shift]
        [0.0, -3.89]
        >>> "asl" in MULTI_LABEL_LOSSES, "class_balanced" in SINGLE_LABEL_LOSSES
        (True, True)
    """
    if single_label is None and dls is not None:
        told = single_label_if_known(dls)
        single_label = torch.as_tensor(dls.train_ds[0][-1]).ndim == 0 if told is None else told
    elif single_label is None:
        single_label = name not in _MULTI
    kind = "single-label" if single_label else "multi-label"
    table = _SINGLE if single_label else _MULTI
    if name not in table:
        what = "is a loss of the other kind of task" if name in _MULTI | _SINGLE else "is unknown"
        raise ValueError(f"{name!r} {what}: use one of {', '.join(map(repr, table))}, which are {kind}.")
    make = table[name]
    if "counts" in inspect.signature(make).parameters:
        options["counts"], options["n"] = check_counts(name, counts, n, single_label, dls, unknown)
    return complete(make(**options), single_label)
