"""What kind of task it is: one class per item, or a value for each of several labels."""

from __future__ import annotations

from typing import Any

from fastai.data.core import DataLoaders
from fastai.data.transforms import Categorize, EncodedMultiCategorize, MultiCategorize, OneHotEncode

from fastai_crl._fastai import pipelines, transforms


def is_single_label(source: Any, n_classes: int | None = None) -> bool:
    """Return whether the task is single-label: one class index per item, not a vector with a value per label.

    Args:
        source: targets of a batch, (n,), (n, 1) or (n, C), or `DataLoaders`: the transforms of their targets say, in an
            export too; where those do not, the targets of one batch do.
        n_classes: outputs of the network. With one output, targets (n,) and (n, 1) are those of one binary label. Where
            it is not given, whole numbers are class indices, fractions and bools are not.
    """
    if isinstance(source, DataLoaders):
        if (known := single_label_if_known(source)) is not None:
            return known and n_classes != 1
        source = next(iter(source[-1] if len(source[-1]) else source[0]))[-1]
    if tuple(source.shape[1:]) not in ((), (1,)):
        return False
    if n_classes is not None:
        return n_classes > 1
    return not str(source.dtype).removeprefix("torch.").startswith(("float", "bfloat", "bool"))


def check_dls(dls: Any) -> None:
    """Raise ValueError for what are no data loaders, such as a learner."""
    if not isinstance(dls, DataLoaders):
        raise ValueError(f"dls is a {type(dls).__name__}: give DataLoaders, those of a learner are learn.dls.")


def single_label_if_known(dls: Any) -> bool | None:
    """Return whether the transforms of the targets make class indices; None where they do not show it."""
    encoders = transforms(pipelines(dls)[-1]) if pipelines(dls) else []
    if any(isinstance(t, (MultiCategorize, EncodedMultiCategorize, OneHotEncode)) for t in encoders):
        return False
    return True if any(isinstance(t, Categorize) for t in encoders) else None
