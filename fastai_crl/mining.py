"""Batch-wise class profiling and hard-sample mining: sections 3.1 and 3.2 of the CRL paper (arXiv:1804.10851).

Everything is static in shape and free of host synchronisation: results are padded to a bound that follows from the
arguments alone, with masks that say what is real. In joint scope the bound is small by construction: the minority
classes hold at most ρ·n positives between them, so there are at most ρ·n anchors and ρ·n/2 classes to mine, however
many labels there are. Masks that meet arithmetic are floats of 0 and 1: a CPU multiplies much faster than it selects.
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

_BIG = 1e30  # beyond any score or distance


def membership(targets: Tensor, n_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """How each sample stands to each label, (n, C) of `dtype`: 1 has it, 0 has it not, in between is neither.

    Args:
        targets: (n, C) of any dtype, 0/1 or fractional (MixUp, label smoothing), or (n,) class indices of a
            single-label task.
        n_classes: C.
        dtype: float32 or float64.
    """
    if targets.ndim == 1:
        return (targets.unsqueeze(1) == torch.arange(n_classes, device=targets.device)).to(dtype)
    if targets.dtype.is_floating_point and targets.dtype != dtype:
        targets = (targets.floor() + targets.ceil()) / 2  # any fraction is ½: conversion could round one to 0 or 1
    return targets.to(dtype)


def split_targets(targets: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    "Who is a positive and who is a negative of each label: two (n, C) bool tensors, see `membership`."
    y = membership(targets, n_classes)
    return y == 1, y == 0


def _limit(rho: float, n: int) -> int:
    "The most positives that minority classes may hold together, ⌊ρ·n⌋ (paper, eq. 3); exact where ρ·n is whole."
    return math.floor(rho * n + 1e-6)


def _minority(h: Tensor, n: int, rho: float, scope: Scope) -> Tensor:
    "Which labels are minority, (C,) bool, from the sizes h_c of their minority sides."
    if scope == "attribute":
        return (h <= _limit(rho, n)) & (h >= 2)
    size, label = h.sort(stable=True)
    return torch.empty_like(h, dtype=torch.bool).scatter_(0, label, (size.cumsum(0) <= _limit(rho, n)) & (size >= 2))


def _sides(y: Tensor, scope: Scope) -> tuple[Tensor, Tensor, Tensor | None]:
    """The minority side of each label, from (n, C) memberships.

    Returns (C, n): 1 for the samples on it, 0 for the samples on the other side, each 0 or 1 otherwise; and (C,) bool:
    whether the minority is the label's negatives (attribute scope, else None).
    """
    y = y.T.contiguous()
    inside, closed = y.floor(), y.ceil()
    if scope == "joint":
        return inside, closed, None
    flipped = 2 * inside.sum(1) > y.shape[1]
    other = flipped[:, None]
    return torch.where(other, 1 - closed, inside), torch.where(other, 1 - inside, closed), flipped


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
    inside, _, _ = _sides(membership(targets, n_classes), scope)
    return _minority(inside.sum(1), len(targets), rho, scope)


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


def _lowest(values: Tensor, k: int) -> Tensor:
    "Indices (R, k) of the k smallest of each row (R, n), smallest first, ties by lower index: `topk` leaves ties open."
    if values.dtype == torch.float64:
        return values.sort(dim=1, stable=True).indices[:, :k]
    # One integer that orders as (value, index): the bits of a float32 order as integers once negatives are reversed.
    bits = values.view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = torch.add(torch.arange(values.shape[1], device=values.device), bits, alpha=2**32)
    return key.topk(k, dim=1, largest=False).indices


@dataclass
class Rows:
    "The labels to mine, as M rows over the batch: a static number that minority classes can never exceed."

    label: Tensor | None  # (M,) long; None: all labels, in order
    flipped: Tensor | None  # (M,) bool: the minority is the label's negatives (attribute scope)
    inside: Tensor  # (M, n) 1 for the minority side, all 0 where the label is not to be mined
    closed: Tensor  # (M, n) 0 for the other side, else 1
    count: Tensor  # (M,) long: minority samples
    against: Tensor  # (M,) long: samples of the other side
    most: int  # the most minority samples that one row can have
    total: int  # the most that all rows can have together: the number of anchors

    @classmethod
    def select(cls, y: Tensor, rho: float, scope: Scope) -> Rows:
        "Rows of (n, C) memberships."
        (n, n_classes), limit = y.shape, _limit(rho, y.shape[0])
        inside, closed, flipped = _sides(y, scope)
        h, label = inside.sum(1), None
        minority = _minority(h, n, rho, scope)
        most = max(1, limit if scope == "joint" else min(limit, n // 2))
        if scope == "joint" and 4 * limit < n_classes:  # few of them can be minority: worth the selecting
            label = minority.argsort(descending=True, stable=True)[: max(1, limit // 2)]
            h, minority, inside, closed = (t.index_select(0, label) for t in (h, minority, inside, closed))
        against = torch.rsub(closed.sum(1), n)
        used = (minority & (against > 0)).to(y.dtype)
        total = most if scope == "joint" else n_classes * most
        return cls(label, flipped, inside * used[:, None], closed, (h * used).long(), against.long(), most, total)

    def labels(self) -> Tensor:
        return torch.arange(len(self.count), device=self.count.device) if self.label is None else self.label

    def scores(self, scores: Tensor) -> Tensor:
        "Scores of being in each row's minority, (n, C) -> (M, n): those of the flipped side rise as the label's fall."
        scores = scores.T.contiguous() if self.label is None else scores.T.index_select(0, self.label)
        return scores if self.flipped is None else torch.where(self.flipped[:, None], -scores, scores)

    def triplets(self, k: int, n_classes: int) -> Tensor:
        "Triplets of each label, (C,) long."
        triplets = self.count * (self.count - 1).clamp(0, k) * self.against.clamp_max(k)
        return triplets if self.label is None else triplets.new_zeros(n_classes).scatter_(0, self.label, triplets)

    def anchors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All minority samples, row by row.

        Returns three (A,) tensors: number, place in the flattened rows, row; of padding the place is one past the end
        and the row is M.
        """
        slot = torch.arange(self.total, device=self.count.device, dtype=torch.int32)
        # The next one stands where the running count first passes its number: `nonzero` of static size.
        place = torch.searchsorted(self.inside.flatten().cumsum(0, dtype=torch.int32), slot, right=True)
        return slot, place, place // self.inside.shape[1]


def _bar(sizes: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    "(R, len(columns)): 0 for the first `sizes` of each row, -_BIG for the others."
    return (columns >= sizes[:, None]).to(dtype) * -_BIG


@dataclass
class Hard:
    """Hard samples in R lists: one per row at class level, where anchors of a label share them, else one per anchor.

    All are places in a flattened matrix, padded with any valid one: (M, n) scores, or (n, n) distances.
    """

    anchor: Tensor  # (A,) place in the rows
    row: Tensor  # (A,)
    near: Tensor  # (R, P) hard positives, hardest first; at class level with the anchor among them
    near_bar: Tensor  # (A, P) 0 for a pair of an anchor and a hard positive, below all distances otherwise
    far: Tensor  # (R, N) hard negatives, hardest first
    far_bar: Tensor  # (R, N) 0 for a hard negative, below all scores otherwise
    shared: bool  # class level

    def each(self, lists: Tensor) -> Tensor:
        "(R, ...) -> (A, ...): the list of each anchor."
        return lists.index_select(0, self.row) if self.shared else lists

    @classmethod
    def by_score(cls, rows: Rows, scores: Tensor, k: int) -> Hard:
        "Class level, from the rows' (M, n) scores (paper, eqs. 4 and 5)."
        (m, n), device, dtype = scores.shape, scores.device, scores.dtype
        slot, place, row = rows.anchors()
        place = place.clamp_max(m * n - 1)
        order = scores.take(place).argsort(stable=True)
        place = place.take(order.take(row.take(order).argsort(stable=True)))  # by row, score, sample
        # The k + 1 lowest of a row serve all its anchors: leave out the anchor itself, or the last if it is not there.
        column = torch.arange(max(1, min(k, rows.most - 1)) + 1, device=device)
        count = torch.constant_pad_nd(rows.count, (0, 1))
        first = count.cumsum(0) - count
        near = place.take((first[:m, None] + column).clamp_max(rows.total - 1))
        itself = (slot - first.take(row)).clamp(0, len(column) - 1)
        bar = _bar(count, column, dtype).index_select(0, row).scatter_(1, itself[:, None], -_BIG)
        far = _lowest(torch.add(-scores, rows.closed, alpha=_BIG), min(k, n))
        far = far + torch.arange(0, m * n, n, device=device)[:, None]
        far_bar = _bar(rows.against, torch.arange(far.shape[1], device=device), dtype)
        return cls(place, row.clamp_max(m - 1), near, bar, far, far_bar, True)

    @classmethod
    def by_distance(cls, rows: Rows, distance: Tensor, k: int) -> Hard:
        "Instance level, from (n, n) distances (paper, eqs. 6 and 7)."
        (m, n), dtype = rows.inside.shape, distance.dtype
        _, place, row = rows.anchors()
        count = torch.constant_pad_nd(rows.count - 1, (0, 1)).take(row)
        place, row = place.clamp_max(m * n - 1), row.clamp_max(m - 1)
        sample = (place % n)[:, None]
        distance = distance.index_select(0, sample[:, 0])
        others = rows.inside.index_select(0, row).scatter_(1, sample, 0)
        first = n * sample
        near = _lowest(torch.add(-distance, torch.rsub(others, 1), alpha=_BIG), max(1, min(k, rows.most - 1)))
        far = _lowest(torch.add(distance, rows.closed.index_select(0, row), alpha=_BIG), min(k, n))
        column = torch.arange(n, device=near.device)
        near_bar = _bar(count, column[: near.shape[1]], dtype)
        far_bar = _bar(rows.against, column[: far.shape[1]], dtype).index_select(0, row)
        return cls(place, row, near + first, near_bar, far + first, far_bar, False)


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
        scores = scores if scores.dtype == torch.float64 else scores.float()
        n, n_classes = scores.shape
        if n == 0:
            none = scores.new_zeros(0, dtype=torch.long)
            pairs = none.reshape(0, 1)
            return Mined(none, none, pairs, pairs > 0, pairs, pairs > 0, None, n_classes)
        rows = Rows.select(membership(targets, n_classes, scores.dtype), rho, scope)
        if features is None:
            hard = Hard.by_score(rows, rows.scores(scores), k)
        else:
            hard = Hard.by_distance(rows, pairwise_distance(plain(features)), k)
        positive_mask = hard.near_bar == 0
        return Mined(
            anchor=hard.anchor % n,
            label=rows.labels().take(hard.row),
            positive=hard.each(hard.near) % n,
            positive_mask=positive_mask,
            negative=hard.each(hard.far) % n,
            negative_mask=(hard.each(hard.far_bar) == 0) & positive_mask.any(1, keepdim=True),
            flipped=None if rows.flipped is None else rows.flipped.take(hard.row),
            n_classes=n_classes,
        )
