"""The imbalance Ω of labels, and the mix of base loss and rectification that it weighs (arXiv:1804.10851, eq. 8)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from fastai_crl.labels import UnknownLabelsError, count, read_labels
from fastai_crl.mining.profile import membership

from .crl import Rectified


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
        n: number of items.

    Returns:
        A scalar of the dtype of counts; 0 where no label occurs, unless there is but one.
    """
    return _move(torch.cat([counts, n - counts]) if len(counts) == 1 else counts)


def _move(h: Tensor) -> Tensor:
    total = h.sum()
    return torch.where(total > 0, (h / torch.where(total > 0, total, 1) - 1 / len(h)).abs().sum() / 2, 0)


class SeenLabels:
    """Labels of all batches so far: Ω where nothing tells those of the training set."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None  # (C,) positives of each label
        self.n = 0  # items

    @torch.no_grad()
    def add(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Count a batch of (n, C) logits; return Ω of all batches, a scalar on its device, in float32 or more."""
        h = (membership(targets, logits.shape[1]) == 1).sum(0)
        self.counts, self.n = h if self.counts is None else self.counts.to(h.device) + h, self.n + len(targets)
        return omega(self.counts.to(torch.promote_types(logits.dtype, torch.float32)), self.n)


class TrainingLabels:
    """Labels that a learner trains on: Ω of its data set's, or of those seen so far where that does not tell them."""

    def __init__(self) -> None:
        self.counted: Any = ...  # the data set whose Ω follows, if it tells
        self.omega: Tensor | None = None
        self.seen = SeenLabels()

    def add(self, loader: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Count a batch of (n, C) logits of a loader, if it has to be; return Ω, a scalar in float32 or more."""
        data = getattr(loader, "dataset", None)
        if self.counted is not data:
            self.counted, self.omega = data, None
            with suppress(UnknownLabelsError):
                labels = read_labels(loader, logits.shape[1])
                if labels.nnz:
                    self.omega = omega(count(labels).double(), labels.shape[0])
        return self.seen.add(logits, targets) if self.omega is None else self.omega


def mix(base: Tensor, rectified: Rectified, alpha: float | Tensor) -> Tensor:
    """α·L_crl + (1 - α)·L_base; exactly L_base where no triplet was mined, or L_base is not finite.

    Args:
        base: L_base, a scalar.
        rectified: L_crl and its triplets per label, of `CRL.loss_and_counts`.
        alpha: α in [0, 1]; it is used in the losses' precision.

    Returns:
        The scalar loss; no step waits for a GPU.
    """
    dtype = torch.promote_types(base.dtype, rectified.loss.dtype)
    alpha = alpha.to(dtype) if isinstance(alpha, Tensor) else torch.full((), alpha, dtype=dtype, device=base.device)
    alpha = alpha.where(rectified.counts.any() & base.detach().isfinite(), 0)
    return alpha * rectified.loss + (1 - alpha) * base
