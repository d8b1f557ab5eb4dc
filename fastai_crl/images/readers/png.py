"""PNG, by imagecodecs: the fastest of the decoders that `examples/benchmarks/data.py` compares, with equal pixels."""

import zlib
from dataclasses import replace
from typing import BinaryIO

import imagecodecs
import numpy as np
from PIL import Image

from .base import Input, Reader, Source, check_pixels
from .pillow import open_with_pillow

_START, _END = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\0\0\0\0IEND\xaeB`\x82"
_PLANES = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type: grey, RGB, grey with alpha, RGBA
_TIMES = 1040  # deflate makes at most this many bytes out of one


def _chunks_before_pixels(f: BinaryIO, start: bytes, size: int) -> set[bytes]:
    """Return the kinds of the chunks between header and pixels: mostly there are none, and nothing is read."""
    kinds, at = set(), 33
    while (head := start[at : at + 8] or _at(f, at))[4:] not in (b"IDAT", b"IEND") and at < size:
        kinds.add(head[4:])
        at += 12 + int.from_bytes(head[:4], "big")
    return kinds


def _at(f: BinaryIO, at: int) -> bytes:
    f.seek(at)
    return f.read(8)


def _check_sums(f: BinaryIO) -> None:
    """Raise an error for chunks that do not fit their checksums, as Pillow does not look at those of the pixels."""
    f.seek(0)
    Image.open(f, formats=["PNG"]).verify()


def _open(file: Input, n: int) -> Source:
    f, head = file.stream, file.start
    if len(head) < 33 or zlib.crc32(head[12:29]) != int.from_bytes(head[29:33], "big"):
        raise ValueError("its header is cut off or damaged")
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    check_pixels(height, width)
    depth, planes = head[24], _PLANES.get(head[25])
    # A table of colours, less than 8 bits, or the frames of an animation.
    if planes is None or depth < 8 or b"acTL" in _chunks_before_pixels(f, head, file.size):
        source = open_with_pillow(file, n)
        return replace(source, decode=lambda: _check_sums(f) or source.decode())
    if height * (width * planes * depth // 8) > _TIMES * file.size:
        raise ValueError(f"truncated: {file.size:,} bytes cannot hold the {height}x{width} pixels that it claims")
    f.seek(max(0, file.size - len(_END)))
    intact = f.read(len(_END)) == _END

    def decode() -> np.ndarray:
        f.seek(0)
        a = imagecodecs.png_decode(f.read())
        a = a[None] if a.ndim == 2 else np.moveaxis(a, -1, 0)[:planes]  # a transparent colour adds alpha
        if planes != 2:
            return a
        if (a[1] != np.iinfo(a.dtype).max).any():
            raise ValueError("it is not opaque, save it without alpha")
        return a[:1]

    dtype = np.uint8 if depth == 8 else np.uint16
    shown = 1 if planes == 2 else planes
    return Source(shown, height, width, decode, dtype, colour=planes > 2, intact=intact and planes != 2)


PNG = Reader("PNG", (".png",), _open, lambda file: file.start.startswith(_START), channels=(1, 3), threads=True)
