"""JPEG, GIF, BMP, WebP and others, by Pillow, of the formats named here and no other."""

import numpy as np
from PIL import Image

from .base import Input, Reader, Source, check_pixels
from .intensity import brightness

# Pillow would also run programs, such as Ghostscript on PostScript, whatever the file is called.
_FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "GIF", "BMP", "PPM", "WEBP")
_STARTS = (b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")
_STARTS += tuple(f"P{k}".encode() for k in range(1, 7))
_SUFFIXES = (".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".jp2", ".pgm", ".ppm", ".pbm", ".pnm")
_JPEG_END = b"\xff\xd9"


def open_with_pillow(file: Input, n: int) -> Source:
    """Open a file of one of the formats meant, whatever its reader; animations are refused."""
    f = file.stream
    f.seek(0)
    im = Image.open(f, formats=_FORMATS)
    check_pixels(im.height, im.width)
    mode = im.mode
    if (frames := getattr(im, "n_frames", 1)) > 1:
        raise ValueError(f"it holds {frames} frames: save one image alone, or channels as the pages of a TIFF")
    if mode == "F" or (mode == "I" and im.format not in ("PNG", "PPM")):
        raise ValueError(f"its pixels are of a kind ({mode}) without a fixed range: save it with 8 or 16 bits")
    if mode in ("CMYK", "LAB"):
        raise ValueError(f"its colours are {mode}, which no one rule turns into red, green and blue: save it as RGB")
    grey = mode in ("L", "1", "LA", "La") or mode.startswith("I") or (mode in ("P", "PA") and n == 1)
    colours = "RGBA" if mode == "RGBA" or im.has_transparency_data else "RGB"

    def decode() -> np.ndarray:
        return _grey(im)[None] if grey else np.moveaxis(np.asarray(im.convert(colours)), -1, 0)

    f.seek(max(0, file.size - len(_JPEG_END)))
    intact = im.format == "JPEG" and f.read(len(_JPEG_END)) == _JPEG_END and mode in ("L", "RGB")
    dtype = np.uint16 if mode.startswith("I") else np.uint8
    planes = 1 if grey else len(colours)
    return Source(planes, im.height, im.width, decode, dtype, colour=not grey, intact=intact)


def _grey(im: Image.Image) -> np.ndarray:
    """Return a picture as brightness (H,W)."""
    if im.mode in ("P", "PA"):
        if im.has_transparency_data and np.asarray(im.convert("RGBA"))[..., 3].min() < 255:
            raise ValueError("it is not opaque, save it without alpha")
        table = np.array(im.getpalette("RGB")).reshape(-1, 3)
        return brightness(np.asarray(im.convert("P") if im.mode == "PA" else im), table, 8)
    if im.mode in ("LA", "La") and np.asarray(im)[..., -1].min() < 255:
        raise ValueError("it is not opaque, save it without alpha")
    if im.mode.startswith("I"):
        return np.asarray(im).astype(np.uint16)
    return np.asarray(im.convert("L"))


PILLOW = Reader(
    "Pillow", _SUFFIXES, open_with_pillow, lambda file: file.start.startswith(_STARTS), channels=(1, 3), threads=True
)
