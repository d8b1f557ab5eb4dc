"""Gzipped files of any other format."""

import gzip
import io
from dataclasses import replace
from typing import BinaryIO

from PIL import Image

from .base import HOW_TO_ALLOW, Input


def is_gzip(file: Input) -> bool:
    """Whether a file is gzipped."""
    return file.start.startswith(b"\x1f\x8b")


def unzip(file: Input, n: int) -> Input:
    """Return what a gzipped file holds; ValueError for more than `n` channels can need, or where it is damaged."""
    most = None if Image.MAX_IMAGE_PIXELS is None else 2 * n * Image.MAX_IMAGE_PIXELS + 2**20
    out: BinaryIO = io.BytesIO()
    file.stream.seek(0)
    with gzip.open(file.stream) as z:
        while chunk := z.read(2**20):
            out.write(chunk)
            if most is not None and out.tell() > most:
                raise ValueError(f"it unzips to more than {most:,} bytes, too many for {n} channels{HOW_TO_ALLOW}")
    size = out.tell()
    out.seek(0)
    unzipped = replace(file, start=out.read(64), stream=out, size=size)
    if is_gzip(unzipped):
        raise ValueError("it is gzipped more than once: unzip it")
    return unzipped
