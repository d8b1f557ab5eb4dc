"""Thresholds of a network: one per label, or one number behind them all, fitted, and scored by cross-fitting."""

import numbers
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import expit
from sklearn.metrics import roc_curve
from sklearn.model_selection import StratifiedKFold

from fastai_crl._checks import check_choice, whole_number

from .by_label import balanced_by_label, f1_by_label, ratio, recall_by_label
from .decisions import Truth, as_array, as_probabilities, as_targets, decide
from .own_measure import Measure, fit_measure, measured
from .recall import RecallAtLeast
from .shift import frequency_odds, log_odds, midway, shift_thresholds, shifted_classes

How = Literal["f1", "balanced", "rate", "shift"]
_SHIFTS = np.linspace(-3, 3, 121)
_Curve = tuple[np.ndarray, np.ndarray]  # cuts, each the lowest score of a yes, descending; and the measure there


class FittedThresholds(NamedTuple):
    """Thresholds (C,), float64, and what they are worth: a DataFrame with one row per label.

    Its columns: `positives`; `threshold`; and F1, or balanced accuracy or recall where that was fitted, at 0.5
    (`fixed`), at `threshold` on the very samples it was fitted on (`in_sample`), and of decisions each made by
    thresholds that never saw the sample (`cross_fitted`); `optimism` = in_sample - cross_fitted, how much of the gain
    is over-fitting. NaN for a label without positives, so that `report.mean()` is over the others. Where some targets
    are unknown, `known` is how many are not.

    Example:
        >>> probs = [[0.1], [0.2], [0.3], [0.4]] * 5
        >>> fitted: FittedThresholds = fit_thresholds(probs, [[0], [0], [1], [1]] * 5)
        >>> fitted.thresholds.round(2).tolist(), fitted.report.fixed.item(), fitted.report.cross_fitted.item()
        ([0.22], 0.0, 1.0)
    """

    thresholds: np.ndarray
    report: pd.DataFrame

    @property
    def shift(self) -> float | None:
        """The one number behind thresholds that were fitted with `how="shift"`; None for others."""
        return self.report.attrs.get("shift")

    @property
    def measure(self) -> dict[str, float] | None:
        """A measure of one's own: `fixed`, `in_sample` and `cross_fitted`, as in the report; None for others."""
        return self.report.attrs.get("measure")


def fit_thresholds(
    probs: ArrayLike,
    targets: ArrayLike,
    how: How | RecallAtLeast | Measure = "f1",
    rates: ArrayLike | None = None,
    shrink: float = 3.0,
    folds: int = 5,
    repeats: int = 4,
    seed: int = 0,
    names: Sequence[str] | None = None,
    frequency: ArrayLike | None = None,
    n: int | ArrayLike | None = None,
) -> FittedThresholds:
    """Fit one threshold per label to predictions of samples that the network was not trained on.

    A label with few positives allows hardly any choice of its own: its best threshold on these few is luck. So it is
    fitted in each of `repeats` x `folds` splits, stratified by label; drawn towards the one threshold that is best for
    all labels together (highest mean score) with the weight shrink/(positives + shrink), on the scale of log-odds; and
    averaged over the splits, on the same scale. A label without positives or without negatives gets the common one.

    Args:
        probs: (n, C) probabilities, in [0, 1].
        targets: (n, C) of 0 and 1, ½ where unknown; for `"shift"` also (n,) class indices. Each label's threshold is
            fitted to its known targets.
        how: `"f1"`: highest F1; `"balanced"`: highest (true positive rate + true negative rate)/2; `"rate"`: as many
            yes as `rates` says; `"shift"`: highest mean F1 of all labels by one number s, the thresholds of logits +
            s·logit(frequency) (see `shift_thresholds`), for which labels with three positives are enough. With class
            indices: of the likeliest class of logits + s·log(frequency), the highest probability / threshold. A
            `RecallAtLeast`: the largest with that recall; column `promised` of the report says for which labels. Any
            function of (targets, decisions), (n, C) bool each, such as scikit-learn's: that of the highest value, as
            far as moving one label at a time finds it; the report has F1, and `measure` what the function says. It is
            called up to folds x repeats x (50 + 32 C) times.
        rates: (C,) shares of samples to say yes to, for `"rate"`: for instance the labels' rates in the training set.
            Default: those of `targets`.
        shrink: positives at which a label's own threshold and the common one weigh the same, ≥ 0; 0: no shrinkage,
            `inf`: one threshold for all. For `"f1"`, `"balanced"` and a function.
        folds: parts of a split, at least 2; thresholds are fitted on (folds - 1)/folds of the samples.
        repeats: splits to fit in, at least 1.
        seed: of the splits.
        names: C names for the report's rows; default the column numbers.
        frequency: (C,) shares of the training samples with each label, for `"shift"`. Default: those of `targets`.
        n: number of training samples, or (C,) of those of which a label is known, needed where a share is 0 or 1: see
            `shift_thresholds`.

    Returns:
        `FittedThresholds`: (thresholds, report). A probability above its threshold is a yes; see `decide`.

    Raises:
        ValueError: arrays that do not fit each other or their ranges, no positive at all, unknown how, options out of
            range, a function that gives no finite number, or that would see unknown targets. Labels
            whose recall cannot be promised are a warning.
    """
    probs, (targets, known, single_label) = _check(probs, targets, how, shrink, folds, repeats)
    seed = whole_number("seed", seed, 0, "give a whole number, from 0 to 2**32 - repeats", 2**32 - repeats)
    n_classes = probs.shape[1]
    if single_label and targets.sum(0).max() < folds:
        raise ValueError(f"folds={folds}, and no class has as many samples: give fewer folds, or more samples.")
    if names is not None and len(names) != n_classes:
        raise ValueError(f"names has {len(names)} names for {n_classes} labels: give one for each, in their order.")
    if rates is not None:
        if how != "rate":
            raise ValueError(f'rates are what how="rate" goes by, and how={how!r}: leave one of them out.')
        rates = _check_rates(rates, n_classes)
    if frequency is not None and how != "shift":
        raise ValueError(f'frequency is what how="shift" goes by, and how={how!r}: leave one of them out.')
    if how == "shift":
        if frequency is None:
            frequency, n = targets.sum(0) / known.sum(0).clip(2), known.sum(0)
        odds = frequency_odds(frequency, n_classes, single_label, n)
        fit_shift = _shift_fitter(probs, targets, odds, single_label)
    promise, measure = how if isinstance(how, RecallAtLeast) else None, how if callable(how) else None
    balanced = partial(balanced_by_label, known=known)
    score = recall_by_label if promise else balanced if how == "balanced" else f1_by_label
    splits, shifts, crossed, values = [], [], [], []
    for repeat in range(repeats):
        if single_label or measure:  # whole rows
            kind = targets.argmax(1) if single_label else _rarest(targets, folds)
            fold = np.repeat(_folds(kind, folds, seed + repeat)[:, None], n_classes, 1)
        else:
            fold = np.full(targets.shape, -1)
            for c, told in enumerate(known.T):
                fold[told, c] = _folds(targets[told, c], folds, seed + repeat)
        chosen = np.zeros_like(targets)
        for k in range(folds):
            seen = (fold != k) & known
            if how == "rate":
                shares = ratio((targets & seen).sum(0), seen.sum(0)) if rates is None else rates
                columns = zip(probs.T, seen.T, shares, strict=True)
                found = np.array([_rate_cut(p[m], share) for p, m, share in columns])
            elif how == "shift":
                shifts.append(fit_shift(seen))
                found = shift_thresholds(shifts[-1], frequency, single_label, n)
            elif promise:
                found = promise.fit(probs, targets, seen)[0]
            elif measure:
                found = fit_measure(measure, probs[seen[:, 0]], targets[seen[:, 0]], shrink)
            else:
                found = _fit_scores(probs, targets, seen, how, shrink)
            splits.append(found)
            chosen |= decide(probs, found, single_label=single_label) & known & ~seen
        crossed.append(score(targets, chosen))
        values.append(measured(measure, targets, chosen) if measure else 0.0)
    if how == "shift":
        thresholds = shift_thresholds(float(np.mean(shifts)), frequency, single_label, n)
    elif promise:  # of all samples: a mean would promise nothing
        thresholds, promised = promise.fit(probs, targets, known)
    else:
        thresholds = expit(np.mean([log_odds(t) for t in splits], 0))
    occurs = targets.any(0)
    fixed, in_sample = (decide(probs, cuts, single_label=single_label) & known for cuts in (0.5, thresholds))
    table = {"positives": targets.sum(0)} | ({} if known.all() else {"known": known.sum(0)})
    table |= {
        "threshold": thresholds,
        "fixed": np.where(occurs, score(targets, fixed), np.nan),
        "in_sample": np.where(occurs, score(targets, in_sample), np.nan),
        "cross_fitted": np.where(occurs, np.mean(crossed, 0), np.nan),
    }
    report = pd.DataFrame(table, index=pd.Index(range(n_classes) if names is None else names, name="label"))
    report["optimism"] = report.in_sample - report.cross_fitted
    if shifts:
        report.attrs["shift"] = float(np.mean(shifts))
    if measure:
        whole = {"fixed": fixed, "in_sample": in_sample}
        report.attrs["measure"] = {name: measured(measure, targets, made) for name, made in whole.items()}
        report.attrs["measure"]["cross_fitted"] = float(np.mean(values))
    if promise:
        report["promised"] = promised
        if few := list(report.index[~promised]):
            warnings.warn(promise.too_few(few), stacklevel=2)
    return FittedThresholds(thresholds, report)


# ---- fitting in one split: `seen`, (n, C) bool, are the samples of each label that it may see ----
def _curves(probs: np.ndarray, targets: np.ndarray, seen: np.ndarray, how: str) -> list[_Curve | None]:
    """Return the curve of each label, None where it has one side only."""
    columns = zip(probs.T, targets.T, seen.T, strict=True)
    return [_curve(p[m], y[m], how) if 0 < y[m].sum() < m.sum() else None for p, y, m in columns]


def _shift_fitter(
    probs: np.ndarray, targets: np.ndarray, odds: np.ndarray, single_label: bool
) -> Callable[[np.ndarray], float]:
    """Return the function of `seen` that gives the shift of the highest mean F1; of several the one nearest to 0."""
    classes, true = shifted_classes(probs, odds, _SHIFTS) if single_label else None, targets.argmax(1)

    def values(seen: np.ndarray) -> list[np.ndarray]:
        if classes is None:
            curves = zip(_curves(probs, targets, seen, "f1"), odds, strict=True)
            return [_at(curve, expit(-_SHIFTS * o)) for curve, o in curves if curve is not None]
        rows = seen[:, 0]
        return list(np.transpose([_class_f1(chosen[rows], true[rows], len(odds)) for chosen in classes]))

    def fit(seen: np.ndarray) -> float:
        mean = np.mean(values(seen) or [np.zeros(len(_SHIFTS))], 0)
        best = _SHIFTS[mean >= mean.max() - 1e-12]
        return float(best[np.abs(best).argmin()])

    return fit


def _class_f1(chosen: np.ndarray, true: np.ndarray, n_classes: int) -> np.ndarray:
    """`f1_by_label` of class indices, (C,): for every shift in every split scikit-learn's would take long."""
    hits, predicted, there = (np.bincount(x, minlength=n_classes) for x in (true[chosen == true], chosen, true))
    return 2 * hits / np.maximum(predicted + there, 1)


def _fit_scores(probs: np.ndarray, targets: np.ndarray, seen: np.ndarray, how: str, shrink: float) -> np.ndarray:
    curves = _curves(probs, targets, seen, how)
    known = [curve for curve in curves if curve is not None]
    if not known:
        return np.full(len(curves), 0.5)
    edges = np.unique(np.quantile(probs[targets & seen], np.linspace(0, 1, 101)))
    edges = edges[edges > 0]
    cuts = midway(np.r_[0, edges[:-1]], edges) if len(edges) else np.array([0.5])
    common = cuts[np.mean([_at(curve, cuts) for curve in known], 0).argmax()]
    own = np.array([common if curve is None else _best(*curve) for curve in curves])
    weight = 1 / (1 + shrink / np.maximum((targets & seen).sum(0), 1))
    return expit(weight * log_odds(own) + (1 - weight) * log_odds(common))


def _curve(p: np.ndarray, y: np.ndarray, how: str) -> _Curve:
    fpr, tpr, cuts = roc_curve(y, p, drop_intermediate=False)
    positives = y.sum()
    negatives = len(y) - positives
    tp, fp = np.rint(tpr * positives), np.rint(fpr * negatives)  # whole numbers, so that ties are ties
    if how == "balanced":
        return cuts, 0.5 + (tp * negatives - fp * positives) / (2 * positives * negatives)
    return cuts, 2 * tp / (tp + fp + positives)


def _best(cuts: np.ndarray, values: np.ndarray) -> float:
    """Of the thresholds with the best value, the highest, midway between two scores."""
    i = values[cuts > 0].argmax()  # no threshold is below a score of 0
    return float(midway(np.r_[cuts, 0][i + 1], min(cuts[i], 1)))


def _at(curve: _Curve, thresholds: np.ndarray) -> np.ndarray:
    """The curve's values where a score above a threshold is a yes."""
    cuts, values = curve
    return values[np.searchsorted(-cuts, -thresholds) - 1]


def _rate_cut(p: np.ndarray, rate: float) -> float:
    scores = np.unique(p)
    cuts = midway(np.r_[0, scores], np.r_[scores, 1])  # below each score, and above all
    yes = len(p) - np.searchsorted(np.sort(p), cuts, side="right")
    return float(cuts[np.abs(yes - rate * len(p)).argmin()])


def _folds(y: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold of each sample, (n,), every fold with its share of the positives; fewer than `folds` of both: one each."""
    if max(y.sum(), len(y) - y.sum()) < folds and y.dtype == bool:
        return np.arange(len(y)) % folds
    fold = np.empty(len(y), int)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # the shrinkage is there for these
        for k, (_, test) in enumerate(StratifiedKFold(folds, shuffle=True, random_state=seed).split(y, y)):
            fold[test] = k
    return fold


def _rarest(targets: np.ndarray, folds: int) -> np.ndarray:
    """Return the rarest label of each sample, (n,), C for one without any; all alike where none has `folds` samples."""
    rarity = np.where(targets, targets.sum(0), len(targets) + 1)
    label = np.where(targets.any(1), rarity.argmin(1), targets.shape[1])
    return label if np.bincount(label).max() >= folds else np.zeros_like(label)


def _check_rates(rates: ArrayLike, n_classes: int) -> np.ndarray:
    rates = as_array(rates).astype(float)
    if rates.shape != (n_classes,) or not ((rates >= 0) & (rates <= 1)).all():
        raise ValueError(f"rates={rates.tolist()} do not fit {n_classes} labels: give one share in [0, 1] per label.")
    return rates


def _check(
    probs: ArrayLike, targets: ArrayLike, how: Any, shrink: float, folds: int, repeats: int
) -> tuple[np.ndarray, Truth]:
    if not callable(how) and not isinstance(how, RecallAtLeast):
        check_choice("how", how, get_args(How))
    probs = as_probabilities(probs).astype(float)
    truth = as_targets(targets, probs.shape)
    if callable(how) and not truth.known.all():
        raise ValueError(f"how={how!r} cannot leave out targets that are unknown: give a name, or a RecallAtLeast.")
    if truth.single_label and how != "shift":
        raise ValueError(
            f"targets are class indices, and how={how!r}: a single-label task takes the likeliest class, and "
            'how="shift" fits what is added to its logits.'
        )
    if not truth.targets.any():
        raise ValueError("targets hold no 1: there is nothing to fit to.")
    if not isinstance(shrink, numbers.Real) or not shrink >= 0:
        raise ValueError(f"shrink={shrink!r}: give a number of positives, 0 or more, that weigh as much as the others.")
    rule = "give a whole number, at least "
    folds, repeats = whole_number("folds", folds, 1, f"{rule}2"), whole_number("repeats", repeats, 0, f"{rule}1")
    if folds < 2 or repeats < 1 or len(probs) < 2 * folds:
        raise ValueError(
            f"folds={folds}, repeats={repeats} for {len(probs)} samples: give at least 2 folds, 1 repeat, and 2 "
            "samples per fold."
        )
    return probs, truth
