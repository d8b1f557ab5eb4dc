"""Metrics against counts by hand."""

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn

from fastai_crl.metrics import MacroF1, MeanAP, label_report

PROBS = np.array([[0.9, 0.2, 0.4], [0.8, 0.7, 0.1], [0.3, 0.6, 0.2], [0.6, 0.1, 0.3]])
TARGETS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]])


def test_label_report_by_hand():
    table = label_report(PROBS, TARGETS, ["a", "b", "c"], triplets=[5, 0, 2])
    assert list(table.columns) == ["support", "precision", "recall", "F1", "AP", "triplets"]
    assert table.support.tolist() == [2, 1, 0] and table.triplets.tolist() == [5, 0, 2]
    assert table.precision.tolist() == pytest.approx([2 / 3, 1 / 2, 0])
    assert table.recall.tolist() == pytest.approx([1, 1, 0])
    assert table.F1.tolist() == pytest.approx([4 / 5, 2 / 3, 0])
    assert table.AP[:2].tolist() == pytest.approx([(1 + 2 / 3) / 2, 1]) and np.isnan(table.AP["c"])


def test_label_report_of_class_indices():
    table = label_report(PROBS, np.array([0, 0, 1, 2]))
    assert table.support.tolist() == [2, 1, 1]
    assert table.precision.tolist() == pytest.approx([2 / 3, 1, 0])
    assert table.recall.tolist() == pytest.approx([1, 1, 0])


def test_metrics_in_a_learner(tmp_path):
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x + 0 * self.unused

    data = torch.utils.data.TensorDataset(torch.tensor(PROBS).logit().float(), torch.tensor(TARGETS).float())
    dls = DataLoaders.from_dsets(data, data, bs=3, num_workers=0, device="cpu")
    loss = nn.BCEWithLogitsLoss()
    learn = Learner(dls, Logits(), loss_func=loss, metrics=[MacroF1(), MacroF1(0.65), MeanAP()], path=tmp_path)
    _, f1, f1_high, mean_ap = learn.validate()
    assert f1 == pytest.approx((4 / 5 + 2 / 3) / 3)
    assert f1_high == pytest.approx((1 / 2 + 1) / 3)
    assert mean_ap == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)  # over the two labels that occur
