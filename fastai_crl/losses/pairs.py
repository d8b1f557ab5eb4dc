"""The criteria that no engine serves: an anchor's distances to its hard samples, pair by pair, for `Criterion.sums`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastai_crl.mining.hard_samples import HardSamples, take
from fastai_crl.mining.profile import Profile, Scope

from .criteria import Criterion, Pairs, ScoreSpace


class PairOptions(NamedTuple):
    """Options of `pair_sums`.

    Attributes:
        criterion: makes sums of the pairs.
        scope: `"joint"` or `"attribute"`.
        rho: ρ, largest share of the batch that the minority makes up.
        k: κ, hard positives and negatives per anchor.
        margin: m.
        by_label: each label's triplets are weighed by one over their number.
    """

    criterion: Criterion
    scope: Scope
    rho: float
    k: int
    margin: float
    by_label: bool


def widest(scores: Tensor, distance: Tensor | None, space: ScoreSpace) -> Tensor | float:
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
    memory: tuple[Tensor, Tensor] | None,
    *,
    features: Tensor | None,
    distance: Tensor | None,
    span: Tensor | float,
    options: PairOptions,
) -> tuple[Tensor, ...]:
    """Mine a slice of the labels, and make the criterion's sums over all pairs, differentiable.

    Args:
        scores: (n, C) float32 or float64.
        y: (n, C) memberships of the same dtype, see `membership`.
        frequency: (C,), see `minority_classes`, or None.
        memory: (C, R) past scores of positives, or (C, R, d) embeddings, and (C, R) bool: which hold; or None.
        features: (n, d) at instance level, which then compares them; else None.
        distance: (n, n), that of the features, or None.
        span: see `widest`.
        options: see `PairOptions`.

    Returns:
        (C,) long triplets of each label (pairs, where a lone positive is enough), and the sums.
    """
    past, valid = (None, None) if memory is None else memory
    criterion, k = options.criterion, options.k
    with torch.no_grad():
        profile = Profile.of(y, options.rho, options.scope, frequency, valid, criterion.lone_positive)
        counts = profile.triplets(k)
        share = counts.clamp_min(1).to(y.dtype).reciprocal() if options.by_label else None
        counts = profile.by_label(counts, y.shape[1])
        past = None if past is None else profile.of_labels(past)
    if distance is None or features is None:
        scores = profile.scores(scores)
        past = None if past is None else past.to(scores.dtype)
        with torch.no_grad():
            hard = HardSamples.by_score(profile, scores.detach(), k, past)
        own, near, far = take((scores, past), hard.anchor, hard.near, hard.far)
        to_positive, to_negative = (own[:, None] - hard.each(near)).abs(), own[:, None] - hard.each(far)
    else:
        past = None if past is None else profile.distance_to(features, past)
        with torch.no_grad():
            remembered = None if past is None else past.detach()
            hard = HardSamples.by_distance(profile, distance.detach(), k, remembered)
        to_positive, to_negative = take((distance, past), hard.near, hard.far)
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
    return counts, *criterion.sums(pairs, options.margin)
