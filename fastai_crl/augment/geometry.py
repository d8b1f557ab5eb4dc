"""Batch transforms of where things are: flips and turns, affine maps, crops."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastai_crl._checks import check_size

from .base import BatchTransform, check, check_range, log_uniform, spread


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


def _sample(x: Tensor, theta: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Return `x` resampled at the affine maps `theta`, six of (B,), mirrored at its edges; computed in float32."""
    theta = torch.stack(theta, 1).view(-1, 2, 3).to(x.device, non_blocking=True)
    grid = F.affine_grid(theta, [*x.shape[:2], *size], align_corners=False)
    return F.grid_sample(x.float(), grid, padding_mode="reflection", align_corners=False).to(x.dtype)


class RandomAffine(BatchTransform):
    """Rotate, zoom and translate in one resampling, bilinear, mirrored at the edges.

    Args:
        rotate: largest angle, degrees, either way.
        zoom: largest magnification, 1 or more; as much smaller as larger (log-uniform in 1/zoom..zoom).
        translate: largest move, share of the side, 0 to 1, in each direction.
        p: probability of each image to be changed, 0 to 1; the others keep their values to about 1e-4.
    """

    order = 30

    def __init__(self, rotate: float = 10.0, zoom: float = 1.1, translate: float = 0.0, p: float = 0.75):
        super().__init__()
        check(0, 180, rotate=rotate)
        check(1, 10, zoom=zoom)
        check(0, 1, translate=translate, p=p)
        self.rotate, self.zoom, self.translate, self.p = rotate, zoom, translate, p

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """Angle in radians, log of the magnification, move right and down in shares of the side: (4, B)."""
        return spread(shape[0], self.p, math.radians(self.rotate), math.log(self.zoom), self.translate, self.translate)

    def apply(self, x: Tensor, drawn: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        angle, log_zoom, right, down = drawn
        cos, sin = angle.cos() / log_zoom.exp(), angle.sin() / log_zoom.exp()
        # From a place in the result to its source, both in -1..1 from edge to edge, hence the sides' ratio.
        across, along = sin * (h / w), -sin * (w / h)
        theta = [cos, across, -2 * (cos * right + across * down), along, cos, -2 * (along * right + cos * down)]
        return _sample(x, theta, (h, w))


class RandomCropBatch(BatchTransform):
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
        self.size = check_size(size)
        if scale is not None:
            check_range("scale", scale, 1, "shares of the area")
        check_range("ratio", ratio, math.inf, "width over height")
        self.scale, self.ratio, self.training = scale, ratio, False

    def __call__(self, b: Any, split_idx: int | None = None, **kwargs: Any) -> Any:
        self.training = split_idx == 0
        return super().__call__(b, split_idx=split_idx, **kwargs)

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """Top and left of the place in each image, pixels, (2, B); with `scale` also height and width, (4, B)."""
        n, _, h, w = shape
        spare = h - self.size[0], w - self.size[1]
        if min(spare) < 0:
            raise ValueError(
                f"RandomCropBatch cannot cut {self.size[0]}x{self.size[1]} pixels out of images of {h}x{w}: pass a "
                "smaller size, or read the images larger."
            )
        if not self.training:
            return torch.tensor(spare)[:, None].expand(2, n) // 2
        if self.scale is None:
            return torch.stack([torch.randint(s + 1, (n,)) for s in spare])
        area, ratio = torch.empty(n).uniform_(*self.scale) * h * w, log_uniform(n, *self.ratio)
        height, width = (area / ratio).sqrt().clamp(max=h), (area * ratio).sqrt().clamp(max=w)
        return torch.stack([torch.rand(n) * (h - height), torch.rand(n) * (w - width), height, width])

    def apply(self, x: Tensor, drawn: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if len(drawn) == 2:
            top, left = drawn.to(x.device, non_blocking=True)
            # All places of that size are views; one gather copies those that were drawn.
            places = x.unfold(2, self.size[0], 1).unfold(3, self.size[1], 1)
            return places[torch.arange(len(x), device=x.device), :, top, left]
        top, left, height, width = drawn
        zero = torch.zeros_like(top)
        theta = [width / w, zero, (2 * left + width) / w - 1, zero, height / h, (2 * top + height) / h - 1]
        return _sample(x, theta, self.size)


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
