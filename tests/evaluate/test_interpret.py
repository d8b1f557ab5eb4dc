"""Interpretation: the numbers against counts by hand, the plots against the numbers, a learner's against its parts."""

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from matplotlib import pyplot as plt
from sklearn.metrics import confusion_matrix
from torch import nn

from fastai_crl.callback import CRLCallback
from fastai_crl.evaluate.decider import set_thresholds
from fastai_crl.evaluate.interpret import CRLInterpretation
from fastai_crl.evaluate.metrics import label_report
from fastai_crl.evaluate.predictions import EpochPreds
from fastai_crl.labels import label_counts

PROBS = np.array([[0.9, 0.2, 0.4], [0.8, 0.7, 0.1], [0.3, 0.6, 0.2], [0.6, 0.1, 0.3], [0.2, 0.8, 0.9]])
TARGETS = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1]])


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def interp():
    return CRLInterpretation(PROBS, TARGETS, ["a", "b", "c"], counts=[300, 40, 9], n_train=320)


def heights(ax):
    return [bar.get_height() for bar in ax.patches]


def test_report(interp):
    expected = label_report(PROBS, TARGETS, ["a", "b", "c"], counts=[300, 40, 9])
    pd.testing.assert_frame_equal(interp.report(), expected)


def test_distribution_and_its_boundary(interp):
    frame = interp.distribution()
    assert frame.index.tolist() == ["c", "b", "a"] and frame["count"].tolist() == [9, 40, 300]
    assert frame.cumulative.tolist() == [9, 49, 349] and frame.minority.tolist() == [True, True, False]
    assert interp.distribution(rho=0.1).minority.tolist() == [True, False, False]  # 49 of 320 are more than a tenth
    ax = interp.plot_distribution(rho=0.1)
    assert heights(ax) == [9, 40, 300] and ax.get_lines()[1].get_ydata()[0] == 32
    colors = [bar.get_facecolor() for bar in ax.patches]
    assert colors[0] != colors[1] == colors[2]


def test_hardest(interp):
    frame = interp.hardest("a")
    assert frame["index"].tolist() == [2, 3, 0] and frame.prob.tolist() == [0.3, 0.6, 0.9]
    assert frame.labels.tolist() == [["a", "b"], ["a"], ["a"]] and frame.item.tolist() == [2, 3, 0]
    negatives = interp.hardest(1, "negative", n=2)
    assert negatives["index"].tolist() == [4, 0] and negatives.prob.tolist() == [0.8, 0.2]


def test_hardest_over_epochs(interp):
    before = PROBS.copy()
    before[[0, 2, 3], 0] = [0.1, 0.9, 0.5]
    frame = interp.hardest("a", epochs=[torch.tensor(before), PROBS])
    assert frame["index"].tolist() == [0, 3, 2] and frame.mean_prob.tolist() == pytest.approx([0.5, 0.55, 0.6])
    assert frame.prob.tolist() == [0.9, 0.6, 0.3]


def test_curve_by_hand(interp):
    frame = interp.curve("b")
    assert frame.cut.tolist() == [0.1, 0.2, 0.6, 0.7, 0.8]
    assert frame.precision.tolist() == pytest.approx([2 / 5, 2 / 4, 2 / 3, 1 / 2, 0])
    assert frame.recall.tolist() == [1, 1, 1, 0.5, 0]
    assert frame.F1.tolist() == pytest.approx([4 / 7, 4 / 6, 4 / 5, 1 / 2, 0])


def test_plots_of_curves(interp):
    ax = interp.plot_precision_recall(["b"])
    line, dot = ax.get_lines()
    assert line.get_xdata().tolist() == interp.curve("b").recall.tolist()
    assert (*dot.get_xdata(), *dot.get_ydata()) == pytest.approx((1, 2 / 3))  # at a threshold of 0.5
    ax = interp.plot_thresholds()
    lines = ax.get_lines()
    assert len(lines) == 6 and ax.get_xscale() == "logit"
    assert lines[2].get_ydata().tolist() == interp.curve("b").F1.tolist()
    assert (*lines[3].get_xdata(), *lines[3].get_ydata()) == pytest.approx((0.5, 4 / 5))


def test_confusion(interp):
    # Decisions: a, ab, b, a, bc. False: a on the second image (b), b on the fifth (c).
    assert interp.confusion().to_numpy().tolist() == [[2, 0, 0], [1, 2, 0], [0, 1, 1]]
    assert interp.confusion().loc["b", "a"] == 1
    ax = interp.plot_confusion()
    shares = ax.get_images()[0].get_array()
    assert [text.get_text() for text in ax.texts] == [f"{share:.2f}" for share in shares.ravel()]
    np.testing.assert_allclose(shares, [[2 / 3, 0, 0], [1 / 2, 1, 0], [0, 1, 1]])


def test_single_label():
    classes = np.array([0, 1, 1, 0, 2])
    interp = CRLInterpretation(PROBS, classes)
    assert interp.confusion().to_numpy().tolist() == confusion_matrix(classes, PROBS.argmax(1)).tolist()
    pd.testing.assert_frame_equal(interp.report(), label_report(PROBS, classes, ["0", "1", "2"], counts=[2, 2, 1]))
    interp.plot_thresholds()
    interp.plot_precision_recall()


def test_gain(interp):
    worse = PROBS.copy()
    worse[0, 0], worse[4, 2] = 0.1, 0.45
    baseline = CRLInterpretation(worse, TARGETS, ["a", "b", "c"], counts=[300, 40, 9])
    frame = interp.gain(baseline)
    assert frame.index.tolist() == ["c", "b", "a"] and frame.train.tolist() == [9, 40, 300]
    assert frame.F1_gain.tolist() == pytest.approx([1 - 0, 0, 2 / 3 - 2 / 5])
    here, there = interp.report().AP, baseline.report().AP
    assert frame.AP_gain["a"] == pytest.approx(here["a"] - there["a"]) and frame.AP_gain["a"] > 0
    ax = interp.plot_gain(baseline, by="F1")
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([1, 0, 2 / 3 - 2 / 5])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["c (9)", "b (40)", "a (300)"]


def test_bad_input(interp):
    with pytest.raises(ValueError, match=r"label='d' is none of a, b, c"):
        interp.hardest("d")
    with pytest.raises(ValueError, match="kind='easy'"):
        interp.hardest("a", "easy")
    with pytest.raises(ValueError, match=r"each of shape \(5, 3\)"):
        interp.hardest("a", epochs=[PROBS[:4]])
    with pytest.raises(ValueError, match="no images to show"):
        interp.plot_hardest("a")
    with pytest.raises(ValueError, match="other labels or targets"):
        interp.gain(CRLInterpretation(PROBS, 1 - TARGETS, ["a", "b", "c"]))


def make_learner(dls, path):
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(4 * 16, dls.c))
    crl = CRLCallback(alpha=0.3, schedule=[1, 1], scope="attribute")
    return Learner(dls, model, loss_func=BCEWithLogitsLossFlat(), cbs=crl, path=path)


def test_from_learner(hpa_dls, tmp_path):
    learn = make_learner(hpa_dls, tmp_path)
    epochs = EpochPreds(ds_idx=0)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, cbs=epochs)
        learn.validate(cbs=epochs)  # on its own: not an epoch
    probs, targets = learn.get_preds()
    set_thresholds(learn, probs.double().quantile(0.8, dim=0).numpy())
    interp = CRLInterpretation.from_learner(learn)
    counts = label_counts(hpa_dls.train, hpa_dls.c)
    expected = label_report(probs, targets, hpa_dls.vocab, learn.loss_func.thresh, counts)
    expected["triplets"] = learn.crl.counts_frame().sum().to_numpy()
    pd.testing.assert_frame_equal(interp.report(), expected)
    assert interp.report().triplets.sum() > 0
    assert interp.n_train == len(hpa_dls.train_ds)
    # The training set in its own order.
    train = CRLInterpretation.from_learner(learn, ds_idx=0)
    assert train.targets.sum(0).tolist() == counts.tolist()
    assert len(epochs.epochs) == 2 and epochs.epochs[-1].shape == train.probs.shape
    np.testing.assert_allclose(epochs.epochs[-1], train.probs, atol=1e-3)
    label = int(counts.argmax())
    frame = train.hardest(label, n=3, epochs=epochs.epochs)
    assert frame.item.tolist() == hpa_dls.train_ds.items.Id.iloc[frame["index"]].tolist()
    mean = np.mean([e.numpy()[:, label] for e in epochs.epochs], 0)
    assert frame.mean_prob.tolist() == pytest.approx(sorted(mean[train.targets[:, label]])[:3], abs=1e-3)
    assert all(hpa_dls.vocab[label] in labels for labels in frame.labels)
    axes = train.plot_hardest(label, n=3)
    drawn = axes[0, 0].get_images()[0].get_array()
    first = train.dl.dataset[int(train.hardest(label)["index"][0])][0]
    np.testing.assert_allclose(drawn, first.composite())
    assert axes[1, 2].get_title().startswith(f"{train.hardest(label, 'negative').prob[2]:.3f}")
