"""Augmentation of multi-channel batches on the device they lie on: every image draws its own, no channel sees another.

Batch transforms of fastai for float images (B,C,H,W), any C, intensities in 0..1. They keep the tensor's type, dtype
and device, and change training batches only (`RandomCropBatch` cuts the centre out of the others). What each image
gets is drawn from torch's generator of the CPU, so after fastai's `set_seed` it is the same on every device (only the
pixels of `GaussianNoise` are drawn on the device itself), and nothing waits for the device. Images alone are changed,
not masks, points or boxes that go with them.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from fastai.torch_core import TensorImage
from fasttransform import DisplayedTransform
from torch import Tensor

from fastai_crl._checks import check_size

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


# ---------------------------------------------------------------- where things are


def d4(x: Tensor, k: int) -> Tensor:
    """Return the `k`-th (0..7) of the eight flips and quarter turns of images (...,H,W), exactly; 0 changes nothing.

    k & 1 flips left and right, k & 2 up and down, k & 4 then exchanges rows and columns: (...,W,H).

    Example:
        >>> d4(torch.tensor([[1, 2], [3, 4]]), 1).tolist()
        [[2, 1], [4, 3]]
    """
    dims = [d for bit, d in ((1, -1), (2, -2)) if k & bit]
    x = x.flip(dims) if dims else x
    return x.mT if k & 4 else x


class RandomAffine(BatchTransform):
    """Rotate and zoom in one resampling, bilinear, mirrored at the edges, computed in float32.

    Args:
        rotate: largest angle, degrees, either way.
        zoom: largest magnification, 1 or more; as much smaller as larger (log-uniform in 1/zoom..zoom).
        p: probability of each image to be changed, 0 to 1; the others keep their values to about 1e-4.
    """

    order = 30

    def __init__(self, rotate: float = 10.0, zoom: float = 1.1, p: float = 0.75):
        super().__init__()
        check(0, 180, rotate=rotate)
        check(1, 10, zoom=zoom)
        check(0, 1, p=p)
        self.rotate, self.zoom, self.p = rotate, zoom, p

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """Angle in radians and log of the magnification: (2, B)."""
        return spread(shape[0], self.p, math.radians(self.rotate), math.log(self.zoom))

    def apply(self, x: Tensor, drawn: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        angle, log_zoom = drawn
        cos, sin, zero = angle.cos() / log_zoom.exp(), angle.sin() / log_zoom.exp(), torch.zeros_like(angle)
        # From a place in the result to its source, both in -1..1 from edge to edge, hence the sides' ratio.
        theta = torch.stack([cos, sin * (h / w), zero, -sin * (w / h), cos, zero], 1).view(-1, 2, 3)
        grid = F.affine_grid(theta.to(x.device, non_blocking=True), list(x.shape), align_corners=False)
        return F.grid_sample(x.float(), grid, padding_mode="reflection", align_corners=False).to(x.dtype)


class RandomCropBatch(BatchTransform):
    """Cut a place of its own out of each training image, the centre out of all others; nothing is resampled.

    Args:
        size: side, or (height, width), of the result in pixels.
    """

    order, split_idx = 32, None

    def __init__(self, size: int | tuple[int, int]):
        super().__init__()
        self.size, self.training = check_size(size), False

    def __call__(self, b: Any, split_idx: int | None = None, **kwargs: Any) -> Any:
        self.training = split_idx == 0
        return super().__call__(b, split_idx=split_idx, **kwargs)

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """Top and left of the place in each image, pixels, (2, B)."""
        n, _, h, w = shape
        spare = h - self.size[0], w - self.size[1]
        if min(spare) < 0:
            raise ValueError(
                f"RandomCropBatch cannot cut {self.size[0]}x{self.size[1]} pixels out of images of {h}x{w}: pass a "
                "smaller size, or read the images larger."
            )
        if not self.training:
            return torch.tensor(spare)[:, None].expand(2, n) // 2
        return torch.stack([torch.randint(s + 1, (n,)) for s in spare])

    def apply(self, x: Tensor, drawn: Tensor) -> Tensor:
        top, left = drawn.to(x.device, non_blocking=True)
        # All places of that size are views; one gather copies those that were drawn.
        places = x.unfold(2, self.size[0], 1).unfold(3, self.size[1], 1)
        return places[torch.arange(len(x), device=x.device), :, top, left]


class RandomD4(BatchTransform):
    """One of the eight flips and quarter turns, equally likely; exact. Images that are not square are only flipped.

    Of fluorescence images of cultured cells none is more natural than another. (fastai's `Dihedral` resamples, and
    leaves half of the images as they are.)
    """

    order = 34

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """Which one (see `d4`) each image gets, (B,)."""
        return torch.randint(8 if shape[-2] == shape[-1] else 4, shape[:1])

    def apply(self, x: Tensor, drawn: Tensor) -> Tensor:
        # Each step of `d4` for the whole batch, kept where it was drawn: six kernels for any number of images.
        steps = (1, 2, 4) if x.shape[-2] == x.shape[-1] else (1, 2)
        chosen = (drawn & torch.tensor(steps)[:, None]).bool()[..., None, None, None]
        for step, where in zip(steps, chosen.to(x.device, non_blocking=True), strict=True):
            x = torch.where(where, d4(x, step), x)
        return x


# ---------------------------------------------------------------- how bright they are


class ChannelIntensity(BatchTransform):
    """Change the intensity of each channel of each image on its own: gain · x ** gamma, cut to 0..1.

    Exposure and staining differ from plate to plate and from channel to channel.

    Args:
        gain, gamma: largest relative change, 0 or more: 0.1 draws log-uniformly from 1/1.1..1.1.
        p: probability of each image to be changed, 0 to 1.
    """

    order = 40

    def __init__(self, gain: float = 0.1, gamma: float = 0.1, p: float = 0.75):
        super().__init__()
        check(0, 10, gain=gain, gamma=gamma)
        check(0, 1, p=p)
        self.gain, self.gamma, self.p = gain, gamma, p

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """Gain and gamma, (2, B, C)."""
        n, c = shape[:2]
        reach = torch.tensor([math.log1p(self.gain), math.log1p(self.gamma)])[:, None, None]
        return (torch.empty(2, n, c).uniform_(-1, 1) * reach * (torch.rand(n, 1) < self.p)).exp()

    def apply(self, x: Tensor, drawn: Tensor) -> Tensor:
        gain, gamma = drawn[..., None, None].to(x.device, x.dtype, non_blocking=True)
        return x.clamp(0, 1).pow_(gamma).mul_(gain).clamp_(0, 1)


class GaussianNoise(BatchTransform):
    """Add normal noise to every pixel of every channel, of one standard deviation per image; cut to 0..1.

    Args:
        std: largest standard deviation, 0 to 1; drawn uniformly from 0..std.
        p: probability of each image to be changed, 0 to 1.
    """

    order = 42

    def __init__(self, std: float = 0.02, p: float = 0.5):
        super().__init__()
        check(0, 1, std=std, p=p)
        self.std, self.p = std, p

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """The standard deviation in each image, (B,)."""
        return spread(shape[0], self.p, self.std)[0].abs()

    def apply(self, x: Tensor, drawn: Tensor) -> Tensor:
        std = drawn[:, None, None, None].to(x.device, x.dtype, non_blocking=True)
        return torch.randn_like(x).mul_(std).add_(x).clamp_(0, 1)


class Cutout(BatchTransform):
    """Black out one rectangle per image, in all channels at the same place (random erasing).

    fastai's `RandomErasing` puts it at one place per batch; black is what fluorescence images have between the cells.

    Args:
        area: largest share of the image's area, 0 to 1; drawn uniformly from 0..area. Height over width, each relative
            to the image, is log-uniform in ½..2.
        p: probability of each image to be changed, 0 to 1.
    """

    order = 44

    def __init__(self, area: float = 0.2, p: float = 0.5):
        super().__init__()
        check(0, 1, area=area, p=p)
        self.area, self.p = area, p

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """Top, left, height and width, pixels, (4, B); a pixel is blacked out if its centre is inside."""
        n, _, h, w = shape
        area, ratio = spread(n, self.p, self.area)[0].abs(), torch.empty(n).uniform_(-1, 1).exp2()
        height, width = h * (area * ratio).sqrt().clamp(max=1), w * (area / ratio).sqrt().clamp(max=1)
        return torch.stack([torch.rand(n) * (h - height), torch.rand(n) * (w - width), height, width])

    def apply(self, x: Tensor, drawn: Tensor) -> Tensor:
        top, left, height, width = drawn[..., None].to(x.device, non_blocking=True)
        down, right = (torch.arange(s, device=x.device) + 0.5 for s in x.shape[-2:])
        rows, cols = (down > top) & (down < top + height), (right > left) & (right < left + width)
        return x.masked_fill((rows[:, :, None] & cols[:, None, :])[:, None], 0)


# ---------------------------------------------------------------- all together


def microscopy_transforms(
    size: int | tuple[int, int] | None = None,
    flips: bool = True,
    rotate: float = 10.0,
    zoom: float = 1.1,
    intensity: float = 0.1,
    noise: float = 0.0,
    cutout: float = 0.0,
    p: float = 0.75,
) -> list[DisplayedTransform]:
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
