"""The stem of a network pretrained on photographs, its first convolution, for images of more than three channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from fastai.torch_core import params
from fastcore.foundation import L
from torch import nn


def stem_of(model: nn.Module) -> nn.Conv2d:
    """Return the first convolution of a model."""
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d))


@torch.no_grad()
def spread_rgb(model: nn.Module) -> None:
    """Give channels that a pretrained stem never saw the mean of its RGB filters, and keep the sum over channels."""
    conv = stem_of(model)
    n_in = conv.in_channels
    conv.weight[:, 3:] = conv.weight[:, :3].mean(1, keepdim=True)
    conv.weight *= 3 / n_in


class StemSplitter:
    """Parameter groups of `split`, with the stem moved to the last: it then trains with the head."""

    def __init__(self, split: Callable[[nn.Module], L]):
        self.split = split

    def __call__(self, model: nn.Module) -> L:
        stem = params(stem_of(model))
        ids = {id(p) for p in stem}
        groups = [[p for p in group if id(p) not in ids] for group in self.split(model)]
        return L(*groups[:-1], groups[-1] + stem)
