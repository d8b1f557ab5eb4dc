"""One number for all labels, and the way back from adjusted logits, against analytic posteriors and plain search."""

import numpy as np
import pytest
import torch
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat
from scipy.special import expit, logit, softmax
from scipy.stats import norm
from sklearn.metrics import f1_score
from torch import nn

from fastai_crl.evaluate.decider import set_thresholds, threshold_in_use
from fastai_crl.evaluate.decisions import decide
from fastai_crl.evaluate.interpret import CRLInterpretation
from fastai_crl.evaluate.metrics import MacroF1
from fastai_crl.evaluate.shift import frequency_odds, shift_thresholds, training_probabilities
from fastai_crl.evaluate.thresholds import _shift_fitter, fit_thresholds
from fastai_crl.labels import label_counts
from fastai_crl.learner import CRLLearner
from fastai_crl.losses.baselines import make_loss
from fastai_crl.losses.complete import CompleteLoss
from fastai_crl.losses.crl_loss import CRLLoss

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
        optimism.append(own.report.optimism.mean() - shift.report.optimism.mean())
    assert np.mean(gains) > 0 and np.mean(optimism) > 0.02


def test_a_label_without_positives_follows_the_others():
    probs, targets = sample(800)
    targets[:, 3] = False
    fitted = fit_thresholds(probs, targets, "shift", frequency=FREQUENCY)
    assert fitted.thresholds == pytest.approx(shift_thresholds(fitted.shift, FREQUENCY))
    assert np.isnan(fitted.report.in_sample[3])
    of_targets = fit_thresholds(probs, targets, "shift")  # its frequency is 0: it counts as there once
    once = shift_thresholds(of_targets.shift, targets.mean(0), n=len(targets))
    assert of_targets.thresholds == pytest.approx(once) and once[3] == expit(-of_targets.shift * logit(1 / 800))


def test_frequencies():
    assert frequency_odds([0, 0.2, 1], 3, n=10) == pytest.approx(logit([0.1, 0.2, 0.9]))
    assert frequency_odds([0, 0.2, 0.8], 3, True, n=10) == pytest.approx(np.log([0.1, 0.2, 0.8]))
    assert frequency_odds([1e-12, 0.2, 0.8], 3)[0] == pytest.approx(logit(1e-12), rel=1e-12)
    for wrong in ([0.1, 0.2], [0.1, 0.2, 1.5], [0.1, float("nan"), 0.2], [20, 5, 1], ["a", "b", "c"]):
        with pytest.raises(ValueError, match=r"does not fit 3 labels: give one share in \[0, 1\]"):
            frequency_odds(wrong, 3)
    for edge in ([0, 0.1, 0.2], [0.5, 1, 0.1]):
        with pytest.raises(ValueError, match=r"count as there, or missing, in one sample\. Give n=, the number of"):
            frequency_odds(edge, 3)
    for n in (1, 2.5, True):
        with pytest.raises(ValueError, match=r"n=.*give the number of training samples, at least 2"):
            frequency_odds([0.5, 0.1, 0.2], 3, n=n)
    probs, targets = sample(100)
    with pytest.raises(ValueError, match='frequency is what how="shift" goes by'):
        fit_thresholds(probs, targets, frequency=FREQUENCY)


def single_label_sample(n=2000, seed=0, known=0.0):
    """Calibrated posteriors of Gaussians around the corners, logits moved by -known·log(frequency); class indices."""
    rng, frequency = np.random.default_rng(seed), np.array([0.6, 0.3, 0.08, 0.02])
    targets = rng.choice(4, n, p=frequency)
    x = rng.normal(size=(n, 4)) + 2 * np.eye(4)[targets]
    return softmax(2 * x + (1 - known) * np.log(frequency), 1), targets, frequency


def test_single_label_thresholds_are_shifted_logits():
    probs, _, frequency = single_label_sample()
    for shift in (-1.5, -0.4, 0, 0.7):
        thresholds = shift_thresholds(shift, frequency, single_label=True)
        expected = (np.log(probs) + shift * np.log(frequency)).argmax(1)
        assert decide(probs, thresholds, single_label=True).argmax(1).tolist() == expected.tolist()
        assert thresholds.max() == 1 and CompleteLoss(None, True, thresh=torch.tensor(thresholds)).decodes(
            torch.tensor(probs)
        ).tolist() == list(expected)
    assert decide(probs, 0.9, single_label=True).argmax(1).tolist() == probs.argmax(1).tolist()
    zeros = decide(np.array([[0, 1.0], [0.1, 0.9]]), [0, 1], single_label=True)
    assert zeros.argmax(1).tolist() == [1, 0]


def best_shift(probs, targets, frequency):
    """The shift that is fitted to all these samples."""
    targets = np.eye(len(frequency), dtype=bool)[targets]
    return _shift_fitter(probs, targets, frequency_odds(frequency, 4, True), True)(np.ones_like(targets))


def test_the_best_single_label_shift():
    grid = np.linspace(-3, 3, 121)
    probs, targets, frequency = single_label_sample()
    decided = [(np.log(probs) + s * np.log(frequency)).argmax(1) for s in grid]
    scores = [f1_score(targets, d, average="macro") for d in decided]
    best = best_shift(probs, targets, frequency)
    assert scores[np.abs(grid - best).argmin()] == pytest.approx(max(scores)) and best != 0
    fitted = fit_thresholds(probs, targets, "shift", frequency=frequency, names=list("abcd"))
    assert fitted.thresholds == pytest.approx(shift_thresholds(fitted.shift, frequency, True))
    chosen = decide(probs, fitted.thresholds, single_label=True).argmax(1)
    assert fitted.report.in_sample.tolist() == pytest.approx(f1_score(targets, chosen, average=None).tolist())
    assert fitted.report.fixed.mean() == pytest.approx(f1_score(targets, probs.argmax(1), average="macro"))
    assert fitted.report.fixed.mean() < fitted.report.cross_fitted.mean() <= fitted.report.in_sample.mean()
    moved = single_label_sample(known=0.6)
    assert best_shift(*moved) == pytest.approx(best + 0.6, abs=0.06)


def test_a_class_without_positives():
    probs, targets, frequency = single_label_sample(300)
    targets[targets == 3] = 2
    fitted = fit_thresholds(probs, targets, "shift", frequency=frequency, folds=2)
    assert np.isfinite(fitted.thresholds).all() and np.isnan(fitted.report.in_sample[3])
    with pytest.raises(ValueError, match=r'how=.rate.: a single-label task takes the likeliest class.*how="shift"'):
        fit_thresholds(probs, targets, "rate")
    few = np.arange(4).repeat(3)
    assert np.isfinite(fit_thresholds(probs[:12], few, "shift", folds=3).thresholds).all()
    with pytest.raises(ValueError, match="folds=4, and no class has as many samples: give fewer folds"):
        fit_thresholds(probs[:12], few, "shift", folds=4)


@pytest.mark.parametrize("loss", ["plain", "fastai", "crl", "adjusted"])
def test_single_label_in_a_learner(single_label_dls, tmp_path, loss):
    """Predict, get_preds, metric, report, an export: all decide by the fitted shift."""
    made = {
        "plain": nn.CrossEntropyLoss,
        "fastai": LabelSmoothingCrossEntropyFlat,
        "crl": lambda: CRLLoss(CrossEntropyLossFlat(), alpha=0.3),
        "adjusted": lambda: make_loss("logit_adjusted", single_label=True, dls=single_label_dls),
    }[loss]()
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(4 * 16, single_label_dls.c))
    nn.init.normal_(model[-1].weight, std=4)
    learn = CRLLearner(single_label_dls, model, loss_func=made, metrics=MacroF1(), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        before = float(learn.validate()[0])
        fitted = learn.fit_thresholds(how="shift", folds=2)
        learn.thresholds = shift_thresholds(-2, [0.98, 0.02], single_label=True)
        assert float(learn.validate()[0]) == pytest.approx(before)  # what is trained stays
        value = learn.validate()[1]
        probs, targets, decoded = learn.get_preds(with_decoded=True)
        chosen = decide(probs, learn.thresholds, single_label=True).argmax(1)
        assert fitted.shift is not None and decoded.tolist() == chosen.tolist() != probs.argmax(1).tolist()
        assert value == pytest.approx(f1_score(targets, chosen, average="macro"))
        interp = CRLInterpretation.from_learner(learn)
        assert interp.chosen.argmax(1).tolist() == chosen.tolist() and value == pytest.approx(interp.report().F1.mean())
        learn.fit(1)
        learn.export("x.pkl")
        again, item = load_learner(tmp_path / "x.pkl"), single_label_dls.valid_ds.items[1]
        assert again.thresholds.tolist() == learn.thresholds.tolist()
        assert again.predict(item)[1] == learn.predict(item)[1]


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


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("single_label", [False, True])
def test_what_the_loss_added_is_undone(single_label, tau):
    """Labels that never occur, once, in all samples but one, and, of several, in all."""
    counts, n = ([0, 1, 60, 39], 100) if single_label else ([0, 1, 30, 99, 100], 100)
    loss = make_loss("logit_adjusted", counts=counts, n=n, single_label=single_label, tau=tau)
    logits = torch.linspace(-4, 4, 8 * len(counts)).view(8, -1).double()
    found = training_probabilities(loss.activation(logits), np.array(counts) / n, tau, single_label, n=n)
    np.testing.assert_allclose(found, loss.activation(logits + loss.shift.double()), rtol=1e-5)


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
    n = len(hpa_dls.train_ds)
    frequency = label_counts(hpa_dls.train, hpa_dls.c) / n
    assert fitted.thresholds == pytest.approx(shift_thresholds(fitted.shift, frequency, n=n))
    assert threshold_in_use(learn).tolist() == fitted.thresholds.tolist()


def test_a_crl_loss_that_waits_for_its_first_batch(single_label_dls, tmp_path):
    learn = Learner(
        single_label_dls, nn.Sequential(nn.Flatten(), nn.LazyLinear(single_label_dls.c)), CRLLoss(), path=tmp_path
    )
    set_thresholds(learn, np.linspace(0.1, 1, single_label_dls.c))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        assert np.isfinite(learn.recorder.values[0][0])
        probs, _, decoded = learn.get_preds(with_decoded=True)
    assert decoded.tolist() == (probs / np.linspace(0.1, 1, single_label_dls.c)).argmax(1).tolist()
