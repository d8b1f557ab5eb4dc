"""The Class Rectification Loss as modules, and the imbalance measure that weighs it (arXiv:1804.10851, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import criteria
from ._checks import check_arguments, check_batch, choice, plain
from .mining import Hard, Level, Rows, Scope, membership, pairwise_distance, split_targets

__all__ = ["CRL", "CRLLoss", "Criterion", "ScoreSpace", "imbalance"]

CRITERIA = ("relative", "absolute", "distribution")
Criterion = Literal["relative", "absolute", "distribution"]
ScoreSpace = Literal["probability", "logit"]

# Attribute scope mines labels in slices, so that (anchors x κ) of one slice stays near this many entries.
_SLICE = 2**22


def imbalance(counts: Sequence[float] | Tensor, how: Literal["move", "fill", "ratio"] = "move") -> float:
    """Ω of the paper's α = η·Ω (eq. 8): "the minimum percentage of samples to make the classes uniform", as a fraction.

    The sentence has been read in three ways; the values are those of the 28 labels of HPA 2018.

    - `"move"`: ½·Σ|h_c/Σh - 1/C|, the share of labels to move to other classes. 0.476.
    - `"fill"`: 1 - Σh/(C·max h), the share of a uniform set that would have to be added. 0.859.
    - `"ratio"`: min h/max h. 0.00085. A known mistake, kept for comparison: it falls as imbalance grows.

    With Ω in percent and the paper's η = 0.01, α is this fraction.

    Args:
        counts: C numbers of positives h_c, ≥ 0, not all zero.
        how: one of the three.

    Returns:
        A float in [0, 1]; 0 for uniform counts (`"ratio"`: 1).

    Raises:
        ValueError: counts that are empty, negative, not finite or all zero; unknown how.

    Example:
        >>> imbalance([30, 10])
        0.25
    """
    choice("how", how, ("move", "fill", "ratio"))
    h = torch.as_tensor(counts, dtype=torch.float64).flatten()
    if not len(h) or not bool(h.isfinite().all()) or bool((h < 0).any()) or not float(h.sum()) > 0:
        raise ValueError(f"counts={h.tolist()}: give one finite count per class, none negative, not all zero.")
    if how == "move":
        return float((h / h.sum() - 1 / len(h)).abs().sum() / 2)
    return float(1 - h.sum() / (len(h) * h.max())) if how == "fill" else float(h.min() / h.max())


class CRL(nn.Module):
    """Class Rectification Loss, the rectification term alone (arXiv:1804.10851, sections 3.1 to 3.3).

    In every batch it finds the minority classes, takes each of their samples as an anchor, mines the anchor's hardest
    positives and negatives and pulls them apart:

    - `criterion="relative"` (eq. 9): mean over all triplets of max(0, m + d(a,+) - d(a,-));
    - `criterion="absolute"` (eq. 13): ½·(mean d(a,+)² + mean max(m - d(a,-), 0)²) over the pairs;
    - `criterion="distribution"` (eqs. 14-16): Σ_t h⁺_t Σ_{k≤t} h⁻_k of the pairs' soft histograms.

    The distances: at class level d(a,+) = |p_a - p_+| and d(a,-) = p_a - p_-, *signed*, on the anchor label's scores
    (eq. 10); at instance level ‖f_a - f_*‖₂ on the features (eq. 11).

    Args:
        k: κ, hard positives and hard negatives per anchor (paper: 25).
        rho: ρ, largest share of the batch that the minority makes up (paper: 0.5).
        margin: m. Default: class level 0.5 (paper, section 3.3), 2.0 in logit space, which is the same width where
            the sigmoid is steepest; instance level 2π/|Z| (eq. 12), |Z| the number of classes profiled together, C in
            joint scope and 2 in attribute scope. The distribution criterion has none.
        scope: `"joint"` profiles all labels together, `"attribute"` each as a binary attribute. See `minority_classes`.
        level: `"class"` mines by score, `"instance"` by feature distance.
        criterion: `"relative"`, `"absolute"` or `"distribution"`.
        score_space: `"probability"` (the paper: sigmoid, or softmax for class indices) or `"logit"`, the log-odds of
            that probability, whose gradient does not vanish with p·(1 - p) where labels are rare.
        bins: τ, nodes of the distribution criterion's histograms, over [-1, 1] for probabilities, else over the range
            that the batch's scores or distances allow.

    Call:
        `(logits, targets, features=None) -> scalar` in float32 (float64 for float64 logits), also under autocast; 0
        where there is no triplet. logits (n, C); targets (n, C) in [0, 1] (only exact ones are positives, only exact
        zeros are negatives) or (n,) class indices; features (n, d) at instance level.

    Attributes:
        counts: (C,) long, triplets of each label in the last call; None before the first.

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
    ):
        super().__init__()
        check_arguments(k, rho, scope, level)
        choice("criterion", criterion, CRITERIA)
        choice("score_space", score_space, ("probability", "logit"))
        if margin is not None and not 0 <= margin < math.inf:
            raise ValueError(f"margin={margin!r}: give a finite distance of at least 0, or None for the paper's.")
        if bins < 2:
            raise ValueError(f"bins={bins!r}: a histogram needs at least 2 nodes.")
        self.k, self.rho, self.margin, self.scope, self.level = k, rho, margin, scope, level
        self.criterion, self.score_space, self.bins = criterion, score_space, bins
        self.counts: Tensor | None = None

    def extra_repr(self) -> str:
        names = ("k", "rho", "margin", "scope", "level", "criterion", "score_space")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "counts": None}  # a batch has no place in a checkpoint

    def default_margin(self, n_classes: int) -> float:
        "m for C classes, where none was given."
        if self.margin is not None:
            return self.margin
        if self.level == "instance":
            return 2 * math.pi / (n_classes if self.scope == "joint" else 2)
        return 0.5 if self.score_space == "probability" else 2.0

    def scores(self, logits: Tensor, single_label: bool) -> Tensor:
        "What class level compares, (n, C): probabilities or log-odds; softmax of a single-label task, else sigmoid."
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
        logits, targets = plain(logits), plain(targets)
        features = None if features is None else plain(features)
        check_batch(logits, targets, features, "logits")
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits if logits.dtype == torch.float64 else logits.float()
            if logits.shape[0] == 0:
                self.counts = logits.new_zeros(logits.shape[1], dtype=torch.long)
                return logits.sum()
            scores = self.scores(logits, targets.ndim == 1)
            distance = None if features is None else pairwise_distance(features)
            y = membership(targets.detach(), logits.shape[1], logits.dtype)
            shared = (distance, self._span(scores, distance), self.default_margin(logits.shape[1]))
            width = logits.shape[1] if self.scope == "joint" else self._slice_width(*logits.shape)
            if width >= logits.shape[1]:
                self.counts, *sums = self._part(scores, y, *shared)
            else:
                slices = zip(scores.split(width, 1), y.split(width, 1), strict=True)
                part = self._part
                if self.level == "instance" or self.criterion != "relative":  # whose graph holds every pair
                    part = partial(checkpoint, part, use_reentrant=False)
                parts = (part(*tensors, *shared) for tensors in slices)
                counts, *sums = zip(*parts, strict=True)
                self.counts, sums = torch.cat(counts), map(sum, sums)
            if self.criterion == "relative":
                return criteria.relative_loss(*sums, self.counts)
            return getattr(criteria, f"{self.criterion}_loss")(*sums)

    def _slice_width(self, n: int, n_classes: int) -> int:
        "Labels that attribute scope mines at a time."
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
        self, scores: Tensor, y: Tensor, distance: Tensor | None, span: Tensor | float, margin: float
    ) -> tuple[Tensor, ...]:
        "Triplets per label and the criterion's sums for a slice of the labels."
        with torch.no_grad():
            rows = Rows.select(y, self.rho, self.scope)
            counts = rows.triplets(self.k, y.shape[1])
        if distance is None:
            scores = rows.scores(scores)
            with torch.no_grad():
                hard = Hard.by_score(rows, scores.detach(), self.k)
            taken, (own, near, far) = _take(scores, hard.anchor, hard.near, hard.far)
            if self.criterion == "relative":
                weights, active = criteria.relative_weights(
                    own, near, hard.near_bar, far, hard.far_bar, hard.row, margin
                )
                return counts, taken.dot(weights) + margin * active
            to_pos, to_neg = (own[:, None] - hard.each(near)).abs(), own[:, None] - hard.each(far)
        else:
            with torch.no_grad():
                hard = Hard.by_distance(rows, distance.detach(), self.k)
            _, (to_pos, to_neg) = _take(distance, hard.near, hard.far)
            if self.criterion == "relative":
                return counts, criteria.relative_sums(to_pos, hard.near_bar, to_neg, hard.far_bar, margin)
        pos = hard.near_bar == 0
        pairs = (to_pos, pos, to_neg, (hard.each(hard.far_bar) == 0) & pos.any(1, keepdim=True))
        if self.criterion == "distribution":
            low = 0.0 if distance is not None else -span
            return counts, *criteria.distribution_sums(*pairs, low, span, self.bins)
        return counts, *getattr(criteria, f"{self.criterion}_sums")(*pairs, margin)


def _take(matrix: Tensor, *places: Tensor) -> tuple[Tensor, list[Tensor]]:
    "Entries of a matrix at places in it, flattened, all in one gather: its gradient is one scatter."
    taken = matrix.flatten().gather(0, torch.cat([p.flatten() for p in places]))
    parts = taken.split_with_sizes([p.numel() for p in places])
    return taken, [t.view(p.shape) for t, p in zip(parts, places, strict=True)]


class CRLLoss(nn.Module):
    """L = α·L_crl + (1 - α)·L_base (paper, eq. 8): a complete loss function, for fastai or plain PyTorch.

    In a batch without any triplet L is L_base exactly. `reduction`, `activation` and `decodes` are those of the base
    loss, so `predict`, `get_preds(with_loss=True)` and `show_results` work. With `reduction="none"` and in `eval()`
    mode it returns the base loss alone: the rectification term belongs to a batch, not to an item. (fastai never
    switches a loss to `eval()`. `CRLCallback` is the way to keep `valid_loss` the plain base loss.)

    Args:
        base_loss: any loss of (logits, targets). Default: binary cross entropy for (n, C) targets, cross entropy for
            (n,) class indices, decided at the first batch.
        alpha: α in [0, 1], or `"auto"`: Ω of the labels seen so far, `imbalance(counts, "move")`.
        counts: positives per label of the training set, (C,), for `alpha="auto"`: fixes α instead of counting batches.
        **crl: arguments of `CRL`.

    Call:
        `(logits, targets, features=None) -> scalar`, see `CRL`.

    Raises:
        ValueError: alpha neither `"auto"` nor in [0, 1]; what `CRL` and `imbalance` raise.
    """

    def __init__(
        self,
        base_loss: Callable[..., Tensor] | None = None,
        alpha: float | Literal["auto"] = "auto",
        counts: Sequence[float] | Tensor | None = None,
        **crl: Any,
    ):
        super().__init__()
        self.alpha = imbalance(counts) if check_alpha(alpha) == "auto" and counts is not None else alpha
        self.crl = CRL(**crl)
        self.base_loss = base_loss
        self.seen: Tensor | None = None

    def forward(self, logits: Tensor, targets: Tensor, features: Tensor | None = None) -> Tensor:
        if self.base_loss is None:
            self.base_loss = default_base_loss(targets.ndim == 1)
        base = self.base_loss(logits, targets)
        if not self.training or getattr(self, "reduction", "mean") == "none":
            return base
        alpha = self._count(logits, targets) if self.alpha == "auto" else self.alpha
        return rectify(base, self.crl(logits, targets, features), self.crl.counts, alpha)

    @torch.no_grad()
    def _count(self, logits: Tensor, targets: Tensor) -> Tensor:
        "α from the labels of all batches so far, on their device."
        h = split_targets(plain(targets), logits.shape[1])[0].sum(0)
        self.seen = h if self.seen is None else self.seen.to(h.device) + h
        return (self.seen / self.seen.sum().clamp_min(1) - 1 / len(h)).abs().sum() / 2

    def _delegate(self, name: str, x: Tensor) -> Tensor:
        method = getattr(self.base_loss, name, None)
        if method is None:
            method = getattr(default_base_loss(isinstance(self.base_loss, nn.CrossEntropyLoss)), name)
        return method(x)

    def activation(self, x: Tensor) -> Tensor:
        "Probabilities of logits, as the base loss defines them."
        return self._delegate("activation", x)

    def decodes(self, x: Tensor) -> Tensor:
        "Decisions from probabilities, as the base loss defines them."
        return self._delegate("decodes", x)

    @property
    def reduction(self) -> str:
        return "mean" if self.base_loss is None else self.base_loss.reduction

    @reduction.setter
    def reduction(self, value: str) -> None:
        if self.base_loss is None:
            self.base_loss = default_base_loss(False)
        self.base_loss.reduction = value


def check_alpha(alpha: float | str) -> float | str:
    "`alpha`, or a ValueError if it is neither `auto` nor in [0, 1]."
    if alpha != "auto" and (isinstance(alpha, str) or not 0 <= alpha <= 1):
        raise ValueError(f'alpha={alpha!r}: the weight of the rectification term must be in [0, 1], or "auto".')
    return alpha


def default_base_loss(single_label: bool) -> Callable[..., Tensor]:
    "What the paper rectifies: cross entropy, binary for multi-label tasks."
    return CrossEntropyLossFlat() if single_label else BCEWithLogitsLossFlat()


def rectify(base: Tensor, crl: Tensor, counts: Tensor, alpha: float | Tensor) -> Tensor:
    "α·crl + (1 - α)·base, and base exactly where no triplet was mined (eq. 8)."
    alpha = torch.where(counts.sum() > 0, alpha, 0.0)
    return alpha * crl + (1 - alpha) * base
