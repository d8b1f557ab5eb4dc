"""Metrics against counts by hand, scikit-learn and torchmetrics called directly, and plain loops."""

import pickle

import numpy as np
import pytest
import sklearn.metrics as skm
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastai_crl.evaluate.by_label import ranking_by_label
from fastai_crl.evaluate.decisions import decide
from fastai_crl.evaluate.metrics import (
    CalibrationError,
    ClassBalancedAccuracy,
    MacroF1,
    MeanAP,
    MeanAPByGroup,
    MeanAUROC,
    MicroF1,
    calibration_error,
    class_balanced_accuracy,
    frequency_groups,
    label_report,
    macro_f1,
    mean_ap,
    mean_auroc,
    micro_f1,
)

PROBS = np.array([[0.9, 0.2, 0.4], [0.8, 0.7, 0.1], [0.3, 0.6, 0.2], [0.6, 0.1, 0.3]])
TARGETS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]])


def sample(n=200, c=5, seed=0):
    """Probabilities and targets of labels from common to rare; the last label never occurs."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, c)) < [0.6, 0.3, 0.1, 0.03, 0][:c]).astype(int)
    probs = (rng.random((n, c)) * 0.7 + 0.3 * targets).astype(np.float32)
    return probs, targets


def loop_counts(targets, chosen):
    """True and false positives, false and true negatives of one label."""
    tp = fp = fn = tn = 0
    for t, d in zip(targets, chosen, strict=True):
        tp, fp, fn, tn = tp + (t and d), fp + (d and not t), fn + (t and not d), tn + (not t and not d)
    return tp, fp, fn, tn


@given(st.integers(1, 5), st.integers(2, 30), st.integers(0, 10**6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_decision_metrics_equal_loops(c, n, seed, by_label):
    rng = np.random.default_rng(seed)
    probs, targets = rng.random((n, c)), rng.random((n, c)) < rng.random(c)
    thresh = rng.random(c) if by_label else 0.4
    f1, balanced, total = [], [], np.zeros(4)
    for label in range(c):
        t = thresh[label] if by_label else thresh
        tp, fp, fn, tn = counts = loop_counts(targets[:, label], [p > t for p in probs[:, label]])
        f1.append(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0)
        if tp + fn and tn + fp:
            balanced.append((tp / (tp + fn) + tn / (tn + fp)) / 2)
        total += counts
    assert macro_f1(probs, targets, thresh) == pytest.approx(np.mean(f1))
    tp, fp, fn, _ = total
    assert micro_f1(probs, targets, thresh) == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0)
    expected = np.mean(balanced) if balanced else np.nan
    assert class_balanced_accuracy(probs, targets, thresh) == pytest.approx(expected, nan_ok=True)
    assert label_report(probs, targets, thresh=thresh).F1.tolist() == pytest.approx(f1)


def test_decisions():
    assert decide(PROBS, 0.6).tolist() == (PROBS > 0.6).tolist()
    assert decide(PROBS, [0.85, 0.65, 0.35]).sum(0).tolist() == [1, 1, 1]
    assert decide(torch.tensor([[0.5, 0.51]]), torch.tensor([0.5, 0.5])).tolist() == [[False, True]]
    with pytest.raises(ValueError, match=r"thresholds of shape \(2,\) do not fit 3 labels"):
        decide(PROBS, [0.1, 0.2])


def test_ranking_metrics_skip_labels_without_positives():
    probs, targets = sample()
    assert targets.any(0).tolist() == [True] * 4 + [False]
    ap = [skm.average_precision_score(targets[:, c], probs[:, c]) for c in range(4)]
    auroc = [skm.roc_auc_score(targets[:, c], probs[:, c]) for c in range(4)]
    assert mean_ap(probs, targets) == pytest.approx(np.mean(ap))
    assert mean_ap(probs, targets, labels=[2, 4]) == pytest.approx(ap[2])
    assert mean_auroc(torch.tensor(probs), torch.tensor(targets)) == pytest.approx(np.mean(auroc))
    every = np.ones_like(targets)  # no negatives: AP is 1, AUROC does not exist
    assert mean_ap(probs, every) == 1 and np.isnan(mean_auroc(probs, every))
    assert np.isnan(mean_ap(probs, 0 * every)) and np.isnan(class_balanced_accuracy(probs, every))


@given(st.integers(1, 4), st.integers(2, 30), st.integers(0, 10**6), st.sampled_from([2, 5, 1000]))
@settings(max_examples=60, deadline=None)
def test_ranking_equals_scikit_learn_with_ties(c, n, seed, levels):
    rng = np.random.default_rng(seed)
    probs, targets = rng.integers(0, levels, (n, c)) / levels, rng.random((n, c)) < rng.random(c)
    ap, auroc = ranking_by_label(probs.astype(np.float32), targets, np.ones_like(targets))
    for k in range(c):
        one = targets[:, k], probs[:, k].astype(np.float32)
        assert ap[k] == pytest.approx(skm.average_precision_score(*one)) if one[0].any() else np.isnan(ap[k])
        both = one[0].any() and not one[0].all()
        assert auroc[k] == pytest.approx(skm.roc_auc_score(*one)) if both else np.isnan(auroc[k])


def loop_ece(confidence, hit, bins):
    total = 0
    for b in range(bins):
        inside = [i for i, p in enumerate(confidence) if b / bins < p <= (b + 1) / bins or (b == 0 and p == 0)]
        if inside:
            total += len(inside) / len(hit) * abs(np.mean(confidence[inside]) - np.mean(hit[inside]))
    return total


def test_calibration_error_equals_loop():
    probs, targets = sample()
    expected = np.mean([loop_ece(probs[:, c], targets[:, c], 15) for c in range(5)])
    assert calibration_error(probs, targets) == pytest.approx(expected, rel=1e-5)
    assert label_report(probs, targets).ECE.mean() == pytest.approx(expected, rel=1e-5)
    assert calibration_error([[0.0], [1.0]], [[0], [1]]) == 0 and calibration_error([[1.0], [0.0]], [[0], [1]]) == 1


@pytest.mark.parametrize("bins", [1, 4, 5, 10, 15])
def test_an_edge_belongs_to_the_bin_below(bins):
    edges = np.arange(bins + 1) / bins
    probs = np.repeat(np.r_[edges, (edges[1:] + edges[:-1]) / 2], 3)[:, None]
    for seed in range(20):
        targets = np.random.default_rng(seed).integers(0, 2, probs.shape)
        want = loop_ece(probs[:, 0], targets[:, 0], bins)
        assert calibration_error(probs, targets, bins) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda: calibration_error(PROBS, TARGETS, bins=0), "bins=0: give a whole number of bins"),
        (lambda: calibration_error(PROBS, TARGETS, bins=2.5), "bins=2.5"),
        (lambda: mean_ap(PROBS, TARGETS, labels=[]), r"labels=\[\] picks no label"),
        (lambda: mean_ap(PROBS, TARGETS, labels=[3]), r"labels=\[3\] .* give indices, 0 to 2, or 3 bools"),
        (lambda: mean_ap(PROBS, TARGETS, labels=np.array([True])), r"labels=\[True\]"),
        (lambda: mean_ap(PROBS, TARGETS, labels=np.zeros(3, bool)), "picks no label"),
        (lambda: macro_f1(np.zeros((0, 3)), np.zeros((0, 3))), "holds no sample"),
        (lambda: label_report(PROBS, TARGETS, names=["a"]), "names has 1 entries for 3 labels"),
        (lambda: label_report(PROBS, TARGETS, counts=[1, 2, 3, 4]), "counts has 4 entries for 3 labels"),
        (lambda: frequency_groups([np.nan, 5, 500]), r"counts=\[nan, 5.0, 500.0\]: give numbers"),
        (lambda: frequency_groups([-1, 5]), "0 or more"),
    ],
)
def test_values_out_of_range(measure, message):
    with pytest.raises(ValueError, match=message):
        measure()


def test_calibration_error_equals_torchmetrics():
    classification = pytest.importorskip("torchmetrics.functional.classification", reason="no torchmetrics")
    probs, targets = (torch.tensor(a) for a in sample())
    binary = [classification.binary_calibration_error(probs[:, c], targets[:, c], 10) for c in range(5)]
    assert calibration_error(probs, targets, bins=10) == pytest.approx(float(sum(binary)) / 5, rel=1e-4)
    softmax, classes = (probs * 4).softmax(1), targets.argmax(1)
    single = classification.multiclass_calibration_error(softmax, classes, 5, n_bins=10)
    assert calibration_error(softmax, classes, bins=10) == pytest.approx(float(single), rel=1e-4)


def test_single_label():
    probs = np.array([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.1, 0.6, 0.3], [0.1, 0.2, 0.7]])
    classes = np.array([0, 1, 1, 0, 0])  # class 2 does not occur, but is chosen once
    with pytest.warns(UserWarning, match="not in y_true"):
        expected = skm.balanced_accuracy_score(classes, probs.argmax(1))
    assert class_balanced_accuracy(probs, classes) == pytest.approx(expected) == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert micro_f1(probs, classes) == pytest.approx(2 / 5)
    assert macro_f1(probs, classes) == pytest.approx(skm.f1_score(classes, probs.argmax(1), average="macro"))
    ap = [skm.average_precision_score(classes == c, probs[:, c]) for c in (0, 1)]
    assert mean_ap(probs, classes) == pytest.approx(np.mean(ap))
    assert label_report(probs, classes).support.tolist() == [3, 2, 0]
    assert "threshold" not in label_report(probs, classes)


def test_frequency_groups():
    assert frequency_groups([5, 10, 50, 51], cuts=(10, 50)).tolist() == ["tail", "medium", "medium", "head"]
    with pytest.raises(ValueError, match=r"cuts=\(100, 20\)"):
        frequency_groups([1], cuts=(100, 20))
    with pytest.raises(ValueError, match=r"counts=None.*count them yourself"):
        MeanAPByGroup(None)


def test_label_report_by_hand():
    table = label_report(PROBS, TARGETS, ["a", "b", "c"], counts=[200, 30, 3])
    assert table.support.tolist() == [2, 1, 0]
    assert table.group.tolist() == ["head", "medium", "tail"] and table.train.tolist() == [200, 30, 3]
    assert table.precision.tolist() == pytest.approx([2 / 3, 1 / 2, 0])
    assert table.recall.tolist() == pytest.approx([1, 1, 0])
    assert table.F1.tolist() == pytest.approx([4 / 5, 2 / 3, 0])
    assert table.balanced[:2].tolist() == pytest.approx([(1 + 1 / 2) / 2, (1 + 2 / 3) / 2])
    assert table.AP[:2].tolist() == pytest.approx([(1 + 2 / 3) / 2, 1])
    assert table.AUROC[:2].tolist() == pytest.approx([3 / 4, 1])
    assert table.loc["c", ["balanced", "AP", "AUROC"]].isna().all() and table.ECE["c"] == pytest.approx(0.25)
    assert table.threshold.tolist() == [0.5] * 3
    at = label_report(PROBS, TARGETS, thresh=[0.85, 0.65, 0.5])
    assert at.threshold.tolist() == [0.85, 0.65, 0.5] and at.recall.tolist() == [0.5, 1, 0]


def test_label_report_of_class_indices():
    table = label_report(PROBS, np.array([0, 0, 1, 2]))
    assert table.support.tolist() == [2, 1, 1]
    assert table.precision.tolist() == pytest.approx([2 / 3, 1, 0])
    assert table.recall.tolist() == pytest.approx([1, 1, 0])


class Logits(nn.Module):
    """The input is the output."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + 0 * self.unused


def learner(logits, targets, path, loss, metrics):
    data = torch.utils.data.TensorDataset(logits, targets)
    dls = DataLoaders.from_dsets(data, data, bs=3, num_workers=0, device="cpu")
    return Learner(dls, Logits(), loss_func=loss, metrics=metrics, path=path)


def test_metrics_in_a_learner(tmp_path):
    at, counts = [0.85, 0.65, 0.5], [300, 50, 2]
    metrics = [
        *(MacroF1(), MacroF1(0.65), MacroF1(at), MicroF1(), MicroF1(at), ClassBalancedAccuracy(at)),
        *(MeanAP(), *MeanAPByGroup(counts), MeanAUROC(), CalibrationError()),
    ]
    logits, targets = torch.tensor(PROBS).logit().float(), torch.tensor(TARGETS).float()
    learn = learner(logits, targets, tmp_path, nn.BCEWithLogitsLoss(), metrics)
    values = list(learn.validate())[1:]
    assert values[:3] == pytest.approx([(4 / 5 + 2 / 3) / 3, (1 / 2 + 1) / 3, (2 / 3 + 1) / 3])
    assert values[3:5] == pytest.approx([3 * 2 / (2 * 3 + 2), 2 * 2 / (2 * 2 + 1)])
    assert values[5] == pytest.approx(((1 / 2 + 1) / 2 + 1) / 2)
    ap = [(1 + 2 / 3) / 2, 1]
    assert values[6] == pytest.approx(np.mean(ap)) and values[7:9] == pytest.approx(ap) and np.isnan(values[9])
    assert values[10] == pytest.approx((3 / 4 + 1) / 2)
    assert values[11] == pytest.approx(calibration_error(PROBS, TARGETS))
    names = ["macro_f1"] * 3 + ["micro_f1"] * 2 + ["balanced_accuracy", "mean_ap"]
    assert [m.name for m in learn.metrics] == [*names, "map_head", "map_medium", "map_tail", "auroc", "ece"]
    again = pickle.loads(pickle.dumps(metrics[2]))  # as in an exported learner
    assert again(torch.tensor(PROBS), torch.tensor(TARGETS)) == pytest.approx((2 / 3 + 1) / 3)


def test_metrics_in_a_single_label_learner(tmp_path):
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.1, 0.6, 0.3]])
    classes = torch.tensor([0, 1, 1, 0])
    metrics = [ClassBalancedAccuracy(), MeanAP(), CalibrationError(), MeanAUROC()]
    values = learner(3 + probs.log(), classes, tmp_path, nn.CrossEntropyLoss(), metrics).validate()[1:]
    functions = (class_balanced_accuracy, mean_ap, calibration_error, mean_auroc)
    assert list(values) == pytest.approx([f(probs, classes) for f in functions], rel=1e-5)


FUNCTIONS = (macro_f1, micro_f1, class_balanced_accuracy, mean_ap, mean_auroc, calibration_error)


@pytest.mark.parametrize("metric", FUNCTIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_predictions_that_are_not_finite_have_no_score(metric, value):
    for single_label in (False, True):
        targets = np.array([0, 1, 1, 0]) if single_label else TARGETS
        one = PROBS.copy()
        one[1, 2] = value
        assert np.isnan(metric(one, targets)) and np.isnan(metric(np.full_like(PROBS, value), targets))
        assert not np.isnan(metric(PROBS, targets))
    with pytest.raises(ValueError, match="probs hold NaN"):
        label_report(one, TARGETS)


def test_a_network_that_diverged_ends_no_fit(tmp_path):
    metrics = [MacroF1(), MicroF1(), ClassBalancedAccuracy(), MeanAP(), MeanAUROC(), CalibrationError()]
    logits, targets = torch.full((4, 3), float("nan")), torch.tensor(TARGETS).float()
    values = learner(logits, targets, tmp_path, nn.BCEWithLogitsLoss(), metrics).validate()[1:]
    assert np.isnan(list(values)).all() and len(values) == 6


@pytest.mark.parametrize("metric", FUNCTIONS)
def test_targets_in_a_column(metric):
    classes = np.array([0, 2, 1, 1])
    assert metric(PROBS, classes[:, None]) == metric(PROBS, classes)
    assert metric(PROBS, torch.tensor(classes)[:, None].char()) == metric(PROBS, classes)
    assert metric(PROBS[:, :1], TARGETS[:, 0]) == metric(PROBS[:, :1], TARGETS[:, :1])  # one label
    for wrong in ([0, 1, -1, 2], [0, 1, 3, 2], [0, 1, 0.5, 2], TARGETS * 0.7, TARGETS - 1, TARGETS[:3]):
        with pytest.raises(ValueError, match=r"(no labels|do not fit)"):
            metric(PROBS, np.array(wrong))


@pytest.mark.parametrize("metric", [macro_f1, micro_f1, class_balanced_accuracy, calibration_error, label_report])
def test_logits_are_no_probabilities(metric):
    with pytest.raises(ValueError, match=r"run from -2.2 to 2.2: give probabilities"):
        metric(np.log(PROBS / (1 - PROBS)), TARGETS)
    if metric in (macro_f1, micro_f1, class_balanced_accuracy, label_report):
        with pytest.raises(ValueError, match=r"'0\.5' are not numbers"):
            metric(PROBS, TARGETS, thresh="0.5")


def test_metrics_of_half_precision():
    probs = torch.tensor(PROBS).bfloat16().requires_grad_()
    for metric in FUNCTIONS:
        assert metric(probs, torch.tensor(TARGETS)) == pytest.approx(metric(probs.detach().double().numpy(), TARGETS))
    assert label_report(probs, TARGETS).F1.tolist() == label_report(PROBS, TARGETS).F1.tolist()


def test_a_threshold_is_checked_when_the_metric_is_made():
    for make in (MacroF1, MicroF1, ClassBalancedAccuracy):
        with pytest.raises(ValueError, match="out of range"):
            make(1.5)
