"""The contrastive comparison."""

from __future__ import annotations

from torch import Tensor

from .base import Criterion, Pairs


class Absolute(Criterion):
    """Half of the mean of d(a,+)² and of max(m - d(a,-), 0)² over the pairs (eq. 13)."""

    name = "absolute"

    def sums(self, pairs: Pairs, margin: float) -> tuple[Tensor, ...]:
        """Return the sums of both, each with its number of pairs."""
        near = (pairs.to_positive.square() * pairs.is_positive).sum()
        far = ((margin - pairs.to_negative).clamp_min(0).square() * pairs.is_negative).sum()
        return near, pairs.is_positive.sum(), far, pairs.is_negative.sum()

    def loss(self, *sums: Tensor, counts: Tensor) -> Tensor:
        near, positives, far, negatives = sums
        return 0.5 * (near / positives.clamp_min(1) + far / negatives.clamp_min(1))
