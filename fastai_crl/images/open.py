"""Opening multi-channel images: as a function, and as the transform that data blocks use."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasttransform import DisplayedTransform
from PIL import Image

from .image_set import ImageSet, Size
from .layout import CHANNELS, PATTERN
from .tensor import TensorMultiChannel


def open_channels(
    prefix: str | Path,
    channels: Sequence[str] = CHANNELS,
    size: Size | None = None,
    pattern: str = PATTERN,
    resample: int = Image.Resampling.BILINEAR,
    bits: int | None = None,
    stretch: float | tuple[float, float] | None = None,
) -> TensorMultiChannel:
    """Read the image `prefix` = folder/id as uint8 (C,H,W), intensities 0..255; arguments as for `ImageSet`.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: a file that cannot be read; see `ImageSet.open`.
    """
    return ImageSet(".", channels, pattern, size, resample, bits, stretch).open(prefix)


class OpenMultiChannel(DisplayedTransform):
    """Transform from a path prefix folder/id to a uint8 `TensorMultiChannel`.

    `images` is the `ImageSet` that the arguments describe, of the folder "."; `of` takes one that is there already.

    Args:
        channels: as for `ImageSet`, like the others.
        size: see there.
        pattern: see there.
        resample: see there.
        bits: see there.
        stretch: see there.
        cache: a `Packed` made with the same arguments; images that it does not hold are read from their files.
    """

    input_types = (str, Path)

    def __init__(
        self,
        channels: Sequence[str] = CHANNELS,
        size: Size | None = None,
        pattern: str = PATTERN,
        resample: int = Image.Resampling.BILINEAR,
        bits: int | None = None,
        stretch: float | tuple[float, float] | None = None,
        cache: Any = None,
    ):
        super().__init__()
        self.images = ImageSet(".", channels, pattern, size, resample, bits, stretch)
        self.channels, self.pattern, self.cache = self.images.channels, pattern, cache

    @classmethod
    def of(cls, images: ImageSet, cache: Any = None) -> "OpenMultiChannel":
        """Return the transform that opens images as `images` does, whatever their folder."""
        return cls(images.channels, images.size, images.pattern, images.resample, images.bits, images.stretch, cache)

    def encodes(self, o: str | Path):
        x = self.cache.get(o) if self.cache is not None else None
        return self.images.open(o) if x is None else x
