"""The rectification term: what the Class Rectification Loss adds to a loss (arXiv:1804.10851, sections 3.1 to 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastai_crl._checks import Batch, check_arguments, check_choice, check_per_label, features_of
from fastai_crl.mining.hard_samples import pairwise_distance
from fastai_crl.mining.profile import Level, Scope, membership

from .criteria import CRITERIA, Average, Criterion, ScoreSpace, TermOptions, make_criterion
from .hinge import hinge_weights
from .pairs import pair_sums, span_of

# Attribute scope lays the pairs of labels out in slices, so that (anchors x κ) of one stays near this many entries.
_SLICE = 2**22
# Log-odds beyond this lose their differences; a hinge reaches no further.
_BOUND = 1e20


class Rectified(NamedTuple):
    """The rectification term of a batch.

    Attributes:
        loss: scalar.
        triplets: (C,) long, of each label (pairs, for ranking).
    """

    loss: Tensor
    triplets: Tensor


class CRL(nn.Module):
    """Class Rectification Loss, the rectification term alone (arXiv:1804.10851, sections 3.1 to 3.3).

    In every batch it finds the minority classes, takes each of their samples as an anchor, mines the anchor's hardest
    positives and negatives and pulls them apart:

    - `criterion="relative"` (eq. 9): mean over all triplets of max(0, m + d(a,+) - d(a,-));
    - `criterion="absolute"` (eq. 13): ½·(mean d(a,+)² + mean max(m - d(a,-), 0)²) over the pairs;
    - `criterion="distribution"` (eqs. 14-16): Σ_t h⁺_t Σ_{k≤t} h⁻_k of the pairs' soft histograms;
    - `criterion="ranking"` (class level; not in the paper): mean over all pairs of max(0, m - d(a,-)), see `Ranking`.

    The distances: at class level d(a,+) = |p_a - p_+| and d(a,-) = p_a - p_-, *signed*, on the anchor label's scores
    (eq. 10); at instance level ‖f_a - f_*‖₂ on the features (eq. 11).

    Args:
        k: κ, hard positives and hard negatives per anchor (paper: 25).
        rho: ρ, largest share of the batch that the minority makes up. Default: the criterion's (paper: 0.5; ranking 1).
        margin: m. Default: the criterion's. Class level 0.5 (paper, section 3.3), for ranking 1.0, in logit space 2.0,
            which is the same width where the sigmoid is steepest; instance level 2π/|Z| (eq. 12), |Z| the number of
            classes profiled together, C in joint scope and 2 in attribute scope. The distribution criterion has none.
        scope: `"joint"` profiles all labels together, `"attribute"` each as a binary attribute. See `minority_classes`.
        level: `"class"` mines by score, `"instance"` by feature distance.
        criterion: `"relative"`, `"absolute"`, `"distribution"`, `"ranking"`, or an object of your own class derived
            from `Criterion`.
        average: `"triplet"` (paper): the mean is over all triplets, so labels with more of them weigh more; `"label"`:
            each label's mean counts the same. Default: the criterion's, `"label"` for ranking. For `"relative"` and
            `"ranking"`, and criteria of your own that say so.
        score_space: `"probability"` (the paper: sigmoid, or softmax for class indices) or `"logit"`, the log-odds of
            that probability, whose gradient does not vanish with p·(1 - p) where labels are rare.
        frequency: (C,) how common each label is in the training set. Joint scope then takes the labels in that order
            rather than in the order of the batch's own counts, which say little where batches are resampled.
        shift: (C,) what the base loss adds to the logits, such as log frequencies; scores are then formed from the
            logits that the base loss sees.

    Call:
        `(logits, targets, features=None) -> scalar` in float32 (float64 for float64 logits), also under autocast; 0
        where there is no triplet. `loss_and_triplets` returns the triplets of each label too. logits (n, C); targets
        (n, C) in [0, 1] (only exact ones are positives, only exact zeros are negatives) or (n,) class indices; features
        (n, d) at instance level. With one logit per item, (n, 1) or (n,), targets (n, 1) or (n,) are one binary label.

    Attributes:
        criterion: the `Criterion` object.
        frequency, shift: buffers, which move with `to` and are in `state_dict`.

    Raises:
        ValueError: unknown options, shapes that do not match, NaN or infinite logits or features, targets outside
            [0, 1]. On a GPU the value checks are asynchronous device assertions.
    """

    frequency: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        k: int = 25,
        rho: float | None = None,
        margin: float | None = None,
        scope: Scope = "joint",
        level: Level = "class",
        criterion: str | Criterion = "relative",
        score_space: ScoreSpace = "probability",
        frequency: Sequence[float] | Tensor | None = None,
        average: Average | None = None,
        shift: Sequence[float] | Tensor | None = None,
    ):
        super().__init__()
        self.criterion = make_criterion(criterion)
        self.rho = self.criterion.rho if rho is None else rho
        self.average: Average = self.criterion.average if average is None else average
        check_arguments(k, self.rho, scope, level)
        check_choice("score_space", score_space, ("probability", "logit"))
        check_choice("average", self.average, ("triplet", "label"))
        if margin is not None and not 0 <= margin < math.inf:
            raise ValueError(f"margin={margin!r}: give a finite distance of at least 0, or None for the criterion's.")
        self.k, self.margin, self.scope, self.level, self.score_space = int(k), margin, scope, level, score_space
        self._check_criterion()
        self.register_buffer("frequency", check_per_label("frequency", frequency, lowest=0))
        self.register_buffer("shift", check_per_label("shift", shift))

    def _check_criterion(self) -> None:
        """Raise ValueError for options that the criterion does not take."""
        criterion, name = self.criterion, self.criterion.name
        if self.average not in criterion.averages:
            fit = " or ".join(f'"{n}"' for n, c in CRITERIA.items() if self.average in c.averages)
            raise ValueError(
                f'average="{self.average}" needs criterion={fit}, not {name!r}, whose `averages` are '
                f"{criterion.averages}: give one of those, or another criterion."
            )
        if self.level not in criterion.levels:
            served = " and ".join(map(repr, criterion.levels))
            raise ValueError(
                f"criterion={name!r} has no level={self.level!r}: it serves {served}. "
                'Give another criterion, such as "relative".'
            )

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that make an equal, fresh `CRL`."""
        names = ("k", "rho", "margin", "scope", "level", "criterion", "score_space", "frequency", "average", "shift")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        shown = {**self.options, "criterion": self.criterion.name}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if name not in ("frequency", "shift"))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("frequency", "shift"):  # an object that has none takes the state's
            if getattr(self, name) is None and (saved := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(saved))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def default_margin(self, n_classes: int) -> float:
        """Return m for C classes: the margin given, or the criterion's."""
        if self.margin is not None:
            return self.margin
        return self.criterion.margin(self.level, self.score_space, self.scope, n_classes)

    def scores(self, logits: Tensor, single_label: bool) -> Tensor:
        """What class level compares, (n, C): probabilities or log-odds; softmax for single-label, else sigmoid."""
        if self.score_space == "probability":
            return logits.softmax(1) if single_label else logits.sigmoid()
        if not single_label:
            return logits
        log_p = logits.log_softmax(1)
        # log(1 - p): of the likeliest label, whose p may round to 1, it is the sum of the other labels' p.
        likeliest = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, log_p.argmax(1, keepdim=True), True)
        others = log_p.masked_fill(likeliest, -torch.inf)
        return log_p - torch.where(likeliest, others.logsumexp(1, keepdim=True), torch.log1p(-others.exp()))

    @property
    def bound(self) -> float | None:
        """The largest size of a logit that can be compared; None for no bound."""
        return _BOUND if self.score_space == "logit" else None

    def forward(self, logits: Tensor, targets: Tensor, features: Tensor | None = None) -> Tensor:
        return self.loss_and_triplets(logits, targets, features).loss

    def loss_and_triplets(self, logits: Tensor, targets: Tensor, features: Tensor | None = None) -> Rectified:
        """Return the term with the triplets of each label; arguments and errors are those of a call."""
        return self.rectify(Batch.of(logits, targets, features_of(self.level, features), bound=self.bound))

    def rectify(self, batch: Batch, shift: Tensor | None = None) -> Rectified:
        """Return the term of a batch that has been checked.

        Args:
            batch: with features at instance level; one that is broken has no triplets.
            shift: (C,) added to the logits in place of the `shift` given at the start; None for that.

        Raises:
            ValueError: frequency or shift of another length than C.
        """
        logits, targets, features, broken = batch
        n, n_classes = logits.shape
        shift = self.shift if shift is None else shift
        for name, values in (("frequency", self.frequency), ("shift", shift)):
            if values is not None and len(values) != n_classes:
                raise ValueError(f"{name} has {len(values)} values, but logits {n_classes} columns: give one each.")
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits if logits.dtype == torch.float64 else logits.float()
            if n == 0:
                return Rectified(logits.sum(), torch.zeros(n_classes, dtype=torch.long, device=logits.device))
            scores = self.scores(logits if shift is None else logits + shift.to(logits), targets.ndim == 1)
            y = membership(targets.detach(), n_classes, logits.dtype)
            y = y if broken is None else y.masked_fill(broken, 0.5)  # neither positives nor negatives: no triplets
            distance = None if self.level == "class" or features is None else pairwise_distance(features)
            margin, by_label = self.default_margin(n_classes), self.average == "label"
            widest = 1.0 if self.score_space == "probability" else 2 * _BOUND
            options = TermOptions(self.criterion, self.scope, self.rho, self.k, margin, by_label, widest)
            if not self.criterion.hinge or distance is not None:
                return self._pairs(scores, y, distance, options)
            weights, active, triplets = hinge_weights(scores.detach(), y, self.frequency, options)
            product = scores.flatten().dot(weights.flatten())
            return Rectified(torch.add(product, active, alpha=margin), triplets)

    def _pairs(self, scores: Tensor, y: Tensor, distance: Tensor | None, options: TermOptions) -> Rectified:
        """Any other criterion: its sums over the pairs of all labels at once, or of slices added up."""
        n, n_classes = scores.shape
        span = span_of(scores, distance, self.score_space)
        part = partial(pair_sums, distance=distance, span=span, options=options)
        width = n_classes if self.scope == "joint" else self._slice_width(n, n_classes)
        if width >= n_classes:
            triplets, *sums = part(scores, y, self.frequency)
        else:
            part = partial(checkpoint, part, use_reentrant=False)
            slices = zip(scores.split(width, 1), y.split(width, 1), strict=True)
            each, *of_each = zip(*(part(*tensors, None) for tensors in slices), strict=True)
            triplets, sums = torch.cat(each), [sum(values[1:], values[0]) for values in of_each]
        return Rectified(self.criterion.loss(*sums, counts=(triplets > 0) if options.by_label else triplets), triplets)

    def _slice_width(self, n: int, n_classes: int) -> int:
        """Labels that attribute scope lays out at a time."""
        per_anchor = 2 * min(self.k, n) if self.level == "class" else n
        return max(1, min(n_classes, _SLICE // (max(1, n // 2) * per_anchor)))
