"""Formats and their corners: the right pixels, or a refusal by the check of headers already."""

import gzip
import io
import os
import resource
import signal
import socket
import struct
import zlib
from pathlib import Path

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


@pytest.fixture(autouse=True)
def in_time():
    "Nothing may wait for ever."
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(30)
    yield
    signal.alarm(0)


def tiff(a: np.ndarray, file: Path | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, a, **{"photometric": "minisblack", **options})
    if file is not None:
        file.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def with_tag(data: bytes, tag: str, value: int, page: int = 0) -> bytes:
    """A TIFF in which a tag of one value holds another."""
    data = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as t:
        entry = t.pages[page].tags[tag]
        struct.pack_into("<H" if entry.dtype == 3 else "<I", data, entry.valueoffset, value)
    return bytes(data)


def refused(file: Path, reason: str, n: int = 1, **options) -> None:
    """By the check of headers, and by reading, which names the file."""
    with pytest.raises(ValueError, match=reason):
        header(file, n, **options)
    with pytest.raises(ValueError, match=f"{file.name} cannot be read .*{reason}"):
        read_planes(file, n, **options)


def same(file: Path, want: np.ndarray, n: int = 1, **options) -> None:
    assert np.array_equal(read_planes(file, n, **options), want if want.ndim == 3 else want[None])
    assert header(file, n, options.get("full")) == want.shape[-2:]


# ---------------------------------------------------------------- integers


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u4", "u8"])
@pytest.mark.parametrize("top", [115, 127])
def test_integers_without_a_range_of_their_own_are_refused(tmp_path, dtype, top):
    tiff(np.linspace(0, top, 24).reshape(4, 6).astype(dtype), tmp_path / "t.tif")
    refused(tmp_path / "t.tif", "nothing says which u?int.* value is full intensity: save it as uint8 or uint16")


@pytest.mark.parametrize("dtype", ["i2", "i4", "i8", "u4", "u8"])
def test_bits_give_them_one(tmp_path, dtype):
    values = (np.arange(24).reshape(4, 6) * 178).astype(dtype)
    tiff(values, tmp_path / "t.tif")
    same(tmp_path / "t.tif", np.round(values * (255 / 4095)).astype(np.uint8), full=4095)
    tiff(values - 2000 if dtype[0] == "i" else values + 3000, tmp_path / "t.tif")
    refused(tmp_path / "t.tif", r"values .* are not from 0 to 4095", full=4095)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c8"])
def test_pixels_that_are_no_integers_are_refused(tmp_path, dtype):
    tiff(np.ones((4, 6), dtype), tmp_path / "t.tif")
    refused(tmp_path / "t.tif", "have no fixed range")
    refused(tmp_path / "t.tif", "have no fixed range", full=4095)


@pytest.mark.parametrize("depth", [8, 10, 12, 14, 16])
@pytest.mark.parametrize(
    "options", [{}, {"compression": "zlib", "predictor": True}, {"compression": "lzw"}, {"tile": (16, 16)}]
)
@pytest.mark.parametrize("n", [1, 3])
def test_white_is_zero_at_any_depth(tmp_path, depth, options, n):
    if depth % 8 and options:
        pytest.skip("tifffile writes packed integers in plain strips only")
    white = 2**depth - 1
    a = RNG.integers(0, white + 1, (n, 12, 15) if n > 1 else (12, 15)).astype(np.uint8 if depth == 8 else np.uint16)
    more = {"bitspersample": depth} if depth % 8 else {}
    try:
        tiff(a, tmp_path / "w.tif", photometric="miniswhite", **options, **more)
    except NotImplementedError as e:  # the last imagecodecs for Python 3.10 only reads packed integers
        pytest.skip(f"imagecodecs {imagecodecs.__version__} cannot write the file: {e}")
    same(tmp_path / "w.tif", np.round((white - a.astype(float)) * (255 / white)).astype(np.uint8), n)


def test_white_is_zero_with_bits(tmp_path):
    a = np.array([[0, 2048, 4095]], np.uint16)
    tiff(a, tmp_path / "w.tif", photometric="miniswhite")
    assert read_planes(tmp_path / "w.tif", full=4095)[0].tolist() == [[255, 127, 0]]


def test_sixteen_bit_grey_with_alpha_keeps_its_depth(tmp_path):
    a = np.dstack([np.linspace(0, 65535, 24).reshape(4, 6), np.full((4, 6), 65535)]).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(a))
    same(tmp_path / "a.png", np.round(a[..., 0] / 257).astype(np.uint8))
    a[0, 0, 1] = 3
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(a))
    refused(tmp_path / "a.png", "not opaque")


@pytest.mark.parametrize("name", ["a.pgm", "a.ppm"])
def test_netpbm_of_sixteen_bits(tmp_path, name):
    a = np.linspace(0, 65535, 24).reshape(4, 6).astype(">u2")
    head = b"P5 6 4 65535\n" if name == "a.pgm" else b"P6 6 4 255\n"
    grey = np.round(a / 257).astype(np.uint8)
    (tmp_path / name).write_bytes(head + (a.tobytes() if name == "a.pgm" else np.dstack([grey] * 3).tobytes()))
    same(tmp_path / name, grey)


# ---------------------------------------------------------------- tables of colours

RAMP = np.arange(256)
INDICES = np.array([[0, 1, 60, 120, 200, 254, 255]], np.uint8)


def fire() -> np.ndarray:
    return np.stack([(RAMP * 3).clip(0, 255), (RAMP * 3 - 255).clip(0, 255), (155 - RAMP).clip(0, 255)])


def hilo() -> np.ndarray:
    table = np.stack([RAMP] * 3)
    table[:, 0], table[:, 255] = (0, 0, 255), (255, 0, 0)
    return table


DISPLAY = {
    "grey": np.stack([RAMP] * 3),
    "green": np.stack([0 * RAMP, RAMP, 0 * RAMP]),
    "yellow": np.stack([RAMP, RAMP, 0 * RAMP]),
    "contrast": np.stack([(RAMP * 4 - 200).clip(0, 255)] * 3),
    "red hot": np.stack([(RAMP * 3).clip(0, 255), (RAMP * 3 - 255).clip(0, 255), (RAMP * 3 - 510).clip(0, 255)]),
    "hilo": hilo(),
}
NONE = {
    "fire": fire(),
    "inverted": np.stack([RAMP[::-1]] * 3),
    "shuffled": RNG.permutation(256 * 3).reshape(3, 256) // 3,
}


def save_palette(file: Path, a: np.ndarray, table: np.ndarray, **options) -> Path:
    if file.suffix == ".tif":
        return (
            file.write_bytes(tiff(a, photometric="palette", colormap=table.astype(np.uint16) * 257, **options)) and file
        )
    im = Image.fromarray(a, "P") if a.ndim == 2 else None
    im.putpalette(table.T.astype(np.uint8).tobytes())
    im.save(file)
    return file


@pytest.mark.parametrize("suffix", ["tif", "png", "bmp"])
@pytest.mark.parametrize("name", [*DISPLAY, *NONE])
def test_tables_for_display_give_the_indices_others_are_refused(tmp_path, suffix, name):
    file = save_palette(tmp_path / f"l.{suffix}", INDICES, {**DISPLAY, **NONE}[name])
    if name in DISPLAY:
        same(file, INDICES)
    else:
        refused(file, "table of colours is no brightness.*Lookup Tables > Grays")
    if (suffix, name) != ("bmp", "grey"):  # which Pillow takes for grey
        want = {**DISPLAY, **NONE}[name].astype(np.uint8)[:, INDICES]
        same(file, want, 3)


@pytest.mark.parametrize("name", [*DISPLAY, *NONE])
def test_of_imagej_every_table_is_for_display(tmp_path, name):
    table = {**DISPLAY, **NONE}[name]
    save_palette(tmp_path / "l.tif", INDICES, table, metadata=None, description="ImageJ=1.54f\nmode=grayscale\n")
    same(tmp_path / "l.tif", INDICES)


@pytest.mark.parametrize("suffix", ["tif", "png", "bmp", "gif"])
@pytest.mark.parametrize("exchanged", [(0, 1), (254, 255), (0, 255), (100, 101)])
def test_a_whole_table_of_greys_in_another_order_gives_the_greys(tmp_path, suffix, exchanged):
    greys = RAMP.copy()
    greys[list(exchanged)] = greys[list(exchanged[::-1])]
    file = save_palette(tmp_path / f"l.{suffix}", INDICES, np.stack([greys] * 3))
    same(file, greys[INDICES].astype(np.uint8))
    same(file, np.stack([greys[INDICES].astype(np.uint8)] * 3), 3)


@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_a_short_table_of_greys_in_any_order_gives_the_greys(tmp_path, suffix):
    greys = np.array([200, 17, 255, 0, 90], np.uint8)
    im = Image.fromarray(np.array([[0, 1, 2], [3, 4, 0]], np.uint8), "P")
    im.putpalette(np.repeat(greys, 3).tobytes())
    im.save(tmp_path / f"p.{suffix}")
    same(tmp_path / f"p.{suffix}", greys[[[0, 1, 2], [3, 4, 0]]])


def test_pages_with_tables(tmp_path):
    tiff(STACK, tmp_path / "l.tif", photometric="palette", colormap=DISPLAY["green"].astype(np.uint16) * 257)
    same(tmp_path / "l.tif", STACK, 4)
    tiff(STACK, tmp_path / "l.tif", photometric="palette", colormap=NONE["fire"].astype(np.uint16) * 257)
    refused(tmp_path / "l.tif", "no brightness", 4)


# ---------------------------------------------------------------- frames


def frames(file: Path, mode: str, n: int = 3) -> np.ndarray:
    two = RNG.integers(0, 2, (n, 8, 8), dtype=np.uint8) * 255
    ims = [Image.fromarray(a).convert(mode) for a in two]
    ims[0].save(file, save_all=True, append_images=ims[1:], **({"compression": "raw"} if file.suffix == ".tif" else {}))
    return two


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.tif", "1"), ("a.tif", "P"), ("a.tif", "L"), ("a.gif", "L"), ("a.gif", "P"), ("a.png", "L"), ("a.png", "1")],
)
def test_every_frame_is_counted(tmp_path, name, mode):
    want = frames(tmp_path / name, mode)
    refused(tmp_path / name, "it holds 3 (channels|frames) where 1 (are|channels)")
    refused(tmp_path / name, "it holds 3 (channels|frames) where 5 (are|channels)", 5)
    if name == "a.tif" or mode == "L":
        same(tmp_path / name, want, 3)


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.gif"])
def test_frames_in_colour_are_refused(tmp_path, name):
    ims = [Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(2)]
    ims[0].save(tmp_path / name, save_all=True, append_images=ims[1:])
    for n in (1, 2, 3):
        refused(tmp_path / name, "frames|no brightness", n)


def test_pictures_of_a_camera_that_hold_several(tmp_path):
    ims = [Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(2)]
    ims[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=ims[1:])
    refused(tmp_path / "a.jpg", "it holds 2 frames", 3)


@pytest.mark.parametrize("save", ["LA", "RGBA", "P"])
@pytest.mark.parametrize("n", [1, 3])
def test_what_shows_through_is_refused(tmp_path, save, n):
    if (save, n) == ("LA", 3):
        pytest.skip("grey with alpha is one channel")
    im = Image.fromarray(GREY).convert("LA" if save == "LA" else "RGBA")
    im.putpixel((3, 3), (*(7,) * (len(im.getbands()) - 1), 9))
    if save == "P":
        im = Image.fromarray(GREY).convert("P")
        im.info["transparency"] = int(GREY[0, 0])
    im.save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "not opaque", n)


# ---------------------------------------------------------------- TIFF: pages, descriptions, headers


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("back_to", [0, 1, 3])
def test_a_list_of_pages_that_is_a_circle(tmp_path, bigtiff, byteorder, back_to):
    data = bytearray(tiff(STACK, bigtiff=bigtiff, byteorder=byteorder, metadata=None))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as t:
        offsets = [p.offset for p in t.pages]
    count, entry, offset = ("Q", 20, "Q") if bigtiff else ("H", 12, "I")
    (entries,) = struct.unpack_from(byteorder + count, data, offsets[-1])
    at = offsets[-1] + struct.calcsize(byteorder + count) + entry * entries
    struct.pack_into(byteorder + offset, data, at, offsets[back_to])
    for name, content in {"c.tif": bytes(data), "c.tif.gz": gzip.compress(bytes(data))}.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "list of pages leads round in a circle", 4)


def test_a_folder_with_such_a_file_is_checked(tmp_path):
    test_a_list_of_pages_that_is_a_circle(tmp_path, False, "<", 0)
    with pytest.raises(ValueError, match=r"1 in all\): c\.tif \(damaged: its list of pages"):
        ImageSet(tmp_path, tuple("abcd"), "{id}.tif").check()


def test_thousands_of_pages_are_not_read(tmp_path):
    tiff(np.zeros((1500, 2, 2), np.uint8), tmp_path / "a.tif", metadata=None)
    refused(tmp_path / "a.tif", "more than 1004 pages", 4)


@pytest.mark.parametrize("tag", ["ImageWidth", "ImageLength"])
@pytest.mark.parametrize("value", [0, 1, 7, 14, 16, 60, 9999])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib"},
        {"compression": "lzw"},
        {"compression": "packbits"},
        {"compression": "zstd"},
        {"rowsperstrip": 5},
        {"compression": "lzw", "predictor": True, "rowsperstrip": 5},
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


def test_a_page_of_another_kind_than_the_first(tmp_path):
    for tag, value in {"ImageWidth": 8, "PhotometricInterpretation": 0, "BitsPerSample": 16}.items():
        (tmp_path / "a.tif").write_bytes(with_tag(tiff(STACK, metadata=None), tag, value, page=2))
        refused(tmp_path / "a.tif", "different size or kind|truncated|damaged", 4)


def ome(size_c: int, planes: str = "<TiffData/>", uuid: str = "") -> str:
    return (
        f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" {uuid}>'
        f'<Image ID="Image:0"><Pixels DimensionOrder="XYCZT" ID="Pixels:0" SizeC="{size_c}" SizeT="1" SizeX="15" '
        f'SizeY="12" SizeZ="1" Type="uint8">{planes}</Pixels></Image></OME>'
    )


@pytest.mark.parametrize("axis", "ZTAP")
@pytest.mark.parametrize("options", [{"imagej": True}, {"ome": True}, {}])
def test_planes_that_are_no_channels_by_their_axes(tmp_path, axis, options):
    if axis in "AP" and options:
        pytest.skip("no such axis in these")
    tiff(STACK, tmp_path / "a.tif", metadata={"axes": f"{axis}YX"}, **options)
    what = {"Z": "depth", "T": "time", "A": "angle", "P": "phase"}[axis]
    for n in (1, 4):
        refused(tmp_path / "a.tif", f"its axes {axis}YX say that its 4 planes differ in {what}, not in channel", n)
    tiff(STACK[:1], tmp_path / "a.tif", metadata={"axes": f"{axis}YX"}, **options)
    same(tmp_path / "a.tif", STACK[0])


HUGE = 10**9


@pytest.mark.parametrize("pages", [1, 4])
@pytest.mark.parametrize(
    "xml",
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
    ],
)
def test_ome_that_claims_very_much_is_refused_before_anything_is_made_of_it(tmp_path, pages, xml):
    file = save_ome(tmp_path / "o.ome.tif", STACK[:pages], xml)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(file, "its description (claims|divides)", 4)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 20


def save_ome(file: Path, a: np.ndarray, xml: str) -> Path:
    tiff(a, file, metadata=None, description=xml)
    return file


@pytest.mark.parametrize(("held", "claimed"), [(2, 4), (1, 4), (3, 4), (4, 2), (4, 5), (4, 1)])
def test_ome_that_claims_other_planes_than_it_holds(tmp_path, held, claimed, capfd):
    file = save_ome(tmp_path / "o.ome.tif", STACK[:held], ome(claimed))
    for n in {held, claimed}:
        refused(file, "claims|holds|described?s?", n)
    assert capfd.readouterr().err == ""


def test_ome_whose_planes_lie_in_another_file(tmp_path):
    parts = "".join(
        f'<TiffData FirstC="{c}" IFD="{c % 2}" PlaneCount="1">'
        f'<UUID FileName="{c // 2}.ome.tif">urn:uuid:{c // 2}</UUID></TiffData>'
        for c in range(4)
    )
    for k in range(2):
        save_ome(tmp_path / f"{k}.ome.tif", STACK[2 * k : 2 * k + 2], ome(4, parts, f'UUID="urn:uuid:{k}"'))
    for n in (2, 4):
        refused(tmp_path / "0.ome.tif", "planes in other files", n)


def test_ome_of_which_each_file_holds_one_plane(tmp_path):
    parts = "".join(
        f'<TiffData FirstC="{c}" IFD="0" PlaneCount="1"><UUID FileName="{c}.ome.tif">urn:uuid:{c}</UUID></TiffData>'
        for c in range(4)
    )
    for c in range(4):
        same(save_ome(tmp_path / f"{c}.ome.tif", STACK[c], ome(4, parts, f'UUID="urn:uuid:{c}"')), STACK[c])


def test_ome_decides_on_the_order_of_the_planes(tmp_path):
    order = [2, 0, 3, 1]
    parts = "".join(f'<TiffData FirstC="{c}" IFD="{i}" PlaneCount="1"/>' for c, i in enumerate(order))
    same(save_ome(tmp_path / "o.ome.tif", STACK, ome(4, parts)), STACK[order], 4)


@pytest.mark.parametrize("xml", [ome(4)[:-30], ome(4).replace("XYCZT", "XY"), ome(4).replace('SizeC="4"', 'SizeC="x"')])
def test_ome_that_cannot_be_followed(tmp_path, xml):
    refused(save_ome(tmp_path / "o.ome.tif", STACK, xml), "", 4)


@pytest.mark.parametrize("description", ['{"shape": [9, 12, 15]}', "ImageJ=1.54f\nimages=9\nchannels=9\n"])
def test_other_descriptions_that_claim_more_than_there_is(tmp_path, description):
    tiff(STACK, tmp_path / "a.tif", metadata=None, description=description)
    refused(tmp_path / "a.tif", "", 9)
    tiff(GREY, tmp_path / "a.tif", metadata=None, description=description)
    refused(tmp_path / "a.tif", "", 9)


@pytest.mark.parametrize(
    "options", [{"imagej": True}, {"ome": True}, {"truncate": True}, {"imagej": True, "truncate": True}]
)
def test_stacks_as_others_write_them(tmp_path, options):
    axes = {} if options == {"truncate": True} else {"metadata": {"axes": "CYX"}}
    tiff(STACK, tmp_path / "a.tif", **axes, **options)
    same(tmp_path / "a.tif", STACK, 4)


def test_compressions_that_cannot_be_decoded_are_found_by_the_check(tmp_path):
    (tmp_path / "a.tif").write_bytes(with_tag(tiff(GREY, compression="zlib"), "Compression", 65000))
    refused(tmp_path / "a.tif", "")
    (tmp_path / "a.tif").write_bytes(with_tag(tiff(GREY, compression="zlib"), "Compression", 7))
    refused(tmp_path / "a.tif", "")


@pytest.mark.parametrize(
    ("tag", "value", "what"), [("Predictor", 3, "predictor 3 of 8-bit"), ("Compression", 9, "compression 9")]
)
def test_a_predictor_is_not_blamed_on_the_compression(tmp_path, tag, value, what):
    (tmp_path / "a.tif").write_bytes(with_tag(tiff(GREY, compression="zlib", predictor=True), tag, value))
    refused(tmp_path / "a.tif", what)


def test_jpeg_in_tiff(tmp_path):
    smooth = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    tiff(smooth, tmp_path / "a.tif", compression="jpeg", compressionargs={"level": 95})
    assert np.abs(read_planes(tmp_path / "a.tif")[0].astype(int) - smooth).max() < 12
    assert header(tmp_path / "a.tif") == (64, 64)


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "webp", "png"])
def test_pictures_in_tiff_of_another_size_than_it_says(tmp_path, compression):
    smooth = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    a, n = (np.dstack([smooth] * 3), 3) if compression == "webp" else (smooth, 1)
    kind = {"photometric": "rgb"} if n == 3 else {}
    data = tiff(a, tmp_path / "a.tif", compression=compression, metadata=None, **kind)
    assert header(tmp_path / "a.tif", n) == (64, 64) and len(read_planes(tmp_path / "a.tif", n)) == n
    for tag, value in {"ImageWidth": 63, "ImageLength": 32}.items():
        (tmp_path / "a.tif").write_bytes(with_tag(data, tag, value))
        refused(tmp_path / "a.tif", "do not fit each other|some are missing", n)
    if compression == "jpeg":  # which claims to unpack to 3.6 GB
        at = data.index(b"\xff\xc0") + 5
        (tmp_path / "a.tif").write_bytes(data[:at] + struct.pack(">HH", 60000, 60000) + data[at + 4 :])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refused(tmp_path / "a.tif", "")
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 100


@pytest.mark.parametrize("compression", ["lerc", "jpegxl", "jpegxr"])
def test_compressions_of_which_nothing_tells_the_size_are_refused(tmp_path, compression):
    tiff(GREY, tmp_path / "a.tif", compression=compression)
    refused(tmp_path / "a.tif", "compression [0-9]+ is not read: save it with LZW, deflate, or none")


# ---------------------------------------------------------------- what is no image file


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "null.png").symlink_to("/dev/null")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "s.png"))
        refused(tmp_path / "s.png", "it is a socket, not a regular file")
        for name, what in {
            "pipe": "a named pipe",
            "folder": "a folder",
            "null": "a device",
            "zero": "a device",
        }.items():
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


@pytest.mark.parametrize(
    "start", [b"%PDF-1.4", b"#FIG", b"\xd7\xcd\xc6\x9a", b"\x01\0\0\0" + bytes(36) + b" EMF", b"8BPS"]
)
def test_other_formats_of_pillow_are_not_asked(tmp_path, start):
    (tmp_path / "a.png").write_bytes(start + bytes(200))
    refused(tmp_path / "a.png", "cannot identify its format")


def test_gzip_in_gzip(tmp_path):
    (tmp_path / "a.tif.gz").write_bytes(gzip.compress(gzip.compress(tiff(GREY))))
    refused(tmp_path / "a.tif.gz", "more than once")


# ---------------------------------------------------------------- small files that claim much


def png(width: int, height: int, depth: int = 8, colour: int = 0, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("depth", "colour"), [(8, 0), (16, 0), (8, 2), (16, 6), (16, 4)])
def test_a_png_too_small_for_its_pixels(tmp_path, depth, colour):
    (tmp_path / "a.png").write_bytes(png(9000, 9000, depth, colour))  # within the limit of pixels
    refused(tmp_path / "a.png", "bytes cannot hold the 9000x9000 pixels", 3 if colour in (2, 6) else 1)
    black = png(3000, 3000, data=bytes(3001 * 3000))
    assert len(black) < 10_000
    (tmp_path / "a.png").write_bytes(black)
    same(tmp_path / "a.png", np.zeros((3000, 3000), np.uint8))


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


def test_netpbm_of_other_depths_and_jpeg_2000(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 4095\n" + struct.pack(">HHH", 4095, 2048, 0))
    same(tmp_path / "a.pgm", np.array([[255, 128, 0]], np.uint8))
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "a.jp2")
    same(tmp_path / "a.jp2", GREY)


@pytest.mark.parametrize(("width", "height"), [(0, 16), (16, 0), (0, 0)])
def test_sides_of_no_pixels(tmp_path, width, height):
    bmp = io.BytesIO()
    Image.fromarray(GREY).save(bmp, "BMP")
    jpeg = io.BytesIO()
    Image.fromarray(GREY).save(jpeg, "JPEG")
    data, at = jpeg.getvalue(), jpeg.getvalue().index(b"\xff\xc0") + 5
    files = {
        "a.png": png(width, height),
        "a.bmp": bmp.getvalue()[:18] + struct.pack("<ii", width, height) + bmp.getvalue()[26:],
        "a.jpg": data[:at] + struct.pack(">HH", height, width) + data[at + 4 :],
        "a.pgm": b"P5 %d %d 255\n" % (width, height),
        "a.tif": with_tag(with_tag(tiff(GREY), "ImageWidth", width), "ImageLength", height),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "")


def test_a_page_that_names_itself_as_part_of_it(tmp_path):
    data = bytearray(tiff(STACK, software="abc", ome=True, metadata={"axes": "CYX"}))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as t:
        page = t.pages[0]
        struct.pack_into("<HHII", data, page.tags["Software"].offset, 330, 4, 1, page.offset)  # SubIFDs
    (tmp_path / "a.tif").write_bytes(data)
    same(tmp_path / "a.tif", STACK, 4)
