"""Batch transforms of where things are: flips and turns, affine maps, crops."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastai_crl._checks import check_size

from .base import BatchTransform, check, spread


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
