"""Damaged files, drawn with a seed: equal pixels or a refusal, in time, and never a crash of the process."""

import gzip
import io
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from fastai_crl.images.readers import header, read_planes
from tests.images.test_formats import tiff

y, x = np.mgrid[:40, :52]
GREY = ((np.sin(y / 7) + np.cos(x / 5)) * 50 + 110 + np.random.default_rng(0).integers(0, 12, y.shape)).astype(np.uint8)
STACK = np.stack([np.roll(GREY, 5 * k) for k in range(4)])
RGB = np.dstack([GREY, GREY // 2, GREY // 3])

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def pillow(a: np.ndarray, kind: str, mode: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    im = Image.fromarray(a)
    (im.convert(mode) if mode else im).save(buffer, kind, **options)
    return buffer.getvalue()


ONE_PAGE = tiff(GREY)
# Number of channels, the file, and whether checksums cover the pixels: then no damage can give others.
KINDS = {
    "png": (1, pillow(GREY, "PNG"), True),
    "png of 16 bits": (1, pillow(GREY.astype(np.uint16) * 257, "PNG"), True),
    "png in colour": (3, pillow(RGB, "PNG"), True),
    "png with a table": (3, pillow(RGB, "PNG", "P"), True),
    "png of one bit": (1, pillow(GREY, "PNG", "1"), True),
    "jpeg": (3, pillow(RGB, "JPEG"), False),
    "gif": (1, pillow(GREY, "GIF"), False),
    "webp": (3, pillow(RGB, "WEBP", lossless=True), False),
    "tiff": (1, tiff(GREY, rowsperstrip=8), False),
    "tiff of tiles": (4, tiff(STACK, tile=(16, 16)), False),
    "tiff, lzw": (1, tiff(GREY, compression="lzw", rowsperstrip=16), False),
    "tiff, deflate": (1, tiff(GREY, compression="zlib", rowsperstrip=16), False),
    "tiff of pages": (4, tiff(STACK, metadata=None), False),
    "tiff, big": (4, tiff(STACK, bigtiff=True, byteorder=">"), False),
    "tiff of one bit": (1, pillow(GREY, "TIFF", "1"), False),
    "ome": (4, tiff(STACK, ome=True, metadata={"axes": "CYX"}), False),
    "imagej": (4, tiff(STACK, imagej=True, metadata={"axes": "CYX"}), False),
    "gzip": (1, gzip.compress(ONE_PAGE), True),
}


def damaged(data: bytes, k: int, rng: np.random.Generator) -> bytes:
    """Flipped bits, a byte of head or end, a cut, zeros, bytes put in or taken out."""
    d = bytearray(data)
    at, n = int(rng.integers(len(d))), int(rng.integers(1, 100))
    if k % 5 == 0:
        for _ in range(1 + k % 3):
            d[int(rng.integers(len(d)))] ^= 1 << int(rng.integers(8))
    elif k % 5 == 1:
        end = at % min(300, len(d))
        d[end if k % 2 else -1 - end] = int(rng.choice([0, 1, 2, 4, 8, 16, 64, 127, 128, 255]))
    elif k % 5 == 2:
        del d[at:]
    elif k % 5 == 3:
        d[at : at + n] = bytes(len(d[at : at + n]))
    elif k % 2:
        del d[at : at + n]
    else:
        d[at:at] = rng.integers(0, 256, n, dtype=np.uint8).tobytes()
    return bytes(d)


def outcome(call):
    try:
        return call()
    except ValueError:
        return None


def read_all(file: Path, n: int, files: list[bytes], want: np.ndarray, send) -> None:
    "In a process of its own, so that a crash is a failed test; what hangs is killed."
    signal.alarm(120)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    counts: Counter = Counter()
    for data in files:
        file.write_bytes(data)
        size, got = outcome(lambda: header(file, n)), outcome(lambda: read_planes(file, n))
        assert got is None or (got.dtype == np.uint8 and len(got) == n and size == got.shape[1:])
        counts["refused" if got is None else "equal" if np.array_equal(got, want) else "other"] += 1
    send.send(counts)


def read_damaged(folder: Path, kind: str, files: list[bytes]) -> Counter:
    n, data, _ = KINDS[kind]
    (folder / "whole").write_bytes(data)
    want = read_planes(folder / "whole", n)
    assert header(folder / "whole", n) == want.shape[1:]
    receive, send = multiprocessing.Pipe(False)
    target, args = read_all, (folder / "damaged", n, files, want, send)
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    send.close()
    try:
        counts = receive.recv()
    except EOFError:
        process.join()
        pytest.fail(f"reading ended with {process.exitcode}")
    process.join()
    assert counts.total() == len(files)
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_any_kind(tmp_path, kind):
    rng = np.random.default_rng(len(kind))
    counts = read_damaged(tmp_path, kind, [damaged(KINDS[kind][1], k, rng) for k in range(100)])
    assert counts["refused"] >= 20 and (not KINDS[kind][2] or not counts["other"])


@pytest.mark.parametrize("kind", ["tiff", "tiff, lzw", "tiff, deflate", "tiff of pages", "tiff of one bit"])
def test_every_bit_of_the_header_of_a_tiff(tmp_path, kind):
    """Other pixels come of what has a meaning: white for black, another predictor, compression, or place."""
    data = KINDS[kind][1]
    with tifffile.TiffFile(io.BytesIO(data)) as t:
        page = t.pages[0]
        tags = [tag for tag in page.tags if tag.name != "Predictor"]
        places = sorted({0, 1, 2, 3, *(i for tag in tags for i in range(tag.offset, tag.offset + 12))})
    flipped = [data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :] for i in places for bit in range(8)]
    counts = read_damaged(tmp_path, kind, flipped)
    assert counts["other"] <= 8, counts
