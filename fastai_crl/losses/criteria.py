"""The comparisons of an anchor with its hard positives and negatives, each a class (arXiv:1804.10851, section 3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fastai_crl._checks import whole_number
from fastai_crl.mining.profile import Level, Scope

# What the reference documents: all but the options, which the package makes for itself.
__all__ = [
    "CRITERIA",
    "Absolute",
    "Average",
    "Criterion",
    "Distribution",
    "Pairs",
    "Ranking",
    "Relative",
    "ScoreSpace",
    "make_criterion",
]

ScoreSpace = Literal["probability", "logit"]
Average = Literal["triplet", "label"]


@dataclass(frozen=True)
class Pairs:
    """Distances of A anchors to their hard positives and negatives, padded to static shapes.

    A triplet is an anchor with one of its P positives and one of its N negatives. Padded distances mean nothing.

    Attributes:
        to_positive: (A, P) distances d(a,+), differentiable.
        is_positive: (A, P) bool, False for padding.
        to_negative: (A, N) distances d(a,-), differentiable, the nearest first and padding last.
        is_negative: (A, N) bool, False for padding, and for anchors that have no positive but need one.
        lowest, highest: the range of all distances.
        share: (A,) what each triplet of an anchor counts with a mean per label: 1 / triplets of its label; else None.
    """

    to_positive: Tensor
    is_positive: Tensor
    to_negative: Tensor
    is_negative: Tensor
    lowest: Tensor | float
    highest: Tensor | float
    share: Tensor | None = None


class Criterion:
    """How anchors are compared with their hard positives and negatives: derive a class, and pass an object of it.

    A criterion makes sums over the pairs of a slice of the labels (`sums`), which add up over slices, and the loss of
    the added sums (`loss`).

    Attributes:
        name: what it is called in messages.
        rho, average: defaults of `CRL`'s arguments.
        alpha_limit: α by `alpha="auto"` is Ω, but at most this, 0 to 1.
        averages: the averages it can take. With `"label"` it weighs an anchor's triplets by `Pairs.share`.
        levels: the levels it can be used at.
        lone_positive: anchors are compared with negatives alone: one positive of a label is enough, and `CRL` counts
            pairs of an anchor and a negative in place of triplets.
        hinge: at class level the loss is the mean of max(0, m + d(a,+) - d(a,-)), or with `lone_positive` that of
            max(0, m - d(a,-)): `losses.hinge` computes it, and `sums` and `loss` are not called. A derived class with
            either of its own is not computed so, unless it says so again.

    Example:
        Anchors, positives and negatives compared through a softplus, in one class:

        >>> import torch
        >>> from fastai_crl.losses import CRL
        >>> class Logistic(Criterion):
        ...     name = "logistic"
        ...     def sums(self, pairs, margin):
        ...         gap = margin + pairs.to_positive[:, :, None] - pairs.to_negative[:, None, :]
        ...         is_triplet = pairs.is_positive[:, :, None] & pairs.is_negative[:, None, :]
        ...         return ((torch.nn.functional.softplus(gap) * is_triplet).sum(),)
        ...     def loss(self, *sums, counts):
        ...         return sums[0] / counts.sum().clamp_min(1)
        >>> targets = torch.tensor([[1.0], [1], [0], [0]])
        >>> crl = CRL(criterion=Logistic(), margin=0)
        >>> print(f"{crl(torch.zeros(4, 1), targets):.3f}")  # all scores equal: log 2
        0.693
    """

    name: ClassVar[str] = "custom"
    rho: ClassVar[float] = 0.5
    alpha_limit: ClassVar[float] = 1.0
    average: ClassVar[Average] = "triplet"
    averages: ClassVar[tuple[Average, ...]] = ("triplet",)
    levels: ClassVar[tuple[Level, ...]] = ("class", "instance")
    lone_positive: ClassVar[bool] = False
    hinge: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if {"sums", "loss"} & set(vars(cls)) and "hinge" not in vars(cls):
            cls.hinge = False  # what it computes is not what the class computes that it is derived from

    def margin(self, level: Level, score_space: ScoreSpace, scope: Scope, n_classes: int) -> float:
        """Return the default margin m: the paper's, in logit space as wide as where the sigmoid is steepest."""
        if level == "instance":
            return 2 * math.pi / (n_classes if scope == "joint" else 2)
        return 2.0 if score_space == "logit" else 0.5

    def sums(self, pairs: Pairs, margin: float) -> tuple[Tensor, ...]:
        """Return sums over the pairs of a slice of the labels, which add up over slices."""
        raise NotImplementedError(f"{type(self).__name__} needs a method sums(pairs, margin).")

    def loss(self, *sums: Tensor, counts: Tensor) -> Tensor:
        """Return the loss, a scalar that is 0 where there is no triplet.

        Args:
            *sums: those of `sums`, added up over all slices.
            counts: (C,) triplets of each label; with a mean per label, 1 for each label that has any.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method loss(*sums, counts).")

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Relative(Criterion):
    """Mean over all triplets of max(0, m + d(a,+) - d(a,-)) (eqs. 9 to 11)."""

    name = "relative"
    averages = ("triplet", "label")
    hinge = True

    def sums(self, pairs: Pairs, margin: float) -> tuple[Tensor, ...]:
        """Return the sum of the hinges of all P·N triplets of each anchor, in O(P·log N).

        With the negatives sorted, the hinge of positive i is active for those nearer than m + d(a,+i), which are a
        prefix. The sum is then linear in the distances, each weighted by the number of active hinges it takes part in.
        """
        to_positive, to_negative = pairs.to_positive, pairs.to_negative
        with torch.no_grad():
            nearest_first = torch.where(pairs.is_negative, to_negative, torch.inf)
            reach = torch.where(pairs.is_positive, to_positive + margin, -torch.inf)
            active = torch.searchsorted(nearest_first, reach)
            by_active = to_positive.new_zeros(to_negative.shape[0], to_negative.shape[1] + 1)
            by_active.scatter_add_(1, active, torch.ones_like(to_positive))
            # For negative j: how many positives have active > j.
            times = to_positive.shape[1] - by_active.cumsum(1)[:, :-1]
        by_anchor = (active * (margin + to_positive)).sum(1) - (times * to_negative).sum(1)
        return (by_anchor.sum() if pairs.share is None else by_anchor.dot(pairs.share),)

    def loss(self, *sums: Tensor, counts: Tensor) -> Tensor:
        return sums[0] / counts.sum().clamp_min(1)


class Ranking(Relative):
    """Mean over all pairs of max(0, m - d(a,-)), at class level; not in the paper.

    Without d(a,+) nothing draws a label's confident positives towards its worst, and a lone positive is an anchor too.
    Its defaults are those that did best: ρ = 1 (every label, rarest first, until their positives outnumber the batch),
    each label's mean counting the same, a margin of 1, beyond which no pair of probabilities is ever apart, so that its
    gradient never stops, and a weight α of at most ¼, where the paper's is Ω alone.
    """

    name = "ranking"
    rho = 1.0
    alpha_limit = 0.25
    average = "label"
    levels = ("class",)
    lone_positive = True

    def margin(self, level: Level, score_space: ScoreSpace, scope: Scope, n_classes: int) -> float:
        return 2.0 if score_space == "logit" else 1.0


class Absolute(Criterion):
    """Half of the mean of d(a,+)² and of max(m - d(a,-), 0)² over the pairs (eq. 13)."""

    name = "absolute"

    def sums(self, pairs: Pairs, margin: float) -> tuple[Tensor, ...]:
        """Return the sums of both, each with its number of pairs."""
        near = (pairs.to_positive.square() * pairs.is_positive).sum()
        far = ((margin - pairs.to_negative).clamp_min(0).square() * pairs.is_negative).sum()
        return near, pairs.is_positive.sum(), far, pairs.is_negative.sum()

    def loss(self, *sums: Tensor, counts: Tensor) -> Tensor:
        near, positives, far, negatives = sums
        return 0.5 * (near / positives.clamp_min(1) + far / negatives.clamp_min(1))


class Distribution(Criterion):
    """Σ_t h⁺_t Σ_{k≤t} h⁻_k of the pairs' soft histograms (eqs. 14 to 16); it has no margin.

    Args:
        bins: τ, nodes of the histograms, over the range of all distances: [-1, 1] for probabilities, else what the
            batch's scores or distances allow.

    Raises:
        ValueError: bins other than a whole number of at least 2.
    """

    name = "distribution"

    def __init__(self, bins: Any = 100):
        self.bins = whole_number("bins", bins, 2, "a histogram needs a whole number of at least 2 nodes")

    def sums(self, pairs: Pairs, margin: float) -> tuple[Tensor, ...]:
        """Return the soft histograms (τ,) of both, each with its number of pairs.

        A distance is shared linearly between its two neighbouring nodes, so its gradient passes through (eqs. 14, 15).
        """
        near = self._histogram(pairs.to_positive, pairs.is_positive, pairs)
        far = self._histogram(pairs.to_negative, pairs.is_negative, pairs)
        return near, pairs.is_positive.sum(), far, pairs.is_negative.sum()

    def _histogram(self, distance: Tensor, is_pair: Tensor, pairs: Pairs) -> Tensor:
        place = (distance - pairs.lowest) * ((self.bins - 1) / (pairs.highest - pairs.lowest))
        below = place.detach().floor().clamp(0, self.bins - 2)
        to_next = place - below
        node, histogram = below.long().flatten(), distance.new_zeros(self.bins)
        histogram = histogram.scatter_add(0, node, ((1 - to_next) * is_pair).flatten())
        return histogram.scatter_add(0, node + 1, (to_next * is_pair).flatten())

    def loss(self, *sums: Tensor, counts: Tensor) -> Tensor:
        """How often a positive pair is at least as far apart as a negative one (eq. 16)."""
        near, positives, far, negatives = sums
        return (near / positives.clamp_min(1) * (far / negatives.clamp_min(1)).cumsum(0)).sum()

    def __repr__(self) -> str:
        return f"Distribution(bins={self.bins})"


class TermOptions(NamedTuple):
    """Options of the rectification term of one batch.

    Attributes:
        criterion: how anchors are compared with their hard samples.
        scope: `"joint"` or `"attribute"`.
        rho: ρ, largest share of the batch that the minority makes up.
        k: κ, hard positives and negatives per anchor.
        margin: m.
        by_label: the mean of the labels' means, else the mean over all triplets.
        widest: the largest difference that two scores can have; 1 for probabilities, from 0 to 1.
    """

    criterion: Criterion
    scope: Scope
    rho: float
    k: int
    margin: float
    by_label: bool
    widest: float

    @property
    def threshold(self) -> float:
        """The margin, or one that activates every hinge where the margin is larger than that."""
        return min(self.margin, 2 * self.widest)

    @property
    def apart(self) -> float:
        """What moves a score beyond the reach of any other's hinge."""
        return 8 * self.widest


CRITERIA: dict[str, type[Criterion]] = {c.name: c for c in (Relative, Absolute, Distribution, Ranking)}


def make_criterion(criterion: str | Criterion) -> Criterion:
    """Return a criterion object for a name of `CRITERIA`, or the object itself.

    Raises:
        ValueError: an unknown name, or something other than a name or an object.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        raise ValueError(
            f"criterion={criterion!r} is unknown: use one of {', '.join(map(repr, CRITERIA))}, or an object of a class "
            "derived from Criterion."
        )
    return CRITERIA[criterion]()
