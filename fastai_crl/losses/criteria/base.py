"""What a criterion is, and what it compares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from fastai_crl.mining.profile import Level, Scope

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
        uses_memory: past positives make sense.
        hinge: at class level the sum is that of max(0, m + d(a,+) - d(a,-)), or with `lone_positive` that of
            max(0, m - d(a,-)): the fast engines of `losses.hinge` serve it and `sums` is not called. A
            derived class with `sums` of its own is not served, unless it says so again.

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
    uses_memory: ClassVar[bool] = True
    hinge: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "sums" in vars(cls) and "hinge" not in vars(cls):
            cls.hinge = False  # sums of its own are not those of the class it is derived from

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
