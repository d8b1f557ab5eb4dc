"""Augmentation of multi-channel batches on the device they lie on: every image draws its own, no channel sees another.

Batch transforms of fastai for float images (B,C,H,W), any C, intensities in 0..1. They keep the tensor's type, dtype
and device, and change training batches only (`RandomCropBatch` cuts the centre out of the others). What each image
gets is drawn from torch's generator of the CPU, so after fastai's `set_seed` it is the same on every device (only the
pixels of `GaussianNoise` are drawn on the device itself), and nothing waits for the device. Images alone are changed,
not masks, points or boxes that go with them.
"""

from fasttransform import Transform

from .geometry import RandomAffine, RandomCropBatch, RandomD4, d4
from .intensity import ChannelIntensity, Cutout, GaussianNoise

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


def microscopy_transforms(
    size: int | tuple[int, int] | None = None,
    flips: bool = True,
    rotate: float = 10.0,
    zoom: float = 1.1,
    shift: float = 0.0,
    intensity: float = 0.1,
    noise: float = 0.0,
    cutout: float = 0.0,
    scale: tuple[float, float] | None = None,
    p: float = 0.75,
) -> list[Transform]:
    """Return batch transforms for fluorescence images of any number of channels, for fastai's `batch_tfms`.

    No warp, a microscope has no perspective, and nothing that mixes channels. Zeros (`zoom=1`) leave a kind out.

    Args:
        size: cut this side, or (height, width), out of each image (`RandomCropBatch`); None keeps the size.
        flips: the eight flips and quarter turns (`RandomD4`).
        rotate: largest angle in degrees, see `RandomAffine`.
        zoom: largest factor, see `RandomAffine`.
        shift: largest share of the side, see `RandomAffine`.
        intensity: `gain` and `gamma` of `ChannelIntensity`.
        noise: `std` of `GaussianNoise`.
        cutout: `area` of `Cutout`.
        scale: with `size`, the range of the place's area, see `RandomCropBatch`.
        p: probability of each image to be changed, for each of affine, intensity, noise and cutout.

    Raises:
        ValueError: a value out of its range, or a scale without a size.
    """
    if scale is not None and size is None:
        raise ValueError(f"scale={scale} needs a size: pass size=, the side of what is cut out.")
    tfms = {
        RandomAffine(rotate, zoom, shift, p): rotate or zoom != 1 or shift,
        RandomCropBatch(1 if size is None else size, scale): size is not None,
        RandomD4(): flips,
        ChannelIntensity(intensity, intensity, p=p): intensity,
        GaussianNoise(noise, p): noise,
        Cutout(cutout, p=p): cutout,
    }
    return [t for t, wanted in tfms.items() if wanted]
