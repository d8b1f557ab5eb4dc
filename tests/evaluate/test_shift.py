"""One number for all labels, and the way back from adjusted logits, against analytic posteriors and plain search."""

import numpy as np
import pytest
import torch
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from scipy.special import expit, logit, softmax
from scipy.stats import norm
from sklearn.metrics import f1_score
from torch import nn

from fastai_crl.evaluate.decisions import thresholds_of
from fastai_crl.evaluate.shift import frequency_odds, shift_thresholds, training_probabilities
from fastai_crl.evaluate.thresholds import fit_thresholds
from fastai_crl.labels import label_counts
from fastai_crl.learner import CRLLearner

FREQUENCY = np.array([0.5, 0.2, 0.05, 0.01])


def sample(n=3000, seed=0, frequency=FREQUENCY, apart=2.5):
    """Calibrated probabilities: scores of N(0, 1), those of positives of N(apart, 1)."""
    rng = np.random.default_rng(seed)
    targets = rng.random((n, len(frequency))) < frequency
    x = rng.normal(size=targets.shape) + apart * targets
    return expit(logit(frequency) + apart * x - apart**2 / 2), targets


@pytest.mark.parametrize("shift", [-1.5, -1, -0.3, 0, 0.7])
def test_thresholds_are_shifted_logits(shift):
    probs, _ = sample(500)
    decided = expit(logit(probs) + shift * logit(FREQUENCY)) > 0.5
    assert ((probs > shift_thresholds(shift, FREQUENCY)) == decided).mean() > 0.999
    assert shift_thresholds(shift, FREQUENCY)[0] == 0.5 and shift_thresholds(0, FREQUENCY).tolist() == [0.5] * 4
    assert shift_thresholds(-1, FREQUENCY) == pytest.approx(FREQUENCY)


def test_the_best_of_all_shifts():
    probs, targets = sample(1500)
    grid = np.linspace(-3, 3, 121)
    scores = [f1_score(targets, probs > shift_thresholds(s, FREQUENCY), average="macro") for s in grid]
    fitted = fit_thresholds(probs, targets, "shift", frequency=FREQUENCY)
    assert fitted.thresholds == pytest.approx(shift_thresholds(fitted.shift, FREQUENCY))
    assert fitted.report.in_sample.mean() > max(scores) - 0.01
    assert fit_thresholds(probs, targets).shift is None
    for c in range(4):
        expected = f1_score(targets[:, c], probs[:, c] > fitted.thresholds[c])
        assert fitted.report.in_sample[c] == pytest.approx(expected)


@pytest.mark.parametrize("known", [-0.8, -0.4, 0.4])
def test_a_known_shift_is_undone(known):
    """Logits moved by -known·logit(frequency): the fitted shift moves by known."""
    probs, targets = sample(4000)
    plain = fit_thresholds(probs, targets, "shift", frequency=FREQUENCY).shift
    moved = expit(logit(probs) - known * logit(FREQUENCY))
    assert fit_thresholds(moved, targets, "shift", frequency=FREQUENCY).shift == pytest.approx(plain + known, abs=0.1)


def test_three_positives_are_enough():
    """Labels with three positives: cross-fitted, one number is worth more than a threshold for each, and holds."""
    frequency = np.array([0.3, 0.1, *[0.01] * 12])
    gains, optimism = [], []
    for seed in range(4):
        probs, targets = sample(300, seed, frequency)
        probs = expit(logit(probs) + 0.8 * logit(frequency))  # a network too careful with rare labels
        fresh = sample(20_000, seed + 100, frequency)
        fresh = expit(logit(fresh[0]) + 0.8 * logit(frequency)), fresh[1]
        shift = fit_thresholds(probs, targets, "shift", frequency=frequency)
        own = fit_thresholds(probs, targets, shrink=0)
        worth = [f1_score(fresh[1], fresh[0] > f.thresholds, average="macro") for f in (shift, own)]
        gains.append(worth[0] - worth[1])
        optimism.append(own.optimism - shift.optimism)
    assert np.mean(gains) > 0 and np.mean(optimism) > 0.02


def test_a_label_without_positives_follows_the_others():
    probs, targets = sample(800)
    targets[:, 3] = False
    fitted = fit_thresholds(probs, targets, "shift", frequency=FREQUENCY)
    assert fitted.thresholds == pytest.approx(shift_thresholds(fitted.shift, FREQUENCY))
    assert np.isnan(fitted.report.in_sample[3])
    of_targets = fit_thresholds(probs, targets, "shift")  # its frequency is 0: half the rarest
    assert of_targets.thresholds[3] == pytest.approx(shift_thresholds(of_targets.shift, targets.mean(0))[3])


def test_frequencies():
    assert frequency_odds([0, 0.2, 1], 3) == pytest.approx(logit([0.1, 0.2, 0.9]))
    for wrong in ([0.1, 0.2], [0.1, 0.2, 1.5], [0.1, float("nan"), 0.2], [0, 0, 1], [20, 5, 1], ["a", "b", "c"]):
        with pytest.raises(ValueError, match=r"does not fit 3 labels: give one share in \[0, 1\]"):
            frequency_odds(wrong, 3)
    probs, targets = sample(100)
    with pytest.raises(ValueError, match='frequency is what how="shift" goes by'):
        fit_thresholds(probs, targets, frequency=FREQUENCY)
    with pytest.raises(ValueError, match="single-label task takes the likeliest class"):
        fit_thresholds(probs, targets.argmax(1), "shift")


# ---------------------------------------------------------------- the way back


def test_multi_label_posteriors():
    """Two Gaussians: the posterior at one half, brought to the frequency, is the posterior there."""
    x, apart = np.linspace(-4, 6, 201)[:, None], 2.0
    ratio = norm.pdf(x, apart) / norm.pdf(x)
    balanced = np.repeat(ratio / (1 + ratio), 4, 1)
    expected = ratio * FREQUENCY / (ratio * FREQUENCY + 1 - FREQUENCY)
    np.testing.assert_allclose(training_probabilities(balanced, FREQUENCY), expected, rtol=1e-9)
    half = expit(logit(balanced) + 0.5 * logit(FREQUENCY))
    np.testing.assert_allclose(training_probabilities(torch.tensor(half), FREQUENCY, tau=0.5), expected, rtol=1e-9)


def test_single_label_posteriors():
    frequency, x = np.array([0.7, 0.25, 0.05]), np.linspace(-5, 5, 101)[:, None]
    density = norm.pdf(x, [-1, 0, 1])
    balanced = density / density.sum(1, keepdims=True)
    expected = density * frequency / (density * frequency).sum(1, keepdims=True)
    found = training_probabilities(balanced, frequency, single_label=True)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    adjusted = softmax(np.log(expected) - 0.5 * np.log(frequency), 1)
    np.testing.assert_allclose(training_probabilities(adjusted, frequency, 0.5, True), expected, rtol=1e-9)


def test_extremes_stay_probabilities():
    found = training_probabilities([[0.0, 1.0], [1.0, 0.0]], [0.1, 0.2])
    assert (found >= 0).all() and (found <= 1).all()
    assert training_probabilities([[0.0, 1.0]], [0.1, 0.9], single_label=True) == pytest.approx(np.array([[0, 1]]))


def test_in_a_learner(hpa_dls, tmp_path):
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(4 * 16, hpa_dls.c))
    learn = CRLLearner(hpa_dls, model, loss_func=BCEWithLogitsLossFlat(), path=tmp_path)
    assert isinstance(learn, Learner)
    with learn.no_bar():
        fitted = learn.fit_thresholds(how="shift", folds=2)
    frequency = label_counts(hpa_dls.train, hpa_dls.c) / len(hpa_dls.train_ds)
    assert fitted.thresholds == pytest.approx(shift_thresholds(fitted.shift, frequency))
    assert thresholds_of(learn).tolist() == fitted.thresholds.tolist()
