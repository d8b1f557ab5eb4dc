"""What the labels of a data set are: of each item, how many, their names; without opening an image."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import Categorize
from fastcore.foundation import L
from scipy import sparse
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from fastai_crl._fastai import pipelines, transformed, transforms

# What the reference documents: the base class of `_Row`, pandas' own, has annotations that cannot be read.
__all__ = ["each_item", "label_counts", "label_names", "read_labels", "read_targets", "shown_names"]

_SAMPLE = 5  # items whose labels are compared with those that training gets
# Opening a picture of 512 x 512 pixels takes 1.4 ms of the processor, fastai's own pipeline of a csv's row 0.1 ms, a
# getter on its own 0.01 ms. What else the machine does shows in the wall time, so that its limit is a wide one.
_ALLOWED = 0.5  # seconds of either that items may take in any case; and beyond them:
_OPENS = 1e-3  # CPU seconds an item, which show that it is opened
_WAIT, _PACE = 1.5, 2e-4  # wall seconds for all items, or an item where there are many

_known: dict[int, tuple[weakref.ref, Any, sparse.csr_matrix | None]] = {}


def read_labels(source: Any, n_classes: int | None = None, open_images: bool = False) -> sparse.csr_matrix | None:
    """Return the labels of each item, (n, C) bool: read once per data set, and again where it has changed.

    Of fastai's `Datasets` (so any `DataBlock`) the targets' transforms run, never those of the inputs: `get_y` for
    each item, the encoding (`Categorize` and the like) once for each set of labels that occurs. Of a `TensorDataset`
    the last tensor is taken.

    Args:
        source: a data set, or a loader of one.
        n_classes: C. Default: what the vocabulary or the targets show.
        open_images: read them whatever they cost. Else there are none as soon as they prove costly: more than 1 ms of
            the processor an item, as opening a picture takes; or, as on a slow disk, more than 2 s to wait for all of
            them, or 0.2 ms an item if that is more. Half a second is always allowed.

    Returns:
        The labels; None where they cost too much, or the targets are neither class indices nor vectors of values from
        0 to 1 (those that are 1 are labels), or do not fit `n_classes`.
    """
    dataset = source.dataset if isinstance(source, (DataLoader, torch.utils.data.DataLoader)) else source
    if isinstance(dataset, Subset):
        found = read_labels(dataset.dataset, n_classes, open_images)
        return None if found is None else found[np.asarray(dataset.indices, int)]
    key, state = id(dataset), (_state(dataset), open_images)
    if state[0] is None:  # any change would go unseen
        return _widened(_read(dataset, open_images), n_classes)
    held = _known.get(key)
    if held is None or held[0]() is not dataset or held[1] != state:
        found = _read(dataset, open_images)
        held = weakref.ref(dataset, lambda _: _known.pop(key, None)), state, found
        _known[key] = held
    return _widened(held[2], n_classes)


def label_counts(source: Any, n_classes: int | None = None) -> Tensor | None:
    """Return the number of items with each label, (C,) long; None where they cannot be had without opening images.

    Args:
        source: `DataLoaders` (the training set counts), a loader or a data set; see `read_labels`.
        n_classes: C. Default: what the vocabulary or the targets show.
    """
    labels = read_labels(source.train if isinstance(source, DataLoaders) else source, n_classes)
    return None if labels is None else torch.from_numpy(np.asarray(labels.sum(0), np.int64).ravel())


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


# ---------------------------------------------------------------- items


class _Row(pd.Series):
    """A row of a DataFrame that is made in a microsecond: columns by name and place, and nothing else of a Series."""

    _fields = ()  # `ColReader` asks for it, in each cell

    def __init__(self, columns: dict[Any, int], values: Sequence[Any]):
        object.__setattr__(self, "_columns", columns)
        object.__setattr__(self, "_row", values)

    def __getitem__(self, key: Any) -> Any:
        return self._row[self._columns[key]]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or hasattr(pd.Series, name) or name not in self._columns:
            raise AttributeError(f"A row has no {name!r}.")
        return self._row[self._columns[name]]

    def __contains__(self, key: Any) -> bool:
        return key in self._columns

    @property
    def iloc(self) -> Sequence[Any]:
        return self._row

    values = iloc


def each_item(items: Any) -> Iterator[Any]:
    """Yield the items of a fastai data set; the rows of a DataFrame a hundred times as fast as by `iloc`."""
    if isinstance(items, pd.DataFrame) and items.columns.is_unique:
        columns = {c: i for i, c in enumerate(items.columns)}
        yield from (_Row(columns, row) for row in items.to_numpy())
    else:
        items = L(items, use_list=None)
        yield from (items[i] for i in range(len(items)))


# ---------------------------------------------------------------- reading


def _state(dataset: Any) -> Any:
    """Return what differs once the items or the vocabulary of `dataset` have changed; None if that cannot be told."""
    if not (pipes := pipelines(dataset)):
        return None
    items, vocab = pipes[-1].items, getattr(pipes[-1], "vocab", None) or ()
    try:
        if isinstance(items, pd.DataFrame):
            held = pd.util.hash_pandas_object(items, index=False).to_numpy().tobytes()
        else:
            held = tuple(map(id, items)) if isinstance(items, (list, tuple, L)) else np.asarray(items).tobytes()
        return held, tuple(map(id, transforms(pipes[-1]))), tuple(map(str, vocab))
    except (TypeError, ValueError):
        return None


def read_targets(pipeline: Any, open_images: bool = True) -> list[np.ndarray] | None:
    """Return the target of each item of a fastai `TfmdLists`; None where that opens images and may not."""
    for quick in (True, False):
        try:
            found = _unopened(_quick(pipeline) if quick else iter(pipeline), len(pipeline), open_images)
        except Exception:
            if not quick:
                raise
            continue  # a getter that needs more of a row than a `_Row` has, or an item that fails in training too
        if found is None or not quick or _agree(pipeline, found):
            return found
    return None


def _read(dataset: Any, open_images: bool) -> sparse.csr_matrix | None:
    if isinstance(dataset, TensorDataset):
        return _matrix(list(dataset.tensors[-1].cpu().numpy())) if len(dataset.tensors) > 1 else None
    pipes = pipelines(dataset)
    if not pipes or len(pipes) - getattr(dataset, "n_inp", 1) != 1:
        return None
    found, c = read_targets(pipes[-1], open_images), getattr(pipes[-1], "c", 0)
    return None if found is None else _matrix(found, c if isinstance(c, int) else 0)


def _quick(targets: Any) -> Iterator[np.ndarray]:
    """Yield the target of each item: getters run for each, the encoding once for each value that they give."""
    fs = transforms(targets)
    at = next((i for i, f in enumerate(fs) if isinstance(f, Categorize)), len(fs))
    encoded: dict[Any, np.ndarray] = {}
    for item in each_item(targets.items):
        item = transformed(item, fs[:at], targets.split_idx)
        if isinstance(item, _Row):
            raise TypeError("A transform passed a row on.")
        if at == len(fs):
            yield np.asarray(item)
            continue
        text = isinstance(item, (str, int, float))
        key = (type(item), item) if text else tuple(item) if isinstance(item, (list, tuple, L)) else None
        if key is None or key not in encoded:
            y = np.asarray(transformed(item, fs[at:], targets.split_idx))
            if key is None:
                yield y
                continue
            encoded[key] = y
        yield encoded[key]


def _unopened(targets: Iterable[Any], n: int, open_images: bool) -> list[np.ndarray] | None:
    """Return all `n` targets; None once what they cost shows that they are opened or waited for, and may not be."""
    found: list[np.ndarray] = []
    for y in targets:
        found.append(np.asarray(y))
        if open_images:
            continue
        now = np.array([time.thread_time(), time.perf_counter()])
        if len(found) == 1:  # for which a getter may load its table
            start, each = now, np.array([_OPENS, max(_WAIT / n, _PACE)])
        if (now - start > _ALLOWED + each * len(found)).any():
            return None
    return found


def _agree(targets: Any, found: list[np.ndarray]) -> bool:
    """Whether some items have the targets `found` in training too."""
    at = sorted({int(i) for i in np.linspace(0, len(found) - 1, _SAMPLE)}) if found else []
    return all(np.array_equal(np.asarray(targets[i]), found[i]) for i in at)


def _matrix(targets: list[np.ndarray], n_classes: int = 0) -> sparse.csr_matrix | None:
    """Return targets, class indices or vectors, as (n, C) bool; None where they are neither."""
    if not targets:
        return sparse.csr_matrix((0, n_classes), dtype=bool)
    if all(y.ndim == 0 and y.dtype.kind in "iu" for y in targets):
        column = np.array(targets, np.int64)
        if column.min() < 0:
            return None
        shape = len(column), max(n_classes, int(column.max()) + 1)
        return sparse.csr_matrix((np.ones(len(column), bool), (np.arange(len(column)), column)), shape)
    if not all(y.ndim == 1 and y.shape == targets[0].shape and y.dtype.kind in "iufb" for y in targets):
        return None
    y = np.stack(targets)
    return sparse.csr_matrix(y == 1) if ((y >= 0) & (y <= 1)).all() else None


def _widened(labels: sparse.csr_matrix | None, n_classes: int | None) -> sparse.csr_matrix | None:
    """Return `labels` with `n_classes` columns: those that are missing are class indices that no item has."""
    if labels is None or n_classes in (None, labels.shape[1]):
        return labels
    single = labels.shape[0] == 0 or (labels.sum(1) == 1).all()
    if n_classes < labels.shape[1] or not single:
        return None
    return sparse.csr_matrix((labels.data, labels.indices, labels.indptr), (labels.shape[0], n_classes))
