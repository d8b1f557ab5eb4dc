"""What `compare.py` adds to a base loss: forms, weights and times of CRL, each by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastai_crl.losses import CRL
from fastai_crl.losses.criteria import Ranking
from fastai_crl.losses.crl import Rectified
from fastai_crl.losses.imbalance import ramp
from fastai_crl.mining import minority_classes

__all__ = ["TERMS", "Term", "easy_anchors"]


def easy_anchors(logits: Tensor, targets: Tensor, sure: float, k: int = 25, margin: float = 0.5) -> Rectified:
    """CRL as published, at class level, but that only positives the network is sure of are anchors.

    The others are still hard positives, and are pushed up to the anchors. With `sure` 0 it is the published loss.
    """
    p = logits.softmax(1) if targets.ndim == 1 else logits.sigmoid()
    hinges = [p.new_zeros(0)]
    for c in minority_classes(targets, n_classes=p.shape[1]).nonzero()[:, 0].tolist():
        positive = targets == c if targets.ndim == 1 else targets[:, c] == 1
        own = p[positive, c]
        negatives = p[~positive, c].topk(min(k, int((~positive).sum()))).values
        for i in (own > sure).nonzero()[:, 0].tolist():
            others = torch.cat([own[:i], own[i + 1 :]])
            positives = others.topk(min(k, len(others)), largest=False).values
            to_positive, to_negative = (own[i] - positives).abs(), own[i] - negatives
            hinges.append((margin + to_positive[:, None] - to_negative).relu().flatten())
    found = torch.cat(hinges)
    return Rectified(found.sum() / max(1, len(found)), torch.tensor([len(found)]))


@dataclass(frozen=True)
class Term:
    """What is added to a base loss.

    Attributes:
        crl: arguments of `CRL`.
        adjusted: whether it works on the logits that the base loss adjusts, rather than on those of the network.
        active: the part of training in which it is added, from and to, of 0 to 1.
        share: of Ω, that its weight α is.
        most: α at the most.
        sure: the probability above which a positive is an anchor of `easy_anchors`, which then replaces `crl`.
    """

    crl: dict[str, Any] = field(default_factory=dict)
    adjusted: bool = False
    active: tuple[float, float] = (0.0, 1.0)
    share: float = 1.0
    most: float = 1.0
    sure: float | None = None

    def alpha(self, omega: float, done: float) -> float:
        """Its weight when `done`, 0 to 1, of training is done: it ramps up from where it becomes active."""
        start, stop = self.active
        return min(self.share * omega, self.most) * (ramp(done - start) if start <= done < stop else 0.0)

    def of(self, shift: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Rectified]:
        """What makes it of logits, targets and the embedding; `shift` is what the base loss adds to logits."""
        if self.sure is not None:
            return lambda logits, targets, _: easy_anchors(logits, targets, self.sure)
        return CRL(**self.crl, shift=shift if self.adjusted else None).loss_and_triplets


TERMS: dict[str, Term | None] = {
    "none": None,
    "ranking": Term({"criterion": "ranking"}),
    "ranking_adjusted": Term({"criterion": "ranking"}, adjusted=True),
    "published": Term({"criterion": "relative"}),
    "instance": Term({"criterion": "relative", "level": "instance"}),
    "ranking_quarter": Term({"criterion": "ranking"}, most=Ranking.alpha_limit),  # the package's default
    "ranking_adjusted_quarter": Term({"criterion": "ranking"}, adjusted=True, most=Ranking.alpha_limit),
    # Not among the arms that run by default:
    "ranking_half": Term({"criterion": "ranking"}, share=0.5),
    "ranking_adjusted_half": Term({"criterion": "ranking"}, adjusted=True, share=0.5),
    "ranking_eighth": Term({"criterion": "ranking"}, most=Ranking.alpha_limit / 2),
    "ranking_early": Term({"criterion": "ranking"}, active=(0.0, 0.5), most=Ranking.alpha_limit),
    "ranking_late": Term({"criterion": "ranking"}, active=(0.5, 1.0), most=Ranking.alpha_limit),
    "easy_anchors": Term(sure=0.9),
}
