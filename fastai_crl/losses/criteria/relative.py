"""Triplet ranking."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Criterion, Pairs


class Relative(Criterion):
    """Mean over all triplets of max(0, m + d(a,+) - d(a,-)) (eqs. 9 to 11)."""

    name = "relative"
    averages = ("triplet", "label")
    hinge = True

    def sums(self, pairs: Pairs, margin: float) -> tuple[Tensor, ...]:
        """Return the sum of the hinges of all P·N triplets of each anchor, in O(P·log N).

        With the negatives sorted, the hinge of positive i is active for those nearer than m + d(a,+i), which are a
        prefix. The sum is then linear in the distances, each weighted by the number of active hinges it takes part in.
        """
        to_positive, to_negative = pairs.to_positive, pairs.to_negative
        with torch.no_grad():
            nearest_first = torch.where(pairs.is_negative, to_negative, torch.inf)
            reach = torch.where(pairs.is_positive, to_positive + margin, -torch.inf)
            active = torch.searchsorted(nearest_first, reach)
            by_active = to_positive.new_zeros(to_negative.shape[0], to_negative.shape[1] + 1)
            by_active.scatter_add_(1, active, torch.ones_like(to_positive))
            # For negative j: how many positives have active > j.
            times = to_positive.shape[1] - by_active.cumsum(1)[:, :-1]
        by_anchor = (active * (margin + to_positive)).sum(1) - (times * to_negative).sum(1)
        return (by_anchor.sum() if pairs.share is None else by_anchor.dot(pairs.share),)

    def loss(self, *sums: Tensor, counts: Tensor) -> Tensor:
        return sums[0] / counts.sum().clamp_min(1)
