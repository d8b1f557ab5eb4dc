"""Augmentation that suits fluorescence images, in one call."""

from fasttransform import Transform

from .geometry import RandomAffine, RandomCropBatch, RandomD4
from .intensity import ChannelIntensity, Cutout, GaussianNoise


def microscopy_transforms(
    size: int | tuple[int, int] | None = None,
    flips: bool = True,
    rotate: float = 10.0,
    zoom: float = 1.1,
    intensity: float = 0.1,
    noise: float = 0.0,
    cutout: float = 0.0,
    p: float = 0.75,
) -> list[Transform]:
    """Return batch transforms for fluorescence images of any number of channels, for fastai's `batch_tfms`.

    No warp, as a microscope has no perspective, and nothing that mixes channels. A 0 (`zoom=1`) leaves a kind out.

    Args:
        size: cut this side, or (height, width), out of each image (`RandomCropBatch`); None keeps the size.
        flips: the eight flips and quarter turns (`RandomD4`).
        rotate: largest angle in degrees, see `RandomAffine`.
        zoom: largest factor, see `RandomAffine`.
        intensity: `gain` and `gamma` of `ChannelIntensity`.
        noise: `std` of `GaussianNoise`.
        cutout: `area` of `Cutout`.
        p: probability of each image to be changed, for each of affine, intensity, noise and cutout.

    Raises:
        ValueError: a value out of its range.
    """
    tfms = {
        RandomAffine(rotate, zoom, p): rotate or zoom != 1,
        RandomCropBatch(1 if size is None else size): size is not None,
        RandomD4(): flips,
        ChannelIntensity(intensity, intensity, p): intensity,
        GaussianNoise(noise, p): noise,
        Cutout(cutout, p): cutout,
    }
    return [t for t, wanted in tfms.items() if wanted]
