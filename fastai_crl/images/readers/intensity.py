"""From integers of any depth to intensities 0..255: scaled, stretched, resized."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from skimage.exposure import rescale_intensity

from fastai_crl._checks import whole_number


def check_intensity(
    bits: int | None, stretch: float | Sequence[float] | None
) -> tuple[int | None, tuple[float, float] | None]:
    """Return `bits` and `stretch` as (lo, hi), or raise ValueError for values out of range (see `read_planes`)."""
    if bits is not None:
        rule = "the depth of data in 16-bit files is 9 to 16 bits, or None for their own"
        bits = whole_number("bits", bits, 9, rule, 16)
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


def check_white(white: int | None, bits: int | None) -> int | None:
    """Return the value of full intensity that `white` or `bits` says; raise ValueError for both, or a wrong one."""
    if white is None:
        return None if bits is None else 2**bits - 1
    if bits is not None:
        raise ValueError(f"white={white!r} and bits={bits!r} both say what full intensity is: pass one of them.")
    rule = "the value of full intensity in files of more than 8 bits is a whole number above 0, or None for their own"
    return whole_number("white", white, 1, rule)


def white_of(dtype: np.dtype, white: int | None, chosen: int | None) -> int:
    """Return the value of full intensity, or raise ValueError where nothing says it.

    Args:
        dtype: of the pixels.
        white: what the file says; None for nothing.
        chosen: what the user says; files of 8 bits keep their range.
    """
    dtype = np.dtype(dtype)
    if dtype == np.uint8:
        return 255
    if dtype.kind not in "ui":
        kind = "floating point" if dtype.kind == "f" else dtype
        raise ValueError(f"{kind} pixels have no fixed range, save the image with 8 or 16 bits")
    if chosen is not None and dtype != np.int8:
        return chosen
    if white is None and dtype != np.uint16:
        fix = "" if dtype == np.int8 else ", or, if 0 is black, pass bits=, 9 to 16, or white="
        raise ValueError(f"nothing says which {dtype} value is full intensity: save it as uint8 or uint16{fix}")
    return 65535 if white is None else white


def brightness(a: np.ndarray, table: np.ndarray, depth: int) -> np.ndarray:
    """Return what a picture with a table of colours shows as one channel, uint8, or raise ValueError.

    A table of all 2**`depth` values that never gets darker is for display: the indices are the data, as when ImageJ
    saves a channel with a look-up table such as Green, or HiLo, greys of which the first and the last are coloured. A
    table of greys in any other order is how small pictures are stored: the greys are the data. Any other table has no
    one reading.

    Args:
        a: indices.
        table: colours (k,3).
        depth: of an index in bits.
    """
    table = table.astype(int)
    grey = (table == table[:, :1]).all(1)
    full, steps = len(table) == 2**depth, np.diff(table[grey] if grey[1:-1].all() else table, axis=0)
    if full and (steps >= 0).all() and (steps > 0).any():
        return np.round(np.arange(2**depth) * (255 / (2**depth - 1))).astype(np.uint8)[a]
    used = np.unique(a)
    if used[-1] >= len(table):
        raise ValueError("it has indices beyond its table of colours")
    if not grey[used].all() or (full and (steps <= 0).all()):
        raise ValueError(
            "its table of colours is no brightness, from dark to bright, so that it does not stand for one channel: "
            "save it in grey (in ImageJ: Image > Lookup Tables > Grays)"
        )
    return table[:, 0].astype(np.uint8)[a]


def to_bytes(
    a: np.ndarray, white: int, size: tuple[int, int] | None, stretch: tuple[float, float] | None
) -> np.ndarray:
    """Return one plane (H,W) scaled, resized and rounded, uint8."""
    lo, hi = (0, white) if stretch is None else map(float, np.percentile(a, stretch))
    if hi <= lo:  # nothing to stretch
        lo, hi = 0, white
    if (lo, hi) != (0, 255):  # in float32 where that holds every value: in a third of the time, to the same bytes
        a = rescale_intensity(a.astype(np.result_type(a, np.float32)), (lo, hi), (0, 255)).astype(np.float32)
    if size is not None and a.shape != size:
        # Pillow's resize is antialiased, and exact on floats.
        a = np.asarray(Image.fromarray(a).resize(size[::-1], Image.Resampling.BILINEAR))
    return a.round().astype(np.uint8, copy=False)
