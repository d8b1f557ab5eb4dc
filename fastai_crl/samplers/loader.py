"""fastai data loaders that draw their training batches with a sampler."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
from fastai.data.core import DataLoaders, TfmdDL
from fastai.torch_core import num_distrib
from scipy import sparse

from fastai_crl._fastai import keeps_workers, loader_options
from fastai_crl.labels import read_labels

from .base import Sampler, SamplerFactory, as_labels, check_sampler, make_sampler

DEFAULT = "class_aware"


class SampledDL(TfmdDL):
    """A `TfmdDL` whose shuffling is that of a sampler; without shuffling it goes through its items in order.

    For any `DataBlock`: `dataloaders(source, dl_type=SampledDL, sampler="repeat_factor")`; see `with_sampler` for
    loaders that exist. Validation and test loaders (`new` with another data set) are never resampled, nor is
    `get_preds(ds_idx=0)`; `validate(ds_idx=0)` is, as it takes the training loader as it is. An epoch has whole
    batches; each pass, that of `show_batch` too, moves on to the next. In distributed training (fastai's
    `DistributedDL` gives each process a contiguous part of the epoch) the processes' k-th batches together are one
    batch of the sampler.

    While the attribute `resample` is False it shuffles, as a plain `TfmdDL` does (see `ResampleCallback`).

    Args:
        dataset, bs, shuffle, kwargs: as in `TfmdDL`.
        sampler: a name (`"class_aware"`, `"repeat_factor"`, those of `register_sampler`), an iterable of indices with a
            length, a class or function that returns one, or None for shuffling.
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
        sampler: str | Sampler | SamplerFactory | None = DEFAULT,
        sampler_kwargs: dict[str, Any] | None = None,
        targets: Any = None,
        **kwargs: Any,
    ):
        options = dict(sampler_kwargs or {})
        if sampler is not None:
            if check_sampler(sampler) is None:
                make_sampler(sampler, {}, options)  # refuses options
            elif bs is None:
                raise ValueError("bs=None: a sampler makes batches, give their size.")
        self._sampler, self._targets, self._options = sampler, targets, options
        self._made: tuple[int, Sampler] | None = None
        self.resample = True
        super().__init__(dataset, bs=bs, shuffle=shuffle, **kwargs)

    @property
    def sampler(self) -> Any:
        """The sampler in use, made on first use; None while the loader goes in order or merely shuffles."""
        if not (self.shuffle and self.resample) or self._sampler is None:
            return None
        world = num_distrib() or 1
        if self._made is None or self._made[0] != world:
            offered = {
                "targets": self._labels,
                "bs": lambda: self.bs * world,
                "world_size": lambda: world,
                "dataset": lambda: self.dataset,
            }
            self._made = world, make_sampler(self._sampler, offered, self._options)
        return self._made[1]

    def _labels(self) -> sparse.csr_matrix:
        """Return the labels of the items, given or read."""
        labels = read_labels(self.dataset, open_images=True) if self._targets is None else as_labels(self._targets)
        if labels is None:
            raise ValueError(
                f"A {type(self.dataset).__name__} does not tell its labels without opening its items, or they are "
                "neither class indices nor vectors of 0 and 1: pass targets=, (n, C) of 0 and 1 or (n,) class "
                "indices, in the order of the data set."
            )
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
        sampler = self.sampler
        return super().__len__() if sampler is None else -(-self._whole(len(sampler)) // self.bs)

    def get_idxs(self) -> list[int]:
        sampler, world = self.sampler, num_distrib() or 1
        if sampler is None:
            return super().get_idxs()
        order = self._draw(sampler)[: self._whole(len(sampler))]
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
    dls: DataLoaders, sampler: str | Sampler | SamplerFactory | None = DEFAULT, targets: Any = None, **kwargs: Any
) -> DataLoaders:
    """Return `dls` with another training loader, which draws by a sampler; its other loaders are the same objects.

    Args:
        dls: fastai `DataLoaders` whose training loader is a `TfmdDL`.
        sampler: see `SampledDL`.
        targets: see `SampledDL`.
        **kwargs: options of the sampler: seed, t, rho, group.

    Raises:
        ValueError: a training loader of another type, and what `SampledDL` raises.
    """
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
