"""What the labels of a fastai data set are: names, counts, kind of task."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["label_counts", "label_names", "shown_names"]


def label_counts(dl: Any, n_classes: int) -> Tensor | None:
    """Positives of each label in the data set behind a fastai `DataLoader`, (C,) long, without opening its images.

    None where the data set does not keep its targets apart from its inputs, as a plain PyTorch data set.
    """
    pipelines = getattr(getattr(dl, "dataset", None), "tls", None)
    if pipelines is None or len(pipelines) != 2:
        return None
    counts = torch.zeros(n_classes, dtype=torch.long)
    for y in pipelines[1]:
        y = torch.as_tensor(y)
        if y.ndim == 0 and not y.is_floating_point():
            counts[int(y)] += 1
        elif y.shape == (n_classes,):
            counts += (y == 1).long()
        else:
            return None
    return counts


def label_names(dls: Any, n_classes: int) -> list[str]:
    """Names of the labels by column: the vocabulary where there is one that fits, else the numbers."""
    vocab = getattr(dls, "vocab", None)
    names = [str(v) for v in vocab] if vocab is not None else []
    return names if len(names) == n_classes else [str(c) for c in range(n_classes)]


def shown_names(dls: Any, n_classes: int) -> list[str]:
    """Return the names of the labels by column, as pictures show them: `label_names` of `from_csv`, else the vocab."""
    pipelines = getattr(dls, "tls", None)
    names = getattr(pipelines[-1].tfms, "names", {}) if pipelines else {}
    return [names.get(v, v) for v in label_names(dls, n_classes)]
