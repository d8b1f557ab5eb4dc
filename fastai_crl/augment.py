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
from fasttransform import DisplayedTransform, Transform
from torch import Tensor

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


def d4(x: Tensor, k: int) -> Tensor:
    """Return the `k`-th (0..7) of the eight flips and quarter turns of images (...,H,W), exactly; 0 changes nothing.

    k & 1 flips left and right, k & 2 up and down, k & 4 then exchanges rows and columns: (...,W,H).
    """
    dims = [d for bit, d in ((1, -1), (2, -2)) if k & bit]
    x = x.flip(dims) if dims else x
    return x.mT if k & 4 else x


def _spread(n: int, p: float, *reach: float) -> Tensor:
    """Draw uniformly from -reach..reach, (len(reach), n); zero, which changes nothing, with probability 1 - p."""
    return torch.empty(len(reach), n).uniform_(-1, 1) * torch.tensor(reach)[:, None] * (torch.rand(n) < p)


def _log_uniform(n: int, low: float, high: float) -> Tensor:
    return torch.empty(n).uniform_(math.log(low), math.log(high)).exp()


def _sample(x: Tensor, theta: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Return `x` resampled at the affine maps `theta`, six of (B,), mirrored at its edges; reckoned in float32."""
    theta = torch.stack(theta, 1).view(-1, 2, 3).to(x.device, non_blocking=True)
    grid = F.affine_grid(theta, [*x.shape[:2], *size], align_corners=False)
    return F.grid_sample(x.float(), grid, padding_mode="reflection", align_corners=False).to(x.dtype)


def _check(low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        if not low <= value <= high:
            raise ValueError(f"{name}={value} must be in {low}..{high}.")


def _check_range(name: str, value: tuple[float, float], high: float, what: str) -> None:
    if not 0 < value[0] <= value[1] <= high:
        raise ValueError(f"{name}={value} must be (low, high) with 0 < low <= high <= {high}, {what}.")


class _BatchTransform(DisplayedTransform):
    """A transform of training batches; a subclass draws (`draw`), on the CPU, then applies what was drawn (`apply`)."""

    split_idx = 0

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        raise NotImplementedError

    def apply(self, x: Tensor, drawn: Tensor) -> Tensor:
        raise NotImplementedError

    def encodes(self, x: TensorImage):
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} got {x.dtype} images of shape {tuple(x.shape)}, it takes float batches "
                "(B,C,H,W): pass it in batch_tfms, with IntToFloatTensor before it."
            )
        return self.apply(x.as_subclass(Tensor), self.draw(tuple(x.shape)))  # the pipeline restores the type


# ---------------------------------------------------------------- geometry


class RandomAffine(_BatchTransform):
    """Rotate, zoom and shift in one resampling, bilinear, mirrored at the edges.

    Args:
        rotate: largest angle, degrees, either way.
        zoom: largest magnification, 1 or more; as much smaller as larger (log-uniform in 1/zoom..zoom).
        shift: largest shift, share of the side, 0 to 1, in each direction.
        p: probability of each image to be changed, 0 to 1; the others keep their values to about 1e-4.
    """

    order = 30

    def __init__(self, rotate: float = 10.0, zoom: float = 1.1, shift: float = 0.0, p: float = 0.75):
        super().__init__()
        _check(0, 180, rotate=rotate)
        _check(1, 10, zoom=zoom)
        _check(0, 1, shift=shift, p=p)
        self.rotate, self.zoom, self.shift, self.p = rotate, zoom, shift, p

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        "Angle in radians, log of the magnification, shift right and down in shares of the side: (4, B)."
        return _spread(shape[0], self.p, math.radians(self.rotate), math.log(self.zoom), self.shift, self.shift)

    def apply(self, x: Tensor, drawn: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        angle, log_zoom, right, down = drawn
        cos, sin = angle.cos() / log_zoom.exp(), angle.sin() / log_zoom.exp()
        # From a place in the result to its source, both in -1..1 from edge to edge, hence the sides' ratio.
        across, along = sin * (h / w), -sin * (w / h)
        theta = [cos, across, -2 * (cos * right + across * down), along, cos, -2 * (along * right + cos * down)]
        return _sample(x, theta, (h, w))


class RandomCropBatch(_BatchTransform):
    """Cut a place of its own out of each training image, the centre out of all others.

    Args:
        size: side, or (height, width), of the result.
        scale: None cuts exactly `size` pixels and resamples nothing. (low, high), shares of the image's area, is
            Inception's random resized crop: the place has an area in that range, is resized to `size`, bilinear, and
            is cut down where it would reach beyond the image (fastai and torchvision draw again instead). Nothing
            smooths what shrinks to less than half. The centre is never resized.
        ratio: with `scale`, range of width over height, log-uniform.
    """

    order, split_idx = 32, None

    def __init__(
        self,
        size: int | tuple[int, int],
        scale: tuple[float, float] | None = None,
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ):
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        if min(self.size) < 1:
            raise ValueError(f"size={size} must be at least one pixel high and wide.")
        if scale is not None:
            _check_range("scale", scale, 1, "shares of the area")
        _check_range("ratio", ratio, math.inf, "width over height")
        self.scale, self.ratio, self.training = scale, ratio, False

    def __call__(self, b: Any, split_idx: int | None = None, **kwargs: Any) -> Any:
        self.training = split_idx == 0
        return super().__call__(b, split_idx=split_idx, **kwargs)

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        "Top, left, height and width of the place in each image, pixels, (4, B)."
        n, _, h, w = shape
        if h < self.size[0] or w < self.size[1]:
            raise ValueError(
                f"RandomCropBatch cannot cut {self.size[0]}x{self.size[1]} pixels out of images of {h}x{w}: pass a "
                "smaller size, or read the images larger."
            )
        height, width = torch.tensor(self.size)[:, None].expand(2, n)
        if not self.training:
            return torch.stack([(h - height) // 2, (w - width) // 2, height, width])
        if self.scale is None:
            top, left = (torch.randint(s - cut + 1, (n,)) for s, cut in zip((h, w), self.size, strict=True))
            return torch.stack([top, left, height, width])
        area, ratio = torch.empty(n).uniform_(*self.scale) * h * w, _log_uniform(n, *self.ratio)
        height, width = (area / ratio).sqrt().clamp(max=h), (area * ratio).sqrt().clamp(max=w)
        return torch.stack([torch.rand(n) * (h - height), torch.rand(n) * (w - width), height, width])

    def apply(self, x: Tensor, drawn: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if not drawn.is_floating_point():
            places = zip(x, drawn[0].tolist(), drawn[1].tolist(), strict=True)
            return torch.stack([i[:, t : t + self.size[0], s : s + self.size[1]] for i, t, s in places])
        top, left, height, width = drawn
        zero = torch.zeros_like(top)
        theta = [width / w, zero, (2 * left + width) / w - 1, zero, height / h, (2 * top + height) / h - 1]
        return _sample(x, theta, self.size)


class RandomD4(_BatchTransform):
    """One of the eight flips and quarter turns, equally likely; exact. Images that are not square are only flipped.

    Of fluorescence images of cultured cells none is more natural than another. (fastai's `Dihedral` resamples, and
    leaves half of the images as they are.)
    """

    order = 34

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        "Which one (see `d4`) each image gets, (B,)."
        return torch.randint(8 if shape[-2] == shape[-1] else 4, shape[:1])

    def apply(self, x: Tensor, drawn: Tensor) -> Tensor:
        return torch.stack([d4(image, k) for image, k in zip(x, drawn.tolist(), strict=True)])


# ---------------------------------------------------------------- intensity


class ChannelIntensity(_BatchTransform):
    """Change the intensity of each channel of each image on its own: gain · x ** gamma + offset, cut to 0..1.

    Exposure and staining differ from plate to plate and from channel to channel.

    Args:
        gain, gamma: largest relative change, 0 or more: 0.1 draws log-uniformly from 1/1.1..1.1.
        offset: largest change of the background, 0 to 1.
        p: probability of each image to be changed, 0 to 1.
    """

    order = 40

    def __init__(self, gain: float = 0.1, gamma: float = 0.1, offset: float = 0.0, p: float = 0.75):
        super().__init__()
        _check(0, 10, gain=gain, gamma=gamma)
        _check(0, 1, offset=offset, p=p)
        self.gain, self.gamma, self.offset, self.p = gain, gamma, offset, p

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        "Gain, gamma and offset, (3, B, C)."
        n, c = shape[:2]
        reach = torch.tensor([math.log1p(self.gain), math.log1p(self.gamma), self.offset])[:, None, None]
        drawn = torch.empty(3, n, c).uniform_(-1, 1) * reach * (torch.rand(n, 1) < self.p)
        drawn[:2].exp_()
        return drawn

    def apply(self, x: Tensor, drawn: Tensor) -> Tensor:
        gain, gamma, offset = drawn[..., None, None].to(x.device, x.dtype, non_blocking=True)
        return x.clamp(0, 1).pow_(gamma).mul_(gain).add_(offset).clamp_(0, 1)


class GaussianNoise(_BatchTransform):
    """Add normal noise to every pixel of every channel, of one standard deviation per image; cut to 0..1.

    Args:
        std: largest standard deviation, 0 to 1; drawn uniformly from 0..std.
        p: probability of each image to be changed, 0 to 1.
    """

    order = 42

    def __init__(self, std: float = 0.02, p: float = 0.5):
        super().__init__()
        _check(0, 1, std=std, p=p)
        self.std, self.p = std, p

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        "The standard deviation in each image, (B,)."
        return _spread(shape[0], self.p, self.std)[0].abs()

    def apply(self, x: Tensor, drawn: Tensor) -> Tensor:
        std = drawn[:, None, None, None].to(x.device, x.dtype, non_blocking=True)
        return torch.randn_like(x).mul_(std).add_(x).clamp_(0, 1)


class Cutout(_BatchTransform):
    """Black out one rectangle per image, in all channels at the same place (random erasing).

    fastai's `RandomErasing` puts it at one place per batch; black is what fluorescence images have between the cells.

    Args:
        area: largest share of the image's area, 0 to 1; drawn uniformly from 0..area.
        ratio: range of height over width, each relative to the image, log-uniform.
        p: probability of each image to be changed, 0 to 1.
    """

    order = 44

    def __init__(self, area: float = 0.2, ratio: tuple[float, float] = (0.5, 2.0), p: float = 0.5):
        super().__init__()
        _check(0, 1, area=area, p=p)
        _check_range("ratio", ratio, math.inf, "height over width")
        self.area, self.ratio, self.p = area, ratio, p

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        "Top, left, height and width, pixels, (4, B); a pixel is blacked out if its centre is inside."
        n, _, h, w = shape
        area, ratio = _spread(n, self.p, self.area)[0].abs(), _log_uniform(n, *self.ratio)
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
        rotate, zoom, shift: see `RandomAffine`.
        intensity: `gain` and `gamma` of `ChannelIntensity`.
        noise: `std` of `GaussianNoise`. cutout: `area` of `Cutout`.
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
