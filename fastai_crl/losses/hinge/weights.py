"""The hinge criteria at class level as one product with the scores, on any device; no call waits for a GPU.

Relative (arXiv:1804.10851, eqs. 9 and 10) is max(0, m + |p_a - p_+| - p_a + p_-), ranking the same without |p_a - p_+|.
While the active hinges stay the same their sum is linear in the scores: Σ weight·p + m·(active hinges). Both are found
here without autograd, and one product with the scores carries the gradient. `tests/oracle.py` says the same in
plain loops.

At a kink the gradient is one of several: a hinge of exactly 0 counts as inactive, and |p_a - p_+| of equal scores has
slope 0, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastai_crl._checks import readable
from fastai_crl.losses.criteria import TermOptions
from fastai_crl.mining.profile import limit, n_triplets, within_limit

from . import attribute, joint
from .sides import Sides, all_active

# Entries of the matrices that one slice of the labels takes: on a CPU they stay in its cache, elsewhere in some 100 MB.
_SLICE_ON_CPU, _SLICE = 2**17, 2**22


@torch.no_grad()
def hinge_weights(
    scores: Tensor, y: Tensor, frequency: Tensor | None, options: TermOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Weigh the scores of a batch: the mean of its hinges is Σ weight·score + m·active.

    Args:
        scores: (n, C) float32 or float64, n ≥ 1.
        y: (n, C) memberships of the same dtype, see `membership`.
        frequency: (C,), see `minority_classes`, or None.
        options: see `TermOptions`.

    Returns:
        The weights, (n, C) in the dtype of the scores; active, a scalar, the share of the hinges that are active; and
        the triplets of each label, (C,) long (pairs, for ranking).
    """
    n, bound = len(scores), max(1, limit(options.rho, len(scores)))
    positive, maybe = y.floor(), y.ceil()
    h, g, turned = positive.sum(0).long(), (n - maybe.sum(0)).long(), None
    if options.scope == "attribute":
        turned = h > g
        h, g = torch.where(turned, g, h), torch.where(turned, h, g)
    g = g.clamp_max(options.k)
    few = within_limit(h, n, options.rho, options.scope, frequency)
    triplets = n_triplets(h * few, g, options.k, options.criterion.lone_positive)
    share = _share(triplets, options.by_label, scores.dtype)
    if turned is None and 4 * bound >= len(h):
        weights, active = _weigh(Sides.of(scores, positive, maybe, None, h, g, share, options), bound)
        return weights, active, triplets
    del positive, maybe
    weights, total = torch.zeros_like(scores), share.new_zeros(())
    if turned is None:  # few labels can be minority: worth the selecting
        slices = iter([(triplets.argsort(descending=True, stable=True)[:bound], bound)])
    else:
        slices = _slices(h * (triplets > 0), max(1, min(bound, n // 2)), n, options)
    for labels, most in slices:
        own, flip = y.index_select(1, labels), None if turned is None else turned.take(labels)
        if flip is not None and readable(flip) and not flip.any():
            flip = None
        of_label = h.take(labels), g.take(labels), share.take(labels)
        sides = Sides.of(scores.index_select(1, labels), own.floor(), own.ceil(), flip, *of_label, options)
        part, active = _weigh(sides, most)
        weights.index_copy_(1, labels, part if flip is None else torch.where(flip, -part, part))
        total += active
    return weights, total, triplets


def _weigh(sides: Sides, most: int) -> tuple[Tensor, Tensor]:
    """Weights, (n, M), and what all active hinges count in the mean, of labels with at most that many anchors."""
    options = sides.options
    if options.criterion.lone_positive and options.margin >= options.widest:
        return all_active(sides)
    if options.scope == "joint":
        return joint.weigh(sides, most)
    return (attribute.weigh_ranking if options.criterion.lone_positive else attribute.weigh_relative)(sides, most)


def _share(triplets: Tensor, by_label: bool, dtype: torch.dtype) -> Tensor:
    """What one triplet of each label counts in the mean, (C,); 0 for labels without one."""
    used = triplets > 0
    total = triplets.clamp_min(1) * used.sum().clamp_min(1) if by_label else triplets.sum().clamp_min(1)
    return used / total.to(dtype)


def _slices(sizes: Tensor, most: int, n: int, options: TermOptions) -> Iterator[tuple[Tensor, int]]:
    """Yield slices of the labels, and how many anchors one of them can have at most.

    On a CPU, where reading waits for nothing, only labels with an anchor come, those with the most first.

    Args:
        sizes: (C,) anchors of each label.
        most: that no label can have more anchors than.
        n: samples.
        options: see `TermOptions`.
    """
    labels, entries = torch.arange(len(sizes), device=sizes.device), _SLICE
    known = [most] * len(sizes)
    if readable(sizes):
        labels, entries = sizes.argsort(descending=True, stable=True), _SLICE_ON_CPU
        known = [size for size in sizes.take(labels).tolist() if size]
    start = 0
    while start < len(known):
        pairs = 0 if options.criterion.lone_positive else min(options.k + 1, known[start]) ** 2
        width = max(1, entries // (pairs + n))
        yield labels[start : start + width][: len(known) - start], known[start]
        start += width
