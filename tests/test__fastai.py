"""Facts of fastai and torch that the package relies on."""

import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner, load_learner
from fastai.losses import (
    BaseLoss,
    BCELossFlat,
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    FocalLossFlat,
    LabelSmoothingCrossEntropy,
    MSELossFlat,
)
from fastai.tabular.all import CategoryBlock, TabularDataLoaders
from torch import nn
from torch.nn import functional as F

from fastai_crl._fastai import activation_of, inner_loader, is_single_label
from fastai_crl.losses import CRLLoss, make_loss


def test_the_loader_of_one_process_holds_the_whole_one():
    distributed = pytest.importorskip("fastai.distributed")
    whole = TfmdDL(list(range(8)), bs=2, num_workers=0, device="cpu")
    assert inner_loader(distributed.DistributedDL(whole, 0, 2, device="cpu")) is whole
    assert inner_loader(type("Own", (distributed.DistributedDL,), {})(whole, 0, 2, device="cpu")) is whole
    assert inner_loader(whole) is whole


# ---------------------------------------------------------------- activations

LOGITS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
SIGMOID, SOFTMAX = LOGITS.sigmoid(), LOGITS.softmax(-1)


@pytest.mark.parametrize(
    ("loss", "multi", "single"),
    [
        (BCEWithLogitsLossFlat(), SIGMOID, SIGMOID),
        (CrossEntropyLossFlat(), SOFTMAX, SOFTMAX),
        (FocalLossFlat(), SOFTMAX, SOFTMAX),
        (LabelSmoothingCrossEntropy(), SOFTMAX, SOFTMAX),
        (make_loss("asl"), SIGMOID, SIGMOID),
        (make_loss("focal", single_label=True), SOFTMAX, SOFTMAX),
        (nn.BCEWithLogitsLoss(), SIGMOID, SOFTMAX),
        (nn.MultiLabelSoftMarginLoss(), SIGMOID, SOFTMAX),
        (F.binary_cross_entropy_with_logits, SIGMOID, SOFTMAX),
        (lambda outputs, targets: outputs.sum(), SIGMOID, SOFTMAX),
        (nn.MultiMarginLoss(), SIGMOID, SOFTMAX),
        (nn.CrossEntropyLoss(), SOFTMAX, SOFTMAX),
        (F.cross_entropy, SOFTMAX, SOFTMAX),
        (BaseLoss(nn.CrossEntropyLoss), SOFTMAX, SOFTMAX),
        (BaseLoss(nn.BCEWithLogitsLoss), SIGMOID, SOFTMAX),
        (CRLLoss(), SIGMOID, SOFTMAX),
        (CRLLoss(nn.CrossEntropyLoss()), SOFTMAX, SOFTMAX),
        (CRLLoss(nn.BCEWithLogitsLoss()), SIGMOID, SOFTMAX),
        (CRLLoss(LabelSmoothingCrossEntropy()), SOFTMAX, SOFTMAX),
        (nn.BCELoss(), LOGITS, LOGITS),  # its outputs are probabilities already
        (BCELossFlat(), LOGITS, LOGITS),
        (F.binary_cross_entropy, LOGITS, LOGITS),
        (MSELossFlat(), LOGITS, LOGITS),
    ],
)
def test_activation_of_losses(loss, multi, single):
    assert torch.equal(activation_of(loss, single_label=False)(LOGITS), multi)
    assert torch.equal(activation_of(loss, single_label=True)(LOGITS), single)


def test_log_probabilities_become_probabilities():
    logs = LOGITS.log_softmax(-1)
    torch.testing.assert_close(activation_of(nn.NLLLoss(), single_label=True)(logs), SOFTMAX)


@pytest.mark.parametrize(
    ("targets", "n_classes", "expected"),
    [
        (torch.tensor([0, 2, 1]), None, True),
        (torch.tensor([[0], [2], [1]], dtype=torch.int8), 3, True),
        (torch.tensor([0.0, 2.0]), 3, True),
        (torch.zeros(4, 3), None, False),
        (torch.zeros(4, 3), 3, False),
        (torch.tensor([0.0, 1.0]), 1, False),
        (torch.tensor([[1], [0]]), 1, False),
        (torch.tensor([0.0, 1.0]), None, False),
        (torch.tensor([True, False]), None, False),
    ],
)
def test_kind_of_targets(targets, n_classes, expected):
    assert is_single_label(targets, n_classes) is expected
    if targets.dtype != torch.bool:
        assert is_single_label(targets.numpy(), n_classes) is expected


def test_kind_of_loaders(hpa_dls, single_label_dls, tmp_path):
    assert not is_single_label(hpa_dls, hpa_dls.c) and is_single_label(single_label_dls, 3)
    for dls, expected in ((hpa_dls, False), (single_label_dls, True)):
        Learner(dls, nn.Linear(2, 2), path=tmp_path).export("x.pkl")
        assert is_single_label(load_learner(tmp_path / "x.pkl").dls) is expected  # it has no items
    x = torch.rand(6, 4)
    for y, expected in ((torch.arange(6) % 3, True), (torch.zeros(6, 3), False)):
        data = torch.utils.data.TensorDataset(x, y)
        loader = torch.utils.data.DataLoader(data, batch_size=2)
        assert is_single_label(DataLoaders(loader, loader)) is expected
        assert is_single_label(DataLoaders.from_dsets(data, data, bs=2, num_workers=0)) is expected
    frame = pd.DataFrame({"a": [0.1, 0.2] * 8, "y": list("xyzx") * 4})
    table = TabularDataLoaders.from_df(frame, y_names="y", cont_names=["a"], y_block=CategoryBlock(), bs=4)
    assert is_single_label(table, 3)
