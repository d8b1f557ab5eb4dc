"""A fastai data loader that takes its images from a packed cache, whole batches at a time."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from fastai.data.transforms import ToTensor
from fastai.torch_core import TensorCategory, TensorMultiCategory
from fastcore.basics import chunked

from fastai_crl._fastai import pipelines, transformed, transforms
from fastai_crl.images.cache import Packed
from fastai_crl.labels import each_item, read_targets
from fastai_crl.samplers import SampledDL


class PackedDL(SampledDL):
    """A `TfmdDL` that takes whole batches from a `Packed` cache, at next to no cost per image.

    For data sets whose inputs are opened by `MultiChannelBlock(cache=...)` and whose targets are categories. Where that
    is not so, an image is not in the cache, or item transforms have to run, batches are put together item by item, as
    in `TfmdDL`, with the same result. Targets are read once, before the first batch. Arguments are those of
    `SampledDL`; such data sets ask for no sampler.
    """

    _found: tuple[Any, ...] | None = None

    def _source(self) -> tuple[Packed, np.ndarray, list[torch.Tensor]] | None:
        """The cache, its rows and the targets for the items of the data set; None if they must be made one by one."""
        pipes = pipelines(self.dataset)
        opener = (transforms(pipes[0]) or [None])[-1] if pipes else None
        plain = all(type(f) is ToTensor for f in transforms(self.after_item)) and not transforms(self.before_batch)
        packed = getattr(opener, "cache", None)
        if packed is None or not plain or self.bs is None:
            return None
        if self._found is None or self._found[0] is not self.dataset:
            self._found = self.dataset, packed, *_columns(pipes, packed)
        return None if self._found[2] is None else self._found[1:]

    def before_iter(self) -> None:
        super().before_iter()
        self._source()  # here, in the main process, once for all workers and epochs

    def create_batches(self, samps: Iterable[int]) -> Iterator[Any]:
        source = self._source()
        if source is None:
            yield from super().create_batches(samps)
            return
        packed, rows, targets = source
        for at in chunked(samps, self.bs, self.drop_last):
            at = np.array(at)
            yield (packed.batch(rows[at]), *(t[at] for t in targets))

    def new(self, dataset: Any = None, cls: type | None = None, **kwargs: Any) -> Any:
        res = super().new(dataset, cls, **kwargs)
        if isinstance(res, PackedDL) and res.dataset is self.dataset:
            res._found = self._found  # another's would keep its rows, and take them into an export
        return res


def _columns(pipes: Sequence[Any], packed: Packed) -> tuple[np.ndarray | None, list[torch.Tensor]]:
    """Rows of the cache, and the targets, for the items of a data set; no rows if they cannot be had."""
    *before, _ = transforms(pipes[0])
    prefixes = [transformed(item, before, pipes[0].split_idx) for item in each_item(pipes[0].items)]
    rows, targets = packed.rows(prefixes), []
    for pipe in pipes[1:]:
        if rows is None or type(first := pipe[0]) not in (TensorCategory, TensorMultiCategory):
            return None, []
        targets.append(torch.from_numpy(np.stack(read_targets(pipe))).as_subclass(type(first)))
    return rows, targets
