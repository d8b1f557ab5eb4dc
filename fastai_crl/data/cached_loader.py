"""A fastai data loader that takes its images from a packed cache, whole batches at a time."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from fastai.data.transforms import ToTensor
from fastai.torch_core import TensorCategory, TensorMultiCategory, to_device
from fastcore.basics import chunked

from fastai_crl._checks import offenders
from fastai_crl._fastai import pipelines, transforms
from fastai_crl.images.packed import Packed
from fastai_crl.labels import read_targets, transformed_items
from fastai_crl.samplers import SampledDL


class PackedDL(SampledDL):
    """A `TfmdDL` that takes whole batches from a `Packed` cache, at next to no cost per image.

    For data sets whose inputs are opened by `MultiChannelBlock(images, cache)` and whose targets are categories. Where
    that is not so, an image is not in the cache, its files have changed (they are looked at once per pass), or item
    transforms have to run, batches are put together item by item, as in `TfmdDL`, with the same result. Targets are
    read before each pass, so that those that were corrected are seen. Without workers, batches for a CUDA device are
    fetched by a thread, one ahead, into pinned memory, and copied while the program goes on. Arguments are those of
    `SampledDL`.
    """

    _rows: tuple[Any, np.ndarray | None] | None = None  # items, and where the cache holds them
    _source: tuple[Packed, np.ndarray, list[torch.Tensor]] | None = None

    def _find(self) -> tuple[Packed, np.ndarray, list[torch.Tensor]] | None:
        """The cache, its rows and the targets for the items of the data set; None if they must be made one by one."""
        pipes = pipelines(self.dataset)
        opener = (transforms(pipes[0]) or [None])[-1] if pipes else None
        plain = all(type(f) is ToTensor for f in transforms(self.after_item)) and not transforms(self.before_batch)
        packed = getattr(opener, "cache", None)
        if packed is None or not plain or self.bs is None or not len(self.dataset):
            return None
        if self._rows is None or self._rows[0] is not pipes[0].items:
            prefixes = list(transformed_items(pipes[0], transforms(pipes[0])[:-1]))
            self._rows = pipes[0].items, packed.rows(prefixes)
        kinds = [type(pipe[0]) for pipe in pipes[1:]]
        if (rows := self._rows[1]) is None or not set(kinds) <= {TensorCategory, TensorMultiCategory}:
            return None
        if len(changed := packed.changed(rows)):
            fix = "They are read from their files, which takes longer; make the loaders anew to pack them again."
            what = f"Images that have changed since they were packed in {packed.path}"
            warnings.warn(offenders(what, [packed.ids[r] for r in changed], fix), stacklevel=2)
            return None
        targets = [torch.from_numpy(read_targets(pipe)) for pipe in pipes[1:]]
        return packed, rows, [y.as_subclass(kind) for y, kind in zip(targets, kinds, strict=True)]

    def before_iter(self) -> None:
        super().before_iter()
        self._source = self._find()  # here, in the main process, for all workers

    def create_batches(self, samps: Iterable[int]) -> Iterator[Any]:
        if self._source is None:
            yield from super().create_batches(samps)
            return
        packed, rows, targets = self._source
        parts = map(np.array, chunked(samps, self.bs, self.drop_last))
        in_worker = torch.utils.data.get_worker_info() is not None
        if in_worker or self.device is None or not torch.empty(0, device=self.device).is_cuda:
            yield from ((packed.batch(rows[at]), *(t[at] for t in targets)) for at in parts)
            return

        def pinned(at: np.ndarray) -> tuple[torch.Tensor, ...]:
            return packed.batch(rows[at], pinned=True), *(t[at].pin_memory() for t in targets)

        for batch in one_ahead(pinned, parts):
            yield to_device(batch, self.device, non_blocking=True)

    def new(self, dataset: Any = None, cls: type | None = None, **kwargs: Any) -> Any:
        res = super().new(dataset, cls, **kwargs)
        if isinstance(res, PackedDL) and res.dataset is self.dataset:
            res._rows = self._rows  # another's would keep its rows, and take them into an export
        return res


def one_ahead(make: Callable[[Any], Any], parts: Iterable[Any]) -> Iterator[Any]:
    """Yield `make` of each of `parts`, in order, each made in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as thread:
        ahead = None
        for part in parts:
            now, ahead = ahead, thread.submit(make, part)
            if now is not None:
                yield now.result()
        if ahead is not None:
            yield ahead.result()
