"""The pages of a TIFF, decoded strip by strip and tile by tile, each of the length that it must have."""

import io
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import BinaryIO, NamedTuple

import imagecodecs
import numpy as np
from PIL import Image
from tifffile import COMPRESSION, TIFF, TiffPage

from .base import check_pixels

# What decodes to bytes of a length that can be compared with that of the pixels.
_BYTES = {COMPRESSION.NONE, COMPRESSION.LZW, COMPRESSION.ADOBE_DEFLATE, COMPRESSION.DEFLATE, COMPRESSION.PACKBITS}
_BYTES |= {COMPRESSION.ZSTD, COMPRESSION.LZMA}
# What decodes to a picture, whose own header is compared with that of the page.
_PICTURES = {
    COMPRESSION.JPEG: "JPEG",
    COMPRESSION.JPEG2000: "JPEG2000",
    COMPRESSION.WEBP: "WEBP",
    COMPRESSION.PNG: "PNG",
}


class _Segment(NamedTuple):
    """A strip or tile: where it lies in the file and in the image, and how many bytes its pixels take."""

    offset: int
    size: int
    plane: int
    y: int
    x: int
    rows: int
    pixels: int
    full: int  # bytes of a last strip that was filled up to the length of the others


def _segments(page: TiffPage) -> Iterator[_Segment]:
    length = page.imagelength
    tall, wide = (
        (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, length), page.imagewidth)
    )
    down, across = -(-length // tall), -(-page.imagewidth // wide)
    row = -(-wide * page.shaped[4] * page.bitspersample // 8)
    for i, (offset, size) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
        plane, place = divmod(i, down * across)
        y, x = place // across * tall, place % across * wide
        rows = tall if page.is_tiled else min(tall, length - y)
        yield _Segment(offset, size, plane, y, x, rows, rows * row, tall * row)


def dtype_of(page: TiffPage) -> np.dtype:
    """Return the type of the pixels that `read_page` gives."""
    return np.dtype(np.uint8) if page.dtype == bool else page.dtype


def by_bytes(page: TiffPage) -> bool:
    """Whether the length of what a strip or tile decodes to can be compared with that of its pixels."""
    whole = page.bitspersample == 8 * page.dtype.itemsize
    return page.compression in _BYTES and (page.predictor == 1 or (page.predictor == 2 and whole))


# ---------------------------------------------------------------- checking


def check_page(page: TiffPage, end: int) -> None:
    """Raise ValueError for a page that lies about its pixels, or lacks some of them, in a file of `end` bytes."""
    sides = [page.imagelength, page.imagewidth, *((page.tilelength, page.tilewidth) if page.is_tiled else ())]
    if not all(isinstance(v, int) for v in [*sides, page.bitspersample]):  # tuples, with a damaged count
        raise ValueError("its header is damaged, or its samples are of different depth")
    shown, bits = page.tags.get("PhotometricInterpretation"), page.tags.get("BitsPerSample")
    if shown is None or shown.count != 1 or (bits is not None and bits.count not in (1, page.samplesperpixel)):
        raise ValueError(
            "its header is damaged: it does not say what its values stand for, or of how many bits they are"
        )
    if page.dtype is None:
        raise ValueError(f"its pixels, of {page.bitspersample} bits, are of no known kind")
    if not by_bytes(page) and page.compression not in _PICTURES:
        raise ValueError(f"compression {page.compression:d} is not read: save it with LZW, deflate, or none")
    check_pixels(*sides[:2])
    check_pixels(*sides[-2:])
    listed = page.tags.get(324 if page.is_tiled else 273)  # offsets: tifffile forgets those of too many
    if page.imagedepth != 1 or listed is None or not len(page.dataoffsets) == listed.count == math.prod(page.chunked):
        raise ValueError("truncated: it lies about where its pixels are, or lacks some of them")
    plain = page.compression == COMPRESSION.NONE
    for part in _segments(page):
        if part.size < (part.pixels if plain else 1) or part.offset < 8 or part.offset + part.size > end:
            raise ValueError("truncated: it lies about where its pixels are, or lacks some of them")
        if plain and part.size not in (part.pixels, part.full):
            raise ValueError("damaged: it holds other pixels than its header claims")


def check_overlap(pages: list[TiffPage]) -> None:
    """Raise ValueError for pixels that lie over other pixels, or over the header; equal tiles may be stored once."""
    taken = {(0, 8), *((p.offset, p.offset + 12 * len(p.tags)) for p in pages)}
    taken |= {(at, at + size) for p in pages for at, size in zip(p.dataoffsets, p.databytecounts, strict=True)}
    if any(end > start for (_, end), (start, _) in pairwise(sorted(taken))):
        raise ValueError("damaged: it says that pixels lie where other things do")


# ---------------------------------------------------------------- reading


def read_page(f: BinaryIO, page: TiffPage, out: np.ndarray) -> None:
    """Read the pixels of one page into `out`, of shape `page.shaped` and type `dtype_of(page)`."""
    parts = list(_segments(page))
    if _in_one_piece(page, parts):
        f.seek(parts[0].offset)
        if f.readinto(out.reshape(-1).view(np.uint8)) != out.nbytes:
            raise ValueError("truncated: it lacks some of its pixels")
        if page.parent.byteorder != {"little": "<", "big": ">"}[sys.byteorder]:
            out.byteswap(inplace=True)
        return
    for i, part in enumerate(parts):
        f.seek(part.offset)
        segment = (
            _unpack(page, f.read(part.size), part) if by_bytes(page) else _picture(page, f.read(part.size), i, part)
        )
        to = out[part.plane, 0, part.y : part.y + part.rows, part.x :]
        to = to[:, : segment.shape[1]]
        to[:] = segment[: to.shape[0], : to.shape[1]]


def _in_one_piece(page: TiffPage, parts: list[_Segment]) -> bool:
    whole = page.bitspersample == 8 * page.dtype.itemsize and page.fillorder == page.predictor == 1
    plain = page.compression == COMPRESSION.NONE and not page.is_tiled
    return plain and whole and all(a.offset + a.pixels == b.offset for a, b in pairwise(parts))


def _unpack(page: TiffPage, data: bytes, part: _Segment) -> np.ndarray:
    """Return one strip or tile (rows, width, samples); ValueError for any other length than its own."""
    bits, samples = page.bitspersample, page.shaped[4]
    if page.fillorder == 2:
        data = imagecodecs.bitorder_decode(data)
    if page.compression != COMPRESSION.NONE:
        data = TIFF.DECOMPRESSORS[page.compression](data, out=part.full + 1)
    if len(data) not in (part.pixels, part.full):
        raise ValueError("damaged: its pixels and its header do not fit each other")
    wide = page.tilewidth if page.is_tiled else page.imagewidth
    if bits != 8 * page.dtype.itemsize:
        a = imagecodecs.packints_decode(data[: part.pixels], dtype_of(page), bits, runlen=wide * samples)
    else:
        a = np.frombuffer(data, page.dtype.newbyteorder(page.parent.byteorder), part.pixels // page.dtype.itemsize)
    a = a.reshape(part.rows, wide, samples)
    return a if page.predictor == 1 else TIFF.UNPREDICTORS[page.predictor](a.astype(page.dtype), axis=-2)


def _picture(page: TiffPage, data: bytes, index: int, part: _Segment) -> np.ndarray:
    """Return one strip or tile that is a picture of its own, once its header is seen to claim the same size."""
    wide, tall = (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, page.rowsperstrip)
    with Image.open(io.BytesIO(data), formats=[_PICTURES[page.compression]]) as picture:
        if picture.width != wide or picture.height not in (part.rows, min(tall, page.imagelength)):
            raise ValueError("damaged: its pixels and its header do not fit each other")
    tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression == 7 else {}
    return page.decode(data, index, **tables)[0][0]
