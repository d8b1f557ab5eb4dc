"""TIFF, by tifffile: pages or a channel axis, OME and ImageJ, every strip and tile of the length that it must have.

tifffile is made to read what it can of any file: what it does not find becomes zeros, and pages of the same file are
taken to be alike. Here, pixels are those of the file or there are none.
"""

import io
import logging
import math
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
from PIL import Image
from tifffile import COMPRESSION, PHOTOMETRIC, TIFF, TiffFile, TiffPage, TiffPageSeries, logger

from .base import Input, Reader, Source, check_pixels
from .intensity import brightness
from .pillow import open_with_pillow

__all__ = ["TIFF_READER"]

_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SPARE_PAGES = 1000  # more than the channels: these are counted one by one for the message, more are not
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
_SHOWN = (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB, PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.PALETTE)
_CLAIM = "save the channels of one image alone, as a plain TIFF"


class _Silence(logging.Filter):
    """Drops what tifffile logs about files that are then refused, with the reason, or read all the same."""

    now = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(self.now, "silent", False)


logger().addFilter(_Silence())


@contextmanager
def _quiet() -> Iterator[None]:
    _Silence.now.silent = True
    try:
        yield
    finally:
        _Silence.now.silent = False


def _check_chain(f: BinaryIO, start: bytes, most: int) -> None:
    """Raise ValueError if the list of pages is a circle, leaves the file, or has more than `most`."""
    order = "<" if start[:2] == b"II" else ">"
    big = start[2:4] in (b"+\0", b"\0+")
    count, entry, offset = ("Q", 20, "Q") if big else ("H", 12, "I")
    (at,) = struct.unpack_from(order + offset, start, 8 if big else 4)
    seen: set[int] = set()
    while at:
        if at in seen:
            raise ValueError("damaged: its list of pages leads round in a circle")
        seen.add(at)
        if len(seen) > most:
            raise ValueError(f"it holds more than {most} pages: {_CLAIM}")
        f.seek(at)
        (entries,) = struct.unpack(order + count, f.read(struct.calcsize(count)))
        f.seek(at + struct.calcsize(order + count) + entry * entries)
        (at,) = struct.unpack(order + offset, f.read(struct.calcsize(offset)))


def _check_page(page: TiffPage, end: int) -> None:
    """Raise ValueError for a page that lies about its pixels, or lacks some of them."""
    sides = [page.imagelength, page.imagewidth, *((page.tilelength, page.tilewidth) if page.is_tiled else ())]
    if not all(isinstance(v, int) for v in [*sides, page.bitspersample]):  # tuples, with a damaged count
        raise ValueError("its header is damaged, or its samples are of different depth")
    shown, bits = page.tags.get("PhotometricInterpretation"), page.tags.get("BitsPerSample")
    if shown is None or shown.count != 1 or (bits is not None and bits.count not in (1, page.samplesperpixel)):
        raise ValueError(
            "its header is damaged: it lacks what its values stand for, or gives the depth of other samples"
        )
    if page.dtype is None:
        raise ValueError(f"its pixels, of {page.bitspersample} bits, are of no known kind")
    if not _by_bytes(page) and page.compression not in _PICTURES:
        raise ValueError(f"compression {page.compression:d} is not read: save it with LZW, deflate, or none")
    check_pixels(*sides[:2])
    check_pixels(*sides[-2:])
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    listed = page.tags.get(324 if page.is_tiled else 273)  # offsets: tifffile forgets those of too many
    if page.imagedepth != 1 or listed is None or not len(segments) == listed.count == math.prod(page.chunked):
        raise ValueError("truncated: it lies about where its pixels are, or lacks some of them")
    plain = page.compression == COMPRESSION.NONE
    for i, (offset, size) in enumerate(segments):
        pixels, full = _lengths(page, i) if plain else (1, size)
        if size < pixels or offset < 8 or offset + size > end:
            raise ValueError("truncated: it lies about where its pixels are, or lacks some of them")
        if size not in (pixels, full):
            raise ValueError("damaged: it holds other pixels than its header claims")


def _check_overlap(pages: list[TiffPage]) -> None:
    """Raise ValueError for pixels that lie over other pixels, or over the header; equal tiles may be stored once."""
    taken = {(0, 8), *((p.offset, p.offset + 12 * len(p.tags)) for p in pages)}
    taken |= {(at, at + size) for p in pages for at, size in zip(p.dataoffsets, p.databytecounts, strict=True)}
    spans = sorted(taken)
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        raise ValueError("damaged: it says that pixels lie where other things do")


def _lengths(page: TiffPage, index: int) -> tuple[int, int]:
    """Return how many bytes of pixels a strip or tile holds, and how many if it is a last strip that was filled up."""
    _, _, (_, rows, width, samples) = page.decode(None, index)
    row = -(-width * samples * page.bitspersample // 8)
    return row * rows, row * _full_rows(page)


def _full_rows(page: TiffPage) -> int:
    return page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)


def _read(f: BinaryIO, page: TiffPage) -> np.ndarray:
    """Return the pixels of one page, of shape `page.shape`; less than 8 bits are scaled to 8."""
    out = np.empty(page.shaped, _dtype(page))
    tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression == 7 else {}
    for i, (offset, size) in enumerate(zip(page.dataoffsets, page.databytecounts, strict=True)):
        f.seek(offset)
        data = f.read(size)
        _, (s, _, y, x, _), shape = page.decode(None, i)
        if _by_bytes(page):
            segment = _unpack(page, data, shape, *_lengths(page, i))
        else:
            with Image.open(io.BytesIO(data), formats=[_PICTURES[page.compression]]) as picture:
                if picture.width != shape[2] or picture.height not in (shape[1], _full_rows(page)):
                    raise ValueError("damaged: its pixels and its header do not fit each other")
            segment = page.decode(data, i, **tables)[0]
        to = out[s, 0, y : y + shape[1], x : x + shape[2]]
        to[:] = segment[0, : to.shape[0], : to.shape[1]]
    return out.reshape(page.shape)


def _unpack(page: TiffPage, data: bytes, shape: tuple[int, ...], pixels: int, full: int) -> np.ndarray:
    """Return one strip or tile, of `pixels` or, filled up, `full` bytes; ValueError for any other length."""
    bits = page.bitspersample
    if page.fillorder == 2:
        data = imagecodecs.bitorder_decode(data)
    if page.compression != COMPRESSION.NONE:
        data = TIFF.DECOMPRESSORS[page.compression](data, out=full + 1)
    if len(data) not in (pixels, full):
        raise ValueError("damaged: its pixels and its header do not fit each other")
    if bits != 8 * page.dtype.itemsize:
        a = imagecodecs.packints_decode(data[:pixels], _dtype(page), bits, runlen=shape[2] * shape[3])
    else:
        a = np.frombuffer(data[:pixels], page.dtype.newbyteorder(page.parent.byteorder))
    a = a.reshape(shape).astype(_dtype(page))
    if page.predictor != 1:
        a = TIFF.UNPREDICTORS[page.predictor](a, axis=-2)
    return a


def _dtype(page: TiffPage) -> np.dtype:
    return np.dtype(np.uint8) if page.dtype == bool else page.dtype


def _by_bytes(page: TiffPage) -> bool:
    whole = page.bitspersample == 8 * page.dtype.itemsize
    return page.compression in _BYTES and (page.predictor == 1 or (page.predictor == 2 and whole))


def _series(tif: TiffFile, pages: list[TiffPage]) -> TiffPageSeries:
    """Return the one image that a file holds, or raise ValueError if it claims other planes than it has."""
    series = tif.series
    if not series:
        raise ValueError(f"its description of its pages cannot be followed: {_CLAIM}")
    if len(series) > 1:
        raise ValueError("it holds images of different size or kind, save the channels of one image alone")
    one = series[0]
    if one.kind != "ome" and len(pages) > 1 and (tif.is_ome or "openmicroscopy.org" in pages[0].description):
        raise ValueError(f"its OME-XML describes planes in other files, or cannot be followed: {_CLAIM}")
    own = [p for p in one.pages if p is not None and p.parent is tif]
    if len(own) != len(one.pages) or {p.index for p in own} != set(range(len(pages))):
        raise ValueError(f"its description claims {len(one.pages)} planes, the file holds {len(pages)} pages: {_CLAIM}")
    return one


def _open(file: Input, n: int) -> Source:
    f, end = file.stream, file.size
    _check_chain(f, file.start, n + _SPARE_PAGES)
    f.seek(0)
    with _quiet():
        tif = TiffFile(f, _multifile=False)  # no other files of the set
        pages = list(tif.pages)
        if any(p.photometric not in _SHOWN for p in pages):
            return open_with_pillow(file, n)
        for p in pages:
            _check_page(p, end)
        _check_overlap(pages)
        page, *more = pages
        if any(_kind(p) != _kind(page) for p in more):
            raise ValueError("it holds images of different size or kind, save the channels of one image alone")
        series = _series(tif, pages)
    axes, shape = series.axes, series.shape
    # Without colours, nothing tells whether channels come first or last: the number of channels does.
    last = len(shape) == 3 and (axes[2] == "S" or (axes[0] != "S" and shape[2] == n != shape[0]))
    if len(shape) == 2:
        shape = (1, *shape)
    if len(shape) != 3:
        raise ValueError(f"it has the axes {axes} of lengths {shape}, save one channel axis, height and width")
    planes, height, width = (shape[2], *shape[:2]) if last else shape
    behind = math.prod(shape) > sum(p.size for p in pages)  # one page stands for planes that lie behind it
    if behind and (len(pages) > 1 or series.dataoffset is None or series.dataoffset + series.nbytes > end):
        raise ValueError(f"truncated: its description claims {planes} planes, it holds {len(pages)}: {_CLAIM}")
    # What ImageJ saves with a table of colours is a channel and how it was shown.
    tables = None if tif.is_imagej and n != 3 else _tables(pages)
    coloured = tables is not None and planes == 1 and n == 3

    def decode() -> np.ndarray:
        if behind:
            a = series.asarray(maxworkers=1)
        else:
            a = np.stack([_read(f, pages[p.index]) for p in series.pages]).reshape(series.shape)
        a = np.moveaxis(a, -1, 0) if last else a.reshape(shape)
        if tables is None:
            white = 2**page.bitspersample - 1
            return a if white >= 255 else np.round(np.arange(white + 1) * (255 / white)).astype(np.uint8)[a]
        if coloured:
            return np.moveaxis(tables[0][a[0]], -1, 0)
        return np.stack([brightness(*plane, page.bitspersample) for plane in zip(a, tables, strict=True)])

    return Source(
        3 if coloured else planes,
        height,
        width,
        decode,
        _dtype(page),
        white=2**page.bitspersample - 1 if page.dtype == np.uint16 else None,
        colour=coloured or (page.photometric == PHOTOMETRIC.RGB and planes in (3, 4)),
        inverted=page.photometric == PHOTOMETRIC.MINISWHITE,
        intact=tables is None and _by_bytes(page) and page.dtype in (np.uint8, np.uint16),
    )


def _kind(page: TiffPage) -> tuple[Any, ...]:
    return page.shape, page.dtype, page.photometric, page.bitspersample


def _tables(pages: list[TiffPage]) -> list[np.ndarray] | None:
    """Return the table of colours (k,3) of each page, uint8; None for pages without."""
    if pages[0].photometric != PHOTOMETRIC.PALETTE:
        return None
    if any(p.colormap is None or _dtype(p) != np.uint8 for p in pages):
        raise ValueError("it lacks its table of colours")
    return [(p.colormap.T >> (8 if p.colormap.max() > 255 else 0)).astype(np.uint8) for p in pages]


TIFF_READER = Reader("TIFF", (".tif", ".tiff"), _open, lambda file: file.start.startswith(_STARTS))
