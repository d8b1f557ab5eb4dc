"""Other losses for imbalanced data, each by its name: to compare with CRL, and to put under it as L_base."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastai.data.core import DataLoaders
from fastai.data.transforms import get_c
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from fastai_crl._checks import as_plain_tensor, check_choice
from fastai_crl.labels import label_counts

__all__ = ["MULTI_LABEL_LOSSES", "SINGLE_LABEL_LOSSES", "RivalLoss", "make_loss"]


class RivalLoss(nn.Module):
    """Any loss of (logits, targets) as a complete fastai loss: `reduction`, `activation`, `decodes`; it pickles.

    Computed in float32, whatever the autocast around it.

    Args:
        func: a module that averages over the batch. Where it has a `reduction`, that is the loss's; where it has none,
            `reduction="none"` gives each item's loss as a batch of its own.
        single_label: targets are (n,) class indices, else (n, C) in [0, 1].
        shift: (C,) added to the logits in the loss, and not in predictions.
        thresh: multi-label: a probability above it is a yes; a number or (C,).
    """

    def __init__(
        self, func: nn.Module, single_label: bool = False, shift: Tensor | None = None, thresh: float | Tensor = 0.5
    ):
        super().__init__()
        self.func, self.single_label = func, single_label
        if not single_label:
            self.thresh = thresh
        self.y_int = single_label  # what tells fastai's MixUp that targets cannot be blended
        self.by_item = False
        self.register_buffer("shift", shift)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = as_plain_tensor(logits).float(), as_plain_tensor(targets)
        targets = targets.long() if self.single_label else targets.float()
        if self.shift is not None:
            logits = logits + self.shift
        if self.by_item:
            pairs = zip(logits.split(1), targets.split(1), strict=True)
            return torch.stack([self.func(*pair) for pair in pairs])
        return self.func(logits, targets)

    @property
    def reduction(self) -> str:
        return getattr(self.func, "reduction", "none" if self.by_item else "mean")

    @reduction.setter
    def reduction(self, value: str) -> None:
        if hasattr(self.func, "reduction"):
            self.func.reduction = value
        else:
            check_choice("reduction", value, ("mean", "none"))
            self.by_item = value == "none"

    def activation(self, x: Tensor) -> Tensor:
        """Probabilities of logits: softmax for single-label, else sigmoid."""
        return x.softmax(-1) if self.single_label else x.sigmoid()

    def decodes(self, x: Tensor) -> Tensor:
        """Decisions from probabilities: the likeliest class, or the labels above `thresh`."""
        return x.argmax(-1) if self.single_label else x > self.thresh


class _SigmoidFocal(nn.Module):
    def __init__(self, gamma: float, balance: float):
        super().__init__()
        self.gamma, self.balance, self.reduction = gamma, balance, "mean"

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return sigmoid_focal_loss(logits, targets, self.balance, self.gamma, self.reduction)


def _timm(name: str) -> Any:
    """A member of `timm.loss`, which is optional and had few losses for long."""
    try:
        import timm.loss

        return getattr(timm.loss, name)
    except (ImportError, AttributeError) as e:
        raise ImportError(
            f'This loss needs {name} of timm.loss, in timm 1.0.31 and later: pip install -U "timm>=1.0.31".'
        ) from e


# ---- multi-label: counts are (C,) positives, n samples ----
def _weighted_bce(counts: Tensor, n: int, power: float = 0.5, max_weight: float | None = None) -> Any:
    counts = counts.clamp(1, n - 1)  # a label that is always there weighed 0, and would never be learned
    weights = _timm("compute_class_weights")(counts, n, "neg_pos", power=power, max_weight=max_weight)[1]
    return BCEWithLogitsLossFlat(pos_weight=weights)


def _focal(gamma: float = 2.0, balance: float = -1.0) -> RivalLoss:
    return RivalLoss(_SigmoidFocal(gamma, balance))


def _asl(reduction: str = "mean", **options: Any) -> RivalLoss:
    return RivalLoss(_timm("AsymmetricLossMultiLabel")(reduction=reduction, **options))


def _db(counts: Tensor, n: int, **options: Any) -> RivalLoss:
    return RivalLoss(_timm("DistributionBalancedLoss")(counts, n, **options))


def _two_way(**options: Any) -> RivalLoss:
    return RivalLoss(_timm("TwoWayLoss")(**options))


def _zlpr() -> RivalLoss:
    return RivalLoss(_timm("ZlprLoss")())


def _logit_adjusted_bce(counts: Tensor, n: int, tau: float = 1.0) -> RivalLoss:
    prior = counts.clamp(1, n - 1) / n
    return RivalLoss(nn.BCEWithLogitsLoss(), shift=tau * prior.logit())


# ---- single-label: counts are (C,) samples of each class, n their sum ----
def _class_balanced(counts: Tensor, n: int, beta: float = 0.999, max_weight: float | None = None) -> Any:
    weights = _timm("compute_class_weights")(counts, n, "effective_num", beta=beta, max_weight=max_weight)[1]
    return CrossEntropyLossFlat(weight=weights)


def _logit_adjusted_ce(counts: Tensor, n: int, tau: float = 1.0) -> RivalLoss:
    return RivalLoss(nn.CrossEntropyLoss(), single_label=True, shift=tau * (counts.clamp(1) / n).log())


_MULTI: dict[str, Callable[..., Any]] = {
    "bce": BCEWithLogitsLossFlat,
    "weighted_bce": _weighted_bce,
    "focal": _focal,
    "asl": _asl,
    "db": _db,
    "two_way": _two_way,
    "zlpr": _zlpr,
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
    n: int | None = None,
    single_label: bool | None = None,
    dls: DataLoaders | None = None,
    **options: Any,
) -> Any:
    """Return a loss for imbalanced data by its name, complete for fastai (`reduction`, `activation`, `decodes`).

    Each is the work of PyTorch, torchvision, fastai or timm (`pip install 'fastai_crl[rivals]'`), with the library's
    defaults unless said otherwise. Any of them may be the `loss_func` of `crl_learner`, or the base of `CRLCallback`
    and `CRLLoss`.

    Multi-label, (n, C) targets:

    - `"bce"`: binary cross entropy. (fastai)
    - `"weighted_bce"`: its positive terms weighted by (negatives / positives)^`power` of each label, at most
      `max_weight`. power=0.5, the square root, max_weight=None. (PyTorch; weights: timm)
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
      arXiv:1901.05555. (PyTorch; weights: timm)
    - `"focal"`: `gamma`=2. (fastai)
    - `"logit_adjusted"`: logits + `tau`·log frequency, tau=1. Menon et al., arXiv:2007.07314.

    All average over the items, and multi-label ones, but for two_way and zlpr, over the labels too: α of CRL then
    means the same with each. Labels that never (or always) occur count as if they did (did not) once.

    Args:
        name: one of the above.
        counts: (C,) positives per label in the training set, for weighted_bce, db, class_balanced, logit_adjusted.
        n: number of training samples; in single-label tasks the sum of counts.
        single_label: the kind of task. Default: that of dls, else multi-label where the name has both.
        dls: data loaders to take counts, n and the kind of task from.
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
    """
    if single_label is None:
        single_label = name not in _MULTI if dls is None else torch.as_tensor(dls.train_ds[0][-1]).ndim == 0
    kind = "single-label" if single_label else "multi-label"
    check_choice(f"loss of a {kind} task", name, SINGLE_LABEL_LOSSES if single_label else MULTI_LABEL_LOSSES)
    make = (_SINGLE if single_label else _MULTI)[name]
    if "counts" in inspect.signature(make).parameters:
        options["counts"], options["n"] = _check_counts(name, counts, n, single_label, dls)
    return make(**options)


def _check_counts(
    name: str, counts: Any, n: int | None, single_label: bool, dls: DataLoaders | None
) -> tuple[Tensor, int]:
    """Positives per label, (C,) float, and number of samples, given or read from the training set."""
    if counts is None and dls is not None:
        counts, n = label_counts(dls.train, get_c(dls)), len(dls.train_ds)
    if counts is None or (n is None and not single_label):
        raise ValueError(
            f"{name} needs to know how common each label is: pass counts=, (C,) positives in the training set, and n=, "
            "the number of its samples; or dls= of a data set that tells its labels without opening its images."
        )
    counts = torch.as_tensor(counts, dtype=torch.float32).flatten()
    n = int(counts.sum()) if single_label else int(n)
    if n < 2 or not len(counts) or not bool((counts >= 0).all() & (counts <= n).all()):
        raise ValueError(
            f"counts={counts.tolist()} of n={n} samples: give one count per label, from 0 to n, and n > 1."
        )
    return counts, n
