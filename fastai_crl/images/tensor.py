"""Multi-channel images as one tensor: opened from their files, N channels shown as a colour picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.torch_core import TensorImage, show_image
from fasttransform import DisplayedTransform
from PIL import Image

from fastai_crl.hpa import HPA_CHANNELS

from .layout import PATTERN, channel_files, check_pattern
from .readers import check_intensity, read_planes

__all__ = ["OpenMultiChannel", "TensorMultiChannel", "open_channels"]

# Additive display colours; yellow feeds red and green, as in the pictures the Human Protein Atlas publishes.
_COLORS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "magenta": (1.0, 0.0, 1.0),
    "cyan": (0.0, 1.0, 1.0),
    "orange": (1.0, 0.5, 0.0),
    "gray": (1.0, 1.0, 1.0),
}


# ---------------------------------------------------------------- tensor and display


class TensorMultiChannel(TensorImage):
    """An image (C,H,W), or a batch (B,C,H,W), of any number of channels; uint8 0..255 as read, float after that.

    `channels`, an optional tuple of C names, travels with the tensor and picks the display colours; without it (or
    with another number of channels) the standard ones apply: red, green, blue, yellow.
    """

    channels: tuple[str, ...] | None = None

    def composite(
        self,
        channels: Sequence[str | int] | None = None,
        stretch: float | None = None,
        colors: Sequence[tuple[float, float, float]] | None = None,
    ) -> np.ndarray:
        """Return the additive colour picture of one image, float32 (H,W,3) in 0..1.

        channels: names or positions of the channels to draw; all by default.
        stretch: a percentile in (50,100], for instance 99.5; every drawn channel of this image is stretched so that
            the (100−stretch)th percentile is black and the `stretch`th is full intensity. Default: true brightness.
        colors: RGB in 0..1 per drawn channel; by default a channel named after a colour gets that colour, any other
            the first free one of red, green, blue, yellow, magenta, cyan, orange, and a lone channel is grey.

        Integers are scaled by their range (8 or 16 bits). Floats in 0..1 are drawn as they are; floats outside 0..1,
        such as a normalised image, have lost their zero, so each channel is scaled from its minimum to its maximum.

        Raises ValueError for a tensor that is not one image, an unknown channel, or a percentile out of range.
        """
        x = self.as_subclass(torch.Tensor).detach().cpu()
        if x.ndim == 2:
            x = x[None]
        if x.ndim != 3:
            raise ValueError(f"Only one image (C,H,W) can be shown, got shape {tuple(x.shape)}: index it first.")
        if stretch is not None and not 50 < stretch <= 100:
            raise ValueError(f"stretch={stretch} is not a percentile in (50,100]: pass for instance stretch=99.5.")
        names = _names(self.channels, len(x))
        picked = list(range(len(x))) if channels is None else [_position(c, names) for c in channels]
        img = _to_unit(x[picked])
        if stretch is not None:
            lo, hi = np.percentile(img, [100 - stretch, stretch], axis=(1, 2))
            img = (img - lo[:, None, None]) / np.maximum(hi - lo, 1e-6)[:, None, None]
        palette = _palette(names)[picked] if colors is None else np.asarray(colors, dtype=np.float32)
        return np.einsum("chw,ck->hwk", img.clip(0, 1), palette).clip(0, 1).astype(np.float32)

    def show(
        self,
        ctx: Any = None,
        channels: Sequence[str | int] | None = None,
        stretch: float | None = None,
        colors: Sequence[tuple[float, float, float]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Draw the colour picture (see `composite`) on the axes `ctx`; `kwargs` go to fastai's `show_image`."""
        return show_image(self.composite(channels, stretch, colors), ctx=ctx, **kwargs)


def _names(names: Sequence[str] | None, n: int) -> tuple[str, ...]:
    """Return names for `n` channels: those given if they fit, else the standard ones (a slice keeps old names)."""
    if names is not None and len(names) == n:
        return tuple(names)
    return ("gray",) if n == 1 else (HPA_CHANNELS + tuple(f"channel {i}" for i in range(4, n)))[:n]


def _position(channel: str | int, names: tuple[str, ...]) -> int:
    if channel in names:
        return names.index(channel)
    if isinstance(channel, int) and -len(names) <= channel < len(names):
        return channel % len(names)
    raise ValueError(f"There is no channel {channel!r}: the image has {', '.join(names)}.")


def _palette(names: tuple[str, ...]) -> np.ndarray:
    """Return display colours (C,3)."""
    if len(names) == 1:
        return np.array([_COLORS.get(names[0], _COLORS["gray"])], dtype=np.float32)
    free = [v for k, v in _COLORS.items() if k not in names]
    free += [_COLORS["gray"]] * len(names)
    return np.array([_COLORS[n] if n in _COLORS else free.pop(0) for n in names], dtype=np.float32)


def _to_unit(x: torch.Tensor) -> np.ndarray:
    """Return `x` (C,H,W) of any dtype and range as float32, 0..1."""
    img = np.nan_to_num(x.float().numpy(), nan=0.0, posinf=0.0, neginf=0.0)
    if x.dtype == torch.bool:
        return img
    if not x.is_floating_point():
        return img / (255 if img.max(initial=0) <= 255 else 65535)
    # A little slack: interpolation and rounding leave 0..1 by less than this.
    if img.min(initial=0) >= -1e-3 and img.max(initial=0) <= 1 + 1e-3:
        return img
    lo, hi = img.min((1, 2), keepdims=True), img.max((1, 2), keepdims=True)
    return (img - lo) / np.maximum(hi - lo, 1e-6)


# ---------------------------------------------------------------- opening


def open_channels(
    prefix: str | Path,
    channels: Sequence[str] = HPA_CHANNELS,
    size: int | tuple[int, int] | None = None,
    pattern: str = PATTERN,
    resample: int = Image.Resampling.BILINEAR,
    bits: int | None = None,
    stretch: float | tuple[float, float] | None = None,
) -> TensorMultiChannel:
    """Read the image `prefix` = folder/id as uint8 (C,H,W), intensities 0..255.

    Its files are folder/`pattern`: one per channel, or, for a pattern without {channel}, one that holds all channels in
    the order of `channels` (pages, or first or last axis, of a TIFF; RGB). 8-bit files keep their values, 16-bit files
    are scaled by their bit depth (65535 becomes 255), one channel saved in colour is reduced by the maximum of its
    bands. Each channel is resized on its own to `size`, an int for a square or (height, width); None keeps the size of
    the files.

    bits: depth of the data in 16-bit files, for instance 12: 4095 becomes 255. Default: the file's own.
    stretch: percentiles (lo, hi), or one number p for (100−p, p), that become 0 and 255 in each channel of each image.
        Default: true brightness. See `readers.read_planes`.

    Raises FileNotFoundError for a missing file and ValueError for one that is damaged, truncated, of floating point
    pixels, of other channels, or of another size than the first channel; each names the file.
    """
    bits, stretch = check_intensity(bits, stretch)
    hw = (size, size) if isinstance(size, int) else None if size is None else (int(size[0]), int(size[1]))
    files = channel_files(prefix, channels, pattern)
    planes = [read_planes(f, len(channels) // len(files), hw, resample, bits, stretch) for f in files]
    for f, p in zip(files, planes, strict=True):
        if p.shape != planes[0].shape:
            raise ValueError(
                f"Image file {f} is {p.shape[1]}x{p.shape[2]} but {files[0].name} is "
                f"{planes[0].shape[1]}x{planes[0].shape[2]}: the channels of one image must have the same size."
            )
    return TensorMultiChannel(torch.from_numpy(np.concatenate(planes)), channels=tuple(channels))


class OpenMultiChannel(DisplayedTransform):
    """Transform from a path prefix folder/id to a uint8 `TensorMultiChannel`; arguments as for `open_channels`.

    cache: a `pack.Packed` made with the same arguments; images that it does not hold are read from their files.
    """

    input_types = (str, Path)

    def __init__(
        self,
        channels: Sequence[str] = HPA_CHANNELS,
        size: int | tuple[int, int] | None = None,
        pattern: str = PATTERN,
        resample: int = Image.Resampling.BILINEAR,
        bits: int | None = None,
        stretch: float | tuple[float, float] | None = None,
        cache: Any = None,
    ):
        super().__init__()
        self.channels = (channels,) if isinstance(channels, str) else tuple(channels)
        check_pattern(self.channels, pattern)
        self.bits, self.stretch = check_intensity(bits, stretch)
        self.size, self.pattern, self.resample, self.cache = size, pattern, int(resample), cache

    def encodes(self, o: str | Path):
        x = self.cache.get(o) if self.cache is not None else None
        if x is None:
            x = open_channels(o, self.channels, self.size, self.pattern, self.resample, self.bits, self.stretch)
        return x
