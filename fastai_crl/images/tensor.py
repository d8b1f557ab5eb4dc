"""Multi-channel images as one tensor, whose N channels are shown as a colour picture."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from fastai.torch_core import TensorImage, show_image
from matplotlib.colors import to_rgb
from skimage.exposure import rescale_intensity

from .colors import palette
from .layout import CHANNELS
from .readers import check_intensity

Color = str | tuple[float, float, float]


class TensorMultiChannel(TensorImage):
    """An image (C,H,W), or a batch (B,C,H,W), of any number of channels; uint8 0..255 as read, float after that.

    `channels`, an optional tuple of C names, travels with the tensor and picks the display colours, see `palette`;
    without it (or with another number of channels) the standard ones apply: red, green, blue, yellow.

    Example:
        >>> x = TensorMultiChannel(torch.full((2, 8, 8), 255, dtype=torch.uint8), channels=("dna", "actin"))
        >>> x.composite()[0, 0].tolist()  # the first is drawn in blue, the other in red
        [1.0, 0.0, 1.0]
    """

    channels: tuple[str, ...] | None = None

    def composite(
        self,
        channels: Sequence[str | int] | str | int | None = None,
        stretch: float | tuple[float, float] | None = None,
        colors: Sequence[Color] | None = None,
    ) -> np.ndarray:
        """Return the additive colour picture of one image, float32 (H,W,3) in 0..1.

        Integers are scaled by their range (8 or 16 bits). Floats in 0..1 are drawn as they are; floats outside 0..1,
        such as a normalised image, have lost their zero, so each channel is scaled from its minimum to its maximum.

        Args:
            channels: names or positions of the channels to draw; all by default. A lone one is one channel. A whole
                number is a position, or the name of a channel where there is no such position.
            stretch: as for `ImageSet`, percentiles (lo, hi), or one such as 99.5 for (0.5, 99.5), that become black and
                full intensity in every drawn channel of this image. Default: true brightness.
            colors: one per drawn channel, RGB in 0..1 or matplotlib's names. Default: by the names of the channels,
                those of the field's stains among them, see `palette`.

        Raises:
            ValueError: a tensor that is not one image, an unknown channel, a whole number that is the name of one
                channel and the position of another, percentiles out of range, or colours that do not fit.
        """
        x = self.as_subclass(torch.Tensor).detach().cpu()
        if x.ndim == 2:
            x = x[None]
        if x.ndim != 3:
            raise ValueError(f"Only one image (C,H,W) can be shown, got shape {tuple(x.shape)}: index it first.")
        percentiles = check_intensity(None, stretch)[1]
        names = channel_names(self.channels, len(x))
        picked = positions(channels, names)
        if colors is not None and len(colors) != len(picked):
            raise ValueError(f"colors={colors}: give one for each of the {len(picked)} channels that are drawn.")
        img = _to_unit(x[picked])
        if percentiles is not None:
            img = np.stack([rescale_intensity(p, tuple(np.percentile(p, percentiles)), (0, 1)) for p in img])
        paints = palette(names)[picked] if colors is None else np.array([to_rgb(c) for c in colors], dtype=np.float32)
        return np.einsum("chw,ck->hwk", img.clip(0, 1), paints).clip(0, 1).astype(np.float32)

    def show(
        self,
        ctx: Any = None,
        channels: Sequence[str | int] | str | int | None = None,
        stretch: float | tuple[float, float] | None = None,
        colors: Sequence[Color] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Draw the colour picture (see `composite`) on the axes `ctx`; `kwargs` go to fastai's `show_image`."""
        return show_image(self.composite(channels, stretch, colors), ctx=ctx, **kwargs)


def channel_names(names: Sequence[str] | None, n: int) -> tuple[str, ...]:
    """Return names for `n` channels: those given if they fit, else the standard ones (a slice keeps old names)."""
    names = (names,) if isinstance(names, str) else names
    if names is not None and len(names) == n:
        return tuple(names)
    return ("gray",) if n == 1 else (CHANNELS + tuple(f"channel {i}" for i in range(4, n)))[:n]


def positions(channels: Sequence[str | int] | str | int | None, names: tuple[str, ...]) -> list[int]:
    """Return the positions of channels given by name or position, or a lone one; all for None."""
    channels = (channels,) if isinstance(channels, str | Integral) else channels
    return list(range(len(names))) if channels is None else [_position(c, names) for c in channels]


def _position(channel: str | int, names: tuple[str, ...]) -> int:
    if channel in names:
        return names.index(channel)
    if not isinstance(channel, str):
        inside = -len(names) <= channel < len(names)
        named = names.index(str(channel)) if str(channel) in names else None
        if inside and named not in (None, channel % len(names)):
            raise ValueError(
                f"channel {channel} is both the name of one and the position of another of {', '.join(names)}: pass "
                f"its name as text, '{channel}' or '{names[channel]}'."
            )
        if inside or named is not None:
            return channel % len(names) if inside else named
    raise ValueError(f"There is no channel {channel!r}: the image has {', '.join(names)}.")


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
