"""Batch transforms of how bright things are: gain and gamma by channel, noise, cutout."""

import math

import torch
from torch import Tensor

from .base import BatchTransform, check, spread


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
