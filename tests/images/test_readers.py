"""Decoding of image files: every format, depth and layout to the same pixels; damaged files to an error."""

import gzip
import io
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import skimage.io
import tifffile
from PIL import Image

from fastai_crl.images.image_set import ImageSet, check_folder, image_ids
from fastai_crl.images.layout import check_pattern
from fastai_crl.images.open import open_channels
from fastai_crl.images.readers import check_intensity, header, read_planes
from tests.images.test_formats import png, tiff, with_tag

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (20, 30), dtype=np.uint16)
CHANNELS = tuple("abcde")


def save(file: Path, a: np.ndarray, **kwargs) -> Path:
    """Write with Pillow, or TIFF with tifffile."""
    if ".tif" in file.name:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, a, **kwargs)
        data = buffer.getvalue()
        file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    else:
        Image.fromarray(a).save(file, **kwargs)
    return file


def to_bytes(a: np.ndarray, white: int = 65535) -> np.ndarray:
    return np.round(a.astype(np.float64) * 255 / white).astype(np.uint8)


# ---------------------------------------------------------------- the same pixels


@pytest.mark.parametrize("folder", ["hpa_fields", "hpa_cells"])
def test_real_png_pixels_are_those_of_pillow_and_scikit_image(shared, folder):
    files = sorted((shared / folder / "train").glob("*.png"))
    for file in files[:: max(1, len(files) // 40)]:
        got = read_planes(file)[0]
        with Image.open(file) as im:
            assert np.array_equal(got, np.asarray(im))
        assert np.array_equal(got, skimage.io.imread(file))
        assert header(file) == got.shape


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.tif.gz"])
def test_sixteen_bits_are_scaled_by_their_depth(tmp_path, name):
    file = save(tmp_path / name, GREY16)
    assert np.array_equal(read_planes(file)[0], to_bytes(GREY16))
    low = save(tmp_path / f"low_{name}", GREY16 // 16)
    assert np.array_equal(read_planes(low, full=4095)[0], to_bytes(GREY16 // 16, 4095))
    assert read_planes(low).max() <= 16  # what forgetting bits=12 looks like
    with pytest.raises(ValueError, match=rf"{name} cannot be read \(values .* are not from 0 to 4095, see bits="):
        read_planes(file, full=4095)


def test_bits_leave_files_of_eight_bits_alone(tmp_path):
    assert np.array_equal(read_planes(save(tmp_path / "a.png", GREY), full=4095)[0], GREY)


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "packbits", "zstd"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_compressions(tmp_path, compression, dtype):
    a = GREY if dtype == np.uint8 else GREY16
    got = read_planes(save(tmp_path / "a.tif", a, compression=compression))[0]
    assert np.array_equal(got, a if dtype == np.uint8 else to_bytes(a))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("layout", ["pages", "last", "planar", "tiles", "gzip"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_one_tiff_per_sample(tmp_path, n, layout, dtype):
    top = np.iinfo(dtype).max
    a = np.random.default_rng(n).integers(0, top + 1, (n, 20, 34), dtype=dtype)
    file = tmp_path / ("x.tif.gz" if layout == "gzip" else "x.tif")
    if layout == "last":
        save(file, np.moveaxis(a, 0, -1))
    else:
        more = {
            "pages": {"photometric": "minisblack"},
            "planar": {"photometric": "rgb", "planarconfig": "separate"} if n > 2 else {},
            "tiles": {"photometric": "minisblack", "tile": (16, 16), "compression": "zlib"},
            "gzip": {"photometric": "minisblack"},
        }
        save(file, a, **more[layout])
    want = a if dtype == np.uint8 else to_bytes(a)
    assert np.array_equal(read_planes(file, n), want) and header(file, n) == (20, 34)
    channels = tuple(f"c{i}" for i in range(n))
    pattern = file.name.replace("x", "{id}")
    assert np.array_equal(open_channels(tmp_path / "x", channels, pattern=pattern).numpy(), want)
    assert list(image_ids(tmp_path, channels, pattern)) == ["x"]
    assert check_folder(tmp_path, None, channels, pattern) == {(20, 34): 1}


def test_jpeg_is_decoded_as_pillow_decodes_it(tmp_path):
    save(tmp_path / "a.jpg", GREY, quality=90)
    rgb = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    save(tmp_path / "rgb.jpg", rgb)
    with Image.open(tmp_path / "a.jpg") as im, Image.open(tmp_path / "rgb.jpg") as im3:
        assert np.array_equal(read_planes(tmp_path / "a.jpg")[0], np.asarray(im))
        assert np.array_equal(read_planes(tmp_path / "rgb.jpg", 3), np.moveaxis(np.asarray(im3), -1, 0))
    x = open_channels(tmp_path / "rgb", ("red", "green", "blue"), pattern="{id}.jpg")
    assert x.shape == (3, 16, 16) and x.channels == ("red", "green", "blue")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_rgb_and_opaque_alpha_are_three_channels(tmp_path, suffix):
    rgba = RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8)
    file = tmp_path / f"a.{suffix}"
    save(file, rgba)
    with pytest.raises(ValueError, match="not opaque"):
        read_planes(file, 3)
    rgba[..., 3] = 255
    save(file, rgba)
    assert np.array_equal(read_planes(file, 3), np.moveaxis(rgba[..., :3], -1, 0))
    assert np.array_equal(read_planes(file, 1)[0], rgba[..., :3].max(-1))


def test_sixteen_bit_rgb_png(tmp_path):
    # Pillow would cut these to 8 bits.
    import imagecodecs

    a = RNG.integers(0, 65536, (6, 5, 3), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(a))
    assert np.array_equal(read_planes(tmp_path / "a.png", 3), to_bytes(np.moveaxis(a, -1, 0)))


@pytest.mark.parametrize("mode", ["1", "P", "LA", "L"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_modes_of_one_channel(tmp_path, mode, suffix):
    if (mode, suffix) == ("LA", "tif"):
        pytest.skip("two samples of a TIFF are two channels")
    two = np.kron([[0, 255], [255, 0]], np.ones((4, 4))).astype(np.uint8)
    Image.fromarray(two).convert(mode).save(tmp_path / f"a.{suffix}")
    assert np.array_equal(read_planes(tmp_path / f"a.{suffix}")[0], two)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_cmyk_is_not_converted_without_a_word(tmp_path, suffix, n):
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(np.dstack([GREY] * 3)).convert("CMYK").save(file)
    for call in (header, read_planes):
        with pytest.raises(ValueError, match=r"its colours are CMYK, .*: save it as RGB"):
            call(file, n)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.png.gz"])
@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_a_grey_picture_is_red_green_and_blue_alike(tmp_path, name, mode):
    plain = tmp_path / name.removesuffix(".gz")
    Image.fromarray(GREY).convert(mode).save(plain) if (name, mode) != ("a.jpg", "P") else save(plain, GREY)
    with Image.open(plain) as im:
        want = np.moveaxis(np.asarray(im.convert("RGB")), -1, 0)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    assert np.array_equal(read_planes(tmp_path / name, 3), want) and header(tmp_path / name, 3) == (20, 30)
    with pytest.raises(ValueError, match=r"holds . channels where 4"):
        read_planes(tmp_path / name, 4)


def test_the_page_of_a_tiff_is_one_channel_of_three(tmp_path):
    with pytest.raises(ValueError, match="is grey where 3 channels are expected: save it in colour"):
        read_planes(save(tmp_path / "a.tif", GREY), 3)


def test_the_content_decides_not_the_name(tmp_path):
    file = tmp_path / "a.png"
    save(tmp_path / "a.tif", GREY).rename(file)
    assert np.array_equal(read_planes(file)[0], GREY)
    file.write_bytes(gzip.compress(file.read_bytes()))
    assert np.array_equal(read_planes(file)[0], GREY)


# ---------------------------------------------------------------- intensity


@pytest.mark.parametrize(("a", "white"), [(GREY, 255), (GREY16, 65535)])
def test_stretch_maps_percentiles_of_each_channel(tmp_path, a, white):
    for c, k in (("a", 1), ("b", 3)):
        save(tmp_path / f"x_{c}.tif", a // k)
    got = open_channels(tmp_path / "x", ("a", "b"), pattern="{id}_{channel}.tif", stretch=(2, 98)).numpy()
    for g, k in zip(got, (1, 3), strict=True):
        flat = sorted((a // k).ravel().tolist())

        def at(q, flat=flat):  # linear between order statistics
            i, f = divmod(q / 100 * (len(flat) - 1), 1)
            return flat[int(i)] * (1 - f) + flat[min(int(i) + 1, len(flat) - 1)] * f

        lo, hi = at(2), at(98)
        want = [[min(max((float(v) - lo) / (hi - lo), 0), 1) * 255 for v in row] for row in a // k]
        assert np.abs(g - np.array(want)).max() <= 0.5 + 1e-3
        assert g.min() == 0 and g.max() == 255
    one = open_channels(tmp_path / "x", ("a", "b"), pattern="{id}_{channel}.tif", stretch=98).numpy()
    assert np.array_equal(one, got)


def test_stretch_comes_before_resizing_and_leaves_flat_channels(tmp_path):
    a = np.zeros((8, 8), np.uint16)
    a[1::2], a[0, 0] = 100, 60000  # the outlier is clipped to full intensity before it is averaged
    clipped = Image.fromarray(np.where(a > 0, 255, 0).astype(np.float32))
    want = np.asarray(clipped.resize((4, 4), Image.Resampling.BILINEAR)).round()
    got = read_planes(save(tmp_path / "a.tif", a), size=(4, 4), stretch=(0, 95))[0]
    assert np.array_equal(got, want) and got[0, 0] < 200
    flat = save(tmp_path / "flat.png", np.full((4, 4), 7, np.uint8))
    assert (read_planes(flat, stretch=(1, 99)) == 7).all()


@pytest.mark.parametrize("stretch", [50, 101, (2,), (98, 2), (-1, 99), (5, 5)])
def test_bad_stretch(stretch):
    with pytest.raises(ValueError, match="stretch="):
        ImageSet(".", stretch=stretch)


@pytest.mark.parametrize("bits", [0, 8, 17, 12.5, True, "12"])
def test_bad_bits(bits):
    with pytest.raises(ValueError, match="bits="):
        ImageSet(".", bits=bits)
    assert check_intensity(12, 99) == (12, (1.0, 99.0))


# ---------------------------------------------------------------- names


def test_a_pattern_without_channel_is_one_file(tmp_path):
    assert ImageSet("d", CHANNELS, "{id}.tif.gz").files("x") == [Path("d/x.tif.gz")]
    check_pattern(CHANNELS, "{id}.TIFF")
    check_pattern(("r", "g", "b"), "{id}.png")
    for pattern in ("{id}.png", "{id}.jpg"):
        with pytest.raises(ValueError, match="one file for 5 channels: only a TIFF"):
            check_pattern(CHANNELS, pattern)


@pytest.mark.parametrize("suffix", ["tif", "tif.gz"])
def test_wrong_number_of_channels_is_found_before_training(tmp_path, suffix):
    save(tmp_path / f"a.{suffix}", np.zeros((4, 8, 8), np.uint8), photometric="minisblack")
    with pytest.raises(ValueError, match=r"a\.tif.*\(it holds 4 channels where 5 are expected"):
        check_folder(tmp_path, None, CHANNELS, f"{{id}}.{suffix}")
    with pytest.raises(ValueError, match=r"a\.tif.*cannot be read \(it holds 4 channels where 5 are expected"):
        open_channels(tmp_path / "a", CHANNELS, pattern=f"{{id}}.{suffix}")
    with pytest.raises(ValueError, match="holds 4 channels where 1"):
        read_planes(tmp_path / f"a.{suffix}")


def test_pages_of_different_size_and_further_axes_are_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as w:
        w.write(GREY)
        w.write(GREY[:9])
    with pytest.raises(ValueError, match="different size or kind"):
        read_planes(tmp_path / "a.tif", 2)
    save(tmp_path / "b.tif", np.zeros((2, 3, 8, 9), np.uint8), photometric="minisblack")
    with pytest.raises(ValueError, match=r"axes .*\(2, 3, 8, 9\)"):
        read_planes(tmp_path / "b.tif", 2)


# ---------------------------------------------------------------- damage


def huge_tiff(side: int) -> bytes:
    """A tiny TIFF whose header claims side x side pixels, in segments of zero bytes."""
    data = tiff(np.zeros((8, 8), np.uint8))
    for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
        data = with_tag(data, name, min(side, 65535))
    return data


@pytest.mark.parametrize("name", ["png", "palette.png", "tif", "jpg", "bmp"])
def test_a_header_that_claims_too_much_is_refused_before_decoding(tmp_path, name):
    jpeg = io.BytesIO()
    Image.fromarray(GREY).save(jpeg, "JPEG")
    at = jpeg.getvalue().index(b"\xff\xc0") + 5
    bmp = io.BytesIO()
    Image.fromarray(GREY).save(bmp, "BMP")
    data = {
        "png": png(100_000, 100_000),
        "palette.png": png(100_000, 100_000, colour=3),
        "tif": huge_tiff(65535),
        "jpg": jpeg.getvalue()[:at] + struct.pack(">HH", 65535, 65535) + jpeg.getvalue()[at + 4 :],
        "bmp": bmp.getvalue()[:18] + struct.pack("<ii", 100_000, 100_000) + bmp.getvalue()[26:],
    }[name]
    (tmp_path / f"x.{name}").write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"x\.{name} cannot be read .*(MAX_IMAGE_PIXELS|exceeds limit)"):
        read_planes(tmp_path / f"x.{name}")
    with pytest.raises(ValueError, match=rf"x\.{name} \("):
        check_folder(tmp_path, None, ("c",), f"{{id}}.{name}")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 100  # MiB; 65535² bytes are 4096


def test_the_limit_is_that_of_pillow(tmp_path, monkeypatch):
    file = save(tmp_path / "a.png", GREY)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", GREY.size - 1)
    with pytest.raises(ValueError, match=r"claims 20x30 pixels, more than 599; .*MAX_IMAGE_PIXELS"):
        read_planes(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert np.array_equal(read_planes(file)[0], GREY)


def test_a_gzip_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    (tmp_path / "a.tif.gz").write_bytes(gzip.compress(bytes(2**24)))
    with pytest.raises(ValueError, match=r"a\.tif\.gz .*unzips to more than 1,050,576 bytes"):
        read_planes(tmp_path / "a.tif.gz")


def check_refused(file, tag, value, **kwargs):
    """A grey TIFF with one of its tags overwritten lacks pixels, and both functions say so."""
    file.write_bytes(with_tag(tiff(GREY + 1, **kwargs), tag, value))
    for call in (header, read_planes):
        with pytest.raises(ValueError, match="some are missing"):
            call(file)


def test_a_tiff_without_some_of_its_pixels_is_not_black(tmp_path):
    # tifffile reads a segment of no bytes as zeros.
    check_refused(tmp_path / "a.tif", "StripByteCounts", 0, rowsperstrip=4, compression="zlib")


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_tiff_with_fewer_segments_than_rows_is_neither_black_nor_slow(tmp_path, compression):
    check_refused(tmp_path / "a.tif", "ImageLength", 60_000, compression=compression)


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> dict[str, tuple[Path, int]]:
    """One intact file of each kind, and its number of channels."""
    d = tmp_path_factory.mktemp("samples")
    stack = RNG.integers(0, 256, (4, 12, 14), dtype=np.uint8)
    rgb = RNG.integers(0, 256, (12, 14, 3), dtype=np.uint8)
    Image.fromarray(rgb).convert("P").save(d / "palette.png")
    return {
        "png": (save(d / "a.png", GREY), 1),
        "png16": (save(d / "b.png", GREY16), 1),
        "palette": (d / "palette.png", 3),
        "jpeg": (save(d / "a.jpg", rgb), 3),
        "tiff": (save(d / "a.tif", stack, photometric="minisblack"), 4),
        "lzw": (save(d / "l.tif", GREY16, compression="lzw"), 1),
        "rgb tiff": (save(d / "r.tif", rgb, compression="zlib"), 3),
        "gzip": (save(d / "g.tif.gz", stack, photometric="minisblack"), 4),
    }


@pytest.mark.parametrize("kind", ["png", "png16", "palette", "jpeg", "tiff", "lzw", "rgb tiff", "gzip"])
def test_truncated_and_empty_files_never_give_other_pixels(samples, tmp_path, kind):
    file, n = samples[kind]
    data, want = file.read_bytes(), read_planes(file, n)
    cut = tmp_path / file.name
    refused = 0
    for end in np.unique(np.linspace(0, len(data) - 1, 25).astype(int)):
        cut.write_bytes(data[:end])
        try:
            got = read_planes(cut, n)
        except ValueError as e:
            assert cut.name in str(e) and "replace the file" in str(e)
            refused += 1
        else:
            assert np.array_equal(got, want), end  # only what follows the pixels is missing
    assert refused >= 20


@pytest.mark.parametrize(
    "content", [b"\0" * 500, b"<html>404</html>", b"", b"\x89PNG\r\n\x1a\n", b"II*\0", b"\x1f\x8b"]
)
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.tif.gz"])
def test_files_that_are_no_image(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        read_planes(tmp_path / name)
    with pytest.raises(ValueError, match=rf"1 in all\): {name} \("):
        check_folder(tmp_path, None, ("c",), "{id}" + name[1:])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.tif does not exist"):
        open_channels(tmp_path / "x", CHANNELS, pattern="{id}.tif")
