"""Image files as integer planes: PNG, JPEG, TIFF (also gzipped) and what else Pillow reads, told apart by content.

The decoders are imagecodecs for PNG (the fastest of those that `examples/benchmarks/data.py` compares, with the same
pixels), tifffile and Pillow. Headers are checked before anything is decoded: no damaged file can ask for much memory.
"""

import gzip
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from fastai_crl._checks import whole_number

__all__ = ["check_intensity", "header", "read_planes"]

_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\0\0\0\0IEND\xaeB`\x82"
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_GZIP_START = b"\x1f\x8b"
_HOW_TO_ALLOW = "; if that is right, raise PIL.Image.MAX_IMAGE_PIXELS"
_NO_RANGE = "floating point pixels have no fixed range, save the image with 8 or 16 bits"
_PNG_PLANES = {0: 1, 2: 3, 6: 4}  # by colour type: grey, RGB, RGBA


@dataclass
class _Source:
    """An open image file: what its header says, and the function that decodes it to (planes,H,W)."""

    height: int
    width: int
    planes: int
    decode: Callable[[], np.ndarray]
    colour: bool = False  # planes are red, green, blue and perhaps alpha
    depth: int = 16  # bits, of pixels wider than a byte
    intact: bool = True  # no sign of truncation; else only decoding tells


def check_intensity(
    bits: int | None, stretch: float | Sequence[float] | None
) -> tuple[int | None, tuple[float, float] | None]:
    """Return `bits` and `stretch` as (lo, hi), or raise ValueError for values out of range (see `read_planes`)."""
    if bits is not None:
        bits = whole_number(
            "bits", bits, 9, "the depth of data in 16-bit files is 9 to 16 bits, or None for their own", 16
        )
    if stretch is None:
        return bits, None
    try:
        pair = [float(v) for v in ((100 - stretch, stretch) if np.ndim(stretch) == 0 else stretch)]
    except (TypeError, ValueError):
        pair = []
    if isinstance(stretch, bool) or len(pair) != 2 or not 0 <= pair[0] < pair[1] <= 100:
        raise ValueError(
            f"stretch={stretch!r}: give two percentiles 0 <= lo < hi <= 100, or one in (50, 100], such as 99.5 for "
            "(0.5, 99.5)."
        )
    return bits, (pair[0], pair[1])


# ---------------------------------------------------------------- formats


def _png(f: BinaryIO) -> _Source:
    head = f.read(33)
    if len(head) < 33:
        raise ValueError("its header is cut off")
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    planes = _PNG_PLANES.get(head[25])
    if planes is None or head[24] < 8:  # palette, grey with alpha, or less than 8 bits
        return _pillow(f)
    f.seek(max(0, f.seek(0, os.SEEK_END) - len(_PNG_END)))
    intact = f.read() == _PNG_END

    def decode() -> np.ndarray:
        f.seek(0)
        a = imagecodecs.png_decode(f.read())
        return (a[None] if a.ndim == 2 else np.moveaxis(a, -1, 0))[:planes]  # a transparent colour adds alpha

    return _Source(height, width, planes, decode, colour=planes > 1, intact=intact)


def _tiff(f: BinaryIO, n: int) -> _Source:
    end = f.seek(0, os.SEEK_END)
    f.seek(0)
    tif = tifffile.TiffFile(f)
    page = tif.pages[0]
    known = (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB)
    if page.photometric not in known or page.bitspersample in (1, 2, 4):
        return _pillow(f)
    for p in tif.pages:
        sides = [p.imagelength, p.imagewidth, *((p.tilelength, p.tilewidth) if p.is_tiled else ())]
        if not all(isinstance(v, int) for v in [*sides, p.bitspersample]):  # tuples, with a damaged count
            raise ValueError("its header is damaged")
        _check_pixels(*sides[:2])
        _check_pixels(*sides[-2:])
        # tifffile fills what it does not find with zeros: a black image.
        segments, plain = list(zip(p.dataoffsets, p.databytecounts, strict=True)), p.compression == 1
        missing = (
            8 * sum(p.databytecounts) < p.size * p.bitspersample if plain else len(segments) < math.prod(p.chunked)
        )
        if missing or any(size == 0 or offset + size > end for offset, size in segments):
            raise ValueError("truncated: it lies about where its pixels are, or lacks some of them")
    if page.dtype is None or page.dtype.kind not in "ui":
        raise ValueError(_NO_RANGE)
    if len(tif.series) > 1:
        raise ValueError("it holds images of different size or kind, save the channels of one image alone")
    series = tif.series[0]
    axes, shape = series.axes, series.shape
    # Without colours, nothing tells whether channels come first or last: the number of channels does.
    last = len(shape) == 3 and (axes[2] == "S" or (axes[0] != "S" and shape[2] == n != shape[0]))
    if len(shape) == 2:
        shape = (1, *shape)
    if len(shape) != 3:
        raise ValueError(f"it has the axes {axes} of lengths {shape}, save one channel axis, height and width")
    planes, height, width = (shape[2], *shape[:2]) if last else shape
    colour = page.photometric == tifffile.PHOTOMETRIC.RGB and planes in (3, 4)

    def decode() -> np.ndarray:
        a = series.asarray(maxworkers=1)
        return a[None] if a.ndim == 2 else np.moveaxis(a, -1, 0) if last else a

    depth = page.bitspersample if page.dtype == np.uint16 else 16
    return _Source(height, width, planes, decode, colour, depth)


def _pillow(f: BinaryIO) -> _Source:
    f.seek(0)
    im = Image.open(f)
    if im.mode == "F":
        raise ValueError(_NO_RANGE)
    grey = im.mode in ("L", "1", "LA", "La") or im.mode.startswith("I")
    colours = "RGBA" if im.mode == "RGBA" else "RGB"

    def decode() -> np.ndarray:
        im.load()
        if im.mode in ("1", "LA", "La"):
            return np.asarray(im.convert("L"))[None]
        return np.asarray(im)[None] if grey else np.moveaxis(np.asarray(im.convert(colours)), -1, 0)

    f.seek(max(0, f.seek(0, os.SEEK_END) - len(_JPEG_END)))
    intact = im.format == "JPEG" and f.read() == _JPEG_END
    return _Source(im.height, im.width, 1 if grey else len(colours), decode, not grey, intact=intact)


def _unzip(f: BinaryIO, n: int) -> BinaryIO:
    most = None if Image.MAX_IMAGE_PIXELS is None else 2 * n * Image.MAX_IMAGE_PIXELS + 2**20
    out = io.BytesIO()
    with gzip.open(f) as z:
        while chunk := z.read(2**20):
            out.write(chunk)
            if most is not None and out.tell() > most:
                raise ValueError(f"it unzips to more than {most:,} bytes, too many for {n} channels{_HOW_TO_ALLOW}")
    out.seek(0)
    return out


def _check_pixels(height: int, width: int) -> None:
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and height * width > most:
        raise ValueError(f"its header claims {height}x{width} pixels, more than {most:,}{_HOW_TO_ALLOW}")


def _source(f: BinaryIO, n: int) -> _Source:
    start = f.read(16)
    f.seek(0)
    if start.startswith(_GZIP_START):
        return _source(_unzip(f, n), n)
    if not start:
        raise ValueError("it is empty")
    tiff = start.startswith(_TIFF_STARTS)
    source = _tiff(f, n) if tiff else _png(f) if start.startswith(_PNG_START) else _pillow(f)
    _check_pixels(source.height, source.width)
    # A grey file saved as colour may stand for one channel, and alpha is no channel unless all four are asked for.
    if source.planes != n and not (source.colour and n in (1, 3)):
        raise ValueError(
            f"it holds {source.planes} channels where {n} are expected, pass channels= and pattern= that fit"
        )
    return source


def _reason(e: Exception) -> str:
    if isinstance(e, UnidentifiedImageError):
        return "cannot identify its format"
    return str(e) or type(e).__name__


# ---------------------------------------------------------------- reading


def header(file: str | Path, n: int = 1) -> tuple[int, int]:
    """Return (height, width) of an image file of `n` channels from its header; decode it only if it looks truncated.

    A gzipped file is unzipped for it. Raises FileNotFoundError, and ValueError (with the reason, not the file's name)
    for a file that cannot be read or does not hold `n` channels.
    """
    try:
        with open(file, "rb", buffering=0) as f:  # of a long file two short reads are needed
            source = _source(f, n)
            if not source.intact:
                source.decode()
            return source.height, source.width
    except FileNotFoundError:
        raise
    except Exception as e:  # decoders raise about anything on damaged bytes
        raise ValueError(_reason(e)) from e


def _decode(file: str | Path, n: int, bits: int | None) -> tuple[np.ndarray, int]:
    """Planes (n,H,W), integer, and the value that is full intensity."""
    with open(file, "rb") as f:
        source = _source(f, n)
        a = source.decode()
    if len(a) != n:  # colour, see `_source`
        if n == 3 and (a[3] != np.iinfo(a.dtype).max).any():
            raise ValueError("it is not opaque, save it without alpha")
        # One channel saved as colour holds its signal in one, two or three equal bands (red only, red and green for
        # yellow, all for grey). The maximum restores it in every case; the usual luma would darken it.
        a = a[:3].max(0, keepdims=True) if n == 1 else a[:3]
    if a.dtype == np.uint8:
        return a, 255
    white = 2 ** (bits or source.depth) - 1
    if a.min() < 0 or a.max() > white:
        raise ValueError(f"values {a.min()}..{a.max()} do not fit {bits or source.depth} bits, see bits=")
    return a, white


def _to_bytes(
    a: np.ndarray, white: int, size: tuple[int, int] | None, resample: int, stretch: tuple[float, float] | None
) -> np.ndarray:
    """One plane (H,W) scaled, resized and rounded, uint8."""
    lo, hi = (0, white) if stretch is None else np.percentile(a, stretch)
    if hi <= lo:  # nothing to stretch
        lo, hi = 0, white
    if (lo, hi) != (0, 255):
        a = ((a - lo) / ((hi - lo) / 255)).clip(0, 255).astype(np.float32)
    if size is not None and a.shape != size:
        # Pillow's resize is antialiased, and exact on floats.
        a = np.asarray(Image.fromarray(a).resize(size[::-1], resample))
    return a if a.dtype == np.uint8 else a.round().clip(0, 255).astype(np.uint8)


def read_planes(
    file: str | Path,
    n: int = 1,
    size: tuple[int, int] | None = None,
    resample: int = Image.Resampling.BILINEAR,
    bits: int | None = None,
    stretch: tuple[float, float] | None = None,
) -> np.ndarray:
    """Read the `n` channels of one file as uint8 (n,H,W), intensities 0..255.

    n: 1 for one file per channel: grey, or a grey image saved in colour, which is reduced by the maximum of its bands.
        More for a TIFF of several pages, or with the channels as its first or last axis; 3 for any picture in RGB.
    size: (height, width) to which each channel is resized on its own; None keeps the size of the file.
    bits: depth of the data in 16-bit files, 9 to 16: 2**bits−1 becomes 255. Default: the file's own depth (16, or what
        a packed TIFF says). Files of 8 bits keep their values.
    stretch: percentiles (lo, hi), 0 <= lo < hi <= 100: each channel is stretched, before it is resized, so that its
        lo-th percentile becomes 0 and its hi-th 255; a channel where the two coincide is left as it is.

    Raises FileNotFoundError for a missing file, and ValueError for one that is damaged or truncated, that holds another
    number of channels, floating point pixels or values beyond `bits`, or more than `PIL.Image.MAX_IMAGE_PIXELS` pixels
    (known from the header, before anything is decoded). Each names the file and the fix.
    """
    try:
        a, white = _decode(file, n, bits)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"Image file {file} does not exist: every image needs all its files.") from e
    except Exception as e:  # decoders raise about anything on damaged bytes
        message = f"Image file {file} cannot be read ({_reason(e)}): replace the file or leave its id out."
        raise ValueError(message) from e
    return np.stack([_to_bytes(p, white, size, resample, stretch) for p in a])
