"""What is done to batches of multi-channel images: statistics for normalising, default augmentation, checks of it."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
from fasttransform import Transform

from fastai_crl._checks import check_size, offenders
from fastai_crl.augment import RandomCropBatch, RandomD4, microscopy_transforms
from fastai_crl.hpa import HPA_CHANNELS, HPA_MEAN, HPA_STD
from fastai_crl.images.open import OpenMultiChannel

Stats = tuple[Sequence[float], Sequence[float]]


def make_stats(
    stats: Any, channels: tuple[str, ...], prefixes: list[Path], reader: OpenMultiChannel, seed: int | None
) -> Stats:
    """Return mean and standard deviation per channel, for intensities in 0..1 of the images that `reader` opens."""
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
            return _measure(prefixes, reader, seed)
        else:
            raise ValueError(f"stats={stats!r} must be 'hpa', 'imagenet', 'data', (mean, std) or None.")
    mean, std = ([float(v) for v in s] for s in stats)
    if not len(mean) == len(std) == len(channels) or min(std) <= 0:
        raise ValueError(
            f"stats have mean {mean} and std {std}, but the {len(channels)} channels {', '.join(channels)} need one "
            "mean and one std above 0 each: pass channels or stats that fit, or stats='data'."
        )
    return mean, std


def _measure(prefixes: list[Path], reader: OpenMultiChannel, seed: int | None, n: int = 512) -> Stats:
    """Return mean and standard deviation over all pixels of at most `n` images, drawn with `seed`."""
    picked = np.random.default_rng(0 if seed is None else seed).permutation(len(prefixes))[:n]

    def moments(i: int) -> np.ndarray:
        x = reader(prefixes[i]).numpy().reshape(len(reader.channels), -1) / 255.0
        return np.stack([np.full(len(x), x.shape[1]), x.sum(1), (x * x).sum(1)])

    with ThreadPoolExecutor() as pool:
        count, total, square = sum(pool.map(moments, picked.tolist()))
    mean = total / count
    # A channel that is constant has no spread; 1e-3 (a quarter of a grey level) keeps it finite.
    return mean.tolist(), np.sqrt(np.maximum(square / count - mean**2, 1e-6)).tolist()


def make_tfms(batch_tfms: Any, crop: int | None, size: int | tuple[int, int] | None) -> list[Transform]:
    """Return crop and augmentation; `batch_tfms`, if given, takes the place of the augmentation."""
    if crop is None:
        return microscopy_transforms() if batch_tfms is None else list(L(batch_tfms))
    crop, whole = check_size(crop, "crop"), check_size(size)
    if whole is None or len({*crop}) > 1 or len({*whole}) > 1 or crop > whole:
        raise ValueError(f"crop={crop[0]} needs a square size of at least {crop[0]}, got size={size}.")
    # Inception's range of areas, as fastai has it.
    return [RandomCropBatch(crop, scale=(0.08, 1.0)), *([RandomD4()] if batch_tfms is None else L(batch_tfms))]


def check_tfms(item_tfms: Any, batch_tfms: Any, n_channels: int) -> None:
    """Raise ValueError for transforms that would do nothing to such images, or cannot work on them."""
    for t in L(item_tfms):
        kind = t if isinstance(t, type) else type(t)
        if issubclass(kind, (Resize, CropPad, RandomResizedCrop, RatioResize, FlipItem, DihedralItem)):
            raise ValueError(
                f"item_tfms: {kind.__name__} works on pictures and would do nothing to a tensor of {n_channels} "
                "channels: use size= and crop= for the size, batch_tfms= for augmentation."
            )
    for t in L(batch_tfms):
        if n_channels != 3 and isinstance(t, (HSVTfm, Saturation)):
            raise ValueError(f"batch_tfms: {type(t).__name__} needs 3 channels (RGB), the images have {n_channels}.")
