"""fastai data loaders that draw their training batches with a sampler."""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from fastai.data.core import DataLoaders, TfmdDL
from fastai.torch_core import num_distrib
from scipy import sparse

from fastai_crl._fastai import keeps_workers, loader_options
from fastai_crl.labels import as_labels, read_labels
from fastai_crl.task import check_dls

from .base import Sampler, SamplerFactory, check_options, check_sampler, make_sampler, takes


class _Made(NamedTuple):
    """A sampler, and what it was made for."""

    world: int  # processes
    n: int  # items
    labels: sparse.csr_matrix | None  # of the items, where it takes them
    sampler: Sampler


class SampledDL(TfmdDL):
    """A `TfmdDL` whose shuffling is that of a sampler; without shuffling it goes through its items in order.

    For any `DataBlock`: `dataloaders(source, dl_type=SampledDL, sampler="repeat_factor")`; see `with_sampler` for
    loaders that exist. Validation and test loaders (`new` with another data set) are never resampled, nor is
    `get_preds(ds_idx=0)`; `validate(ds_idx=0)` is, as it takes the training loader as it is. An epoch has whole
    batches; each pass, that of `show_batch` too, moves on to the next. In distributed training (fastai's
    `DistributedDL` gives each process a contiguous part of the epoch) the processes' k-th batches together are one
    batch of the sampler.

    Labels are read before each pass. Where some were corrected the sampler is made anew; that pass still has the length
    that `len` gave. Where reading them takes long, as where each has a file of its own, give `targets`.

    Args:
        dataset, bs, shuffle, kwargs: as in `TfmdDL`.
        sampler: a name (`"class_aware"`, `"repeat_factor"`, those of `register_sampler`), an iterable of indices with a
            length, a class or function that returns one, or None, the default, for shuffling.
        sampler_kwargs: options of a sampler that is made here, for instance `{"seed": 1, "t": 0.1}`.
        targets: labels of the data set's items in order, as the samplers take them. Default: `read_labels`.

    Raises:
        ValueError: an unknown sampler; options for a sampler that is an object; bs=None for a sampler that is made
            here; at the first use, targets that do not fit or cannot be read, and a sampler that draws what the data
            set does not have, nothing, or another number of indices than its length.

    Example:
        >>> labels = [0] * 8 + [1] * 2
        >>> dl = SampledDL(labels, 4, True, "repeat_factor", {"t": 0.8}, targets=labels)
        >>> sum(sum(batch.tolist()) for batch in dl)  # the two rare ones, each twice
        4
    """

    def __init__(
        self,
        dataset: Any,
        bs: int = 64,
        shuffle: bool = False,
        sampler: str | Sampler | SamplerFactory | None = None,
        sampler_kwargs: dict[str, Any] | None = None,
        targets: Any = None,
        **kwargs: Any,
    ):
        options = dict(sampler_kwargs or {})
        if sampler is not None:
            check_options(sampler, options)
            if check_sampler(sampler) is not None and bs is None:
                raise ValueError("bs=None: a sampler makes batches, give their size.")
        self._sampler, self._targets, self._options = sampler, targets, options
        self._made: _Made | None = None
        super().__init__(dataset, bs=bs, shuffle=shuffle, **kwargs)

    @property
    def sampler(self) -> Any:
        """The sampler, of the labels as they are now; None while the loader goes in order or merely shuffles."""
        return self._in_use(renew=True)

    def _in_use(self, renew: bool) -> Any:
        """Return the sampler; unless `renew`, that of the labels as they were read before."""
        if not self.shuffle or self._sampler is None:
            return None
        world, n = num_distrib() or 1, len(self.dataset)
        made = self._made if self._made is not None and self._made[:2] == (world, n) else None
        if made is None or renew:
            labels = self._labels() if takes(self._sampler, "targets") and "targets" not in self._options else None
            if made is None or not _equal(made.labels, labels):
                offered = {"targets": labels, "bs": self.bs * world, "world_size": world, "dataset": self.dataset}
                made = _Made(world, n, labels, make_sampler(self._sampler, offered, self._options))
                self._made = made
        return made.sampler

    def _labels(self) -> sparse.csr_matrix:
        """Return the labels of the items, given or read."""
        labels = read_labels(self.dataset) if self._targets is None else as_labels(self._targets)
        if labels.shape[0] != len(self.dataset):
            raise ValueError(
                f"targets of {labels.shape[0]} samples for a data set of {len(self.dataset)}: give one row per item, "
                "in the order of the data set."
            )
        return labels

    def _whole(self, length: int) -> int:
        """The indices of whole batches of all processes together; all where they make up less than one."""
        size = self.bs * (num_distrib() or 1)
        return length // size * size or (0 if self.drop_last else length)

    def __len__(self) -> int:
        sampler = self._in_use(renew=False)
        return super().__len__() if sampler is None else -(-self._whole(len(sampler)) // self.bs)

    def get_idxs(self) -> list[int]:
        before, world = self._in_use(renew=False), num_distrib() or 1
        if before is None:
            return super().get_idxs()
        # Labels that were corrected may make an epoch of another length, and fastai has asked `len` for this one.
        order = np.resize(self._draw(self.sampler), self._whole(len(before)))
        if world > 1 and len(order) % (self.bs * world) == 0:
            order = order.reshape(-1, world, self.bs).swapaxes(0, 1).ravel()
        return order.tolist()

    def _draw(self, sampler: Sampler) -> np.ndarray:
        """Return an epoch of the sampler's indices, checked: a wrong one would train on other items, or fail late."""
        order = np.asarray(list(islice(sampler, len(sampler) + 1)))
        if len(order) == 0 or len(order) != len(sampler):
            drawn = f"more than {len(sampler)}" if len(order) > len(sampler) else len(order)
            raise ValueError(
                f"The sampler {type(sampler).__name__} drew {drawn} indices, its length is {len(sampler)}: an epoch "
                "has at least one index, and as many as the sampler's length."
            )
        n = len(self.dataset)
        if order.ndim != 1 or order.dtype.kind not in "iu" or order.min() < 0 or order.max() >= n:
            wrong = next(i for i in order.tolist() if type(i) is not int or not 0 <= i < n)
            raise ValueError(
                f"The sampler {type(sampler).__name__} drew {wrong!r}: indices of a data set of {n} items are whole "
                f"numbers from 0 to {n - 1}."
            )
        return order.astype(np.int64)

    def new(self, dataset: Any = None, cls: type | None = None, **kwargs: Any) -> TfmdDL:
        kwargs = loader_options(kwargs)
        if cls is None or issubclass(cls, SampledDL):
            same = (dataset is None or dataset is self.dataset) and "get_idxs" not in kwargs
            own = {"sampler": self._sampler, "sampler_kwargs": self._options, "targets": self._targets}
            kwargs = {**(own if same else {"sampler": None}), **kwargs}
        return super().new(dataset, cls, **kwargs)


def with_sampler(
    dls: DataLoaders, sampler: str | Sampler | SamplerFactory | None, targets: Any = None, **kwargs: Any
) -> DataLoaders:
    """Return `dls` with another training loader, which draws by a sampler; its other loaders are the same objects.

    Args:
        dls: fastai `DataLoaders` whose training loader is a `TfmdDL`.
        sampler: see `SampledDL`.
        targets: see `SampledDL`.
        **kwargs: options of the sampler: seed, t.

    Raises:
        ValueError: a training loader of another type, and what `SampledDL` raises.
    """
    check_dls(dls)
    train = dls.train
    if type(train) is not TfmdDL and not isinstance(train, SampledDL):
        raise ValueError(
            f"The training loader is a {type(train).__name__}, which a sampler would replace: make the loaders with "
            "dl_type=SampledDL, or with fastai's own TfmdDL."
        )
    given = {"sampler": sampler, "sampler_kwargs": kwargs, "targets": targets}
    cls = SampledDL if type(train) is TfmdDL else type(train)
    sampled = train.new(cls=cls, shuffle=True, persistent_workers=keeps_workers(train), **given)
    return type(dls)(sampled, *dls.loaders[1:], path=dls.path, device=dls.device)


def _equal(a: sparse.csr_matrix | None, b: sparse.csr_matrix | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and np.array_equal(a.indptr, b.indptr) and np.array_equal(a.indices, b.indices)
