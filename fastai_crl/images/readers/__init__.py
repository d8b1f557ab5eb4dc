"""Image files as integer planes: PNG, JPEG, TIFF (also gzipped), what else Pillow reads, and formats of one's own.

The content of a file decides which of the registered readers opens it, not its name. Headers are checked before
anything is decoded: no damaged file can ask for much memory, and none but a regular file, or a folder that a reader
takes, is opened at all.
"""

import gzip
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from .base import HOW_TO_ALLOW, Input, Reader, Source, check_pixels
from .intensity import check_intensity, check_white, to_bytes, white_of
from .pillow import PILLOW
from .png import PNG
from .tiff import TIFF_READER

__all__ = [
    "Input",
    "Reader",
    "Source",
    "check_intensity",
    "check_white",
    "header",
    "read_planes",
    "read_values",
    "reader_of",
    "register_reader",
]

_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_UNKNOWN = "cannot identify its format as one that is read: save it as PNG, TIFF or JPEG"


# ---------------------------------------------------------------- gzipped files of any format


def _is_gzip(file: Input) -> bool:
    return file.start.startswith(b"\x1f\x8b")


def _unzip(file: Input, n: int) -> Input:
    """Return what a gzipped file holds; ValueError for more than `n` channels can need, or where it is damaged."""
    most = None if Image.MAX_IMAGE_PIXELS is None else 2 * n * Image.MAX_IMAGE_PIXELS + 2**20
    out = io.BytesIO()
    file.stream.seek(0)
    with gzip.open(file.stream) as z:
        while chunk := z.read(2**20):
            out.write(chunk)
            if most is not None and out.tell() > most:
                raise ValueError(f"it unzips to more than {most:,} bytes, too many for {n} channels{HOW_TO_ALLOW}")
    unzipped = replace(file, start=bytes(out.getbuffer()[:64]), stream=out, size=out.tell())
    if _is_gzip(unzipped):
        raise ValueError("it is gzipped more than once: unzip it")
    return unzipped


# ---------------------------------------------------------------- the registered readers

_GZIP = Reader("gzip", (".gz",), lambda file, n: _source(_unzip(file, n), n), _is_gzip, threads=True)
_READERS: list[Reader] = [PNG, TIFF_READER, PILLOW, _GZIP]


def register_reader(reader: Reader) -> None:
    """Have `reader` open the files, or folders, that it matches, before all others; one of its name goes.

    Workers that are spawned, not forked, import the module of the data set anew: register there.

    Args:
        reader: of the format.

    Raises:
        TypeError: something other than a `Reader`.
    """
    if not isinstance(reader, Reader):
        raise TypeError(f"reader={reader!r}: give a Reader(name, suffixes, ...) object.")
    _READERS[:] = [reader, *(r for r in _READERS if r.name != reader.name)]


def reader_of(name: str) -> Reader | None:
    """Return the first reader whose suffixes a file's name ends with."""
    return next((r for r in _READERS if name.lower().endswith(r.suffixes)), None)


# ---------------------------------------------------------------- opening


@contextmanager
def _opened(path: str | Path) -> Iterator[Input]:
    """Open a regular file, or look at a folder; anything else could wait for ever, or never end.

    Raises:
        FileNotFoundError: no such file.
        ValueError: whatever else goes wrong while it is open; the reason.
    """
    try:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            yield Input(Path(path))
        elif stat.S_ISREG(found.st_mode):
            with open(path, "rb", buffering=0) as f:  # of a long file two short reads are needed
                yield Input(Path(path), f.read(64), f, found.st_size)
        else:
            raise ValueError(f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'no file')}, not a regular file")
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as e:
        raise ValueError(_UNKNOWN) from e
    except Exception as e:  # decoders raise about anything on damaged bytes
        raise ValueError(str(e) or type(e).__name__) from e


def _source(file: Input, n: int) -> Source:
    if not file.start and not file.is_folder:
        raise ValueError("it is empty")
    reader = next((r for r in _READERS if r.reads(file)), None)
    if reader is None:
        raise ValueError("it is a folder, and no reader takes it" if file.is_folder else _UNKNOWN)
    source = reader.source(file, n)
    check_pixels(source.height, source.width)
    if source.planes == 1 and n == 3 and reader.channels == (1, 3):  # of a picture, that is red, green and blue
        decode = source.decode
        source = replace(source, planes=3, decode=lambda: np.repeat(decode(), 3, 0))
    # A grey file saved as colour may stand for one channel, and alpha is no channel unless all four are asked for.
    if source.planes == 1 and n == 3:
        raise ValueError("it is grey where 3 channels are expected: save it in colour if it is a picture among others")
    if source.planes != n and not (source.colour and n in (1, 3)):
        raise ValueError(
            f"it holds {source.planes} channels where {n} are expected, pass channels= and pattern= that fit"
        )
    return source


def _decode(source: Source, n: int, full: int | None) -> tuple[np.ndarray, int]:
    """Planes (n,H,W), integer, and the value that is full intensity."""
    white = white_of(source.dtype, source.white, full)
    a = source.decode()
    if a.shape != (source.planes, source.height, source.width) or a.dtype != source.dtype:
        raise ValueError(
            f"damaged: its header claims {source.planes} planes of {source.height}x{source.width} {source.dtype}, it "
            f"decodes to {a.shape} {a.dtype}"
        )
    if len(a) != n:  # colour, see `_source`
        if len(a) == 4 and (a[3] != np.iinfo(a.dtype).max).any():
            raise ValueError("it is not opaque, save it without alpha")
        # One channel saved as colour holds its signal in one, two or three equal bands (red only, red and green for
        # yellow, all for grey). The maximum restores it in every case; the usual luma would darken it.
        a = a[:3].max(0, keepdims=True) if n == 1 else a[:3]
    if a.dtype != np.uint8 and (a.min() < 0 or a.max() > white):
        raise ValueError(f"values {a.min()}..{a.max()} are not from 0 to {white}, see bits= and white=")
    return (white - a if source.inverted else a), white


# ---------------------------------------------------------------- reading


def header(file: str | Path, n: int = 1, full: int | None = None) -> tuple[int, int]:
    """Return (height, width) of an image file of `n` channels from its header.

    Where the header cannot tell that the pixels will be had, as in a file that looks truncated, or of a rare kind, they
    are decoded. A gzipped file is unzipped. Arguments are those of `read_planes`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be read or does not hold `n` channels; the reason, not the file's name.
    """
    with _opened(file) as opened:
        source = _source(opened, n)
        if source.intact and not source.planes == 4 > n:  # alpha, that must be opaque
            white_of(source.dtype, source.white, full)
        else:
            _decode(source, n, full)
        return source.height, source.width


def read_values(file: str | Path, n: int = 1, full: int | None = None) -> tuple[np.ndarray, int]:
    """Read the `n` channels of one file as they are stored, integers (n,H,W), and the value of full intensity.

    Arguments and errors are those of `read_planes`.
    """
    try:
        with _opened(file) as opened:
            return _decode(_source(opened, n), n, full)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"Image file {file} does not exist: every image needs all its files.") from e
    except ValueError as e:
        message = f"Image file {file} cannot be read ({e}): replace the file or leave its id out."
        raise ValueError(message) from e


def read_planes(
    file: str | Path,
    n: int = 1,
    size: tuple[int, int] | None = None,
    full: int | None = None,
    stretch: tuple[float, float] | None = None,
) -> np.ndarray:
    """Read the `n` channels of one file as uint8 (n,H,W), intensities 0..255.

    Args:
        file: its path.
        n: 1 for one file per channel: grey, or a grey image saved in colour, which is reduced by the maximum of its
            bands. More for a TIFF of several pages, or with the channels as its first or last axis; 3 for any picture
            in RGB.
        size: (height, width) to which each channel is resized on its own; None keeps the size of the file.
        full: the value of full intensity, which becomes 255. Default: the file's own (65535, or what the depth of a
            packed TIFF says). Files of 8 bits keep their values. Of other integers only `full` tells it.
        stretch: percentiles (lo, hi), 0 <= lo < hi <= 100: each channel is stretched, before it is resized, so that its
            lo-th percentile becomes 0 and its hi-th 255; a channel where the two coincide is left as it is.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: a file that is damaged or truncated, that is no regular file, that holds another number of channels
            or frames, pixels without a range (floating point, or integers of other than 8 or 16 bits without `full`),
            values beyond `full`, a table of colours that is no brightness, or more than `PIL.Image.MAX_IMAGE_PIXELS`
            pixels (known from the header, before anything is decoded). Each names the file and the fix.
    """
    a, white = read_values(file, n, full)
    return np.stack([to_bytes(p, white, size, stretch) for p in a])
