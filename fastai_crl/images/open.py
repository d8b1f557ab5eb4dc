"""Opening multi-channel images: as a function, and as the transform that data blocks use."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasttransform import DisplayedTransform

from .image_set import ImageSet, check_images
from .layout import CHANNELS
from .packed import Packed
from .tensor import TensorMultiChannel


def open_channels(prefix: str | Path, channels: Sequence[str] = CHANNELS, **kwargs: Any) -> TensorMultiChannel:
    """Read the image `prefix` = folder/id as uint8 (C,H,W), intensities 0..255.

    Args:
        prefix: path of its files, without what the pattern adds.
        channels: names, in the order of the tensor.
        **kwargs: the other arguments of `ImageSet`: pattern, size, bits, stretch.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: a file that cannot be read; see `ImageSet.open`.
    """
    return ImageSet(".", channels, **kwargs).open(prefix)


class OpenMultiChannel(DisplayedTransform):
    """Transform from a path prefix folder/id, or the path of one of its files, to a uint8 `TensorMultiChannel`.

    Args:
        images: how the files are named and read; their folder is that of each item.
        cache: what `pack` returned for the same images; those that it does not hold are read from their files.
    """

    input_types = (str, Path)

    def __init__(self, images: ImageSet, cache: Packed | None = None):
        super().__init__()
        self.images, self.cache = check_images(images).with_(folder="."), cache

    @property
    def channels(self) -> tuple[str, ...]:
        """The names of the channels."""
        return self.images.channels

    def encodes(self, o: str | Path):
        x = self.cache.get(o) if self.cache is not None else None
        return self.images.open(self.images.id_of(o)) if x is None else x
