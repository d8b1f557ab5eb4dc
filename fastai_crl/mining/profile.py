"""Who is minority in a batch: the profile of its labels, and which of them to mine (arXiv:1804.10851, section 3.1).

Everything is static in shape and free of host synchronisation: results are padded to a bound that follows from the
arguments alone, with masks that say what is real. In joint scope the bound is small by construction: the minority
classes hold at most ρ·n positives between them, so there are at most ρ·n anchors and ρ·n/2 classes to mine (ρ·n where
a lone positive will do), however many labels there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["joint", "attribute"]
Level = Literal["class", "instance"]


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


def limit(rho: float, n: int) -> int:
    """The most positives that minority classes may hold together, ⌊ρ·n⌋ (paper, eq. 3); exact where ρ·n is whole."""
    return math.floor(rho * n + 1e-6)


def n_triplets(h: Tensor, n_far: Tensor, k: int, lone_positive: bool) -> Tensor:
    """Triplets of each label, (C,), from its anchors and their hard negatives; pairs, with `lone_positive`."""
    pairs = h * n_far
    return pairs if lone_positive else pairs * (h - 1).clamp(0, k)


def within_limit(h: Tensor, n: int, rho: float, scope: Scope, frequency: Tensor | None = None) -> Tensor:
    """Which labels are minority by the sizes h_c of their minority sides, (C,) bool, those without any included.

    `frequency`, (C,), sorts the labels in joint scope instead of h.
    """
    if scope == "attribute":
        return h <= limit(rho, n)
    if frequency is None:
        ascending, label = h.sort(stable=True)
    else:
        label = frequency.argsort(stable=True)
        ascending = h.take(label)
    few = ascending.cumsum(0) <= limit(rho, n)
    return torch.empty_like(few).scatter_(0, label, few)


def sides(y: Tensor, scope: Scope) -> tuple[Tensor, Tensor, Tensor | None]:
    """The minority side of each label, from (n, C) memberships.

    Returns two (n, C) bool, the samples on it, and those that are not on the other side; and (C,) bool: whether the
    minority is the label's negatives (attribute scope, else None).
    """
    minority_side, excluded = y == 1, y != 0
    if scope == "joint":
        return minority_side, excluded, None
    flipped = minority_side.sum(0) + excluded.sum(0) > len(y)  # more positives than negatives
    return torch.where(flipped, ~excluded, minority_side), torch.where(flipped, ~minority_side, excluded), flipped


@dataclass
class Profile:
    """The labels to mine, M of them: a static number that minority classes can never exceed."""

    label: Tensor | None  # (M,) long; None: all labels, in order
    flipped: Tensor | None  # (M,) bool: the minority is the label's negatives (attribute scope)
    minority_side: Tensor  # (n, M) bool: on the minority side of a label that is to be mined
    excluded: Tensor  # (n, M) bool: not on the other side, whose samples can be negatives
    n_minority: Tensor  # (M,) long: minority samples
    n_majority: Tensor  # (M,) long: samples of the other side
    most: int  # the most minority samples that one label can have
    total: int  # the most that all labels can have together: the number of anchors

    @classmethod
    def of(
        cls, y: Tensor, rho: float, scope: Scope, frequency: Tensor | None = None, lone_positive: bool = False
    ) -> Profile:
        """The profile of (n, C) memberships; with `lone_positive` a class needs one sample only."""
        (n, n_classes), bound = y.shape, limit(rho, y.shape[0])
        minority_side, excluded, flipped = sides(y, scope)
        h, label = minority_side.sum(0), None
        small = within_limit(h, n, rho, scope, frequency) & (h > (0 if lone_positive else 1))
        most = max(1, bound if scope == "joint" else min(bound, n // 2))
        if scope == "joint" and 4 * bound < n_classes:  # few of them can be minority: worth the selecting
            label = small.argsort(descending=True, stable=True)[: max(1, bound if lone_positive else bound // 2)]
            h, small = h.take(label), small.take(label)
            minority_side, excluded = minority_side.index_select(1, label), excluded.index_select(1, label)
        n_majority = torch.rsub(excluded.sum(0), n)
        used = small & (n_majority > 0)
        total = most if scope == "joint" else n_classes * most
        return cls(label, flipped, minority_side & used, excluded, h * used, n_majority, most, total)

    def labels(self) -> Tensor:
        """The labels to mine, (M,) long."""
        return torch.arange(len(self.n_minority), device=self.n_minority.device) if self.label is None else self.label

    def scores(self, scores: Tensor) -> Tensor:
        """Scores of being in each label's minority, (n, C) -> (n, M): a flipped one's rise as the label's fall."""
        scores = scores if self.label is None else scores.index_select(1, self.label)
        return scores if self.flipped is None else torch.where(self.flipped, -scores, scores)

    def by_label(self, values: Tensor, n_classes: int) -> Tensor:
        """(M,) of the labels to mine -> (C,) of all, 0 for the others."""
        return values if self.label is None else values.new_zeros(n_classes).scatter_(0, self.label, values)


def anchor_places(minority_side: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """All minority samples, (n, M) bool, in order of sample and label; `total` is no less than their number.

    Returns two (total,) tensors: place in the flattened matrix, and which of the M labels; of padding n·M and M.
    """
    n, m = minority_side.shape
    slot = torch.arange(total, device=minority_side.device)
    # The next one stands where the running count first passes its number: `nonzero` of static size.
    place = torch.searchsorted(minority_side.flatten().cumsum(0), slot, right=True)
    return place, (place % m).masked_fill_(place == n * m, m)
