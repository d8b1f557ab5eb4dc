"""Augmentation of multi-channel batches on the device they lie on: every image draws its own, no channel sees another.

Batch transforms of fastai for float images (B,C,H,W), any C, intensities in 0..1. They keep the tensor's type, dtype
and device, and change training batches only (`RandomCropBatch` cuts the centre out of the others). What each image
gets is drawn from torch's generator of the CPU, so after fastai's `set_seed` it is the same on every device (only the
pixels of `GaussianNoise` are drawn on the device itself), and nothing waits for the device. Images alone are changed,
not masks, points or boxes that go with them.
"""

from .geometry import RandomAffine, RandomCropBatch, RandomD4, d4
from .intensity import ChannelIntensity, Cutout, GaussianNoise
from .presets import microscopy_transforms

__all__ = [
    "ChannelIntensity",
    "Cutout",
    "GaussianNoise",
    "RandomAffine",
    "RandomCropBatch",
    "RandomD4",
    "d4",
    "microscopy_transforms",
]
