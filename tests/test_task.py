"""Which kind of task targets and loaders are of."""

import pandas as pd
import pytest
import torch
from fastai.data.block import CategoryBlock
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.tabular.data import TabularDataLoaders
from torch import nn

from fastai_crl.task import is_single_label, single_label_if_known


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
    assert single_label_if_known(hpa_dls) is False and single_label_if_known(single_label_dls) is True
    for dls, expected in ((hpa_dls, False), (single_label_dls, True)):
        Learner(dls, nn.Linear(2, 2), path=tmp_path).export("x.pkl")
        assert is_single_label(load_learner(tmp_path / "x.pkl").dls) is expected  # it has no items
    x = torch.rand(6, 4)
    for y, expected in ((torch.arange(6) % 3, True), (torch.zeros(6, 3), False)):
        data = torch.utils.data.TensorDataset(x, y)
        loader = torch.utils.data.DataLoader(data, batch_size=2)
        assert is_single_label(DataLoaders(loader, loader)) is expected
        assert single_label_if_known(DataLoaders(loader, loader)) is None
        assert is_single_label(DataLoaders.from_dsets(data, data, bs=2, num_workers=0)) is expected
    frame = pd.DataFrame({"a": [0.1, 0.2] * 8, "y": list("xyzx") * 4})
    table = TabularDataLoaders.from_df(frame, y_names="y", cont_names=["a"], y_block=CategoryBlock(), bs=4)
    assert is_single_label(table, 3)
