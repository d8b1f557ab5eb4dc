"""Measures and influences against scikit-learn and plain loops; intervals against simulations of their coverage."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, recall_score

from fastai_crl.compare import stats
from fastai_crl.compare.stats import Difference, difference, measure
from fastai_crl.evaluate.metrics import calibration_error, macro_f1, mean_ap


def some_run(seed: int, n: int = 60, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of `n` images, three labels, two positives or more of each."""
    rng = np.random.default_rng(seed)
    true = rng.random((n, 3)) < [0.5, 0.3, 0.1]
    true[:2] = True
    true[2] = False
    scores = rng.random((n, 3)) * 0.6 + 0.3 * true
    return scores.round(1) if ties else scores, true


def by_weights(weighted, n: int, step: float = 1e-5) -> np.ndarray:
    """Derivatives of a function of the images' weights, one image after the other."""
    found = []
    for i in range(n):
        up, down = np.ones(n), np.ones(n)
        up[i], down[i] = 1 + step, 1 - step
        found.append((weighted(up) - weighted(down)) / (2 * step))
    return np.array(found)


def plain_ap(score: np.ndarray, true: np.ndarray, weight: np.ndarray) -> float:
    total = 0.0
    for s, y, w in zip(score, true, weight, strict=True):
        above = [(v, t) for p, t, v in zip(score, true, weight, strict=True) if p >= s]
        total += y * w * sum(v * t for v, t in above) / sum(v for v, _ in above)
    return total / (weight @ true)


def plain_f1(chosen: np.ndarray, true: np.ndarray, weight: np.ndarray) -> float:
    hits = sum(w for d, y, w in zip(chosen, true, weight, strict=True) if d and y)
    return 2 * hits / (weight @ true + weight @ chosen)


def plain_ece(confidence: np.ndarray, true: np.ndarray, weight: np.ndarray) -> float:
    gaps = [0.0] * 15
    for p, y, w in zip(confidence, true, weight, strict=True):
        gaps[next(b for b in range(15) if p <= (b + 1) / 15 or b == 14)] += w * (p - y)
    return sum(map(abs, gaps)) / weight.sum()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**16), st.booleans())
def test_measures_and_influences_are_those_of_plain_computation(seed, ties):
    scores, true = some_run(seed, 12, ties)
    chosen, n, sure = scores > 0.5, len(true), 0.97 * scores + 0.0123  # no bin of a mean error of 0, nor its edge
    found = {
        "ap": (stats.average_precision(scores, true), scores, plain_ap),
        "f1": (stats.f1(true, chosen), chosen, plain_f1),
        "recall": (stats.recall(true, chosen), chosen, lambda d, y, w: w @ (d & y) / (w @ y)),
        "ece": (stats.calibration(sure, true), sure, plain_ece),
    }
    for name, ((values, influence), predicted, weighted) in found.items():
        for c, (p, y) in enumerate(zip(predicted.T, true.T, strict=True)):
            by_hand = by_weights(lambda w, p=p, y=y, f=weighted: f(p, y, w), n)
            assert values[c] == pytest.approx(weighted(p, y, np.ones(n))), name
            np.testing.assert_allclose(influence[:, c], by_hand, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("single_label", [False, True])
def test_a_run_has_the_measures_of_the_package(single_label):
    scores, true = some_run(0, 80)
    if single_label:
        true = np.eye(3, dtype=bool)[np.random.default_rng(1).choice(3, 80, p=[0.6, 0.3, 0.1])]
        scores = (scores + true) / (scores + true).sum(1, keepdims=True)
    targets, counts = true.argmax(1) if single_label else true, np.array([50, 5, 20])
    found = measure(scores, true, single_label, counts, 80)
    assert found.values["mAP"] == pytest.approx(mean_ap(scores, targets)) == found.ap.mean()
    assert found.values["mAP, rarest third"] == pytest.approx(average_precision_score(true[:, 1], scores[:, 1]))
    assert found.values["macro-F1 at 0.5"] == pytest.approx(macro_f1(scores, targets))
    assert found.values["calibration error"] == pytest.approx(calibration_error(scores, targets))
    chosen = stats.fitted_decisions(scores, true, single_label, counts, 80)
    assert found.values["macro-F1, fitted"] == pytest.approx(f1_score(true, chosen, average="macro"))
    assert found.values["recall, rarest third"] == pytest.approx(recall_score(true[:, 1], chosen[:, 1]))
    if single_label:
        assert (chosen.sum(1) == 1).all()
    for name, influence in found.influence.items():
        assert influence.sum() == pytest.approx(0, abs=1e-9), name  # weights of one size change nothing


def test_decisions_do_not_see_their_own_image():
    scores, true = some_run(3, 40)
    first = stats.fitted_decisions(scores, true, False, true.sum(0), len(true))
    flipped = true.copy()
    flipped[7] = ~flipped[7]
    fold = stats.stratify([[str(c) for c in np.flatnonzero(r)] for r in true], np.arange(40), [0.2] * 5, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "stratify", lambda *args, **kwargs: fold)  # the same folds
        second = stats.fitted_decisions(scores, flipped, False, true.sum(0), len(true))
    assert (first[fold == fold[7]] == second[fold == fold[7]]).all()


def test_labels_that_say_nothing_are_left_out_and_a_run_that_diverged_has_no_measure():
    scores, true = some_run(0)
    true[:, 0] = True
    true[:, 2] = np.arange(60) == 3
    assert stats.measurable(true).tolist() == [False, True, False]
    found = measure(scores, true, False, true.sum(0), 60)
    assert len(found.ap) == 1 and found.values["mAP"] == pytest.approx(
        average_precision_score(true[:, 1], scores[:, 1])
    )
    diverged = measure(scores * np.nan, true, False, true.sum(0), 60)
    assert np.isnan(list(diverged.values.values())).all() and diverged.ap_influence.shape == found.ap_influence.shape


# ---- intervals ----
def test_without_images_the_interval_is_that_of_a_t_test():
    values = [0.01, 0.03, 0.02, 0.05]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert difference(values) == pytest.approx((0.0275, expected.low, expected.high))
    wider = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.99)
    assert difference(values, n_compared=5) == pytest.approx((0.0275, wider.low, wider.high))
    assert np.isnan(difference([0.01]).low) and difference([0.01]).verdict == "too few"
    with pytest.raises(ValueError, match="at least one seed"):
        difference([])


def plain_interval(values: np.ndarray, influence: np.ndarray) -> tuple[float, float]:
    """Variance and degrees of freedom, as the articles write them."""
    s, n = influence.shape
    variance = sum((v - sum(values) / s) ** 2 for v in values) / (s - 1) / s
    pairs = [(a, b) for a in range(s) for b in range(s) if a != b]
    covariance = max(0, sum(influence[a] @ influence[b] * n / (n - 1) for a, b in pairs) / len(pairs))
    return variance + covariance, (variance + covariance) ** 2 / (variance**2 / (s - 1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.integers(3, 8), st.floats(0, 2))
def test_with_images_it_is_that_of_obuchowski_rockette_and_hillis(seed, n_seeds, shared):
    rng = np.random.default_rng(seed)
    each = rng.normal(size=(n_seeds, 40)) + shared * rng.normal(size=40) + rng.normal(size=(n_seeds, 1))
    values, influence = each.mean(1), (each - each.mean(1, keepdims=True)) / 40
    variance, freedom = plain_interval(values, influence)
    half = scipy.stats.t.ppf(0.975, freedom) * variance**0.5
    assert difference(values, influence) == pytest.approx((values.mean(), values.mean() - half, values.mean() + half))


def test_fewer_than_three_seeds_have_an_interval_over_images_alone():
    rng = np.random.default_rng(0)
    each = rng.normal(size=(2, 50))
    found = difference([0.1, 0.3], (each - each.mean(1, keepdims=True)) / 50)
    assert found.high - found.mean == pytest.approx(1.96 * each.mean(0).std(ddof=1) / 50**0.5, rel=1e-3)


def missed(n_seeds: int, of_seeds: float, of_images: float, n: int = 200, times: int = 2000) -> float:
    """The share of comparisons whose interval leaves the truth, 0.3, out. Each image adds to a mean of its own."""
    rng, outside = np.random.default_rng([n_seeds, int(of_seeds), int(of_images)]), 0
    for _ in range(times):
        each = 0.3 + of_seeds * rng.normal(size=(n_seeds, 1)) + of_images * n**0.5 * rng.normal(size=n)
        values = each.mean(1)
        found = difference(values, (each - values[:, None]) / n)
        outside += not found.low <= 0.3 <= found.high
    return outside / times


@pytest.mark.parametrize("n_seeds", [3, 5, 8])
@pytest.mark.parametrize(("of_seeds", "of_images"), [(1, 0), (0, 1), (1, 1)], ids=["seeds", "images", "both"])
def test_the_truth_is_outside_in_one_comparison_of_twenty(n_seeds, of_seeds, of_images):
    assert 0.03 <= missed(n_seeds, of_seeds, of_images) <= 0.07


def simulated_map(n_seeds: int, times: int = 400, n: int = 300) -> float:
    """The same of mAP, of networks that differ by seed in how well they tell each label, on images drawn anew."""
    rng = np.random.default_rng(n_seeds)
    rates, gain = np.array([0.3, 0.1, 0.05]), 0.4

    def networks(true: np.ndarray) -> list[np.ndarray]:
        hard = rng.normal(size=(len(true), 3))  # what the networks of both arms find hard in an image
        each = [rng.normal(size=(len(true), 3)) for _ in range(2 * n_seeds)]
        skill = [1.2 + gain * (k % 2) + 0.15 * rng.normal() for k in range(2 * n_seeds)]
        return [s * true + 0.7 * hard + 0.7 * e for s, e in zip(skill, each, strict=True)]

    def aps(n: int) -> tuple[np.ndarray, np.ndarray]:
        true = rng.random((n, 3)) < rates
        true[:2] = True
        found = [stats.average_precision(x, true) for x in networks(true)]
        few = np.sqrt(true.sum(0) / (true.sum(0) - 1))
        values, influence = np.array([v.mean() for v, _ in found]), np.array([(i * few).mean(1) for _, i in found])
        return values[1::2] - values[::2], influence[1::2] - influence[::2]

    drawn = [aps(n) for _ in range(times)]
    truth = np.mean([values.mean() for values, _ in drawn])
    found = [difference(*each) for each in drawn]
    return np.mean([not d.low <= truth <= d.high for d in found])


@pytest.mark.parametrize("n_seeds", [3, 8])
def test_the_interval_of_mean_average_precision_holds_the_truth_too(n_seeds):
    assert 0.02 <= simulated_map(n_seeds) <= 0.09  # of 400 comparisons


def test_a_difference_says_what_it_is():
    assert str(Difference(0.1, 0.05, 0.15)) == "**+0.100** (+0.050 to +0.150)"
    assert str(Difference(-0.1, -0.2, 0.0)) == "-0.100 (-0.200 to +0.000)"
    assert str(Difference(0.1, np.nan, np.nan)) == "+0.100"
    found = [Difference(0.0, low, high).verdict for low, high in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1))]
    assert found == ["higher", "lower", "level"]
