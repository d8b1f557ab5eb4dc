"""What the searches for active hinges start from: both sides of some labels, and their hard negatives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastai_crl.losses.criteria import TermOptions
from fastai_crl.mining.hard_samples import hardest


class Sides(NamedTuple):
    """Both sides of M labels of a batch. Scores rise with being on the minority side."""

    scores: Tensor  # (n, M)
    minority: Tensor  # (n, M) 1 on the minority side, else 0
    majority: Tensor  # (n, M) the scores on the majority side, those of other samples moved `apart` below
    h: Tensor  # (M,) long: samples on the minority side
    g: Tensor  # (M,) long: hard negatives, at most κ
    share: Tensor  # (M,) what one triplet of the label counts in the mean; 0 where there is none
    far: Tensor  # (N, M) samples of the hard negatives, hardest first, padded with any others
    signed: bool  # scores may be below 0
    options: TermOptions

    @classmethod
    def of(
        cls,
        scores: Tensor,
        positive: Tensor,
        maybe: Tensor,
        flip: Tensor | None,
        h: Tensor,
        g: Tensor,
        share: Tensor,
        options: TermOptions,
    ) -> Sides:
        """The sides of M labels.

        Args:
            scores: (n, M) of being positive.
            positive: (n, M) 1 for positives, else 0.
            maybe: (n, M) 0 for negatives, else 1.
            flip: (M,) bool: the negatives are the minority side; None: of no label.
            h: see `Sides`, like the next two.
            g: see there.
            share: see there.
            options: see `TermOptions`.
        """
        if flip is not None:
            positive, maybe = torch.where(flip, 1 - maybe, positive), torch.where(flip, 1 - positive, maybe)
            scores = torch.where(flip, -scores, scores)
        signed = options.widest > 1 or flip is not None
        majority = torch.sub(scores, maybe, alpha=options.apart)
        far = hardest(majority, min(options.k, len(scores)), highest=True, signed=signed)
        return cls(scores, positive, majority, h, g, share, far, signed, options)

    def far_scores(self) -> Tensor:
        """Scores of the hard negatives turned around, (M, N) ascending; padding out of reach."""
        return self.majority.T.gather(1, self.far.T).neg_()

    def push(self, weights: Tensor, by_active: Tensor) -> tuple[Tensor, Tensor]:
        """Add the hard negatives: negative j is in the active hinges of each pair that has more than j of them.

        Args:
            weights: (n, M) sums of slopes, changed.
            by_active: (M, N + 1) pairs of an anchor and a positive by their number of active hinges.

        Returns:
            The weights in the mean, and what all active hinges count in it, a scalar.
        """
        up_to = by_active.cumsum(1)
        pushed = up_to[:, -1:] - up_to[:, :-1]
        weights.scatter_add_(0, self.far, pushed.T)
        return weights.mul_(self.share), pushed.sum(1).dot(self.share)

    def by_active(self) -> Tensor:
        """(M, N + 1) zeros, to count pairs by their number of active hinges."""
        return self.scores.new_zeros(self.scores.shape[1], len(self.far) + 1)


def all_active(sides: Sides) -> tuple[Tensor, Tensor]:
    """Weights of max(0, m - p_a + p_-) where m is so wide that every hinge is active.

    A label's term is then m - mean(p of the minority side) + mean(p of its hard negatives), which needs no search.
    Returns the weights, (n, M), and what all hinges count in the mean, a scalar.
    """
    real = torch.arange(len(sides.far), device=sides.far.device)[:, None] < sides.g
    weights = torch.zeros_like(sides.scores).scatter_(0, sides.far, (real * sides.h).to(sides.scores.dtype))
    weights.sub_(sides.minority * sides.g).mul_(sides.share)
    return weights, (sides.h * sides.g * sides.share).sum()
