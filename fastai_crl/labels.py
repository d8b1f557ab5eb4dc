"""What the labels of a data set are: of each item, how many, their names; without opening an image."""

import inspect
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import Categorize
from fastai.torch_core import rank_distrib
from fastcore.foundation import L
from fastprogress.fastprogress import progress_bar
from scipy import sparse
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from fastai_crl._fastai import pipelines, transformed, transforms
from fastai_crl.unknown import UNKNOWN, half_if_unknown

_MANY = 5000  # items that are asked one at a time with a bar


class UnknownLabelsError(ValueError):
    """A data set does not tell its labels without opening its items, or what it tells are no labels."""


class LabelCounts(NamedTuple):
    """How often each label occurs.

    Attributes:
        positives: (C,) long, items that have the label.
        known: items, a number; (C,) long, those of which it is known, where some targets are unknown.
    """

    positives: Tensor
    known: int | Tensor

    @property
    def frequency(self) -> Tensor:
        """Share of the known items that have the label, (C,); 0 where none is known."""
        return self.positives / torch.as_tensor(self.known).clamp_min(1)


def read_labels(source: Any, n_classes: int | None = None, unknown: float | None = None) -> sparse.csr_matrix:
    """Return the labels of each item, (n, C) bool, as they are now: nothing is remembered that could grow stale.

    Of fastai's `Datasets` (so any `DataBlock`) the targets' transforms run, never those of the inputs: see
    `read_targets`. Of a `TensorDataset` the last tensor is taken; of other data sets the attribute `targets`, which
    those of torchvision have, after their `target_transform`. No item is opened.

    Args:
        source: `DataLoaders` (their training set), a loader or a data set.
        n_classes: C. Default: what the vocabulary or the targets show.
        unknown: the value of targets that are unknown, NaN or a number such as -1: they are no labels. None: an error.

    Raises:
        UnknownLabelsError: labels that come only with the opened items, or do not fit `n_classes`; targets that are
            neither class indices nor vectors of values from 0 to 1 (those above ½ are labels).
    """
    return _labels_and_gaps(source, n_classes, unknown)[0]


def _labels_and_gaps(
    source: Any, n_classes: int | None, unknown: float | None
) -> tuple[sparse.csr_matrix, np.ndarray | None]:
    """Return labels (n, C) bool and, where some targets are unknown, how many of each label, (C,) long."""
    source = source.train if isinstance(source, DataLoaders) else source
    dataset = source.dataset if isinstance(source, (DataLoader, torch.utils.data.DataLoader)) else source
    rows = slice(None)
    while isinstance(dataset, Subset):
        rows, dataset = np.asarray(dataset.indices, int)[rows], dataset.dataset
    targets, at_least = _targets_of(dataset)
    if unknown is not None:
        targets = targets.toarray() if sparse.issparse(targets) else _as_array(targets)
        targets = half_if_unknown(torch.from_numpy(targets), unknown)
    labels = as_labels(targets, n_classes, at_least)[rows]
    if not labels.shape[0]:
        raise UnknownLabelsError(
            "The data set is empty, as that of a learner from an export is: give the loaders of the training."
        )
    gaps = None if unknown is None or targets.ndim != 2 else (targets == UNKNOWN).numpy()[rows].sum(0)
    return labels, gaps if gaps is not None and gaps.any() else None


def _targets_of(dataset: Any) -> tuple[Any, int]:
    """Return the targets of a data set, as `as_labels` takes them, and the least C of class indices."""
    pipes = pipelines(dataset)
    if len(pipes) - getattr(dataset, "n_inp", 1) == 1:
        c = getattr(pipes[-1], "c", 0)
        return read_targets(pipes[-1]), c if isinstance(c, int) else 0
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        return dataset.tensors[-1], 0
    # Looked up statically: a table of fastai would answer with its column of that name.
    if inspect.getattr_static(dataset, "targets", None) is not None:
        change = getattr(dataset, "target_transform", None)
        return (_stacked(map(change, dataset.targets)) if change else dataset.targets), 0
    raise UnknownLabelsError(
        f"A {type(dataset).__name__} does not tell its labels: they come only with its opened items. Set its attribute "
        "targets, (n,) class indices or (n, C) of 0 and 1 in the order of its items; or give targets= or counts= to "
        "what asks for them."
    )


def count_labels(source: Any, n_classes: int | None = None, unknown: float | None = None) -> LabelCounts:
    """Return how often each label of a data set occurs; arguments and errors are those of `read_labels`."""
    labels, gaps = _labels_and_gaps(source, n_classes, unknown)
    n = labels.shape[0]
    return LabelCounts(count(labels), n if gaps is None else torch.from_numpy(n - gaps))


def count_if_told(
    source: Any, n_classes: int | None = None, unknown: float | None = None, warning: str = "{}"
) -> LabelCounts | None:
    """Return `count_labels`; None, with a `warning` around the reason, where `read_labels` has none."""
    try:
        return count_labels(source, n_classes, unknown)
    except UnknownLabelsError as error:
        warnings.warn(warning.format(error), stacklevel=3)
        return None


def label_counts(source: Any, n_classes: int | None = None, unknown: float | None = None) -> Tensor | None:
    """Return the number of items with each label, (C,) long; None, with a warning, where `read_labels` has none.

    The warning says how to give them: `dataset.targets = labels`, (n,) class indices or (n, C) of 0 and 1 in the order
    of the items, or `counts=` where they are asked for.

    Args:
        source: `DataLoaders` (their training set), a loader or a data set.
        n_classes: C. Default: what the vocabulary or the targets show.
        unknown: see `read_labels`.
    """
    counts = count_if_told(source, n_classes, unknown)
    return None if counts is None else counts.positives


def count(labels: sparse.csr_matrix) -> Tensor:
    """Return the number of items with each label, (C,) long, of labels (n, C) bool."""
    return torch.from_numpy(labels.getnnz(0).astype(np.int64))


def label_names(dls: Any, n_classes: int) -> list[str]:
    """Return the names of the labels by column: the vocabulary where there is one that fits, else the numbers."""
    vocab = getattr(dls, "vocab", None)
    names = [str(v) for v in vocab] if vocab is not None else []
    return names if len(names) == n_classes else [str(c) for c in range(n_classes)]


def shown_names(dls: Any, n_classes: int) -> list[str]:
    """Return the names of the labels by column, as pictures show them: `label_names` of `from_csv`, else the vocab."""
    encoders = transforms(pipelines(dls)[-1]) if pipelines(dls) else []
    names = next((t.names for t in encoders if hasattr(t, "names")), {})
    return [names.get(v, v) for v in label_names(dls, n_classes)]


def as_labels(targets: Any, n_classes: int | None = None, at_least: int = 0) -> sparse.csr_matrix:
    """Return targets of any kind as a canonical (n, C) bool matrix.

    Args:
        targets: (n, C) of 0 and 1, of any dtype, NumPy, PyTorch or scipy.sparse; or (n,) class indices. With one class,
            (n,) of 0 and 1.
        n_classes: C. Default: the columns, or one more than the highest index.
        at_least: the least C of class indices.

    Raises:
        UnknownLabelsError: targets that are no labels, or have not `n_classes`.
    """
    y = targets if sparse.issparse(targets) else _as_array(targets)
    if n_classes == 1 and y.ndim == 1:
        y = y[:, None]
    if y.ndim not in (1, 2) or y.dtype.kind not in ("biuf" if y.ndim == 2 else "iu"):
        raise UnknownLabelsError(
            f"targets of shape {y.shape} and {y.dtype} fit no task: give (n, C) of 0 and 1, dense or scipy.sparse, or "
            "(n,) integer class indices."
        )
    if y.ndim == 1:
        if len(y) and y.min() < 0:
            raise UnknownLabelsError(f"targets hold the class index {y.min()}: indices start at 0.")
        c = max(n_classes or 0, at_least, int(y.max(initial=-1)) + 1)
        y = sparse.csr_matrix((np.ones(len(y), bool), (np.arange(len(y)), y)), shape=(len(y), c))
    if n_classes not in (None, y.shape[1]):
        raise UnknownLabelsError(f"targets of {y.shape[1]} labels where there are {n_classes}: these must agree.")
    values = y.data if sparse.issparse(y) else y
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        raise UnknownLabelsError(
            f"targets run from {values.min()} to {values.max()}: they must be in [0, 1]; above 0.5 is a yes. Where "
            "some are unknown, say which: read_labels(dls, unknown=float('nan')), crl_learner(dls, unknown=-1)."
        )
    labels = sparse.csr_matrix(y > 0.5)
    labels.sort_indices()
    return labels


# ---- what a pipeline of fastai makes of its items ----


def read_targets(pipeline: Any) -> np.ndarray:
    """Return the targets of all items of a fastai `TfmdLists`, (n, ...), as the pipeline would make each.

    What fetches a label (`get_y`, a column) runs for each item; the encoding (`Categorize` and what follows) once for
    each value that occurs.
    """
    fs = transforms(pipeline)
    at = next((i for i, f in enumerate(fs) if isinstance(f, Categorize)), len(fs))
    places: dict[Any, int] = {}
    encoded: list[np.ndarray] = []
    order = []
    for value in transformed_items(pipeline, fs[:at]):
        if isinstance(value, (list, tuple, L)):
            key: Any = tuple(value)
        else:
            key = (type(value), value) if isinstance(value, (str, int, float, np.generic)) else object()
        if at == len(fs) or key not in places:
            places[key] = len(encoded)
            encoded.append(_as_array(transformed(value, fs[at:], pipeline.split_idx)))
        order.append(places[key])
    return _stacked(encoded)[order]


def transformed_items(pipeline: Any, tfms: Iterable[Any]) -> Iterator[Any]:
    """Yield what `tfms`, the first transforms of a fastai `TfmdLists`, make of each item.

    A first transform that has a method `of_rows`, as those of `from_csv` have, makes them of all rows of a table at
    once; others are asked for one item at a time, with a bar where there are many.
    """
    items, tfms = pipeline.items, list(tfms)
    if tfms and isinstance(items, pd.DataFrame) and hasattr(tfms[0], "of_rows"):
        values, tfms = tfms[0].of_rows(items), tfms[1:]
    else:
        values = _each(items)
        if len(items) > _MANY and rank_distrib() == 0:
            values = progress_bar(values, total=len(items), leave=False)
    return (transformed(value, tfms, pipeline.split_idx) for value in values)


def _each(items: Any) -> Iterator[Any]:
    """Yield items as a fastai pipeline gets them; the rows of a table as columns of its transpose, which is quicker."""
    if isinstance(items, pd.DataFrame):
        dtype = items.iloc[0].dtype if len(items) else object
        return (row for _, row in items.astype(dtype if isinstance(dtype, np.dtype) else object).T.items())
    items = L(items, use_list=None)
    return (items[i] for i in range(len(items)))


def _as_array(y: Any) -> np.ndarray:
    if isinstance(y, Tensor):
        y = y.detach().cpu()
        y = y.float() if y.dtype == torch.bfloat16 else y  # NumPy has no such type
    return np.asarray(y)


def _stacked(targets: Iterable[Any]) -> np.ndarray:
    """Return one array of the targets of all items; of shape (0,) where there are none."""
    rows = [_as_array(y) for y in targets]
    if len(shapes := {row.shape for row in rows}) > 1:
        raise UnknownLabelsError(f"targets of several shapes, {' and '.join(map(str, sorted(shapes)))}, are no labels.")
    return np.stack(rows) if rows else np.zeros(0, np.int64)
