"""The data of a comparison: labels of what is trained on and measured, a digest, and a part to choose rates on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import get_c
from fastai.torch_core import no_random

from fastai_crl._fastai import part_of
from fastai_crl.data.stratify import stratify
from fastai_crl.evaluate.decisions import as_array, as_targets
from fastai_crl.labels import UnknownLabelsError, label_names, read_labels
from fastai_crl.task import is_single_label

from .arm import as_text
from .rows import digest
from .stats import measurable


def labels_of(loader: Any, n_labels: int) -> np.ndarray:
    """Return the labels of a loader's items in order, (n, C) bool; where they cannot be read, from its batches."""
    try:
        return read_labels(loader, n_labels).toarray()
    except UnknownLabelsError:
        with no_random(0, reproducible=False):
            batches = loader.new(shuffle=False, drop_last=False) if isinstance(loader, DataLoader) else loader
            targets = torch.cat([torch.as_tensor(batch[-1]).cpu() for batch in batches])
        return _all_known(targets, (len(targets), n_labels))


def _all_known(targets: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return targets as (n, C) bool; ValueError where some are unknown."""
    targets, known, _ = as_targets(targets, shape)
    if not known.all():
        raise ValueError(
            f"{np.count_nonzero(~known)} of the targets are unknown: learners are compared on known targets alone, as "
            "paired differences need the same images for every label. Give images of which all labels are known."
        )
    return targets


def _items(loader: Any) -> str:
    items = getattr(loader.dataset, "items", None)
    if isinstance(items, pd.DataFrame):
        items = pd.util.hash_pandas_object(items.astype(str)).to_numpy()
    return digest(as_text(items) if isinstance(items, np.ndarray) else "\n".join(map(str, items or ())))


class Data:
    """What a comparison trains on and what it measures.

    Args:
        dls: training and validation loaders.
        dl: loader that is measured in place of validation, or None.
    """

    def __init__(self, dls: DataLoaders, dl: Any = None):
        self.dls, self.dl = dls, dl
        loader = self.dls.valid if self.dl is None else self.dl
        n_labels = get_c(self.dls) or _columns(self.dls)
        self.single_label = is_single_label(self.dls, n_labels)
        self.train, self.true = labels_of(self.dls.train, n_labels), labels_of(loader, n_labels)
        self.names = label_names(self.dls, n_labels)
        self.counts, self.n_train = self.train.sum(0), len(self.train)
        self.measured = f"{'validation set' if self.dl is None else 'dl='}, {len(self.true)} images"
        self.known = measurable(self.true)
        if not self.known.any():
            raise ValueError(
                f"No label has two images or more of the {self.measured}, and one without it: nothing can be measured "
                "there. Give a larger validation set, or dl=."
            )
        self.facts = {
            "training items": f"{self.n_train}, {_items(self.dls.train)}",
            "training labels": digest(as_text(self.train)),
            "measured on": f"{self.measured}, {_items(loader)}",
            "measured labels": digest(as_text(self.true)),
            "names of the labels": self.names,
        }

    @property
    def unknown(self) -> list[str]:
        """Labels that the measured images say nothing about."""
        return [name for name, known in zip(self.names, self.known, strict=True) if not known]

    def check(self, targets: np.ndarray) -> None:
        """Raise a ValueError where predictions came with other targets, so in another order, than those counted."""
        if not np.array_equal(_all_known(targets, self.true.shape), self.true):
            raise ValueError(
                f"The targets of the {self.measured}, differ from one pass to the next: give a loader that goes "
                "through its items in order, without dropping any."
            )

    def part(self) -> Data:
        """Return the training set alone, a fifth of each label's images held out of it to measure on."""
        train, valid = self.dls.train, self.dls.valid
        if not isinstance(train, DataLoader):
            raise ValueError(
                "Several lrs= are chosen from on a part of dls, which cannot be made of loaders of torch: give one."
            )
        labels = [[str(c) for c in np.flatnonzero(row)] for row in self.train]
        side = stratify(labels, np.arange(self.n_train), [0.8, 0.2], seed=0)
        sides = [part_of(train.dataset, np.flatnonzero(side == k), k) for k in (0, 1)]
        with no_random(0, reproducible=False):
            loaders = train.new(sides[0]), valid.new(sides[1])
        return Data(type(self.dls)(*loaders, path=self.dls.path, device=self.dls.device))


def _columns(dls: DataLoaders) -> int:
    """Columns of the targets of loaders that do not tell their labels."""
    with no_random(0, reproducible=False):
        y = as_array(next(iter(dls.valid))[-1])
    if y.ndim != 2:
        raise ValueError("dls does not tell how many classes there are: set dls.c, or give loaders with a vocab.")
    return y.shape[1]
