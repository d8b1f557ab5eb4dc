"""What a trained network is worth, and what part of a difference between two is noise: of seeds and of images.

A measure comes with its *influence*: its derivative by the weight of each image (the infinitesimal jackknife; Efron,
"The jackknife, the bootstrap and other resampling plans", 1982, chapter 6). The sum of the squares estimates the
variance over images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from fastai_crl.data.stratify import stratify
from fastai_crl.evaluate import decide, fit_thresholds

MEASURES = (
    "mAP",
    "mAP, rarest third",
    "macro-F1, fitted",
    "macro-F1 at 0.5",
    "recall, rarest third",
    "calibration error",
)


class Difference(NamedTuple):
    """Mean of paired differences, and its interval; NaN ends where one pair has no interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`"higher"`, `"lower"`, `"level"` where the interval holds 0, or `"too few"` without an interval."""
        if np.isnan(self.low):
            return "too few"
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "level"

    def __str__(self) -> str:
        """As tables show it, in Markdown: bold where the interval leaves 0 out."""
        interval = "" if np.isnan(self.low) else f" ({self.low:+.3f} to {self.high:+.3f})"
        mark = "**" if self.verdict in ("higher", "lower") else ""
        return f"{mark}{self.mean:+.3f}{mark}{interval}"


def difference(values: ArrayLike, influence: ArrayLike | None = None, n_compared: int = 1) -> Difference:
    """Return the mean of paired differences and its 95 % interval, over seeds, and over images if influences are given.

    Seeds are to images what readers are to cases in a study of several readers who all read the same cases, and the
    interval is that of Obuchowski and Rockette (Commun. Stat. Simul. Comput. 24, 1995, 285-308) with the degrees of
    freedom of Hillis (Stat. Med. 26, 2007, 596-619). With s² the variance of the S values and c the covariance over
    images of the values of two seeds (mean over all pairs of seeds, at least 0), the variance of the mean is s²/S + c.
    Its quantile is Student's with (s²/S + c)²/((s²/S)²/(S-1)) degrees of freedom. s² holds the noise of images that
    each seed has for itself, c what all seeds share, so that nothing is counted twice. Without influences it is
    Student's t over the seeds. Not a bootstrap over seeds: of three to eight that is much too narrow.

    Args:
        values: (S,) differences, one for each seed.
        influence: (S, n), of each image on each value. With fewer than three seeds the interval is over images alone.
        n_compared: arms that are compared with the same one: the interval is widened so that with probability 0.95 all
            of theirs hold the truth (Bonferroni: each misses it in 0.05/n_compared).

    Raises:
        ValueError: no values.

    Example:
        >>> [round(v, 3) for v in difference([0.01, 0.03, 0.02, 0.05])]
        [0.028, 0.0, 0.055]
    """
    values = np.asarray(values, float)
    n_seeds, mean = len(values), float(np.mean(values)) if len(values) else np.nan
    if not n_seeds:
        raise ValueError("values is empty: give the difference of at least one seed.")
    tail = 1 - 0.05 / (2 * n_compared)
    of_seeds = values.var(ddof=1) / n_seeds if n_seeds > 1 else np.nan
    if influence is None:
        half = float(stats.t.ppf(tail, n_seeds - 1) * np.sqrt(of_seeds)) if n_seeds > 1 else np.nan
        return Difference(mean, mean - half, mean + half)
    influence = np.asarray(influence, float)
    n = influence.shape[1]
    of_mean = (influence.mean(0) ** 2).sum() * n / (n - 1)
    if n_seeds < 3:
        half = stats.norm.ppf(tail) * np.sqrt(of_mean)
        return Difference(mean, float(mean - half), float(mean + half))
    of_each = (influence**2).sum() * n / (n - 1)
    shared = max((n_seeds**2 * of_mean - of_each) / (n_seeds * (n_seeds - 1)), 0.0)
    total = of_seeds + shared
    freedom = (n_seeds - 1) * (total / of_seeds) ** 2 if of_seeds > 0 else np.inf
    half = float(stats.t.ppf(tail, freedom) * np.sqrt(total))
    return Difference(mean, mean - half, mean + half)


# ---- measures of each label, (C,), with the influence of each image, (n, C) ----
def average_precision(scores: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return average precision of each label, as scikit-learn computes it, and the influence of each image.

    Args:
        scores: (n, C).
        true: (n, C) bool, at least one positive in each column.
    """
    values, influence = np.empty(scores.shape[1]), np.empty(scores.shape)
    for c, (score, positive) in enumerate(zip(scores.T, true.T, strict=True)):
        order = np.argsort(-score, kind="stable")
        y, ranked = positive[order].astype(float), -score[order]
        first, last = np.searchsorted(ranked, ranked), np.searchsorted(ranked, ranked, side="right") - 1  # of the ties
        above, hits, n_positive = last + 1.0, np.cumsum(y)[last], y.sum()
        values[c] = (y * hits / above).sum() / n_positive
        # An image that is ranked as high as a positive, or higher, is in its precision.
        more_hits, more_above = (np.cumsum(v[::-1])[::-1][first] for v in (y / above, y * hits / above**2))
        influence[order, c] = (y * (hits / above + more_hits - values[c]) - more_above) / n_positive
    return values, influence


def f1(true: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return F1 of decisions, (n, C) bool, and the influence of each image, of decisions that are given."""
    either = (true.astype(float) + chosen).sum(0)
    values = 2 * (true & chosen).sum(0) / either
    return values, (2.0 * (true & chosen) - values * (true.astype(float) + chosen)) / either


def recall(true: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return recall of decisions, (n, C) bool, and the influence of each image."""
    values = (true & chosen).sum(0) / true.sum(0)
    return values, true * (chosen - values) / true.sum(0)


def calibration(confidence: np.ndarray, hit: np.ndarray, bins: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """Return the expected calibration error of each column (Guo et al., arXiv:1706.04599), and influences.

    Args:
        confidence: (n, C) probabilities.
        hit: (n, C) bool, whether it is so.
        bins: of equal width, open on the left.
    """
    gap, n = confidence - hit, len(confidence)
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    sums = [np.bincount(w, g, minlength=bins) for w, g in zip(which.T, gap.T, strict=True)]
    values = np.array([np.abs(s).sum() for s in sums]) / n
    signs = np.stack([np.sign(s)[w] for s, w in zip(sums, which.T, strict=True)], 1)
    return values, (signs * gap - values) / n


# ---- of a run ----
class Measured(NamedTuple):
    """A run's measures on the images that it was not trained on.

    Attributes:
        values: of each of `MEASURES`; NaN of a run that diverged.
        influence: (n,) of each.
        ap: (C,) average precision of the labels measured.
        ap_influence: (n, C).
    """

    values: dict[str, float]
    influence: dict[str, np.ndarray]
    ap: np.ndarray
    ap_influence: np.ndarray


def measurable(true: np.ndarray) -> np.ndarray:
    """Return the labels, (C,) bool, that say something: two positives at least, of which one has no variance."""
    return (true.sum(0) > 1) & ~true.all(0)


def fitted_decisions(
    probs: np.ndarray, true: np.ndarray, single_label: bool, counts: np.ndarray, n_train: int, folds: int = 5
) -> np.ndarray:
    """Return decisions (n, C) bool, each by thresholds that were fitted to the other folds: see `fit_thresholds`.

    Args:
        probs: (n, C) probabilities.
        true: (n, C) bool.
        single_label: one class each: by one shift of log frequencies, else by a threshold for each label.
        counts: (C,) training images of each label.
        n_train: training images.
        folds: parts of equal shares of each label.
    """
    names = [[str(c) for c in np.flatnonzero(row)] for row in true]
    fold = stratify(names, np.arange(len(true)), [1 / folds] * folds, seed=0)
    targets, chosen = true.argmax(1) if single_label else true, np.zeros_like(true)
    how: Mapping = {"how": "shift", "frequency": counts / n_train, "n": n_train} if single_label else {"how": "f1"}
    for k in range(folds):
        seen, held = fold != k, fold == k
        found = fit_thresholds(probs[seen], targets[seen], folds=min(5, seen.sum() // 2), repeats=1, **how).thresholds
        chosen[held] = decide(probs[held], found, single_label=single_label)
    return chosen


def measure(probs: np.ndarray, true: np.ndarray, single_label: bool, counts: np.ndarray, n_train: int) -> Measured:
    """Measure a run, on the labels that are `measurable`.

    Args:
        probs: (n, C) probabilities.
        true: (n, C) bool.
        single_label: each image has one class, that of the highest probability.
        counts: (C,) training images of each label: the rarest third of the labels has the fewest.
        n_train: training images.
    """
    known = measurable(true)
    if not np.isfinite(probs).all():
        none = np.full((len(true), known.sum()), np.nan)
        return Measured(dict.fromkeys(MEASURES, np.nan), dict.fromkeys(MEASURES, none[:, 0]), none[0], none)
    probs = probs.astype(float)
    fitted = fitted_decisions(probs, true, single_label, counts, n_train)[:, known]
    fixed, top = decide(probs, single_label=single_label)[:, known], probs.max(1, keepdims=True)
    sure = (top, np.take_along_axis(true, probs.argmax(1)[:, None], 1)) if single_label else (probs, true)
    counts, probs, true = counts[known], probs[:, known], true[:, known]
    rare = np.argsort(counts, kind="stable")[: -(-len(counts) // 3)]
    every, few = slice(None), np.sqrt(true.sum(0) / (true.sum(0) - 1))  # of m positives one is the mean's
    ap, of_image = average_precision(probs, true)
    found = {
        "mAP": ((ap, of_image * few), every),
        "mAP, rarest third": ((ap, of_image * few), rare),
        "macro-F1, fitted": (_widened(f1(true, fitted), few), every),
        "macro-F1 at 0.5": (_widened(f1(true, fixed), few), every),
        "recall, rarest third": (_widened(recall(true, fitted), few), rare),
        "calibration error": (calibration(*sure), every),
    }
    values = {name: float(value[labels].mean()) for name, ((value, _), labels) in found.items()}
    influence = {name: images[:, labels].mean(1) for name, ((_, images), labels) in found.items()}
    return Measured(values, influence, ap, of_image * few)


def _widened(found: tuple[np.ndarray, np.ndarray], factor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return found[0], found[1] * factor
