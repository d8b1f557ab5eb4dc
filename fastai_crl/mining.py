"""Batch-wise class profiling and hard-sample mining: sections 3.1 and 3.2 of the CRL paper (arXiv:1804.10851).

Everything is static in shape and free of host synchronisation: results are padded to a bound that follows from the
arguments alone, with boolean masks that say what is real. In joint scope the bound is small by construction: the
minority classes hold at most ρ·n positives between them, so there are at most ρ·n anchors and ρ·n/2 classes to mine,
however many labels there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._checks import check_arguments, check_batch, plain

__all__ = ["Level", "Mined", "Scope", "mine", "minority_classes"]

Scope = Literal["joint", "attribute"]
Level = Literal["class", "instance"]


def split_targets(targets: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """Who is a positive and who is a negative of each label.

    Args:
        targets: (n, C) of any dtype, 0/1 or fractional (MixUp, label smoothing): rows at exactly 1 are positives,
            rows at exactly 0 are negatives, all others are neither. Or (n,) class indices of a single-label task.
        n_classes: C.

    Returns:
        Two (n, C) bool tensors, positives and negatives.
    """
    if targets.ndim == 2:
        return targets == 1, targets == 0
    positive = targets.unsqueeze(1) == torch.arange(n_classes, device=targets.device)
    return positive, ~positive


def _limit(rho: float, n: int) -> int:
    "The most positives that minority classes may hold together, ⌊ρ·n⌋ (paper, eq. 3); exact where ρ·n is whole."
    return math.floor(rho * n + 1e-6)


def _profile(positive: Tensor, negative: Tensor, rho: float, scope: Scope) -> tuple[Tensor, Tensor, Tensor | None]:
    "Minority labels (C,), how many minority samples each has (C,), and in attribute scope which ones are flipped (C,)."
    n, limit = positive.shape[0], _limit(rho, positive.shape[0])
    h = positive.sum(0)
    if scope == "joint":
        order = h.argsort(stable=True)
        small = torch.empty_like(order, dtype=torch.bool).scatter_(0, order, h[order].cumsum(0) <= limit)
        return small & (h >= 2), h, None
    flipped = 2 * h > n
    h = torch.where(flipped, negative.sum(0), h)
    return (h <= limit) & (h >= 2), h, flipped


def minority_classes(targets: Tensor, rho: float = 0.5, scope: Scope = "joint", n_classes: int | None = None) -> Tensor:
    """Labels that this batch rectifies (paper, section 3.1 and eq. 3).

    `scope="joint"` profiles all labels together: sorted by their number of positives h_c, ascending, ties by label
    index, those whose cumulative count stays ≤ ρ·n are minority. `scope="attribute"` takes each label as a binary
    attribute of its own, the paper's CelebA reading: its rarer side is the minority (the negatives when h_c > n/2; a
    tie goes to the positives), so every label can be one. Classes with fewer than two samples are dropped in both: a
    triplet needs an anchor and another positive.

    Args:
        targets: (n, C) in [0, 1], or (n,) class indices.
        rho: largest share of the batch, in (0, 1], that the minority may make up.
        scope: `"joint"` or `"attribute"`.
        n_classes: C; for class indices only. Default: the largest index + 1.

    Returns:
        (C,) bool.

    Example:
        >>> minority_classes(torch.tensor([[1, 0, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0]]))
        tensor([False, False,  True])
    """
    check_arguments(1, rho, scope, "class")
    if n_classes is None:
        n_classes = targets.shape[1] if targets.ndim == 2 else int(targets.max()) + 1
    return _profile(*split_targets(targets, n_classes), rho, scope)[0]


@dataclass
class Mined:
    """Hard samples of one batch, padded to static shapes: A anchors, P positives and N negatives each.

    An anchor is a (sample, label) pair. Its triplets are all pairs of one of its hard positives with one of its hard
    negatives. Padding is False in the masks; padded indices are valid but mean nothing.

    Attributes:
        anchor: (A,) long, sample index.
        label: (A,) long.
        positive, positive_mask: (A, P) long sample indices, hardest first, and bool.
        negative, negative_mask: (A, N) the same for the negatives.
        flipped: (A,) bool: the minority is the label's negative side (attribute scope only), else None.
        n_classes: C.
    """

    anchor: Tensor
    label: Tensor
    positive: Tensor
    positive_mask: Tensor
    negative: Tensor
    negative_mask: Tensor
    flipped: Tensor | None
    n_classes: int

    def per_anchor(self) -> Tensor:
        "Triplets of each anchor, (A,) long."
        return self.positive_mask.sum(1) * self.negative_mask.sum(1)

    @property
    def n_triplets(self) -> Tensor:
        "Number of triplets, a scalar long tensor (no synchronisation)."
        return self.per_anchor().sum()

    @property
    def n_anchors(self) -> Tensor:
        "Number of anchors that have a triplet, a scalar long tensor."
        return (self.per_anchor() > 0).sum()

    def counts(self) -> Tensor:
        "Triplets of each label, (C,) long."
        per_anchor = self.per_anchor()
        return per_anchor.new_zeros(self.n_classes).scatter_add_(0, self.label, per_anchor)

    def triplets(self) -> Tensor:
        "All triplets, (T, 4) long: anchor, positive, negative, label. For looking at; it synchronises with the host."
        a, i, j = (self.positive_mask[:, :, None] & self.negative_mask[:, None, :]).nonzero(as_tuple=True)
        return torch.stack([self.anchor[a], self.positive[a, i], self.negative[a, j], self.label[a]], 1)


def _hardest(values: Tensor, k: int) -> Tensor:
    "Indices (R, k) of the k largest of each row (R, n), largest first, ties by lower index: `topk` leaves ties open."
    if values.dtype == torch.float64:
        return values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    # One integer that orders as (value, -index): the bits of a float32 order as integers once negatives are reversed.
    bits = (values + 0.0).view(torch.int32)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    return (key - torch.arange(values.shape[1], device=values.device)).topk(k, dim=1).indices


@dataclass
class _Rows:
    "The labels to mine, as M rows over the batch: a static number that minority classes can never exceed."

    label: Tensor  # (M,) long
    positive: Tensor  # (M, n) bool: the minority side, all False where the label is no minority
    negative: Tensor  # (M, n) bool: the other side
    flipped: Tensor | None  # (M,) bool
    count: Tensor  # (M,) long: minority samples of each row
    most: int  # the most samples that one row can have
    total: int  # the most samples that all rows can have together: the number of anchors

    @classmethod
    def select(cls, positive: Tensor, negative: Tensor, rho: float, scope: Scope) -> _Rows:
        (n, n_classes), limit = positive.shape, _limit(rho, positive.shape[0])
        minority, h, flipped = _profile(positive, negative, rho, scope)
        if flipped is None:
            most = total = max(1, limit)
            m = min(n_classes, max(1, limit // 2))
        else:
            most = max(1, min(limit, n // 2))
            m, total = n_classes, n_classes * most
            positive, negative = torch.where(flipped, negative, positive), torch.where(flipped, positive, negative)
        label = torch.arange(n_classes, device=positive.device)
        positive, negative = (positive & minority).T, negative.T
        if m < n_classes:
            label = minority.argsort(descending=True, stable=True)[:m]
            positive, negative = positive[label], negative[label]
        count = torch.where(minority, h, 0)[label]
        return cls(label, positive, negative, None if flipped is None else flipped[label], count, most, total)

    def anchors(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All minority samples, ordered by row, then score, then sample index.

        Returns four (A,) tensors: sample index, row, whether it is one (rather than padding), rank within its row.
        """
        m, n = self.positive.shape
        slot = torch.arange(self.total, device=scores.device)
        # The s-th True of the flattened mask stands where its running count first reaches s: `nonzero` of static size.
        place = torch.searchsorted(self.positive.flatten().cumsum(0), slot + 1).clamp_max(m * n - 1)
        row, sample = place // n, place % n
        end = self.count.cumsum(0)
        real = slot < end[-1]
        order = scores[row, sample].argsort(stable=True)
        order = order[row.masked_fill(~real, m)[order].argsort(stable=True)]
        sample, row = sample[order], row[order]
        return sample, row, real, slot - (end - self.count)[row]

    def scores(self, scores: Tensor) -> Tensor:
        "Scores of being in each row's minority, (M, n): those of the flipped side rise as the label's own fall."
        scores = scores.T[self.label]
        return scores if self.flipped is None else torch.where(self.flipped[:, None], -scores, scores)


def pairwise_distance(features: Tensor) -> Tensor:
    """Euclidean distances between all rows, (n, d) -> (n, n), in float32 or float64 (paper, eq. 11).

    One matrix product. ‖x‖² + ‖y‖² - 2·x·y cancels where rows are close, so it is done in double precision (where the
    device has it): equal distances stay equal and duplicates are at zero. The gradient at zero distance is zero.
    """
    out = torch.float64 if features.dtype == torch.float64 else torch.float32
    features = features.to(out if features.device.type == "mps" else torch.float64)
    square = features.square().sum(1)
    total = square[:, None] + square
    squared = total - 2 * features @ features.T
    apart = squared > 4 * torch.finfo(squared.dtype).eps * total.detach()
    return (torch.where(apart, squared, 1.0).sqrt() * apart).to(out)


def select(
    scores: Tensor,
    positive: Tensor,
    negative: Tensor,
    k: int,
    rho: float,
    scope: Scope,
    distance: Tensor | None = None,
) -> Mined:
    "The work of `mine` on split targets: (n, C) scores and masks, and (n, n) distances for the instance level."
    rows = _Rows.select(positive, negative, rho, scope)
    scores = rows.scores(scores)
    anchor, row, real, rank = rows.anchors(scores)
    n_positives, n_negatives = max(1, min(k, rows.most - 1)), min(k, scores.shape[1])
    if distance is None:
        # A row's anchors stand in the order of their score, so the j-th other is entry j, or j + 1 past the anchor.
        first = torch.arange(anchor.shape[0], device=scores.device) - rank
        j = torch.arange(n_positives, device=scores.device)
        j = first[:, None] + j + (j >= rank[:, None])
        positives = anchor[j.clamp_max(anchor.shape[0] - 1)]
        negatives = _hardest(scores.masked_fill(~rows.negative, torch.finfo(scores.dtype).min), n_negatives)[row]
    else:
        distance = distance[anchor]
        others = rows.positive[row].scatter(1, anchor[:, None], False)
        positives = _hardest(distance.masked_fill(~others, -1), n_positives)
        negatives = _hardest((-distance).masked_fill(~rows.negative[row], -math.inf), n_negatives)
    against = rows.negative.sum(1)[row]
    slot = torch.arange(max(n_positives, n_negatives), device=scores.device)
    return Mined(
        anchor=anchor,
        label=rows.label[row],
        positive=positives,
        positive_mask=(real & (against > 0))[:, None] & (slot[:n_positives] < (rows.count[row] - 1)[:, None]),
        negative=negatives,
        negative_mask=real[:, None] & (slot[:n_negatives] < against[:, None]),
        flipped=None if rows.flipped is None else rows.flipped[row],
        n_classes=positive.shape[1],
    )


def mine(
    scores: Tensor,
    targets: Tensor,
    k: int = 25,
    rho: float = 0.5,
    scope: Scope = "joint",
    level: Level = "class",
    features: Tensor | None = None,
) -> Mined:
    """Hard positives and negatives of every minority sample in the batch (paper, eqs. 4 to 7).

    Class level: hard positives of an anchor are the κ lowest scores of its label among the label's other samples, hard
    negatives the κ highest scores among samples without the label. Instance level: the κ largest feature distances to
    the anchor within the class, the κ smallest outside it. Ties go to the lower sample index. For a flipped label
    (attribute scope, the minority is those without it) the score is 1 - p. Nothing here is differentiable.

    Args:
        scores: (n, C) float; any increasing function of the probability mines the same samples.
        targets: (n, C) in [0, 1], or (n,) class indices.
        k: κ, hard positives and hard negatives per anchor, ≥ 1.
        rho: see `minority_classes`.
        scope: `"joint"` or `"attribute"`.
        level: `"class"` or `"instance"`.
        features: (n, d) embeddings, needed at instance level.

    Returns:
        `Mined`, of ⌊ρ·n⌋ anchors in joint scope and C·⌊min(ρ, ½)·n⌋ in attribute scope, padding included.

    Raises:
        ValueError: shapes that do not match, scores or features that are not finite, targets out of range, k < 1,
            rho outside (0, 1], unknown scope or level, features missing at instance level.
    """
    check_arguments(k, rho, scope, level)
    if level == "class":
        features = None
    elif features is None:
        raise ValueError('level="instance" compares embeddings: pass features of shape (n, d).')
    scores, targets = plain(scores), plain(targets)
    check_batch(scores, targets, features)
    with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
        scores = scores.detach() if scores.dtype == torch.float64 else scores.detach().float()
        distance = None if features is None else pairwise_distance(plain(features.detach()))
        if scores.shape[0] == 0:
            none = scores.new_zeros(0, dtype=torch.long)
            pairs = none.reshape(0, 1)
            return Mined(none, none, pairs, pairs > 0, pairs, pairs > 0, None, scores.shape[1])
        return select(scores, *split_targets(targets, scores.shape[1]), k, rho, scope, distance)
