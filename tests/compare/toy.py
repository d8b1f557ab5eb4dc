"""Small data and learners: points that tell their labels, of which some are rare."""

import numpy as np
import torch
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from torch import nn


def toy_dls(n: int = 160, single_label: bool = False) -> DataLoaders:
    """Loaders of points of one or several of four labels; every third is for validation."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 8))
    if single_label:
        y = np.eye(4)[np.r_[[0, 1, 2, 3], rng.choice(4, n - 4, p=[0.5, 0.3, 0.12, 0.08])]]
    else:
        y = (rng.random((n, 4)) < [0.5, 0.3, 0.15, 0.1]) | (np.arange(n) < 3)[:, None]
    x = torch.from_numpy(y @ centres + rng.normal(size=(n, 8))).float()
    names = [["abcd"[c] for c in np.flatnonzero(row)] for row in y]
    block = DataBlock(
        (TransformBlock, CategoryBlock(vocab="abcd") if single_label else MultiCategoryBlock(vocab="abcd")),
        get_x=lambda i: x[i],
        get_y=lambda i: names[i][0] if single_label else names[i],
        splitter=IndexSplitter(range(0, n, 3)),
    )
    return block.dataloaders(range(n), bs=16, num_workers=0)


def toy_learner(dls: DataLoaders, loss_func=None, hidden: int = 8, **options) -> Learner:
    """A small network, with dropout, that trains in a moment."""
    single = dls.one_batch()[1].ndim == 1
    loss_func = loss_func or (CrossEntropyLossFlat() if single else BCEWithLogitsLossFlat())
    net = nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, 4))
    return Learner(dls, net, loss_func, lr=0.05, **options)
