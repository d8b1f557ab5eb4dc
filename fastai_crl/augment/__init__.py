"""Augmentation of batches of any number of channels, on the device of the batch, each image with its own draw."""

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
