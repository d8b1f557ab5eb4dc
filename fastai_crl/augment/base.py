"""What the batch transforms of `augment` share: draw on the CPU, apply on the device of the batch; checks."""

import torch
from fastai.torch_core import TensorImage
from fasttransform import DisplayedTransform
from torch import Tensor


def spread(n: int, p: float, *reach: float) -> Tensor:
    """Draw uniformly from -reach..reach, (len(reach), n); zero, which changes nothing, with probability 1 - p."""
    return torch.empty(len(reach), n).uniform_(-1, 1) * torch.tensor(reach)[:, None] * (torch.rand(n) < p)


def check(low: float, high: float, **values: float) -> None:
    """Raise ValueError for a value outside low to high, by its name."""
    for name, value in values.items():
        if not low <= value <= high:
            raise ValueError(f"{name}={value} must be in {low}..{high}.")


class BatchTransform(DisplayedTransform):
    """A transform of training batches, in two steps that a subclass defines.

    `draw` takes the shape of the batch and returns what each image gets, a tensor on the CPU; `apply` takes the batch,
    a plain tensor, and what was drawn, and returns the batch.
    """

    split_idx = 0

    def encodes(self, x: TensorImage):
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} got {x.dtype} images of shape {tuple(x.shape)}, it takes float batches "
                "(B,C,H,W): pass it in batch_tfms, with IntToFloatTensor before it."
            )
        return self.apply(x.as_subclass(Tensor), self.draw(tuple(x.shape)))  # the pipeline restores the type
