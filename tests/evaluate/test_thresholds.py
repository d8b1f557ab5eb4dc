"""Thresholds against an exhaustive search, their report against decisions made by hand, and their life in a learner."""

import math
from itertools import pairwise, product

import numpy as np
import pytest
import sklearn.metrics as skm
import torch
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, MSELossFlat
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from torch import nn

from fastai_crl.evaluate import own_measure
from fastai_crl.evaluate import thresholds as module
from fastai_crl.evaluate.decider import set_thresholds, threshold_in_use
from fastai_crl.evaluate.metrics import macro_f1
from fastai_crl.evaluate.predictions import predict_probabilities
from fastai_crl.evaluate.recall import RecallAtLeast
from fastai_crl.evaluate.thresholds import fit_thresholds
from fastai_crl.losses.baselines import make_loss
from fastai_crl.losses.crl_loss import CRLLoss


def sample(n=400, seed=0, rates=(0.4, 0.1, 0.02)):
    """Probabilities, as a network that is too careful with rare labels gives them, and targets."""
    rng = np.random.default_rng(seed)
    targets = rng.random((n, len(rates))) < rates
    scores = logit(np.array(rates)) - 1 + 3 * targets + rng.normal(size=targets.shape)
    return expit(scores).astype(np.float32), targets.astype(int)


def f1(targets, chosen):
    tp = sum(t and d for t, d in zip(targets, chosen, strict=True))
    return 2 * tp / (sum(targets) + sum(chosen)) if tp else 0


def balanced(targets, chosen):
    sides = [[d == t for t, d in zip(targets, chosen, strict=True) if t == side] for side in (0, 1)]
    return sum(map(np.mean, sides)) / 2


def exhaustive(p, y, measure):
    """Best value of all thresholds that differ, and the highest such threshold, by trying them all."""
    scores = sorted({0.0, 1.0, *p.tolist()}) + [1.0] * (1 in p)  # a threshold of 1 says no to a score of 1
    cuts = [(a + b) / 2 for a, b in pairwise(scores)]
    values = [measure(y, [s > t for s in p]) for t in cuts]
    best = max(values)
    return best, max(t for t, v in zip(cuts, values, strict=True) if v >= best - 1e-12)


@given(st.lists(st.tuples(st.integers(0, 10), st.booleans()), min_size=2, max_size=25), st.booleans())
@settings(max_examples=150, deadline=None)
def test_best_threshold_equals_exhaustive_search(rows, by_f1):
    p, y = np.array([r[0] / 10 for r in rows]), np.array([r[1] for r in rows])
    if y.all() or not y.any():
        return
    measure = f1 if by_f1 else balanced
    value, threshold = exhaustive(p, y, measure)
    found = module._best(*module._curve(p, y, "f1" if by_f1 else "balanced"))
    assert measure(y, p > found) == pytest.approx(value) and found == pytest.approx(threshold)


def test_curve_values_at_any_threshold():
    p, y = sample()
    curve, cuts = module._curve(p[:, 1], y[:, 1] == 1, "f1"), np.linspace(0, 1, 57)
    assert module._at(curve, cuts) == pytest.approx([f1(y[:, 1], p[:, 1] > t) for t in cuts])


@given(st.lists(st.integers(0, 10), min_size=1, max_size=30), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_rate_thresholds_equal_exhaustive_search(scores, rate):
    p = np.array(scores) / 10
    found = module._rate_cut(p, rate)
    cuts = [0.05 * (0 not in p), *(np.unique(p) + 0.05)]
    assert abs((p > found).mean() - rate) == pytest.approx(min(abs((p > t).mean() - rate) for t in cuts))


@pytest.mark.parametrize("decimals", [0, 1, 2])
def test_probabilities_of_exactly_0_and_1(decimals):
    """Sparse scores: the best of all thresholds, where the splits agree; above 0 always."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        p = np.round(rng.random((50, 1)) ** 2, decimals)
        y = rng.random((50, 1)) < 0.2 + 0.3 * p
        if not y.any():
            continue
        best = exhaustive(p[:, 0], y[:, 0], f1)[0]
        found = module._best(*module._curve(p[:, 0], y[:, 0], "f1"))
        assert f1(y[:, 0], p[:, 0] > found) == pytest.approx(best)
        fitted = fit_thresholds(p, y, shrink=0)
        assert 0 < fitted.thresholds[0] <= 1 and fitted.report.in_sample[0] <= best + 1e-12
        if decimals == 0 and p.any():  # only 0 and 1: yes to the ones is all that can be said
            assert fitted.report.in_sample[0] == pytest.approx(best)


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0])
def test_tiny_probabilities(scale):
    p = scale * np.array([0, 0, 0, 0.1, 0.2, 0.3, 0.8, 0.9, 1, 1] * 4)[:, None]
    y = p > 0.5 * scale
    assert fit_thresholds(p, y, shrink=0).report.in_sample[0] == 1


def test_neighbouring_floats_are_kept_apart():
    low = 0.3
    high = np.nextafter(low, 1)
    found = module._best(*module._curve(np.array([low, high]), np.array([False, True]), "f1"))
    assert low <= found < high


def test_common_threshold():
    """Infinite shrinkage: one threshold for all, about the one that an exhaustive search finds."""
    probs, targets = sample(rates=(0.1, 0.1, 0.1))
    probs = probs**2  # 0.5 is far too high
    found = fit_thresholds(probs, targets, shrink=np.inf).thresholds
    assert np.ptp(found) < 1e-12
    best = max(np.mean([f1(targets[:, c], probs[:, c] > t) for c in range(3)]) for t in np.unique(probs)[::4])
    assert macro_f1(probs, targets, found[0]) == pytest.approx(best, abs=0.02)
    assert macro_f1(probs, targets, 0.5) < best - 0.05


def test_shrinkage_by_positives():
    probs, targets = sample(n=1000)
    own = fit_thresholds(probs, targets, shrink=0).thresholds
    common = fit_thresholds(probs, targets, shrink=np.inf).thresholds
    found = fit_thresholds(probs, targets, shrink=20).thresholds
    share = (logit(found) - logit(common)) / (logit(own) - logit(common))
    positives = targets.sum(0) * 4 / 5  # of a split's samples
    assert share == pytest.approx(positives / (positives + 20), rel=0.15)
    assert share[0] > share[1] > share[2]


def test_label_without_positives_gets_the_common_threshold():
    probs, targets = sample()
    targets[:, 2] = 0
    thresholds, report = fit_thresholds(probs, targets, shrink=0, names=["a", "b", "c"])
    common = fit_thresholds(probs, targets, shrink=np.inf).thresholds
    assert thresholds[2] == pytest.approx(common[2]) and thresholds[0] != pytest.approx(common[0])
    assert report.loc["c", ["fixed", "in_sample", "cross_fitted", "optimism"]].isna().all()
    assert report.positives["c"] == 0 and report.index.tolist() == ["a", "b", "c"]


@pytest.mark.parametrize("how", ["f1", "balanced"])
def test_report(how):
    probs, targets = sample()
    thresholds, report = fit_thresholds(probs, targets, how)
    measure = skm.f1_score if how == "f1" else skm.balanced_accuracy_score
    for c in range(3):
        assert report.fixed[c] == pytest.approx(measure(targets[:, c], probs[:, c] > 0.5))
        assert report.in_sample[c] == pytest.approx(measure(targets[:, c], probs[:, c] > thresholds[c]))
    assert report.positives.tolist() == targets.sum(0).tolist() and report.threshold.tolist() == thresholds.tolist()
    assert report.optimism.tolist() == pytest.approx((report.in_sample - report.cross_fitted).tolist())
    assert report.cross_fitted.mean() > report.fixed.mean()


def test_cross_fitted_decisions_never_saw_the_sample():
    """By hand: one label, unshrunken, from the folds themselves."""
    probs, targets = sample(n=60, rates=(0.2,))
    p, y = probs[:, 0], targets[:, 0]
    scores = []
    for repeat in range(3):
        fold, chosen = module._folds(y, 4, 5 + repeat), np.zeros(60, bool)
        assert np.bincount(fold).tolist() == [15] * 4 and np.ptp(np.bincount(fold, y)) <= 1
        for k in range(4):
            chosen[fold == k] = p[fold == k] > exhaustive(p[fold != k], y[fold != k], f1)[1]
        scores.append(f1(y, chosen))
    report = fit_thresholds(probs, targets, shrink=0, folds=4, repeats=3, seed=5).report
    assert report.cross_fitted[0] == pytest.approx(np.mean(scores))


def test_cross_fitted_scores_hold_on_fresh_data():
    """20 rare labels: in the sample their thresholds look better than they are; cross-fitted, as good as they are."""
    rates = (0.02,) * 20
    probs, targets = sample(300, 1, rates)
    fresh = sample(20_000, 2, rates)[::-1]
    tuned, calm = (fit_thresholds(probs, targets, shrink=s) for s in (0, 20))
    worth = skm.f1_score(fresh[0], fresh[1] > tuned.thresholds, average="macro")
    assert tuned.report.optimism.mean() > 0.02
    assert tuned.report.optimism.mean() > 2 * calm.report.optimism.mean()
    assert tuned.report.in_sample.mean() > worth + 0.02
    assert abs(tuned.report.cross_fitted.mean() - worth) < (tuned.report.in_sample.mean() - worth) / 2


def test_rates():
    probs, targets = sample()
    rates = [0.3, 0.2, 0.05]
    thresholds, report = fit_thresholds(probs, targets, "rate", rates=rates)
    assert (probs > thresholds).mean(0) == pytest.approx(rates, abs=0.01)
    own = fit_thresholds(probs, targets, "rate").thresholds
    assert (probs > own).mean(0) == pytest.approx(targets.mean(0), abs=0.01)
    assert report.in_sample[0] == pytest.approx(f1(targets[:, 0], probs[:, 0] > thresholds[0]))


def test_same_seed_same_thresholds():
    probs, targets = sample()
    again = fit_thresholds(torch.tensor(probs), torch.tensor(targets).float())
    assert fit_thresholds(probs, targets).thresholds.tolist() == again.thresholds.tolist()
    assert fit_thresholds(probs, targets, seed=9).thresholds.tolist() != again.thresholds.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"how": "best"}, "how='best' is unknown"),
        ({"shrink": -1}, "shrink=-1"),
        ({"folds": 1}, "folds=1, repeats=4 for 400 samples"),
        ({"repeats": 0}, "repeats=0"),
        ({"repeats": 1.5}, "repeats=1.5: give a whole number"),
        ({"folds": 5.0}, "folds=5.0: give a whole number"),
        ({"shrink": "3"}, "shrink='3'"),
        ({"names": ["a"]}, "names has 1 names for 3 labels"),
        ({"folds": 201}, "folds=201"),
        ({"rates": [0.1, 0.1, 0.1]}, "leave one of them out"),
        ({"how": "rate", "rates": [0.1, 2, 0.1]}, r"rates=\[0.1, 2.0, 0.1\] do not fit 3 labels"),
        ({"targets": np.zeros((400, 3))}, "targets hold no 1"),
        ({"targets": np.full((400, 3), 0.3)}, r"no labels \(1 in all\): 0.3.*are 0 and 1"),
        ({"targets": np.zeros((400, 2), int)}, r"targets of shape \(400, 2\), int64, do not fit"),
        ({"targets": np.zeros(400, int)}, "single-label task takes the likeliest"),
        ({"probs": np.full((400, 3), 1.5)}, "probs run from 1.5 to 1.5"),
        ({"probs": np.full((400, 3), np.nan)}, "hold NaN"),
    ],
)
def test_bad_input(change, message):
    probs, targets = sample()
    with pytest.raises(ValueError, match=message):
        fit_thresholds(**{"probs": probs, "targets": targets} | change)


# ---- in a learner ----
def flat(n_classes):
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(4 * 16, n_classes))


LOSSES = {
    "torch": nn.BCEWithLogitsLoss,
    "function": lambda: nn.functional.binary_cross_entropy_with_logits,
    "fastai": BCEWithLogitsLossFlat,
    "rival": lambda: make_loss("focal"),
    "crl": lambda: CRLLoss(BCEWithLogitsLossFlat(), alpha=0.3),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_thresholds_in_a_learner(hpa_dls, tmp_path, loss):
    """Decisions of predict, get_preds and show_results follow them, before and after export."""
    learn = Learner(hpa_dls, flat(hpa_dls.c), loss_func=LOSSES[loss](), path=tmp_path)
    assert threshold_in_use(learn) == 0.5
    probs = predict_probabilities(learn)[0]
    thresholds = probs.double().quantile(0.7, dim=0).numpy()
    set_thresholds(learn, thresholds)
    expected = probs.double().numpy() > thresholds
    assert threshold_in_use(learn).tolist() == thresholds.tolist()
    assert learn.get_preds(with_decoded=True)[2].tolist() == expected.tolist()
    assert 0.2 < expected.mean() < 0.4 and (probs > 0.5).numpy().tolist() != expected.tolist()
    item = hpa_dls.valid_ds.items.iloc[2]
    labels, chosen, _ = learn.predict(item)
    assert chosen.tolist() == expected[2].tolist()
    assert list(labels) == [v for v, yes in zip(hpa_dls.vocab, expected[2], strict=True) if yes]
    learn.show_results(max_n=2)
    learn.export("x.pkl")
    again = load_learner(tmp_path / "x.pkl")
    assert threshold_in_use(again).tolist() == thresholds.tolist()
    assert again.predict(item)[1].tolist() == expected[2].tolist()
    fitted = fit_thresholds(np.tile([[0.2], [0.6]], (10, len(thresholds))), np.tile([[0], [1]], (10, len(thresholds))))
    set_thresholds(learn, fitted)  # as it is
    assert np.array_equal(threshold_in_use(learn), fitted.thresholds)
    set_thresholds(learn, 0.5)
    assert threshold_in_use(learn) == 0.5
    assert learn.get_preds(with_decoded=True)[2].tolist() == (probs > 0.5).tolist()


def test_thresholds_that_do_not_fit_the_learner(hpa_dls):
    learn = Learner(hpa_dls, flat(hpa_dls.c), loss_func=BCEWithLogitsLossFlat())
    with pytest.raises(ValueError, match=rf"do not fit {hpa_dls.c} labels"):
        set_thresholds(learn, [0.5, 0.5])
    with pytest.raises(ValueError, match=r"Thresholds out of range \(1 in all\): 1.5"):
        set_thresholds(learn, 1.5)
    for loss in (MSELossFlat(), make_loss("logit_adjusted", counts=[3, 4], single_label=True)):
        learn = Learner(hpa_dls, flat(hpa_dls.c), loss_func=loss)
        with pytest.raises(ValueError, match=f"{type(loss).__name__}.* takes no thresholds: use"):
            set_thresholds(learn, 0.3)
        assert threshold_in_use(learn) == 0.5


def test_learners_of_one_data_set_keep_apart(hpa_dls):
    """fastai's data blocks give all learners the same loss function."""
    first, second = (Learner(hpa_dls, nn.Linear(2, 2)) for _ in range(2))
    assert first.loss_func is second.loss_func
    set_thresholds(first, 0.3)
    assert threshold_in_use(first) == 0.3 and threshold_in_use(second) == 0.5


# ---- a measure of one's own ----


def mean_over_samples(targets, chosen):
    "Mean F1 of each sample's labels, which no label can be asked for alone."
    return skm.f1_score(targets, chosen, average="samples", zero_division=1)


def cost(targets, chosen):
    "A label that is missed costs ten times one that is given falsely."
    return -float(10 * (targets & ~chosen).sum() + (chosen & ~targets).sum())


def f2(targets, chosen):
    return skm.fbeta_score(targets, chosen, beta=2, average="macro", zero_division=0)


@pytest.mark.parametrize("measure", [f2, mean_over_samples, cost])
def test_a_measure_of_ones_own(measure):
    p, y = sample(300)
    fitted = fit_thresholds(p, y, measure, repeats=1)
    by_f1 = fit_thresholds(p, y).thresholds
    assert set(fitted.measure) == {"fixed", "in_sample", "cross_fitted"} and fit_thresholds(p, y).measure is None
    assert fitted.measure["fixed"] == pytest.approx(measure(y == 1, p > 0.5))
    assert fitted.measure["in_sample"] == pytest.approx(measure(y == 1, p > fitted.thresholds))
    assert fitted.measure["in_sample"] > max(fitted.measure["fixed"], measure(y == 1, p > by_f1))
    assert fitted.measure["cross_fitted"] > fitted.measure["fixed"]
    again = fit_thresholds(p, y, measure, repeats=1)
    assert np.array_equal(again.thresholds, fitted.thresholds)
    assert not np.array_equal(fit_thresholds(p, y, measure, repeats=1, seed=5).thresholds, fitted.thresholds)


@given(st.integers(0, 999), st.sampled_from([1, 2]))
@settings(max_examples=15, deadline=None)
def test_own_measures_find_the_best_thresholds_of_few_labels(seed, n_classes):
    p, y = sample(14, seed, (0.5, 0.4)[:n_classes])
    if not y.any():
        return
    grid = [sorted({0.0, *(t - 1e-9 for t in column), 1.0}) for column in p.astype(float).T]
    every = [cost(y == 1, p > np.array(t)) for t in product(*grid)]
    found = own_measure.fit_measure(cost, p.astype(float), y == 1, 0)
    assert cost(y == 1, p > found) == max(every)  # labels do not meet in it: each at its best is the best


def test_a_measure_of_few_samples_whose_labels_are_all_rare():
    y = np.eye(10, dtype=int)
    assert fit_thresholds(0.2 + 0.5 * y, y, cost, repeats=1).measure["in_sample"] == 0


def test_a_measure_that_forbids_a_yes_has_none():
    p, y = sample(200)
    found = own_measure.fit_measure(lambda targets, chosen: -chosen.sum(), p.astype(float), y == 1, 0)
    assert not (p > found).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, None, "0.5", [0.5], np.array([1.0, 2.0])])
def test_a_measure_gives_one_finite_number(value):
    with pytest.raises(ValueError, match=r"gave .*one finite number, the higher the better, of targets and decisions"):
        fit_thresholds(*sample(60), lambda targets, chosen: value)


def test_a_measure_and_a_recall_are_for_several_labels():
    for how in (cost, RecallAtLeast(0.9)):
        with pytest.raises(ValueError, match="targets are class indices"):
            fit_thresholds(np.full((20, 3), 1 / 3), np.arange(20) % 3, how)


# ---- a recall that is promised ----


@given(
    st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=60),
    st.sampled_from([0.5, 0.7, 0.9]),
    st.sampled_from([0.6, 0.9]),
)
@settings(max_examples=200, deadline=None)
def test_the_largest_threshold_of_a_recall(rows, recall, confidence):
    p, y = np.array([r[0] / 31 for r in rows]), np.array([r[1] for r in rows])
    found, promised = RecallAtLeast(recall, confidence)._fit(p, y)
    n = int(y.sum())
    tail = [sum(math.comb(n, i) * (1 - recall) ** i * recall ** (n - i) for i in range(m + 1)) for m in range(n)]
    may_miss = max((m for m in range(n) if tail[m] <= 1 - confidence + 1e-12), default=None)
    assert promised == (may_miss is not None) == (n >= RecallAtLeast(recall, confidence).needed)
    if n == 0:
        assert found == 0.5
        return
    missed = [sum(1 for s in p[y] if s <= t) for t in [0.0, *sorted(set(p.tolist()))]]
    best = max(m for m in missed if m <= (may_miss or 0))
    assert sum(1 for s in p[y] if s <= found) == best
    higher = [t for t in p if t > found]  # one at the next score would miss more
    assert higher and any(is_one and s == min(higher) for s, is_one in zip(p, y, strict=True))


def test_a_promised_recall_holds_as_often_as_promised():
    rng, how, kept = np.random.default_rng(0), RecallAtLeast(0.8, 0.9), []
    for _ in range(2000):
        scores = rng.random(60)
        threshold, promised = how._fit(scores, np.ones(60, bool))
        kept.append(1 - threshold >= 0.8)  # of uniform scores the recall of a threshold t is 1 - t
        assert promised
    assert 0.88 < np.mean(kept) < 0.98  # 0.9 or a little more, as positives are whole


def test_labels_with_too_few_positives_for_a_recall_are_named():
    p, y = sample(400)
    y[:, 2] = 0
    p = np.c_[p, p[:, 2]]
    y = np.c_[y, np.arange(400) < 3]
    with pytest.warns(UserWarning, match=r"0.9 cannot be promised with confidence 0.95 .2 in all.: c, d. They"):
        fitted = fit_thresholds(p, y, RecallAtLeast(0.9, 0.95), names=list("abcd"))
    assert fitted.report.promised.tolist() == [True, True, False, False]
    assert fitted.thresholds[2] == 0.5 and (p[:3, 3] > fitted.thresholds[3]).all()
    for c in (0, 1):
        assert fitted.report.in_sample.iloc[c] == np.mean(p[y[:, c] == 1, c] > fitted.thresholds[c]) >= 0.9
    assert np.isnan(fitted.report.in_sample.iloc[2]) and fitted.report.cross_fitted.iloc[0] > 0.85


def test_a_positive_of_score_0_is_found_by_no_threshold():
    found = RecallAtLeast(0.5, 0.6).fit(np.zeros((20, 1)), np.ones((20, 1), bool), np.ones((20, 1), bool))
    assert found[0].tolist() == [0] and found[1].tolist() == [False]


@pytest.mark.parametrize("options", [(0,), (1,), (1.5,), (np.nan,), ("0.9",), (0.9, 0), (0.9, 1.0), (None,)])
def test_what_a_recall_may_be(options):
    with pytest.raises(ValueError, match="give a number above 0 and below 1"):
        RecallAtLeast(*options)
