"""Formats and their corners: the right pixels, or a refusal by the check of headers already."""

import gzip
import io
import os
import resource
import signal
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from fastai_crl.images import ImageSet
from fastai_crl.images.readers import Input, header, read_planes
from fastai_crl.images.readers.png import PNG

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (12, 15), dtype=np.uint8)
STACK = RNG.integers(0, 256, (4, 12, 15), dtype=np.uint8)
SMOOTH = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)


@pytest.fixture(autouse=True)
def in_time():
    "Nothing may wait for ever."
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(30)
    yield
    signal.alarm(0)


# ---------------------------------------------------------------- files


def tiff(a: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, a, **{"photometric": "minisblack", **options})
    return buffer.getvalue()


def with_tag(data: bytes, tag: str, value: int, page: int = 0) -> bytes:
    """A TIFF in which a tag of one value holds another."""
    data = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as t:
        entry = t.pages[page].tags[tag]
        struct.pack_into("<H" if entry.dtype == 3 else "<I", data, entry.valueoffset, value)
    return bytes(data)


def circle(bigtiff: bool, byteorder: str, back_to: int) -> bytes:
    """A TIFF whose last page is followed by an earlier one."""
    data = bytearray(tiff(STACK, bigtiff=bigtiff, byteorder=byteorder, metadata=None))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as t:
        offsets = [p.offset for p in t.pages]
    count, entry, offset = ("Q", 20, "Q") if bigtiff else ("H", 12, "I")
    (entries,) = struct.unpack_from(byteorder + count, data, offsets[-1])
    at = offsets[-1] + struct.calcsize(byteorder + count) + entry * entries
    struct.pack_into(byteorder + offset, data, at, offsets[back_to])
    return bytes(data)


def ome(size_c: int, planes: str = "<TiffData/>", uuid: str = "") -> str:
    return (
        f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" {uuid}>'
        f'<Image ID="Image:0"><Pixels DimensionOrder="XYCZT" ID="Pixels:0" SizeC="{size_c}" SizeT="1" SizeX="15" '
        f'SizeY="12" SizeZ="1" Type="uint8">{planes}</Pixels></Image></OME>'
    )


def plain(a: np.ndarray, description: str) -> bytes:
    """A TIFF of which only the description says what it holds."""
    return tiff(a, metadata=None, description=description)


def png(width: int, height: int, depth: int = 8, colour: int = 0, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def saved(kind: str, *images: Image.Image, **options: Any) -> bytes:
    """What Pillow saves, in several frames if there are several images."""
    buffer = io.BytesIO()
    several = {"save_all": True, "append_images": images[1:]} if len(images) > 1 else {}
    images[0].save(buffer, kind, **several, **options)
    return buffer.getvalue()


def with_table(kind: str, a: np.ndarray, table: np.ndarray, **options: Any) -> bytes:
    """A picture of indices `a` with a table of colours (3, k)."""
    if kind == "tiff":
        return tiff(a, photometric="palette", colormap=table.astype(np.uint16) * 257, **options)
    im = Image.fromarray(a, "P")
    im.putpalette(table.T.astype(np.uint8).tobytes())
    return saved(kind, im)


def bytes_of(a: np.ndarray, white: int) -> np.ndarray:
    return np.round(a * (255 / white)).astype(np.uint8)


# ---------------------------------------------------------------- what is read, and what is refused

READ: list[Any] = []
REFUSED: list[Any] = []


def reads(name: str, make: Callable[[], bytes], want: np.ndarray, n: int = 1, full: int | None = None) -> None:
    READ.append(pytest.param(make, want if want.ndim == 3 else want[None], n, full, id=f"{name}-{n}"))


def refuses(
    name: str, make: Callable[[], bytes], reason: str, *ns: int, full: int | None = None, most: int | None = None
) -> None:
    """`most` is the memory, in MiB, that it may take."""
    for n in ns or (1,):
        REFUSED.append(pytest.param(make, reason, n, full, most, id=f"{name}-{n}"))


# Integers.
for t in ("i1", "i2", "i4", "i8", "u4", "u8"):
    for top in (115, 127):
        a = np.linspace(0, top, 24).reshape(4, 6).astype(t)
        why = "nothing says which u?int.* value is full intensity: save it as uint8 or uint16"
        refuses(f"{t} up to {top}", lambda a=a: tiff(a), why)
    if t != "i1":
        a = (np.arange(24).reshape(4, 6) * 178).astype(t)
        reads(f"{t} with bits", lambda a=a: tiff(a), bytes_of(a, 4095), full=4095)
        off = a - 2000 if t[0] == "i" else a + 3000
        refuses(f"{t} beyond bits", lambda a=off: tiff(a), r"values .* are not from 0 to 4095", full=4095)
for t in ("f2", "f4", "f8", "c8"):
    for full in (None, 4095):
        refuses(f"{t}, {full}", lambda t=t: tiff(np.ones((4, 6), t)), "have no fixed range", full=full)
for depth in (8, 10, 12, 14, 16):
    every = ({}, {"compression": "zlib", "predictor": True}, {"compression": "lzw"}, {"tile": (16, 16)})
    # tifffile writes packed integers in plain strips only.
    for options in every if depth % 8 == 0 else ({"bitspersample": depth},):
        for n in (1, 3):
            white = 2**depth - 1
            a = RNG.integers(0, white + 1, (n, 12, 15)).astype(np.uint8 if depth == 8 else np.uint16)
            name, a = f"white is zero, {depth} {options}", a if n > 1 else a[0]
            make = lambda a=a, options=options: tiff(a, photometric="miniswhite", **options)  # noqa: E731
            reads(name, make, bytes_of(white - a.astype(float), white), n)
a = np.array([[0, 2048, 4095]], np.uint16)
reads("white is zero, bits", lambda a=a: tiff(a, photometric="miniswhite"), np.array([[255, 127, 0]]), full=4095)
a = np.linspace(0, 65535, 24).reshape(4, 6).astype(np.uint16)
alpha = np.full((4, 6), 65535, np.uint16)
reads("16 bits with alpha", lambda a=a, b=alpha: imagecodecs.png_encode(np.dstack([a, b])), bytes_of(a, 65535))
alpha = np.where(a == 0, 3, alpha).astype(np.uint16)
refuses("16 bits with alpha", lambda a=a, b=alpha: imagecodecs.png_encode(np.dstack([a, b])), "not opaque")
reads("pgm of 16 bits", lambda a=a: b"P5 6 4 65535\n" + a.astype(">u2").tobytes(), bytes_of(a, 65535))
a = bytes_of(a, 65535)
reads("ppm of 8 bits", lambda a=a: b"P6 6 4 255\n" + np.dstack([a] * 3).tobytes(), a)
pgm = b"P5 3 1 4095\n" + struct.pack(">HHH", 4095, 2048, 0)
reads("pgm of 12 bits", lambda: pgm, np.array([[255, 128, 0]]))
reads("jpeg 2000", lambda: saved("jpeg2000", Image.fromarray(GREY.astype(np.uint16) * 257)), GREY)

# Tables of colours: those for display give the indices, other greys the greys, all else is refused.
RAMP = np.arange(256)
INDICES = np.array([[0, 1, 60, 120, 200, 254, 255]], np.uint8)
HILO = np.stack([RAMP] * 3)
HILO[:, 0], HILO[:, 255] = (0, 0, 255), (255, 0, 0)
DISPLAY = {
    "grey": np.stack([RAMP] * 3),
    "green": np.stack([0 * RAMP, RAMP, 0 * RAMP]),
    "yellow": np.stack([RAMP, RAMP, 0 * RAMP]),
    "contrast": np.stack([(RAMP * 4 - 200).clip(0, 255)] * 3),
    "red hot": np.stack([(RAMP * 3 - k).clip(0, 255) for k in (0, 255, 510)]),
    "hilo": HILO,
}
NONE = {
    "fire": np.stack([(RAMP * 3).clip(0, 255), (RAMP * 3 - 255).clip(0, 255), (155 - RAMP).clip(0, 255)]),
    "inverted": np.stack([RAMP[::-1]] * 3),
    "shuffled": RNG.permutation(256 * 3).reshape(3, 256) // 3,
}
IMAGEJ = {"metadata": None, "description": "ImageJ=1.54f\nmode=grayscale\n"}
for name, table in {**DISPLAY, **NONE}.items():
    reads(f"{name} of ImageJ", lambda t=table: with_table("tiff", INDICES, t, **IMAGEJ), INDICES)
    for kind in ("tiff", "png", "bmp"):
        make = lambda kind=kind, t=table: with_table(kind, INDICES, t)  # noqa: E731
        if name in DISPLAY:
            reads(f"{name} {kind}", make, INDICES)
        else:
            refuses(f"{name} {kind}", make, "table of colours is no brightness.*Lookup Tables > Grays")
        if (kind, name) != ("bmp", "grey"):  # which Pillow takes for grey
            reads(f"{name} {kind}", make, table.astype(np.uint8)[:, INDICES], 3)
for pair in ((0, 1), (254, 255), (0, 255), (100, 101)):
    greys = RAMP.copy()
    greys[list(pair)] = greys[list(pair[::-1])]
    want = greys[INDICES].astype(np.uint8)
    for kind in ("tiff", "png", "bmp", "gif"):
        make = lambda kind=kind, t=greys: with_table(kind, INDICES, np.stack([t] * 3))  # noqa: E731
        reads(f"greys {pair} exchanged {kind}", make, want)
        reads(f"greys {pair} exchanged {kind}", make, np.stack([want] * 3), 3)
FEW, SHORT = np.array([[0, 1, 2], [3, 4, 0]], np.uint8), np.array([200, 17, 255, 0, 90], np.uint8)
for kind in ("png", "bmp"):
    reads(f"a few greys {kind}", lambda kind=kind: with_table(kind, FEW, np.stack([SHORT] * 3)), SHORT[FEW])
reads("pages with tables", lambda: with_table("tiff", STACK, DISPLAY["green"]), STACK, 4)
refuses("pages with tables", lambda: with_table("tiff", STACK, NONE["fire"]), "no brightness", 4)

# Frames, and what shows through.
TWO = RNG.integers(0, 2, (3, 8, 8), dtype=np.uint8) * 255
COLOUR = RNG.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
for kind, mode in (("tiff", "1"), ("tiff", "P"), ("tiff", "L"), ("gif", "L"), ("gif", "P"), ("png", "L"), ("png", "1")):
    options = {"compression": "raw"} if kind == "tiff" else {}
    make = lambda kind=kind, mode=mode, o=options: saved(kind, *(Image.fromarray(a).convert(mode) for a in TWO), **o)  # noqa: E731
    if kind == "tiff":
        refuses(f"frames {kind} {mode}", make, "it holds 3 channels where (1|5) are", 1, 5)
        reads(f"frames {kind} {mode}", make, TWO, 3)
    else:
        refuses(f"frames {kind} {mode}", make, "it holds 3 frames: save", 1, 3, 5)
for kind in ("webp", "png", "gif"):
    make = lambda kind=kind: saved(kind, *map(Image.fromarray, COLOUR))  # noqa: E731
    refuses(f"frames in colour {kind}", make, "it holds 2 frames", 1, 2, 3)
refuses("frames of a camera", lambda: saved("MPO", *map(Image.fromarray, COLOUR)), "it holds 2 frames", 3)


def seen_through(mode: str) -> bytes:
    if mode == "P":
        return saved("png", Image.fromarray(GREY).convert("P"), transparency=int(GREY[0, 0]))
    im = Image.fromarray(GREY).convert(mode)
    im.putpixel((3, 3), (*(7,) * (len(im.getbands()) - 1), 9))
    return saved("png", im)


refuses("seen through LA", lambda: seen_through("LA"), "not opaque")
for mode in ("RGBA", "P"):
    refuses(f"seen through {mode}", lambda mode=mode: seen_through(mode), "not opaque", 1, 3)

# TIFF: pages, descriptions, headers.
for bigtiff in (False, True):
    for order in "<>":
        for to in (0, 1, 3):
            make = lambda args=(bigtiff, order, to): circle(*args)  # noqa: E731
            for kind, made in {"": make, "gz": lambda make=make: gzip.compress(make())}.items():
                refuses(f"circle {bigtiff} {order} {to} {kind}", made, "list of pages leads round in a circle", 4)
many = np.zeros((1500, 2, 2), np.uint8)
refuses("many pages", lambda: tiff(many, metadata=None), "more than 1004 pages", 4)
for tag, value in {"ImageWidth": 8, "PhotometricInterpretation": 0, "BitsPerSample": 16}.items():
    make = lambda tag=tag, value=value: with_tag(tiff(STACK, metadata=None), tag, value, page=2)  # noqa: E731
    refuses(f"another page's {tag}", make, "different size or kind|truncated|damaged", 4)
for axis, what in {"Z": "depth", "T": "time", "A": "angle", "P": "phase"}.items():
    for options in ({"imagej": True}, {"ome": True}, {}) if axis in "ZT" else ({},):  # which have no such axes
        options = {"metadata": {"axes": f"{axis}YX"}, **options}
        why = f"its axes {axis}YX say that its 4 planes differ in {what}, not in channel"
        refuses(f"axis {options}", lambda o=options: tiff(STACK, **o), why, 1, 4)
        reads(f"axis {options}", lambda o=options: tiff(STACK[:1], **o), STACK[0])
HUGE = 10**9
for k, xml in enumerate(
    [
        ome(HUGE),
        ome(4).replace('SizeT="1"', f'SizeT="{HUGE}"'),
        ome(4).replace('SizeZ="1"', f'SizeZ="{HUGE}"'),
        ome(1000).replace('SizeZ="1" ', 'SizeZ="1000" ').replace('SizeT="1"', 'SizeT="1000"'),
        ome(4, f'<TiffData PlaneCount="{HUGE}"/>'),
        ome(4, f'<TiffData NumPlanes="{HUGE}"/>'),
        ome(4, f'<Channel SamplesPerPixel="{HUGE}"/><TiffData/>'),
        ome(HUGE, '<TiffData><UUID FileName="b.ome.tif">urn:uuid:b</UUID></TiffData>'),
        ome(4).replace("</OME>", f'<ModuloAlongC Start="0" End="{HUGE}"/></OME>'),
    ]
):
    for pages in (1, 4):
        make = lambda pages=pages, xml=xml: plain(STACK[:pages], xml)  # noqa: E731
        refuses(f"huge OME {k}, {pages} pages", make, "its description (claims|divides)", 4, most=20)
for held, claimed in ((2, 4), (1, 4), (3, 4), (4, 2), (4, 5), (4, 1)):
    make = lambda held=held, claimed=claimed: plain(STACK[:held], ome(claimed))  # noqa: E731
    refuses(f"OME of {claimed} with {held}", make, "claims|holds|described?s?", held, claimed)
for k, xml in enumerate([ome(4)[:-30], ome(4).replace("XYCZT", "XY"), ome(4).replace('SizeC="4"', 'SizeC="x"')]):
    refuses(f"broken OME {k}", lambda xml=xml: plain(STACK, xml), ".", 4)
ELSEWHERE = (
    '<TiffData FirstC="{c}" IFD="{at}" PlaneCount="1"><UUID FileName="{k}.ome.tif">urn:uuid:{k}</UUID></TiffData>'
)
halves = ome(4, "".join(ELSEWHERE.format(c=c, at=c % 2, k=c // 2) for c in range(4)), 'UUID="urn:uuid:0"')
refuses("OME in two files", lambda: plain(STACK[:2], halves), "planes in other files", 2, 4)
for c in range(4):
    quarters = ome(4, "".join(ELSEWHERE.format(c=k, at=0, k=k) for k in range(4)), f'UUID="urn:uuid:{c}"')
    reads(f"OME in four files {c}", lambda c=c, xml=quarters: plain(STACK[c], xml), STACK[c])
ORDER = [2, 0, 3, 1]
ordered = ome(4, "".join(f'<TiffData FirstC="{c}" IFD="{i}" PlaneCount="1"/>' for c, i in enumerate(ORDER)))
reads("OME in another order", lambda: plain(STACK, ordered), STACK[ORDER], 4)
for k, text in enumerate(['{"shape": [9, 12, 15]}', "ImageJ=1.54f\nimages=9\nchannels=9\n"]):
    for a in (STACK, GREY):
        refuses(f"description {k} of more, {a.ndim}", lambda a=a, text=text: plain(a, text), ".", 9)
for options in ({"imagej": True}, {"ome": True}, {"truncate": True}, {"imagej": True, "truncate": True}):
    axes = {} if options == {"truncate": True} else {"metadata": {"axes": "CYX"}}
    reads(f"stack {options}", lambda o={**axes, **options}: tiff(STACK, **o), STACK, 4)
for value in (7, 65000):
    refuses(f"compression {value}", lambda v=value: with_tag(tiff(GREY, compression="zlib"), "Compression", v), ".")
for tag, value, what in (("Predictor", 3, "predictor 3 of 8-bit"), ("Compression", 9, "compression 9")):
    make = lambda t=tag, v=value: with_tag(tiff(GREY, compression="zlib", predictor=True), t, v)  # noqa: E731
    refuses(what, make, what)
for kind in ("lerc", "jpegxl", "jpegxr"):  # nothing tells the size
    why = "compression [0-9]+ is not read: save it with LZW, deflate, or none"
    refuses(kind, lambda kind=kind: tiff(GREY, compression=kind), why)
for kind in ("jpeg", "jpeg2000", "webp", "png"):
    a, n, rgb = (np.dstack([SMOOTH] * 3), 3, {"photometric": "rgb"}) if kind == "webp" else (SMOOTH, 1, {})
    for tag, value in {"ImageWidth": 63, "ImageLength": 32}.items():
        data = tiff(a, compression=kind, metadata=None, **rgb)
        make = lambda data=data, t=tag, v=value: with_tag(data, t, v)  # noqa: E731
        refuses(f"{kind} in TIFF, {tag}", make, "do not fit each other|some are missing", n)


def jpeg_that_claims_much() -> bytes:
    """It claims to unpack to 3.6 GB."""
    data = tiff(SMOOTH, compression="jpeg", metadata=None)
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 60000, 60000) + data[at + 4 :]


def page_that_names_itself() -> bytes:
    """As part of itself, in its SubIFDs."""
    data = bytearray(tiff(STACK, software="abc", ome=True, metadata={"axes": "CYX"}))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as t:
        page = t.pages[0]
        struct.pack_into("<HHII", data, page.tags["Software"].offset, 330, 4, 1, page.offset)
    return bytes(data)


refuses("jpeg in TIFF that claims much", jpeg_that_claims_much, ".", most=100)
reads("a page that names itself as part of it", page_that_names_itself, STACK, 4)

# What is no image, and small files that claim much.
STARTS = (b"%PDF-1.4", b"#FIG", b"\xd7\xcd\xc6\x9a", b"\x01\0\0\0" + bytes(36) + b" EMF", b"8BPS")
for start in STARTS:
    refuses(f"other formats {start[:4]!r}", lambda s=start: s + bytes(200), "cannot identify its format")
refuses("gzip in gzip", lambda: gzip.compress(gzip.compress(tiff(GREY))), "more than once")
for depth, colour in ((8, 0), (16, 0), (8, 2), (16, 6), (16, 4)):
    make = lambda args=(9000, 9000, depth, colour): png(*args)  # noqa: E731  within the limit of pixels
    why = "bytes cannot hold the 9000x9000 pixels"
    refuses(f"small png {depth} {colour}", make, why, 3 if colour in (2, 6) else 1)
BLACK = png(3000, 3000, data=bytes(3001 * 3000))
assert len(BLACK) < 10_000
reads("black png", lambda: BLACK, np.zeros((3000, 3000), np.uint8))
for width, height in ((0, 16), (16, 0), (0, 0)):
    bmp, jpeg = (saved(kind, Image.fromarray(GREY)) for kind in ("bmp", "jpeg"))
    at = jpeg.index(b"\xff\xc0") + 5
    for name, data in {
        "png": png(width, height),
        "bmp": bmp[:18] + struct.pack("<ii", width, height) + bmp[26:],
        "jpg": jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :],
        "pgm": b"P5 %d %d 255\n" % (width, height),
        "tif": with_tag(with_tag(tiff(GREY), "ImageWidth", width), "ImageLength", height),
    }.items():
        refuses(f"{name} of {width}x{height}", lambda data=data: data, ".")


@pytest.mark.parametrize(("make", "want", "n", "full"), READ)
def test_the_right_pixels(tmp_path, make, want, n, full):
    file = tmp_path / "a"
    try:
        file.write_bytes(make())
    except NotImplementedError as e:  # the last imagecodecs for Python 3.10 only reads packed integers
        pytest.skip(f"imagecodecs {imagecodecs.__version__} cannot write the file: {e}")
    assert np.array_equal(read_planes(file, n, full=full), want)
    assert header(file, n, full) == want.shape[1:]


def refused(file: Path, reason: str, n: int = 1, **options) -> None:
    """By the check of headers, and by reading, which names the file."""
    with pytest.raises(ValueError, match=reason):
        header(file, n, **options)
    with pytest.raises(ValueError, match=f"{file.name} cannot be read .*{reason}"):
        read_planes(file, n, **options)


@pytest.mark.parametrize(("make", "reason", "n", "full", "most"), REFUSED)
def test_a_refusal(tmp_path, make, reason, n, full, most, capfd):
    (tmp_path / "a.x").write_bytes(make())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "a.x", reason, n, full=full)
    assert most is None or (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < most
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------- what is no row of these tables


@pytest.mark.parametrize("tag", ["ImageWidth", "ImageLength"])
@pytest.mark.parametrize("value", [0, 1, 7, 14, 16, 60, 9999])
@pytest.mark.parametrize(
    "options",
    [
        *({}, {"rowsperstrip": 5}, {"compression": "lzw", "predictor": True, "rowsperstrip": 5}),
        *({"compression": kind} for kind in ("zlib", "lzw", "packbits", "zstd")),
    ],
)
def test_sides_other_than_those_of_the_pixels(tmp_path, tag, value, options):
    file = tmp_path / "a.tif"
    file.write_bytes(with_tag(tiff(GREY + 1, metadata=None, **options), tag, value))
    try:
        got = read_planes(file)[0]
    except ValueError:
        pass
    else:  # pixels left over after LZW are no error to anyone
        assert options.get("compression") == "lzw" and 0 < value < 15
        assert np.array_equal(got, tifffile.imread(file)) and np.array_equal(got, np.asarray(Image.open(file)))
    if value == 0 or "compression" not in options:
        refused(file, "damaged|truncated")


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "webp", "png"])
def test_pictures_in_tiff(tmp_path, compression):
    a, n, kind = (np.dstack([SMOOTH] * 3), 3, {"photometric": "rgb"}) if compression == "webp" else (SMOOTH, 1, {})
    level = {"compressionargs": {"level": 95}} if compression == "jpeg" else {}
    (tmp_path / "a.tif").write_bytes(tiff(a, compression=compression, **level, **kind))
    got = read_planes(tmp_path / "a.tif", n)
    assert header(tmp_path / "a.tif", n) == (64, 64) and len(got) == n
    assert np.abs(got.astype(int) - SMOOTH).max() < 12


def test_a_folder_with_a_circle_is_checked(tmp_path):
    (tmp_path / "c.tif").write_bytes(circle(False, "<", 0))
    with pytest.raises(ValueError, match=r"1 in all\): c\.tif \(damaged: its list of pages"):
        ImageSet(tmp_path, tuple("abcd"), "{id}.tif").check()


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "null.png").symlink_to("/dev/null")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "s.png"))
        refused(tmp_path / "s.png", "it is a socket, not a regular file")
        kinds = {"pipe": "a named pipe", "folder": "a folder", "null": "a device", "zero": "a device"}
        for name, what in kinds.items():
            refused(tmp_path / f"{name}.png", f"it is {what}")
        with pytest.raises(ValueError, match=r"5 in all.*(a named pipe|a folder|a device|a socket)"):
            ImageSet(tmp_path, "c", "{id}.png").check()


@pytest.mark.parametrize("name", ["e.png", "e.tif", "e.jpg", "e.eps", "e.png.gz"])
def test_postscript_is_never_run(tmp_path, name, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    refused(tmp_path / name, "cannot identify its format")
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(("depth", "colour", "row"), [(8, 0, 1), (16, 0, 2), (8, 2, 3), (16, 6, 8), (16, 4, 4)])
def test_the_most_that_a_png_can_hold(tmp_path, depth, colour, row):
    n, file = 3 if colour in (2, 6) else 1, tmp_path / "a.png"
    most = 1040 * len(png(1, 1, depth, colour)) // row  # deflate makes at most 1,032 bytes out of one
    file.write_bytes(png(1, most, depth, colour))
    with file.open("rb") as f:
        assert PNG.open(Input(file, f.read(64), f, file.stat().st_size), n).height == most
    file.write_bytes(png(1, most + 1, depth, colour))
    refused(file, "bytes cannot hold", n)


@pytest.mark.parametrize("at", range(16, 29))
def test_a_flipped_bit_in_the_header_of_a_png(tmp_path, at):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    for bit in range(8):
        data[at] ^= 1 << bit
        (tmp_path / "a.png").write_bytes(data)
        refused(tmp_path / "a.png", "header is cut off or damaged")
        data[at] ^= 1 << bit
