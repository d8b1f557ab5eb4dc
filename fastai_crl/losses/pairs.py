"""The criteria that are no hinge of scores: an anchor's distances to its hard samples, pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor

from fastai_crl.mining.hard_samples import HardSamples, take
from fastai_crl.mining.profile import Profile, n_triplets

from .criteria import Pairs, ScoreSpace, TermOptions


def span_of(scores: Tensor, distance: Tensor | None, space: ScoreSpace) -> Tensor | float:
    """Return the largest distance there can be: the range of the distribution criterion's histograms.

    At least 0.01: equal scores span nothing, and the gradient is as steep as the range is small.

    Args:
        scores: (n, C).
        distance: (n, n) distances of the features, at instance level; else None.
        space: of the scores.
    """
    if distance is None and space == "probability":
        return 1.0
    largest = scores.detach().max() - scores.detach().min() if distance is None else distance.detach().max()
    return largest.clamp_min(0.01)


def pair_sums(
    scores: Tensor,
    y: Tensor,
    frequency: Tensor | None,
    *,
    distance: Tensor | None,
    span: Tensor | float,
    options: TermOptions,
) -> tuple[Tensor, ...]:
    """Mine a slice of the labels, and make the criterion's sums over all pairs, differentiable.

    Args:
        scores: (n, C) float32 or float64.
        y: (n, C) memberships of the same dtype, see `membership`.
        frequency: (C,), see `minority_classes`, or None.
        distance: (n, n) distances of the features, which instance level compares; else None.
        span: see `span_of`.
        options: see `TermOptions`.

    Returns:
        (C,) long triplets of each label (pairs, where a lone positive is enough), and the sums.
    """
    criterion, k = options.criterion, options.k
    with torch.no_grad():
        profile = Profile.of(y, options.rho, options.scope, frequency, criterion.lone_positive)
        triplets = n_triplets(profile.n_minority, profile.n_majority.clamp_max(k), k, criterion.lone_positive)
        share = triplets.clamp_min(1).to(y.dtype).reciprocal() if options.by_label else None
        triplets = profile.by_label(triplets, y.shape[1])
    if distance is None:
        scores = profile.scores(scores)
        with torch.no_grad():
            hard = HardSamples.by_score(profile, scores.detach(), k)
        own, near, far = take(scores, hard.anchor, hard.near, hard.far)
        to_positive, to_negative = (own[:, None] - hard.each(near)).abs(), own[:, None] - hard.each(far)
    else:
        with torch.no_grad():
            hard = HardSamples.by_distance(profile, distance.detach(), k)
        to_positive, to_negative = take(distance, hard.near, hard.far)
    is_positive, is_negative = hard.is_near, hard.each(hard.is_far)
    needed = hard.is_anchor[:, None] if criterion.lone_positive else is_positive.any(1, keepdim=True)
    pairs = Pairs(
        to_positive,
        is_positive,
        to_negative,
        is_negative & needed,
        0.0 if distance is not None else -span,
        span,
        None if share is None else share.index_select(0, hard.row),
    )
    return triplets, *criterion.sums(pairs, options.margin)
