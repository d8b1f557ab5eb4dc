"""The comparison of histograms."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastai_crl._checks import whole_number

from .base import Criterion, Pairs


class Distribution(Criterion):
    """Σ_t h⁺_t Σ_{k≤t} h⁻_k of the pairs' soft histograms (eqs. 14 to 16); it has no margin.

    Args:
        bins: τ, nodes of the histograms, over the range of all distances: [-1, 1] for probabilities, else what the
            batch's scores or distances allow.

    Raises:
        ValueError: bins other than a whole number of at least 2.
    """

    name = "distribution"

    def __init__(self, bins: Any = 100):
        self.bins = whole_number("bins", bins, 2, "a histogram needs a whole number of at least 2 nodes")

    def sums(self, pairs: Pairs, margin: float) -> tuple[Tensor, ...]:
        """Return the soft histograms (τ,) of both, each with its number of pairs.

        A distance is shared linearly between its two neighbouring nodes, so its gradient passes through (eqs. 14, 15).
        """
        near = self._histogram(pairs.to_positive, pairs.is_positive, pairs)
        far = self._histogram(pairs.to_negative, pairs.is_negative, pairs)
        return near, pairs.is_positive.sum(), far, pairs.is_negative.sum()

    def _histogram(self, distance: Tensor, is_pair: Tensor, pairs: Pairs) -> Tensor:
        place = (distance - pairs.lowest) * ((self.bins - 1) / (pairs.highest - pairs.lowest))
        below = place.detach().floor().clamp(0, self.bins - 2)
        to_next = place - below
        node, histogram = below.long().flatten(), distance.new_zeros(self.bins)
        histogram = histogram.scatter_add(0, node, ((1 - to_next) * is_pair).flatten())
        return histogram.scatter_add(0, node + 1, (to_next * is_pair).flatten())

    def loss(self, *sums: Tensor, counts: Tensor) -> Tensor:
        """How often a positive pair is at least as far apart as a negative one (eq. 16)."""
        near, positives, far, negatives = sums
        return (near / positives.clamp_min(1) * (far / negatives.clamp_min(1)).cumsum(0)).sum()

    def __repr__(self) -> str:
        return f"Distribution(bins={self.bins})"
