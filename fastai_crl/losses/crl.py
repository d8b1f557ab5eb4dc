"""The rectification term: what the Class Rectification Loss adds to a loss (arXiv:1804.10851, sections 3.1 to 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import repeat
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastai_crl._checks import as_plain_tensor, check_arguments, check_batch, check_choice
from fastai_crl.losses import criteria
from fastai_crl.losses.hinge.loops import NUMBA, hinge_weights
from fastai_crl.losses.hinge.tensors import hinge_sum
from fastai_crl.mining.hard_samples import HardSamples, pairwise_distance, take
from fastai_crl.mining.memory import PositiveMemory
from fastai_crl.mining.profile import Level, Profile, Scope, limit, membership

__all__ = ["CRITERIA", "CRL", "Average", "Criterion", "ScoreSpace"]

CRITERIA = ("relative", "absolute", "distribution", "ranking")
Criterion = Literal["relative", "absolute", "distribution", "ranking"]
ScoreSpace = Literal["probability", "logit"]
Average = Literal["triplet", "label"]

# Attribute scope mines labels in slices, so that (anchors x κ) of one slice stays near this many entries.
_SLICE = 2**22


class CRL(nn.Module):
    """Class Rectification Loss, the rectification term alone (arXiv:1804.10851, sections 3.1 to 3.3).

    In every batch it finds the minority classes, takes each of their samples as an anchor, mines the anchor's hardest
    positives and negatives and pulls them apart:

    - `criterion="relative"` (eq. 9): mean over all triplets of max(0, m + d(a,+) - d(a,-));
    - `criterion="absolute"` (eq. 13): ½·(mean d(a,+)² + mean max(m - d(a,-), 0)²) over the pairs;
    - `criterion="distribution"` (eqs. 14-16): Σ_t h⁺_t Σ_{k≤t} h⁻_k of the pairs' soft histograms;
    - `criterion="ranking"` (class level; not in the paper): mean over all pairs of max(0, m - d(a,-)). Without d(a,+)
      nothing draws a label's confident positives towards its worst, and a lone positive is an anchor too.

    The distances: at class level d(a,+) = |p_a - p_+| and d(a,-) = p_a - p_-, *signed*, on the anchor label's scores
    (eq. 10); at instance level ‖f_a - f_*‖₂ on the features (eq. 11).

    Args:
        k: κ, hard positives and hard negatives per anchor (paper: 25).
        rho: ρ, largest share of the batch that the minority makes up (paper: 0.5).
        margin: m. Default: class level 0.5 (paper, section 3.3), for ranking 1.0 (no pair is ever far enough apart, so
            its gradient never stops), in logit space 2.0, which is the same width where the sigmoid is steepest;
            instance level 2π/|Z| (eq. 12), |Z| the number of classes profiled together, C in joint scope and 2 in
            attribute scope. The distribution criterion has none.
        scope: `"joint"` profiles all labels together, `"attribute"` each as a binary attribute. See `minority_classes`.
        level: `"class"` mines by score, `"instance"` by feature distance.
        criterion: `"relative"`, `"absolute"`, `"distribution"` or `"ranking"`.
        average: `"triplet"` (paper): the mean is over all triplets, so labels with more of them weigh more; `"label"`:
            each label's mean counts the same. For the criteria `"relative"` and `"ranking"`.
        score_space: `"probability"` (the paper: sigmoid, or softmax for class indices) or `"logit"`, the log-odds of
            that probability, whose gradient does not vanish with p·(1 - p) where labels are rare.
        bins: τ, nodes of the distribution criterion's histograms, over [-1, 1] for probabilities, else over the range
            that the batch's scores or distances allow.
        memory: past positives to keep per label. The batch's own anchors are compared with them too (as hard positives,
            with no gradient), so one positive in the batch is enough. 0: none, the paper's method.
        max_age: batches after which a past positive is forgotten.
        frequency: (C,) how common each label is in the training set. Joint scope then takes the labels in that order
            rather than in the order of the batch's own counts, which say little where batches are resampled.

    Call:
        `(logits, targets, features=None) -> scalar` in float32 (float64 for float64 logits), also under autocast; 0
        where there is no triplet. logits (n, C); targets (n, C) in [0, 1] (only exact ones are positives, only exact
        zeros are negatives) or (n,) class indices; features (n, d) at instance level. On a CPU the first call ever for
        relative or ranking at class level takes some seconds, in which numba compiles its loops.

    Attributes:
        counts: (C,) long, triplets of each label in the last call (`"ranking"`: pairs); None before the first.

    Raises:
        ValueError: unknown options, shapes that do not match, NaN or infinite logits or features, targets outside
            [0, 1]. On a GPU the value checks are asynchronous device assertions.
    """

    def __init__(
        self,
        k: int = 25,
        rho: float = 0.5,
        margin: float | None = None,
        scope: Scope = "joint",
        level: Level = "class",
        criterion: Criterion = "relative",
        score_space: ScoreSpace = "probability",
        bins: int = 100,
        memory: int = 0,
        max_age: int = 100,
        frequency: Sequence[float] | Tensor | None = None,
        average: Average = "triplet",
    ):
        super().__init__()
        check_arguments(k, rho, scope, level)
        check_choice("criterion", criterion, CRITERIA)
        check_choice("score_space", score_space, ("probability", "logit"))
        if margin is not None and not 0 <= margin < math.inf:
            raise ValueError(f"margin={margin!r}: give a finite distance of at least 0, or None for the paper's.")
        check_choice("average", average, ("triplet", "label"))
        if average == "label" and criterion not in ("relative", "ranking"):
            raise ValueError(f'average="label" needs criterion="relative" or "ranking", not {criterion!r}.')
        if criterion == "ranking" and (level == "instance" or memory):
            raise ValueError(
                f'criterion="ranking" compares scores with those of negatives: it has no level={level!r} and no use '
                f'for memory={memory!r}. Use level="class" and memory=0.'
            )
        if bins < 2:
            raise ValueError(f"bins={bins!r}: a histogram needs at least 2 nodes.")
        self.k, self.rho, self.margin, self.scope, self.level = int(k), rho, margin, scope, level
        self.criterion, self.score_space, self.bins, self.average = criterion, score_space, bins, average
        self.frequency = None if frequency is None else torch.as_tensor(frequency, dtype=torch.float32)
        self.memory, self.max_age = memory, max_age
        self.past = PositiveMemory(memory, max_age, level) if memory else None
        self.counts: Tensor | None = None

    def extra_repr(self) -> str:
        names = ("k", "rho", "margin", "scope", "level", "criterion", "score_space", "memory", "average")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "counts": None}  # a batch has no place in a checkpoint

    def reset(self) -> None:
        """Forget past batches."""
        self.counts = None
        if self.past is not None:
            self.past.reset()

    def default_margin(self, n_classes: int) -> float:
        """M for C classes, where none was given."""
        if self.margin is not None:
            return self.margin
        if self.level == "instance":
            return 2 * math.pi / (n_classes if self.scope == "joint" else 2)
        if self.score_space == "logit":
            return 2.0
        return 1.0 if self.criterion == "ranking" else 0.5

    def scores(self, logits: Tensor, single_label: bool) -> Tensor:
        """What class level compares, (n, C): probabilities or log-odds; softmax for single-label, else sigmoid."""
        if self.score_space == "probability":
            return logits.softmax(1) if single_label else logits.sigmoid()
        if not single_label:
            return logits
        log_p = logits.log_softmax(1)
        # log(1 - p): of the likeliest label, whose p may round to 1, it is the sum of the other labels' p.
        likeliest = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, log_p.argmax(1, keepdim=True), True)
        others = log_p.masked_fill(likeliest, -1e9)
        return log_p - torch.where(likeliest, others.logsumexp(1, keepdim=True), torch.log1p(-others.exp()))

    def forward(self, logits: Tensor, targets: Tensor, features: Tensor | None = None) -> Tensor:
        if self.level == "class":
            features = None
        elif features is None:
            raise ValueError('level="instance" compares embeddings: pass features of shape (n, d).')
        logits, targets = as_plain_tensor(logits), as_plain_tensor(targets)
        features = None if features is None else as_plain_tensor(features)
        check_batch(logits, targets, features, "logits")
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits if logits.dtype == torch.float64 else logits.float()
            if logits.shape[0] == 0:
                self.counts = logits.new_zeros(logits.shape[1], dtype=torch.long)
                return logits.sum()
            scores = self.scores(logits, targets.ndim == 1)
            distance = None if features is None else pairwise_distance(features)
            y = membership(targets.detach(), logits.shape[1], logits.dtype)
            shared = (features, distance, self._span(scores, distance), self.default_margin(logits.shape[1]))
            memory = None if self.past is None else self.past.read()
            width = logits.shape[1] if self.scope == "joint" else self._slice_width(*logits.shape)
            if width >= logits.shape[1]:
                self.counts, *sums = self._part(scores, y, memory, self.frequency, *shared)
            else:
                past = repeat(None) if memory is None else zip(*(t.split(width) for t in memory), strict=True)
                slices = zip(scores.split(width, 1), y.split(width, 1), past, repeat(None))
                part = self._part
                if self.level == "instance" or self.criterion in ("absolute", "distribution"):  # with every pair
                    part = partial(checkpoint, part, use_reentrant=False)
                parts = (part(*tensors, *shared) for tensors in slices)
                counts, *sums = zip(*parts, strict=True)
                self.counts, sums = torch.cat(counts), map(sum, sums)
            if self.past is not None and self.training:
                self.past.write(scores if features is None else features.to(scores.dtype), y == 1)
            if self.criterion in ("relative", "ranking"):
                return criteria.relative_loss(*sums, self.counts, self.average == "label")
            return getattr(criteria, f"{self.criterion}_loss")(*sums)

    def _slice_width(self, n: int, n_classes: int) -> int:
        """Labels that attribute scope mines at a time."""
        per_anchor = 2 * min(self.k, n) if self.level == "class" else n
        return max(1, min(n_classes, _SLICE // (max(1, n // 2) * per_anchor)))

    def _span(self, scores: Tensor, distance: Tensor | None) -> Tensor | float:
        """The largest distance there can be: the range of the distribution criterion's histograms.

        At least 0.01: equal scores span nothing, and the gradient is as steep as the range is small.
        """
        if distance is None and self.score_space == "probability":
            return 1.0
        largest = scores.detach().max() - scores.detach().min() if distance is None else distance.detach().max()
        return largest.clamp_min(0.01)

    def _part(
        self,
        scores: Tensor,
        y: Tensor,
        memory: tuple[Tensor, Tensor] | None,
        frequency: Tensor | None,
        features: Tensor | None,
        distance: Tensor | None,
        span: Tensor | float,
        margin: float,
    ) -> tuple[Tensor, ...]:
        """Triplets per label and the criterion's sums for a slice of the labels."""
        hinge, ranking = self.criterion in ("relative", "ranking"), self.criterion == "ranking"
        frequency = None if frequency is None else frequency.to(y.device)
        if NUMBA and hinge and distance is None and memory is None and y.device.type == "cpu":
            options = (
                limit(self.rho, len(y)),
                self.k,
                margin,
                self.scope == "attribute",
                ranking,
                self.average == "label",
            )
            weights, constant, counts = hinge_weights(scores.detach(), y, frequency, *options)
            return counts, scores.flatten().dot(weights) + constant
        past, valid = (None, None) if memory is None else memory
        with torch.no_grad():
            profile = Profile.of(y, self.rho, self.scope, frequency, valid, ranking)
            counts = profile.pairs(self.k) if ranking else profile.triplets(self.k)
            share = counts.clamp_min(1).to(y.dtype).reciprocal() if self.average == "label" else None
            counts = profile.by_label(counts, y.shape[1])
            past = past if past is None or profile.label is None else past.index_select(0, profile.label)
        if distance is None:
            scores = profile.scores(scores)
            if hinge:
                return counts, hinge_sum(profile, scores, past, self.k, margin, ranking, share)
            with torch.no_grad():
                hard = HardSamples.by_score(profile, scores.detach(), self.k, past)
            own, near, far = take((scores, past), hard.anchor, hard.near, hard.far)
            to_pos, to_neg = (own[:, None] - hard.each(near)).abs(), own[:, None] - hard.each(far)
        else:
            past = None if past is None else profile.distance_to(features, past)
            with torch.no_grad():
                hard = HardSamples.by_distance(
                    profile, distance.detach(), self.k, None if past is None else past.detach()
                )
            to_pos, to_neg = take((distance, past), hard.near, hard.far)
            if self.criterion == "relative":
                share = None if share is None else share.index_select(0, hard.row)
                return counts, criteria.relative_sums(to_pos, hard.near_bar, to_neg, hard.far_bar, margin, share)
        pos = hard.near_bar == 0
        pairs = (to_pos, pos, to_neg, (hard.each(hard.far_bar) == 0) & pos.any(1, keepdim=True))
        if self.criterion == "distribution":
            low = 0.0 if distance is not None else -span
            return counts, *criteria.distribution_sums(*pairs, low, span, self.bins)
        return counts, *getattr(criteria, f"{self.criterion}_sums")(*pairs, margin)
