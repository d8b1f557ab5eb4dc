"""Active hinges in joint scope, where all anchors of a batch make one short list."""

from __future__ import annotations

import torch
from torch import Tensor

from fastai_crl._checks import readable
from fastai_crl.mining.hard_samples import by_row
from fastai_crl.mining.profile import anchor_places

from .sides import Sides


def weigh(sides: Sides, most: int) -> tuple[Tensor, Tensor]:
    """Weights of max(0, m + |p_a - p_+| - p_a + p_-), or of that without |p_a - p_+|.

    Args:
        sides: of M labels.
        most: that they have no more anchors than together.

    Returns:
        The weights, (n, M), and what all active hinges count in the mean, a scalar.
    """
    options, far, n_labels = sides.options, sides.far_scores(), sides.scores.shape[1]
    place, label = _anchors(sides, most)
    if not len(place):
        return torch.zeros_like(sides.scores), sides.share.sum()
    score, row = sides.scores.take(place), label.clamp_max(n_labels - 1)
    a = score[:, None]
    to_far = far.index_select(0, row).add_(a)  # (A, N) p_a - p_-, ascending
    if options.criterion.lone_positive:
        reach = torch.full_like(a, options.threshold).masked_fill_((label == n_labels)[:, None], -torch.inf)
    else:
        others = torch.constant_pad_nd(sides.h - 1, (0, 1)).take(label)[:, None]
        most_others = int(others.max()) if readable(others) else max(1, most - 1)
        # The κ lowest of the label but the anchor: from the label's first on, and from the anchor on each the next.
        slot = torch.arange(max(len(place), options.k), device=far.device, dtype=torch.int32)
        order = slot[: min(options.k, most_others)]
        near = torch.searchsorted(label, label, out_int32=True)[:, None] + order  # (A, P) places in the list
        near = near.add_(near >= slot[: len(place), None]).clamp_max_(len(place) - 1).view(-1)
        gap = score.index_select(0, near).view(-1, len(order)).sub_(a)  # p_+ - p_a
        reach = gap.abs().add_(options.threshold).masked_fill_(order >= others, -torch.inf)
    above = torch.searchsorted(to_far, reach, out_int32=True)  # (A, P) active hinges: a prefix of the hard negatives
    by_active = sides.by_active()
    bins = torch.add(above, row[:, None], alpha=by_active.shape[1]).view(-1)
    by_active.view(-1).scatter_add_(0, bins, a.new_ones(1).expand(len(bins)))
    weights = torch.zeros_like(sides.scores)
    if options.criterion.lone_positive:
        weights.view(-1).index_add_(0, place, above[:, 0].to(a.dtype), alpha=-1)
    else:
        pull = gap.sign_().mul_(above)  # slopes of |p_a - p_+| - p_a in p_+, and with the other sign in p_a
        weights.view(-1).index_add_(0, place.index_select(0, near), pull.view(-1))
        weights.view(-1).index_add_(0, place, pull.add_(above).sum(1), alpha=-1)
    return sides.push(weights, by_active)


def _anchors(sides: Sides, most: int) -> tuple[Tensor, Tensor]:
    """List all anchors by label, then score, then sample.

    Where their number can be read the list is no longer than that; elsewhere it has place for `most` of them.

    Returns:
        Two (A,) tensors: place in the flattened (n, M) scores, and label, M for padding, which comes last.
    """
    (n, n_labels), mask = sides.scores.shape, torch.logical_and(sides.minority, sides.share)
    if readable(mask):
        place = mask.flatten().nonzero()[:, 0]
        label = place % n_labels
    else:
        place, label = anchor_places(mask, min(most, mask.numel()))
        place = place.clamp_max_(n * n_labels - 1)
    order = by_row(label, sides.scores.take(place), sides.signed)
    return place.take(order), label.take(order)
