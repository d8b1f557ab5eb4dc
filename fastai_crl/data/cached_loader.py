"""A fastai data loader that takes its images from a packed cache, whole batches at a time."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from fastai.data.transforms import ToTensor
from fastai.torch_core import TensorCategory, TensorMultiCategory
from fastcore.basics import chunked

from fastai_crl._fastai import pipelines, transforms
from fastai_crl.images.cache import Packed
from fastai_crl.labels import read_targets, transformed_items
from fastai_crl.samplers import SampledDL


class PackedDL(SampledDL):
    """A `TfmdDL` that takes whole batches from a `Packed` cache, at next to no cost per image.

    For data sets whose inputs are opened by `MultiChannelBlock(cache=...)` and whose targets are categories. Where that
    is not so, an image is not in the cache, or item transforms have to run, batches are put together item by item, as
    in `TfmdDL`, with the same result. Targets are read before each pass, so that labels that were corrected are seen.
    Arguments are those of `SampledDL`.
    """

    _rows: tuple[Any, np.ndarray | None] | None = None  # items, and where the cache holds them
    _held: tuple[Packed, np.ndarray, list[torch.Tensor]] | None = None  # of this pass: cache, rows and targets

    def before_iter(self) -> None:
        super().before_iter()
        self._held = self._hold()  # here, in the main process, for all workers

    def _hold(self) -> tuple[Packed, np.ndarray, list[torch.Tensor]] | None:
        """Return the cache, and its rows and the targets of all items; None where they must be made one by one."""
        pipes = pipelines(self.dataset)
        *before, opener = transforms(pipes[0]) if pipes else [None]
        plain = all(type(f) is ToTensor for f in transforms(self.after_item)) and not transforms(self.before_batch)
        packed = getattr(opener, "cache", None)
        if packed is None or not plain or self.bs is None or not len(self.dataset):
            return None
        if self._rows is None or self._rows[0] is not pipes[0].items:
            self._rows = pipes[0].items, packed.rows(list(transformed_items(pipes[0], before)))
        kinds = [type(pipe[0]) for pipe in pipes[1:]]
        if (rows := self._rows[1]) is None or not set(kinds) <= {TensorCategory, TensorMultiCategory}:
            return None
        targets = [torch.from_numpy(read_targets(pipe)) for pipe in pipes[1:]]
        return packed, rows, [y.as_subclass(kind) for y, kind in zip(targets, kinds, strict=True)]

    def create_batches(self, samps: Iterable[int]) -> Iterator[Any]:
        if self._held is None:
            yield from super().create_batches(samps)
            return
        packed, rows, targets = self._held
        for at in chunked(samps, self.bs, self.drop_last):
            at = np.array(at)
            yield (packed.batch(rows[at]), *(t[at] for t in targets))

    def new(self, dataset: Any = None, cls: type | None = None, **kwargs: Any) -> Any:
        res = super().new(dataset, cls, **kwargs)
        if isinstance(res, PackedDL) and res.dataset is self.dataset:
            res._rows = self._rows  # another's would keep its rows, and take them into an export
        return res
