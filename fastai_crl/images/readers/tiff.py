"""TIFF, by tifffile: pages or a channel axis, OME and ImageJ.

tifffile is made to read what it can of any file: what it does not find becomes zeros, and pages of the same file are
taken to be alike. Here, pixels are those of the file or there are none.
"""

import logging
import math
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from tifffile import PHOTOMETRIC, TiffFile, TiffPage, TiffPageSeries, logger

from .base import Input, Reader, Source
from .intensity import brightness
from .pillow import open_with_pillow
from .tiff_pages import by_bytes, check_overlap, check_page, dtype_of, read_page

_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SPARE_PAGES = 1000  # beyond the number of channels: so many are still read, to say what is wrong with them
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
            check_page(p, end)
        check_overlap(pages)
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
    tables = None if tif.is_imagej and planes == n else _tables(pages)
    coloured = tables is not None and planes == 1 and n == 3

    def decode() -> np.ndarray:
        if behind:
            a = series.asarray(maxworkers=1)
        else:
            a = np.empty((len(pages), *page.shaped), dtype_of(page))
            for p, out in zip(series.pages, a, strict=True):
                read_page(f, pages[p.index], out)
            a = a.reshape(series.shape)
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
        dtype_of(page),
        white=2**page.bitspersample - 1 if page.dtype == np.uint16 else None,
        colour=coloured or (page.photometric == PHOTOMETRIC.RGB and planes in (3, 4)),
        inverted=page.photometric == PHOTOMETRIC.MINISWHITE,
        intact=tables is None and by_bytes(page) and page.dtype in (np.uint8, np.uint16),
    )


def _kind(page: TiffPage) -> tuple[Any, ...]:
    return page.shape, page.dtype, page.photometric, page.bitspersample


def _tables(pages: list[TiffPage]) -> list[np.ndarray] | None:
    """Return the table of colours (k,3) of each page, uint8; None for pages without."""
    if pages[0].photometric != PHOTOMETRIC.PALETTE:
        return None
    if any(p.colormap is None or dtype_of(p) != np.uint8 for p in pages):
        raise ValueError("it lacks its table of colours")
    return [(p.colormap.T >> (8 if p.colormap.max() > 255 else 0)).astype(np.uint8) for p in pages]


TIFF_READER = Reader("TIFF", (".tif", ".tiff"), _open, lambda file: file.start.startswith(_STARTS))
