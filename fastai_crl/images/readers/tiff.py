"""TIFF: pages or a channel axis, OME and ImageJ. tifffile reads the structure and the pixels.

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
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from tifffile import COMPRESSION, PHOTOMETRIC, TIFF, TiffFile, TiffPage, TiffPageSeries, logger

from .base import Input, Reader, Source, check_pixels
from .intensity import brightness
from .pillow import open_with_pillow

_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SPARE_PAGES = 1000  # beyond the number of channels: so many are still read, to say what is wrong with them
_SHOWN = (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB, PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.PALETTE)
_CLAIM = "save the channels of one image alone, as a plain TIFF"
_NO_CHANNELS = "ZTAPRHLVM"  # axes of tifffile: depth, time, angle and so on
_CLAIMS = ("SizeC", "SizeZ", "SizeT", "PlaneCount", "NumPlanes", "SamplesPerPixel")  # of OME-XML
_MOST_ELSEWHERE = 10**6  # planes, in all files of a set
_LACKS = "truncated: pixels are not where the header says, or some are missing"
# What decodes to bytes.
_BYTES = {COMPRESSION.NONE, COMPRESSION.LZW, COMPRESSION.ADOBE_DEFLATE, COMPRESSION.DEFLATE, COMPRESSION.PACKBITS}
_BYTES |= {COMPRESSION.ZSTD, COMPRESSION.LZMA}
# What decodes to a picture, whose own header is compared with that of the page.
_PICTURES = {
    COMPRESSION.JPEG: "JPEG",
    COMPRESSION.JPEG2000: "JPEG2000",
    COMPRESSION.WEBP: "WEBP",
    COMPRESSION.PNG: "PNG",
}


class _Log(logging.Filter):
    """Drops what tifffile logs of files that are opened, as they are then checked; while it decodes, it is an error."""

    now = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(self.now, "decodes", False):
            raise ValueError(f"damaged: {record.getMessage()}")
        return not getattr(self.now, "opens", False)


logger().addFilter(_Log())


@contextmanager
def _while(what: str) -> Iterator[None]:
    setattr(_Log.now, what, True)
    try:
        yield
    finally:
        setattr(_Log.now, what, False)


# ---------------------------------------------------------------- checking


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
    """Raise ValueError for a page whose pixels are not all where its header says, in a file of `end` bytes."""
    sides = [page.imagelength, page.imagewidth, *((page.tilelength, page.tilewidth) if page.is_tiled else ())]
    if not all(isinstance(v, int) for v in [*sides, page.bitspersample]):  # tuples, with a damaged count
        raise ValueError("its header is damaged, or its samples are of different depth")
    shown, bits = page.tags.get("PhotometricInterpretation"), page.tags.get("BitsPerSample")
    plain = page.compression == COMPRESSION.NONE
    said = plain if bits is None else bits.count in (1, page.samplesperpixel)  # 1 bit, where the tag is missing
    if not said or shown is None or shown.count != 1:
        raise ValueError(
            "its header is damaged: it does not say what its values stand for, or of how many bits they are"
        )
    if page.dtype is None:
        raise ValueError(f"its pixels, of {page.bitspersample} bits, are of no known kind")
    if page.compression not in _BYTES | _PICTURES.keys():
        raise ValueError(f"compression {page.compression:d} is not read: save it with LZW, deflate, or none")
    whole = page.bitspersample == 8 * page.dtype.itemsize  # a value takes up whole bytes, not a few bits
    if page.compression in _BYTES and page.predictor not in ((1, 2) if whole else (1,)):
        raise ValueError(
            f"predictor {page.predictor:d} of {page.bitspersample}-bit pixels is not read: save it without a predictor"
        )
    check_pixels(*sides[:2])
    check_pixels(*sides[-2:])
    listed = page.tags.get(324 if page.is_tiled else 273)  # offsets: tifffile forgets those of too many
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    if page.imagedepth != 1 or listed is None or not len(parts) == listed.count == math.prod(page.chunked):
        raise ValueError(_LACKS)
    if any(size < 1 or at < 8 or at + size > end for at, size in parts):
        raise ValueError(_LACKS)
    if plain:
        tall, wide = sides[-2:] if page.is_tiled else (min(page.rowsperstrip, sides[0]), sides[1])
        row, rows = -(-wide * page.shaped[4] * page.bitspersample // 8), page.shaped[0] * page.imagelength
        held, full = sum(page.databytecounts), len(parts) * tall * row  # the last strip may be filled up
        if held not in (full, full if page.is_tiled else rows * row):
            raise ValueError(_LACKS if held < full else "damaged: it holds other pixels than its header claims")


def _check_overlap(pages: list[TiffPage]) -> None:
    """Raise ValueError for pixels that lie over other pixels, or over the header; equal tiles may be stored once."""
    taken = {(0, 8), *((p.offset, p.offset + 12 * len(p.tags)) for p in pages)}
    taken |= {(at, at + size) for p in pages for at, size in zip(p.dataoffsets, p.databytecounts, strict=True)}
    if any(end > start for (_, end), (start, _) in pairwise(sorted(taken))):
        raise ValueError("damaged: it says that pixels lie where other things do")


def _check_pictures(f: BinaryIO, page: TiffPage) -> None:
    """Raise ValueError for a strip or tile that is a picture of another size than the page claims."""
    wide, tall = (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, page.rowsperstrip)
    for at, size in zip(page.dataoffsets, page.databytecounts, strict=True):
        f.seek(at)
        with Image.open(io.BytesIO(f.read(size)), formats=[_PICTURES[page.compression]]) as picture:
            last = page.imagelength % tall or tall
            if picture.width != wide or picture.height not in (min(tall, page.imagelength), last):
                raise ValueError("damaged: its pixels and its header do not fit each other")


# ---------------------------------------------------------------- reading


def _check_ome(xml: str, held: int) -> None:
    """Raise ValueError for OME-XML that claims more planes than `held`, as tifffile would make a list of them all."""
    most = _MOST_ELSEWHERE if "FileName" in xml else held
    try:
        elements = list(ElementTree.fromstring(xml).iter())
    except ElementTree.ParseError:
        return  # which tifffile does not follow either
    for element in elements:
        if "ModuloAlong" in element.tag:
            raise ValueError(f"its description divides an axis into further ones: {_CLAIM}")
        claimed = math.prod(int(element.get(name, 1)) for name in _CLAIMS)
        if claimed > most:
            raise ValueError(f"its description claims {claimed} planes, the file holds {held}: {_CLAIM}")


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
    with _while("opens"):
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
        if tif.is_ome:
            _check_ome(tif.ome_metadata, sum(p.samplesperpixel for p in pages))
        series = _series(tif, pages)
    axes, shape = series.axes, series.shape
    # Without colours, nothing tells whether channels come first or last: the number of channels does.
    last = len(shape) == 3 and (axes[2] == "S" or (axes[0] != "S" and shape[2] == n != shape[0]))
    if len(shape) == 2:
        shape = (1, *shape)
    if len(shape) != 3:
        raise ValueError(f"it has the axes {axes} of lengths {shape}, save one channel axis, height and width")
    planes, height, width = (shape[2], *shape[:2]) if last else shape
    if planes > 1 and (axis := axes[-1 if last else 0]) in _NO_CHANNELS:
        what = f"its axes {axes} say that its {planes} planes differ in {TIFF.AXES_NAMES[axis]}, not in channel"
        raise ValueError(f"{what}: {_CLAIM}, or name the axis C if they are channels")
    behind = math.prod(shape) > sum(p.size for p in pages)  # one page stands for planes that lie behind it
    if behind and (len(pages) > 1 or series.dataoffset is None or series.dataoffset + series.nbytes > end):
        raise ValueError(f"truncated: its description claims {planes} planes, it holds {len(pages)}: {_CLAIM}")
    dtype = np.dtype(np.uint8) if page.dtype == bool else page.dtype
    # What ImageJ saves with a table of colours is a channel and how it was shown.
    tables = None if tif.is_imagej and planes == n else _tables(pages)
    coloured = tables is not None and planes == 1 and n == 3

    def decode() -> np.ndarray:
        for p in pages:
            if p.compression in _PICTURES:
                _check_pictures(f, p)
        with _while("decodes"):
            if behind:
                a = series.asarray(maxworkers=1)
            else:
                a = np.stack([pages[p.index].asarray(maxworkers=1) for p in series.pages])
        a = a.reshape(series.shape).astype(dtype, copy=False)
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
        dtype,
        white=2**page.bitspersample - 1 if page.dtype == np.uint16 else None,
        colour=coloured or (page.photometric == PHOTOMETRIC.RGB and planes in (3, 4)),
        inverted=page.photometric == PHOTOMETRIC.MINISWHITE,
        intact=tables is None and all(p.compression in _BYTES for p in pages) and page.dtype in (np.uint8, np.uint16),
    )


def _kind(page: TiffPage) -> tuple[Any, ...]:
    return page.shape, page.dtype, page.photometric, page.bitspersample


def _tables(pages: list[TiffPage]) -> list[np.ndarray] | None:
    """Return the table of colours (k,3) of each page, uint8; None for pages without."""
    if pages[0].photometric != PHOTOMETRIC.PALETTE:
        return None
    if any(p.colormap is None or p.dtype not in (np.uint8, bool) for p in pages):
        raise ValueError("it lacks its table of colours")
    return [(p.colormap.T >> (8 if p.colormap.max() > 255 else 0)).astype(np.uint8) for p in pages]


TIFF_READER = Reader("TIFF", (".tif", ".tiff"), _open, lambda file: file.start.startswith(_STARTS), threads=True)
