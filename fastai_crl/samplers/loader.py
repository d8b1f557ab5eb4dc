"""fastai data loaders that draw their training batches with a sampler of `samplers`."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.torch_core import num_distrib
from scipy import sparse

from fastai_crl._checks import check_choice

from .repeat_factor import SAMPLERS

__all__ = ["ResampleCallback", "SampledDL", "label_matrix", "with_sampler"]


def label_matrix(dl: Any, n_classes: int | None = None) -> sparse.csr_matrix:
    """Labels of the data set behind a fastai `DataLoader`, (n, C) bool, without opening its images.

    Args:
        dl: of a data set with one pipeline for inputs and one for targets (`Datasets`, so any `DataBlock`): targets
            are class indices or vectors of 0 and 1.
        n_classes: C. Default: the size of the vocabulary, else what the targets show.

    Raises:
        ValueError: a data set that does not keep its targets apart, or targets that are no labels.
    """
    pipelines = getattr(getattr(dl, "dataset", None), "tls", None)
    if pipelines is None or len(pipelines) != 2:
        raise ValueError(
            f"A {type(getattr(dl, 'dataset', None)).__name__} does not tell its labels without opening its items: pass "
            "targets=, (n, C) of 0 and 1 or (n,) class indices, in the order of the data set."
        )
    found = [np.asarray(y) for y in pipelines[1]]
    single = all(y.ndim == 0 and y.dtype.kind in "iu" for y in found)
    if not single and not all(y.ndim == 1 and y.shape == found[0].shape for y in found):
        raise ValueError("The data set's targets are neither class indices nor vectors of one length: pass targets=.")
    columns = [[int(y)] if single else np.flatnonzero(y == 1) for y in found]
    flat = np.concatenate(columns) if columns else np.zeros(0, int)
    seen = int(flat.max(initial=-1)) + 1 if single else len(found[0])
    shape = len(found), n_classes or max(seen, len(getattr(pipelines[1], "vocab", None) or []) if single else 0)
    indptr = np.r_[0, np.cumsum([len(c) for c in columns])]
    return sparse.csr_matrix((np.ones(len(flat), bool), flat, indptr), shape=shape)


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
        sampler: `"class_aware"`, `"repeat_factor"`, an iterable of indices with a length, or None for shuffling.
        sampler_kwargs: arguments of the named sampler besides targets and bs, for instance `{"seed": 1, "t": 0.1}`.
        targets: labels of the data set's items in order, as the samplers take them. Default: `label_matrix`.

    Raises:
        ValueError: an unknown sampler; bs=None; at the first use, targets that do not fit or cannot be read.
    """

    def __init__(
        self,
        dataset: Any,
        bs: int = 64,
        shuffle: bool = False,
        sampler: Any = "class_aware",
        sampler_kwargs: dict[str, Any] | None = None,
        targets: Any = None,
        **kwargs: Any,
    ):
        if isinstance(sampler, str):
            check_choice("sampler", sampler, tuple(SAMPLERS))
            if bs is None:
                raise ValueError("bs=None: a sampler makes batches, give their size.")
        self._sampler, self._made, self._targets, self._options = sampler, None, targets, dict(sampler_kwargs or {})
        self.resample = True
        super().__init__(dataset, bs=bs, shuffle=shuffle, **kwargs)

    @property
    def sampler(self) -> Any:
        """The sampler in use, made on first use; None while the loader goes in order or merely shuffles."""
        if not (self.shuffle and self.resample) or not isinstance(self._sampler, str):
            return self._sampler if self.shuffle and self.resample else None
        world = num_distrib() or 1
        if self._made is None or self._made[0] != world:
            if self._targets is None:
                self._targets = label_matrix(self)
            size = {"bs": self.bs * world} if self._sampler == "class_aware" else {}
            made = SAMPLERS[self._sampler](self._targets, **size, **self._options)
            if made.labels.shape[0] != len(self.dataset):
                raise ValueError(
                    f"targets of {made.labels.shape[0]} samples for a data set of {len(self.dataset)}: give one row "
                    "per item, in the order of the data set."
                )
            self._made = world, made
        return self._made[1]

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
        order = np.fromiter(sampler, np.int64)[: self._whole(len(sampler))]
        if world > 1 and len(order) % (self.bs * world) == 0:
            order = order.reshape(-1, world, self.bs).swapaxes(0, 1).ravel()
        return order.tolist()

    def new(self, dataset: Any = None, cls: type | None = None, **kwargs: Any) -> TfmdDL:
        if "shuffled" in kwargs:  # fastai's tta writes it so
            kwargs["shuffle"] = kwargs.pop("shuffled")
        if cls is None or issubclass(cls, SampledDL):
            same = (dataset is None or dataset is self.dataset) and "get_idxs" not in kwargs
            own = {"sampler": self._sampler, "sampler_kwargs": self._options, "targets": self._targets}
            kwargs = {**(own if same else {"sampler": None}), **kwargs}
        return super().new(dataset, cls, **kwargs)


def with_sampler(dls: DataLoaders, sampler: Any = "class_aware", targets: Any = None, **kwargs: Any) -> DataLoaders:
    """`dls` with another training loader, that draws by a sampler; its other loaders are the same objects.

    Args:
        dls: fastai `DataLoaders` whose training loader is a `TfmdDL`.
        sampler, targets: see `SampledDL`.
        **kwargs: arguments of the sampler: seed, t, rho, group.

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
    persistent = train.fake_l.persistent_workers
    cls = SampledDL if type(train) is TfmdDL else type(train)
    sampled = train.new(cls=cls, shuffle=True, persistent_workers=persistent, **given)
    return type(dls)(sampled, *dls.loaders[1:], path=dls.path, device=dls.device)


class ResampleCallback(Callback):
    """Resample in one part of training only: `SampledDL` draws with its sampler from `start` to `stop`, else uniformly.

    Rebalanced batches help features and rare labels, but teach the network that rare labels are frequent: its
    probabilities come out too high. A last phase of uniform batches (the default) corrects that. `start=0.8, stop=1` is
    the opposite order, deferred re-balancing (Cao et al., LDAM-DRW, NeurIPS 2019, section 3.3): features from the
    natural distribution first.

    The switch is made between epochs. Epochs of the two kinds differ in length, and fastai's schedules follow.

    Args:
        start, stop: shares of the epochs, 0 <= start < stop <= 1.

    Raises:
        ValueError: shares out of order; when training starts, a training loader that is not a `SampledDL`.
    """

    run_valid = False

    def __init__(self, start: float = 0.0, stop: float = 0.8):
        super().__init__()
        if not 0 <= start < stop <= 1:
            raise ValueError(f"start={start}, stop={stop}: give shares of the epochs with 0 <= start < stop <= 1.")
        self.start, self.stop = start, stop

    def before_train(self) -> None:
        loader = self._loader()
        if loader is None:
            raise ValueError(
                f"The training loader is a {type(self.learn.dls.train).__name__}, which has no sampler to switch: pass "
                'sampler="class_aware" to from_csv, or make the loaders with with_sampler(dls).'
            )
        # With half an epoch's slack: 0.8 of 10 epochs is after the eighth, however 0.8 * 10 is rounded.
        done = self.learn.epoch + 0.5
        loader.resample = self.start * self.learn.n_epoch < done < self.stop * self.learn.n_epoch

    def after_fit(self) -> None:
        if (loader := self._loader()) is not None:
            loader.resample = True

    def _loader(self) -> SampledDL | None:
        train = self.learn.dls.train
        train = train.dl if type(train).__name__ == "DistributedDL" else train  # importing it would need accelerate
        return train if isinstance(train, SampledDL) else None
