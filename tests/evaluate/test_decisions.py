"""One form of probabilities, targets and thresholds, one decision, for arrays and tensors of every kind."""

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.torch_core import TensorBase

from fastai_crl.evaluate.decisions import (
    as_array,
    as_probabilities,
    as_targets,
    check_thresholds,
    decide,
    decisions,
)
from fastai_crl.evaluate.metrics import label_report

PROBS = np.array([[0.9, 0.2, 0.4], [0.75, 0.25, 0.125], [0.375, 0.625, 0.25]])


@pytest.mark.parametrize(
    "make",
    [
        np.asarray,
        np.ndarray.tolist,
        torch.tensor,
        lambda p: torch.tensor(p, requires_grad=True),
        lambda p: torch.tensor(p).as_subclass(TensorBase),
        lambda p: list(torch.tensor(p, requires_grad=True)),
    ],
)
def test_arrays_of_every_kind(make):
    assert as_array(make(PROBS)).tolist() == PROBS.tolist()
    assert decide(make(PROBS), 0.3).tolist() == (PROBS > 0.3).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_precisions_keep_their_values(dtype):
    probs = torch.tensor(PROBS, dtype=dtype, requires_grad=True)
    assert np.array_equal(as_array(probs), probs.detach().double().numpy())
    assert as_array(np.float16(0.1)).dtype == np.float32


def test_probabilities():
    assert as_probabilities([[0, 1]]).dtype == float
    over = np.array([[1 + 5e-7, -5e-7]])  # as a mean of probabilities may be
    assert as_probabilities(over).tolist() == [[1, 0]]
    for probs, message in (
        ([[0.5, 1.1]], r"probs run from 0.5 to 1.1: give probabilities.*logits\.sigmoid\(\)"),
        ([[0.5, float("nan")]], "probs hold NaN"),
        ([[0.5, float("inf")]], "probs hold NaN or infinity"),
        ([0.5, 0.1], r"shape \(2,\)"),
        ([["a", "b"]], "give numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            as_probabilities(probs)


@pytest.mark.parametrize("targets", [[0, 2, 1], [[0], [2], [1]], [0.0, 2.0, 1.0], torch.tensor([[0], [2], [1]]).char()])
def test_class_indices(targets):
    found, _, single_label = as_targets(targets, (3, 3))
    assert single_label and found.tolist() == np.eye(3, dtype=bool)[[0, 2, 1]].tolist()


def test_targets_of_labels():
    found, known, single_label = as_targets(torch.tensor([[1.0, 0], [0, 0], [1, 1]]).bfloat16(), (3, 2))
    assert known.all() and not single_label and found.tolist() == [[True, False], [False, False], [True, True]]
    for one in ([1, 0, 1], [[1], [0], [1]], [True, False, True]):  # one label
        found, known, single_label = as_targets(one, (3, 1))
        assert known.all() and not single_label and found.tolist() == [[True], [False], [True]]


@pytest.mark.parametrize(
    ("targets", "shape", "message"),
    [
        ([0, 1, -1], (3, 3), r"no labels \(1 in all\): -1.*class indices, 0 to 2"),
        ([0, 1, 3], (3, 3), r"no labels \(1 in all\): 3"),
        ([[0], [1], [0.5]], (3, 3), r"no labels \(1 in all\): 0.5"),
        ([0, 1, float("nan")], (3, 3), "nan"),
        ([[1, 0.9], [0, 1]], (2, 2), r"0.9.*are 0 and 1"),
        ([[1, 2], [0, 1]], (2, 2), r"2.*are 0 and 1"),
        ([[1, -1], [0, 1]], (2, 2), r"-1.*are 0 and 1"),
        ([0, 1], (3, 3), r"shape \(2,\)"),
        ([[0, 1]], (1, 3), r"shape \(1, 2\)"),
        ([2, 0, 1], (3, 1), r"2.*are 0 and 1"),
        (["a", "b"], (2, 2), "do not fit"),
    ],
)
def test_targets_that_are_no_labels(targets, shape, message):
    with pytest.raises(ValueError, match=message):
        as_targets(targets, shape)


def test_thresholds():
    assert check_thresholds(0.3).shape == () and check_thresholds(torch.tensor([0.1, 1]), 2).tolist() == [
        pytest.approx(0.1),
        1,
    ]
    assert check_thresholds({"b": 0.2, "a": 0.1}, 2, ["a", "b"]).tolist() == [0.1, 0.2]
    assert check_thresholds({1: 0.2, 0: 0.1}, 2, ["0", "1"]).tolist() == [0.1, 0.2]
    assert check_thresholds(torch.tensor([0.5, 0.25], requires_grad=True).bfloat16()).tolist() == [0.5, 0.25]


def test_a_series_goes_by_its_index():
    by_label = pd.Series([0.9, 0.2, 0.5], index=["a", "b", "c"]).sort_values()
    assert check_thresholds(by_label, 3, ["a", "b", "c"]).tolist() == [0.9, 0.2, 0.5]
    by_column = pd.Series([0.9, 0.2, 0.5]).sort_values()
    assert check_thresholds(by_column, 3).tolist() == check_thresholds(by_column, 3, "012").tolist() == [0.9, 0.2, 0.5]
    assert decide(PROBS, by_column).tolist() == decide(PROBS, [0.9, 0.2, 0.5]).tolist()
    assert check_thresholds(pd.Series([0.9, 0.2, 0.5]), 3, ["2", "1", "0"]).tolist() == [0.5, 0.2, 0.9]
    assert check_thresholds(pd.Series([0.9, 0.2, 0.5]), 3, ["a", "b", "c"]).tolist() == [0.9, 0.2, 0.5]  # no index
    with pytest.raises(ValueError, match=r"without label \(4 in all\): 0, 1, a, b"):
        check_thresholds(by_label.drop("c"), 2, [0, 1])
    with pytest.raises(ValueError, match=r"several thresholds \(1 in all\): a"):
        check_thresholds(pd.Series([0.1, 0.2], index=["a", "a"]), 2, ["a", "b"])
    report = label_report(PROBS, PROBS > 0.3, ["a", "b", "c"], by_label)
    assert report.threshold.to_dict() == by_label.to_dict()


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ("0.5", "'0.5' are not numbers: give one number, or one per label, 3, in"),
        (["0.5"] * 3, "are not numbers"),
        (b"0.5", "are not numbers"),
        (True, "True are not numbers"),
        (None, "None are not numbers"),
        ([0.1, [0.2, 0.3], 0.4], "are not numbers"),
        ([0.1, 0.2], r"shape \(2,\) do not fit 3 labels"),
        ([[0.1, 0.2, 0.3]], r"shape \(1, 3\)"),
        ([0.1, float("nan"), 0.3], r"out of range \(1 in all\): nan"),
        ([0.1, 1.5, -1], r"out of range \(2 in all\): 1.5, -1.0"),
        (50, "out of range"),
        ({"a": 0.1, "b": 0.2}, r"without label \(1 in all\): c"),
        ({"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.1}, r"\(1 in all\): d"),
        ({"a": 0.1, "b": "x", "c": 0.3}, "are not numbers"),
    ],
)
def test_thresholds_that_do_not_fit(thresholds, message):
    with pytest.raises(ValueError, match=message):
        check_thresholds(thresholds, 3, ["a", "b", "c"])


def test_decisions():
    assert decide(PROBS, [0.8, 0.3, 0.3]).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert decide(PROBS, [0.8, 0.3, 0.3], at_least_one=True).tolist() == [[1, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert decide(PROBS, 1.0).sum() == 0 and decide(PROBS, 1.0, at_least_one=True).sum() == 3
    with pytest.raises(ValueError, match="out of range"):
        decide(PROBS, 2)


def test_decisions_are_those_of_the_loss_to_the_last_bit():
    probs = torch.tensor([[0.3, 0.1], [0.7, 0.6]])
    for thresh in (0.3, 0.7, torch.tensor([0.3, 0.1], dtype=torch.float64)):
        assert decide(probs, thresh).tolist() == (probs > thresh).tolist()


def test_single_label_takes_the_likeliest():
    (targets, _, single_label), chosen = decisions(PROBS, [0, 1, 1], thresh=0.99)
    assert single_label and chosen.argmax(1).tolist() == [0, 0, 1] and chosen.sum(1).tolist() == [1, 1, 1]
    assert targets.argmax(1).tolist() == [0, 1, 1]
