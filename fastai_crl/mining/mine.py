"""Batch-wise class profiling and hard-sample mining: sections 3.1 and 3.2 of the CRL paper (arXiv:1804.10851).

The public face; `profile` profiles a batch, `hard_samples` finds the hard samples, and the losses use those directly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastai_crl._checks import Batch, check_arguments, features_of

from .hard_samples import HardSamples, pairwise_distance
from .profile import Level, Profile, Scope, membership, sides, within_limit


def minority_classes(
    targets: Tensor,
    rho: float = 0.5,
    scope: Scope = "joint",
    n_classes: int | None = None,
    frequency: Tensor | None = None,
) -> Tensor:
    """Labels that this batch rectifies (paper, section 3.1 and eq. 3).

    `scope="joint"` profiles all labels together: sorted by their number of positives h_c, ascending, ties by label
    index, those whose cumulative count stays ≤ ρ·n are minority. `scope="attribute"` takes each label as a binary
    attribute of its own, the paper's CelebA reading: its rarer side is the minority (the negatives when they are fewer;
    a tie goes to the positives), so every label can be one. Classes with fewer than two samples are dropped in both: a
    triplet needs an anchor and another positive.

    Args:
        targets: (n, C) in [0, 1], or (n,) class indices.
        rho: largest share of the batch, in (0, 1], that the minority may make up.
        scope: `"joint"` or `"attribute"`.
        n_classes: C; for class indices only. Default: the largest index + 1.
        frequency: (C,) how common each label is in the training set: what joint scope sorts by, instead of the batch's
            own counts, which say little where batches are resampled.

    Returns:
        (C,) bool.

    Example:
        >>> minority_classes(torch.tensor([[1, 0, 1], [1, 0, 1], [1, 0, 0], [1, 0, 0]]))
        tensor([False, False,  True])
    """
    check_arguments(1, rho, scope, "class")
    if n_classes is None:
        n_classes = targets.shape[1] if targets.ndim == 2 else int(targets.max()) + 1
    h = sides(membership(targets, n_classes), scope)[0].sum(0)
    return within_limit(h, len(targets), rho, scope, frequency) & (h > 1)


@dataclass
class Mined:
    """Hard samples of one batch, padded to static shapes: A anchors, P positives and N negatives each.

    An anchor is a (sample, label) pair. Its triplets are all pairs of one of its hard positives with one of its hard
    negatives. Padding is False in the masks; padded indices are valid but mean nothing.

    Attributes:
        anchor: (A,) long, sample index.
        label: (A,) long.
        positive, positive_mask: (A, P) long sample indices, hardest first, and bool.
        negative, negative_mask: (A, N) the same for the negatives.
        flipped: (A,) bool: the minority is the label's negative side (attribute scope only), else None.
        n_classes: C.

    Example:
        >>> scores, targets = torch.tensor([[0.9], [0.2], [0.8], [0.1]]), torch.tensor([[1], [1], [0], [0]])
        >>> mined: Mined = mine(scores, targets, k=1)
        >>> mined.anchor.tolist(), mined.positive[mined.positive_mask].tolist(), mined.negative.tolist()
        ([1, 0], [0, 1], [[2], [2]])
    """

    anchor: Tensor
    label: Tensor
    positive: Tensor
    positive_mask: Tensor
    negative: Tensor
    negative_mask: Tensor
    flipped: Tensor | None
    n_classes: int

    def per_anchor(self) -> Tensor:
        """Triplets of each anchor, (A,) long."""
        return self.positive_mask.sum(1) * self.negative_mask.sum(1)

    @property
    def n_triplets(self) -> Tensor:
        """Number of triplets, a scalar long tensor (no synchronisation)."""
        return self.per_anchor().sum()

    @property
    def n_anchors(self) -> Tensor:
        """Number of anchors that have a triplet, a scalar long tensor."""
        return (self.per_anchor() > 0).sum()

    def by_label(self) -> Tensor:
        """Triplets of each label, (C,) long."""
        per_anchor = self.per_anchor()
        return per_anchor.new_zeros(self.n_classes).scatter_add_(0, self.label, per_anchor)

    def triplets(self) -> Tensor:
        """All triplets, (T, 4) long: anchor, positive, negative, label. It synchronises with the host."""
        a, i, j = (self.positive_mask[:, :, None] & self.negative_mask[:, None, :]).nonzero(as_tuple=True)
        return torch.stack([self.anchor[a], self.positive[a, i], self.negative[a, j], self.label[a]], 1)


def mine(
    scores: Tensor,
    targets: Tensor,
    k: int = 25,
    rho: float = 0.5,
    scope: Scope = "joint",
    level: Level = "class",
    features: Tensor | None = None,
) -> Mined:
    """Hard positives and negatives of every minority sample in the batch (paper, eqs. 4 to 7).

    Class level: hard positives of an anchor are the κ lowest scores of its label among the label's other samples, hard
    negatives the κ highest scores among samples without the label. Instance level: the κ largest feature distances to
    the anchor within the class, the κ smallest outside it. Ties go to the lower sample index. For a flipped label
    (attribute scope, the minority is those without it) the score is 1 - p. Nothing here is differentiable.

    Args:
        scores: (n, C) float; any increasing function of the probability mines the same samples.
        targets: (n, C) in [0, 1], or (n,) class indices.
        k: κ, hard positives and hard negatives per anchor, ≥ 1.
        rho: see `minority_classes`.
        scope: `"joint"` or `"attribute"`.
        level: `"class"` or `"instance"`.
        features: (n, d) embeddings, needed at instance level.

    Returns:
        `Mined`, of ⌊ρ·n⌋ anchors in joint scope and C·⌊min(ρ, ½)·n⌋ in attribute scope, padding included.

    Raises:
        ValueError: shapes that do not match, scores or features that are not finite, targets out of range, k < 1,
            rho outside (0, 1], unknown scope or level, features missing at instance level.
    """
    check_arguments(k, rho, scope, level)
    k, batch = int(k), Batch.of(scores, targets, features_of(level, features), "scores", 1e20)
    scores, targets, features, _ = batch
    with torch.no_grad(), torch.autocast(scores.device.type, enabled=False):
        scores = scores if scores.dtype == torch.float64 else scores.float()
        n, n_classes = scores.shape
        if n == 0:
            none = scores.new_zeros(0, dtype=torch.long)
            pairs = none.reshape(0, 1)
            return Mined(none, none, pairs, pairs > 0, pairs, pairs > 0, None, n_classes)
        profile = Profile.of(membership(targets, n_classes, scores.dtype), rho, scope)
        if features is None:
            hard = HardSamples.by_score(profile, profile.scores(scores), k)
            near, far = (hard.each(places) // len(profile.n_minority) for places in (hard.near, hard.far))
        else:
            hard = HardSamples.by_distance(profile, pairwise_distance(features), k)
            near, far = hard.near % n, hard.far % n
        return Mined(
            anchor=hard.anchor // len(profile.n_minority),
            label=profile.labels().take(hard.row),
            positive=near,
            positive_mask=hard.is_near,
            negative=far,
            negative_mask=hard.each(hard.is_far) & hard.is_near.any(1, keepdim=True),
            flipped=None if profile.flipped is None else profile.flipped.take(hard.row),
            n_classes=n_classes,
        )
