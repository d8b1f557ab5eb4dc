"""The hinge criteria at class level in tensor operations, for any device: no call waits for a GPU.

What `loops` does in loops; `mining` has the functions for the minority (eq. 3) and the hard samples (eqs. 4 and 5). The
κ² triplets of an anchor take κ searches in its sorted hard negatives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastai_crl.mining.hard_samples import HardSamples, flat, negatives
from fastai_crl.mining.profile import Profile, Scope


class HingeOptions(NamedTuple):
    """Options of `hinge_weights`.

    Attributes:
        rho: ρ, largest share of the batch that the minority makes up.
        k: κ, hard positives and negatives per anchor.
        margin: m.
        attribute: attribute scope, else joint.
        lone_positive: max(0, m - d(a,-)) over pairs, else max(0, m + d(a,+) - d(a,-)) over triplets.
        by_label: each label's sum is divided by its number of triplets.
    """

    rho: float
    k: int
    margin: float
    attribute: bool
    lone_positive: bool
    by_label: bool


def _relative(
    profile: Profile, scores: Tensor, memory: Tensor | None, k: int, margin: float, share: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 9: places of scores in the flattened (n, M) scores and (M, R) memory, weights, number of active hinges."""
    hard = HardSamples.by_score(profile, scores, k, memory)
    own, row = scores.take(hard.anchor)[:, None], hard.row
    near, far = flat((scores, memory)).take(hard.near), scores.take(hard.far).masked_fill_(~hard.is_far, -torch.inf)
    gap, to_neg = own - near.index_select(0, row), own - far.index_select(0, row)
    # Of positive i the hinges with the negatives nearer than m + d(a,+i) are active, which are a prefix of them.
    active = torch.searchsorted(to_neg, gap.abs().add_(margin).masked_fill_(~hard.is_near, -torch.inf))
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
    profile: Profile, scores: Tensor, memory: Tensor | None, k: int, margin: float, share: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for max(0, m - p_a + p_-)."""
    m = scores.shape[1]
    place, row = profile.anchors()
    place, real, row = place.clamp_max(scores.numel() - 1), row < m, row.clamp_max(m - 1)
    places, is_far = negatives(profile, scores, k)
    far = scores.take(places).masked_fill_(~is_far, -torch.inf)
    active = (scores.take(place)[:, None] - far.index_select(0, row) < margin) & real[:, None]
    active = active.to(scores.dtype) if share is None else active * share.index_select(0, row)[:, None]
    pushed = torch.zeros_like(far).index_add_(0, row, active)
    return torch.cat((place, places.flatten())), torch.cat((-active.sum(1), pushed.flatten())), active.sum()


@torch.no_grad()
def hinge_weights(
    scores: Tensor,
    y: Tensor,
    frequency: Tensor | None,
    memory: tuple[Tensor, Tensor] | None,
    options: HingeOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the hinges of a batch as weights of its scores: see `hinge_sum` for the arguments.

    Returns:
        (n·C,) weights and the constant, a scalar, both in the dtype of the scores; (C,) long triplets of each label.
    """
    (n, n_classes), k = scores.shape, options.k
    past, valid = (None, None) if memory is None else (memory[0].to(scores.dtype), memory[1])
    scope: Scope = "attribute" if options.attribute else "joint"
    profile = Profile.of(y, options.rho, scope, frequency, valid, options.lone_positive)
    counts = profile.triplets(k)
    share = counts.clamp_min(1).to(scores.dtype).reciprocal() if options.by_label else None
    past = None if past is None else profile.of_labels(past)
    own = profile.scores(scores)
    compare = _ranking if options.lone_positive else _relative
    places, weights, active = compare(profile, own, past, k, options.margin, share)
    constant, size = options.margin * active, own.numel()
    entries = weights.new_zeros(size + (0 if past is None else past.numel())).scatter_add_(0, places, weights)
    if past is not None:
        entries, of_past = entries.split((size, past.numel()))
        constant = constant + of_past.dot(past.flatten())
    weights = entries.view(n, -1)
    if profile.flipped is not None:
        weights = torch.where(profile.flipped, -weights, weights)
    if profile.label is not None:
        weights = weights.new_zeros(n, n_classes).index_copy_(1, profile.label, weights)
    return weights.flatten(), constant, profile.by_label(counts, n_classes)
