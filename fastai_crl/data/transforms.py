"""What is done to batches of multi-channel images: statistics for normalising, checks of augmentation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastai.vision.augment import (
    CropPad,
    DihedralItem,
    FlipItem,
    HSVTfm,
    RandomResizedCrop,
    RatioResize,
    Resize,
    Saturation,
)
from fastai.vision.core import imagenet_stats
from fastcore.foundation import L

from fastai_crl._checks import offenders
from fastai_crl.hpa import HPA_CHANNELS, HPA_MEAN, HPA_STD
from fastai_crl.images.image_set import in_threads
from fastai_crl.images.open import OpenMultiChannel

Stats = tuple[Sequence[float], Sequence[float]]


def make_stats(
    stats: Any, channels: tuple[str, ...], prefixes: list[Path], opener: OpenMultiChannel, seed: int | None
) -> Stats:
    """Return mean and standard deviation per channel, for intensities in 0..1 of the images that `opener` opens."""
    if isinstance(stats, str):
        if stats == "hpa":
            if unknown := [c for c in channels if c not in HPA_CHANNELS]:
                fix = f"stats='hpa' knows {', '.join(HPA_CHANNELS)}: pass stats='data' or (mean, std)."
                raise ValueError(offenders("Channels without HPA statistics", unknown, fix))
            at = [HPA_CHANNELS.index(c) for c in channels]
            return [HPA_MEAN[i] for i in at], [HPA_STD[i] for i in at]
        if stats == "imagenet":
            stats = imagenet_stats
        elif stats == "data":
            return _measure(prefixes, opener, seed)
        else:
            raise ValueError(f"stats={stats!r} must be 'hpa', 'imagenet', 'data', (mean, std) or None.")
    mean, std = ([float(v) for v in s] for s in stats)
    if not len(mean) == len(std) == len(channels) or min(std) <= 0:
        raise ValueError(
            f"stats have mean {mean} and std {std}, but the {len(channels)} channels {', '.join(channels)} need one "
            "mean and one std above 0 each: pass channels or stats that fit, or stats='data'."
        )
    return mean, std


def _measure(prefixes: list[Path], opener: OpenMultiChannel, seed: int | None, n: int = 512) -> Stats:
    """Return mean and standard deviation over all pixels of at most `n` images, drawn with `seed`."""
    picked = np.random.default_rng(0 if seed is None else seed).permutation(len(prefixes))[:n]

    def moments(i: int) -> np.ndarray:
        x = opener(prefixes[i]).numpy().reshape(len(opener.channels), -1) / 255.0
        return np.stack([np.full(len(x), x.shape[1]), x.sum(1), (x * x).sum(1)])

    count, total, square = sum(in_threads(moments, picked.tolist()))
    mean = total / count
    # A channel that is constant has no spread; 1e-3 (a quarter of a grey level) keeps it finite.
    return mean.tolist(), np.sqrt(np.maximum(square / count - mean**2, 1e-6)).tolist()


def check_tfms(item_tfms: Any, batch_tfms: Any, n_channels: int) -> None:
    """Raise ValueError for transforms that would do nothing to such images, or cannot work on them."""
    for t in L(item_tfms):
        kind = t if isinstance(t, type) else type(t)
        if issubclass(kind, (Resize, CropPad, RandomResizedCrop, RatioResize, FlipItem, DihedralItem)):
            raise ValueError(
                f"item_tfms: {kind.__name__} works on pictures and would do nothing to a tensor of {n_channels} "
                "channels: use size= for the size, batch_tfms= for augmentation and crops."
            )
    for t in L(batch_tfms):
        if n_channels != 3 and isinstance(t, (HSVTfm, Saturation)):
            raise ValueError(f"batch_tfms: {type(t).__name__} needs 3 channels (RGB), the images have {n_channels}.")
