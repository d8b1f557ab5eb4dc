"""The three comparisons of the CRL paper (arXiv:1804.10851, section 3.3). At class level `_hinge` has a shorter way.

Each takes the distances of every anchor to its hard positives, (A, P), and to its hard negatives, (A, N) with the
nearest first, together with what tells a real pair from padding: a bool mask, or a "bar" of 0 for the real and of a
number beyond any distance for padding. It returns sums over the pairs, which add up over parts of a batch, and a second
function makes the loss of the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "absolute_loss",
    "absolute_sums",
    "distribution_loss",
    "distribution_sums",
    "relative_loss",
    "relative_sums",
]


def relative_sums(
    to_pos: Tensor, near_bar: Tensor, to_neg: Tensor, far_bar: Tensor, margin: float, share: Tensor | None = None
) -> Tensor:
    """Sum of max(0, m + d(a,+) - d(a,-)) over all P·N triplets of each anchor, in O(P·log N) (eqs. 9 and 11).

    `share`, (A,): what a triplet of each anchor counts.

    With the negatives sorted, the hinge of positive i is active for those nearer than m + d(a,+i), which are a prefix.
    The sum is then linear in the distances, each weighted by the number of active hinges it takes part in.
    """
    with torch.no_grad():
        active = torch.searchsorted(to_neg - far_bar, to_pos + near_bar + margin)
        by_active = to_pos.new_zeros(to_neg.shape[0], to_neg.shape[1] + 1)
        by_active.scatter_add_(1, active, torch.ones_like(to_pos))
        times = to_pos.shape[1] - by_active.cumsum(1)[:, :-1]  # for negative j: how many positives have active > j
    by_anchor = (active * (margin + to_pos)).sum(1) - (times * to_neg).sum(1)
    return by_anchor.sum() if share is None else by_anchor.dot(share)


def relative_loss(total: Tensor, triplets: Tensor, by_label: bool = False) -> Tensor:
    """Triplet ranking: the mean hinge over all triplets (eq. 9), or the mean over labels of each label's mean."""
    return total / (triplets > 0 if by_label else triplets).sum().clamp_min(1)


def absolute_sums(to_pos: Tensor, pos: Tensor, to_neg: Tensor, neg: Tensor, margin: float) -> tuple[Tensor, ...]:
    """Sums of d(a,+)² and of max(m - d(a,-), 0)², each with its number of pairs."""
    near = (to_pos.square() * pos).sum()
    far = ((margin - to_neg).clamp_min(0).square() * neg).sum()
    return near, pos.sum(), far, neg.sum()


def absolute_loss(near: Tensor, positives: Tensor, far: Tensor, negatives: Tensor) -> Tensor:
    """Contrastive: half of the mean of both (eq. 13)."""
    return 0.5 * (near / positives.clamp_min(1) + far / negatives.clamp_min(1))


def distribution_sums(
    to_pos: Tensor, pos: Tensor, to_neg: Tensor, neg: Tensor, low: Tensor | float, high: Tensor | float, bins: int
) -> tuple[Tensor, ...]:
    """Soft histograms (τ,) of both, nodes evenly spaced over [low, high], each with its number of pairs.

    A distance is shared linearly between its two neighbouring nodes, so its gradient passes through (eqs. 14 and 15).
    """

    def histogram(distance: Tensor, mask: Tensor) -> Tensor:
        place = (distance - low) * ((bins - 1) / (high - low))
        below = place.detach().floor().clamp(0, bins - 2)
        to_next = place - below
        node, h = below.long().flatten(), distance.new_zeros(bins)
        h = h.scatter_add(0, node, ((1 - to_next) * mask).flatten())
        return h.scatter_add(0, node + 1, (to_next * mask).flatten())

    return histogram(to_pos, pos), pos.sum(), histogram(to_neg, neg), neg.sum()


def distribution_loss(h_pos: Tensor, positives: Tensor, h_neg: Tensor, negatives: Tensor) -> Tensor:
    """Σ_t h⁺_t Σ_{k≤t} h⁻_k: how often a positive pair is at least as far apart as a negative one (eq. 16)."""
    return (h_pos / positives.clamp_min(1) * (h_neg / negatives.clamp_min(1)).cumsum(0)).sum()
