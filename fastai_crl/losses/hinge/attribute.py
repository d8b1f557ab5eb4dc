"""Active hinges in attribute scope, label by label: there the anchors of all labels make no short list."""

from __future__ import annotations

import torch
from torch import Tensor

from fastai_crl.mining.hard_samples import hardest

from .sides import Sides


def weigh_ranking(sides: Sides, most: int) -> tuple[Tensor, Tensor]:
    """Weights of max(0, m - p_a + p_-): an anchor's hinges with the hard negatives above p_a - m are active.

    Returns the weights, (n, M), and what all active hinges count in the mean, a scalar.
    """
    threshold = torch.rsub(sides.scores, sides.options.threshold).T.contiguous()
    above = torch.searchsorted(sides.far_scores(), threshold)  # (M, n)
    by_active = sides.by_active().scatter_add_(1, above, sides.minority.T)
    return sides.push(above.T * -sides.minority, by_active)


def weigh_relative(sides: Sides, most: int) -> tuple[Tensor, Tensor]:
    """Weights of max(0, m + |p_a - p_+| - p_a + p_-): active for the hard negatives above p_a - |p_a - p_+| - m.

    Only the κ + 1 lowest of the minority side can be a hard positive. Among them every pair is laid out. All anchors
    beyond them meet the κ lowest, which score no higher, so that they are only counted.

    Args:
        sides: of M labels.
        most: that none of the labels has more anchors than.

    Returns:
        The weights, (n, M), and what all active hinges count in the mean, a scalar.
    """
    far, options = sides.far_scores(), sides.options
    order = torch.arange(min(options.k + 1, most), device=far.device)
    moved = torch.sub(sides.scores, sides.minority - 1, alpha=options.apart)
    near = hardest(moved, len(order), highest=False, signed=sides.signed)  # (P, M)
    p = sides.scores.T.gather(1, near.T)  # (M, P) lowest first
    real = (order < sides.h[:, None]).to(p.dtype)
    pairs = real[:, :, None] * real[:, None, :]  # (M, P, P) of an anchor and a positive
    pairs.diagonal(dim1=1, dim2=2).zero_()
    gap = p[:, :, None] - p[:, None, :]
    above = torch.searchsorted(far, (gap.abs() + (options.threshold - p)[:, :, None]).flatten(1))
    by_active = sides.by_active().scatter_add_(1, above, pairs.flatten(1))
    active = above.view_as(gap) * pairs
    pull = active * gap.sign()
    slope = (pull - active).sum(2) - pull.sum(1)  # (M, P) of each as an anchor, and as a positive
    weights = torch.zeros_like(sides.scores)
    if most > len(order):
        above = torch.searchsorted(far, options.threshold - p[:, : options.k])  # (M, κ)
        beyond = (sides.h - len(order)).clamp_min(0).to(p.dtype)[:, None]
        by_active.scatter_add_(1, above, beyond.expand_as(above).contiguous())
        # An anchor that ties with positives takes their slope.
        lowest, last = p[:, : options.k], p[:, options.k :]
        ties = sides.minority * (sides.scores == last.T)  # (n, M)
        of_ties = above * (lowest == last)
        n_ties = (ties.sum(0)[:, None] - (p == last).sum(1, keepdim=True)) * (beyond > 0)
        slope[:, : options.k] += of_ties * n_ties - above * beyond
        weights -= ties * (of_ties.sum(1) * (beyond[:, 0] > 0))  # near ones are written over
    weights.scatter_(0, near, slope.T)
    return sides.push(weights, by_active)
