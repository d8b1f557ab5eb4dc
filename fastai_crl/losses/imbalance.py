"""The imbalance Ω of labels, the weight α that it sets, and the mix of both losses (arXiv:1804.10851, eq. 8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from fastai.callback.schedule import SchedCos
from torch import Tensor, nn

from fastai_crl._checks import Batch, as_plain_tensor
from fastai_crl.mining.profile import membership


def imbalance(counts: Sequence[float] | Tensor) -> float:
    """Ω of the paper's α = η·Ω (eq. 8): ½·Σ|h_c/Σh - 1/C|, the share of labels to move to other classes.

    The paper has it as "the minimum percentage of samples to make the classes uniform". With Ω in percent and its
    η = 0.01, α is this fraction. Of the 28 labels of HPA 2018 it is 0.476. Of one binary label the classes are its
    positives and its negatives: Ω of `[positives, negatives]` is |½ - share of positives|.

    Args:
        counts: C numbers of positives h_c, ≥ 0, not all zero.

    Returns:
        A float in [0, 1]; 0 for uniform counts, so also for a single class.

    Raises:
        ValueError: counts that are empty, negative, not finite or all zero.

    Example:
        >>> imbalance([30, 10])
        0.25
    """
    h = torch.as_tensor(counts, dtype=torch.float64).flatten()
    if not len(h) or not bool(h.isfinite().all()) or bool((h < 0).any()) or not float(h.sum()) > 0:
        raise ValueError(f"counts={h.tolist()}: give one finite count per class, none negative, not all zero.")
    return float(_move(h))


def omega(counts: Tensor, n: int | Tensor) -> Tensor:
    """Ω of the labels of `n` items, on their device: `imbalance`, of one label that of its positives and negatives.

    Args:
        counts: (C,) positives of each label, floating point.
        n: number of items, or (C,) of those of which a label is known.

    Returns:
        A scalar of the dtype of counts; 0 where no label occurs, unless there is but one.
    """
    return _move(torch.cat([counts, n - counts]) if len(counts) == 1 else counts)


def _move(h: Tensor) -> Tensor:
    total = h.sum()
    return (h / total.clamp_min(torch.finfo(h.dtype).tiny) - 1 / len(h)).abs().sum() / 2 * (total > 0)


class SeenLabels(nn.Module):
    """Labels of all batches so far: Ω where the data set does not tell. The counts move with the module."""

    counts: Tensor | None  # (2, C) long: positives and negatives of each label

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", None, persistent=False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """Count a batch; return Ω of all batches, a scalar on its device, in float32 or more."""
        y = membership(batch.targets, batch.logits.shape[1])
        both = torch.stack([y == 1, y == 0]).sum(1)
        self.counts = both if self.counts is None else self.counts + both
        counts = self.counts.to(torch.promote_types(batch.logits.dtype, torch.float32))
        return omega(counts[0], counts.sum(0))


def mix(base: Tensor, term: Tensor, found: Tensor, alpha: float | Tensor) -> Tensor:
    """α·L_crl + (1 - α)·L_base; exactly L_base where no triplet was mined, or L_base is not finite.

    Args:
        base: L_base, a scalar.
        term: L_crl, a scalar.
        found: bool scalar: the batch has a triplet.
        alpha: α in [0, 1]; it is used in the precision of the term.

    Returns:
        The scalar loss; no step waits for a GPU.
    """
    base = as_plain_tensor(base)  # losses of fastai give a subclass
    value = base.detach()
    is_finite = value - value == 0
    weight = (found & is_finite).to(term.dtype).mul_(alpha)
    return weight * term + (1 - weight) * base


# ---------------------------------------------------------------- α over training


Schedule = Callable[[float], float] | Sequence[float]
_FACTORS = "factors of α in [0, 1]"


def check_alpha(alpha: float | str) -> float | str:
    """`alpha`, or a ValueError if it is neither `auto` nor in [0, 1]."""
    if alpha != "auto" and (isinstance(alpha, str) or not 0 <= alpha <= 1):
        raise ValueError(f'alpha={alpha!r}: the weight of the rectification term must be in [0, 1], or "auto".')
    return alpha


def ramp(pct: float, over: float = 0.25) -> float:
    """Half a cosine from 0 to 1 over the first `over` of training, then 1: hard samples mean little at the start."""
    return SchedCos(0.0, 1.0)(min(pct / over, 1.0))


def check_schedule(schedule: Schedule | None) -> Schedule | None:
    """`schedule`, or a ValueError if it is an array of other than numbers in [0, 1], or a function that gives others.

    A function is tried at 101 shares of training; one that is out of range only between them is found in training.
    """
    if callable(schedule):
        for pct in np.linspace(0, 1, 101):
            scheduled(schedule, float(pct))
    elif schedule is not None:
        try:
            factors = np.asarray(schedule, float)
        except (TypeError, ValueError):
            factors = np.full(1, np.nan)
        if factors.ndim != 1 or not len(factors) or not ((factors >= 0) & (factors <= 1)).all():
            raise ValueError(f"schedule={schedule!r}: give a function of the share of training done, or {_FACTORS}.")
    return schedule


def scheduled(schedule: Schedule | None, pct: float) -> float:
    """Return the factor of α once `pct` of training is done, 0 to 1, of a function or an array; None is `ramp`.

    Raises:
        ValueError: another factor; beyond 0 and 1 by rounding it is 0 or 1.
    """
    if schedule is None:
        return ramp(pct)
    if not callable(schedule):
        return float(np.interp(pct, np.linspace(0, 1, len(schedule)), schedule))
    share = schedule(pct)
    try:
        number = float(share)
    except (TypeError, ValueError):
        number = np.nan
    if not -1e-6 <= number <= 1 + 1e-6:
        raise ValueError(f"schedule gives {share!r} when {pct:.0%} of training is done: let it give {_FACTORS}.")
    return min(max(number, 0.0), 1.0)
