"""What a reader is, what it is given, and what it gives back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

_ALONE = threading.RLock()  # of the readers that one thread at a time may call
HOW_TO_ALLOW = "; if that is right, raise PIL.Image.MAX_IMAGE_PIXELS"


@dataclass
class Input:
    """An image file, or folder, that is to be read.

    Attributes:
        path: where it lies.
        start: its first 64 bytes; empty for a folder.
        stream: the open file; None for a folder. What a gzipped file unzips to has no place of its own.
        size: of the file in bytes; 0 for a folder.

    Example:
        >>> Input(Path("plate.zarr")).is_folder
        True
    """

    path: Path
    start: bytes = b""
    stream: BinaryIO | None = None
    size: int = 0

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.stream is None


@dataclass
class Source:
    """An opened image: its shape, and the function that decodes it.

    Attributes:
        planes: how many it holds.
        height: of each in pixels.
        width: of each in pixels.
        decode: returns the pixels (planes, height, width) as integers; whatever it raises is reported as damage.
        dtype: of the pixels.
        white: the value of full intensity; None: the largest of a uint8 or uint16. Other types have none of their own
            and need `bits`.
        colour: planes are red, green, blue and perhaps alpha.
        inverted: 0 is full intensity, and `white` is black.
        intact: no sign of truncation and nothing unusual; else a check decodes it, as only that tells.
    """

    planes: int
    height: int
    width: int
    decode: Callable[[], np.ndarray]
    dtype: Any = np.uint8
    white: int | None = None
    colour: bool = False
    inverted: bool = False
    intact: bool = False


@dataclass(frozen=True)
class Reader:
    """A format of image files, or of folders that hold one image.

    Args:
        name: of the format; one reader of a name is registered at a time.
        suffixes: endings of file names, in lower case, such as ".png".
        open: from an `Input`, and the number of channels that is expected, to a `Source`. It reads no more than the
            header. It raises ValueError, with the reason and the fix, for what it cannot read.
        matches: whether it reads an `Input`; None: by the suffixes.
        channels: numbers of channels that one file can hold; None for any.
        threads: whether several threads may call it at once. Many decoders do not allow that, nor does `np.load` under
            Python 3.11, whose `ast`, which reads its header, fails at random (gh-106905 of CPython).
    """

    name: str
    suffixes: tuple[str, ...]
    open: Callable[[Input, int], Source]
    matches: Callable[[Input], bool] | None = None
    channels: tuple[int, ...] | None = None
    threads: bool = False

    def reads(self, file: Input) -> bool:
        """Whether this reader is the one for `file`."""
        if self.matches is not None:
            return self.matches(file)
        return str(file.path).lower().endswith(self.suffixes)

    def source(self, file: Input, n: int) -> Source:
        """Open `file`; without `threads`, its opening and its decoding wait for those in other threads."""
        if self.threads:
            return self.open(file, n)
        with _ALONE:
            source = self.open(file, n)

        def decode() -> np.ndarray:
            with _ALONE:
                return source.decode()

        return replace(source, decode=decode)


def check_pixels(height: int, width: int) -> None:
    """Raise ValueError for a side of 0, or for more pixels than Pillow would allow."""
    most = Image.MAX_IMAGE_PIXELS
    if height < 1 or width < 1:
        raise ValueError(f"its header is damaged: it claims {height}x{width} pixels")
    if most is not None and height * width > most:
        raise ValueError(f"its header claims {height}x{width} pixels, more than {most:,}{HOW_TO_ALLOW}")
