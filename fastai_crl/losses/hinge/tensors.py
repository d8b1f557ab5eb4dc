"""The hinge criteria at class level in tensor operations: sums over all triplets, or pairs, as weights of the scores.

Relative (arXiv:1804.10851, eqs. 9 and 10) is max(0, m + |p_a - p_+| - p_a + p_-), ranking the same without |p_a - p_+|.
While the active ones stay the same their sum is linear in the scores, Σ weight·p + m·(number of active hinges): no pair
needs a gradient, and the κ² triplets of an anchor take κ searches in its sorted hard negatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastai_crl.mining.hard_samples import HardSamples, flat, negatives
from fastai_crl.mining.profile import Profile

__all__ = ["hinge_sum"]


def hinge_sum(
    profile: Profile,
    scores: Tensor,
    memory: Tensor | None,
    k: int,
    margin: float,
    ranking: bool,
    share: Tensor | None,
) -> Tensor:
    """Sum of the hinges of all triplets, or (`ranking`) of all pairs of an anchor and a hard negative.

    Takes the (n, M) scores of the labels to mine, the (M, R) scores in the memory, which are positives of the anchors
    (not for ranking), and (M,) what a triplet of each label counts, None for 1.
    """
    with torch.no_grad():
        places, weights, active = (_ranking if ranking else _relative)(profile, scores, memory, k, margin, share)
    entries = flat((scores, memory))
    return entries.dot(torch.zeros_like(entries).scatter_add_(0, places, weights)) + margin * active


def _relative(
    profile: Profile, scores: Tensor, memory: Tensor | None, k: int, margin: float, share: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Places of scores in the flattened matrices, their weights, and the number of active hinges."""
    hard = HardSamples.by_score(profile, scores, k, memory)
    own, row = scores.take(hard.anchor)[:, None], hard.row
    near, far = flat((scores, memory)).take(hard.near), scores.take(hard.far) + hard.far_bar
    gap, to_neg = own - near.index_select(0, row), own - far.index_select(0, row)
    # Of positive i the hinges with the negatives nearer than m + d(a,+i) are active, which are a prefix of them.
    active = torch.searchsorted(to_neg, gap.abs().add_(margin).add_(hard.near_bar))
    width = far.shape[1] + 1
    by_active = scores.new_zeros(far.shape[0] * width)
    by_active.scatter_add_(0, (active + row[:, None] * width).flatten(), torch.ones_like(gap).flatten())
    up_to = by_active.view(-1, width).cumsum(1)
    pushed = up_to[:, -1:] - up_to[:, :-1]  # negative j: how many pairs of its label have active > j
    active = active.to(scores.dtype)
    if share is not None:
        pushed, active = pushed * share[:, None], active * share.index_select(0, row)[:, None]
    pull = active * gap.sign()
    pulled = torch.zeros_like(near).index_add_(0, row, pull, alpha=-1)
    weights = ((pull - active).sum(1), pulled.flatten(), pushed.flatten())
    return torch.cat((hard.anchor, hard.near.flatten(), hard.far.flatten())), torch.cat(weights), active.sum()


def _ranking(
    profile: Profile, scores: Tensor, memory: None, k: int, margin: float, share: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for ranking."""
    m = scores.shape[1]
    place, row = profile.anchors()
    place, real, row = place.clamp_max(scores.numel() - 1), row < m, row.clamp_max(m - 1)
    places, bar = negatives(profile, scores, k)
    far = scores.take(places) + bar
    active = (scores.take(place)[:, None] - far.index_select(0, row) < margin) & real[:, None]
    active = active.to(scores.dtype) if share is None else active * share.index_select(0, row)[:, None]
    pushed = torch.zeros_like(far).index_add_(0, row, active)
    return torch.cat((place, places.flatten())), torch.cat((-active.sum(1), pushed.flatten())), active.sum()
