"""Files, reading and display of multi-channel images."""

import pickle
import re
import unicodedata
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.torch_core import TensorImage
from fastcore.foundation import L
from PIL import Image

from fastai_crl.hpa import HPA_CHANNELS
from fastai_crl.images.image_set import ImageSet, check_folder, image_ids
from fastai_crl.images.open import OpenMultiChannel, open_channels
from fastai_crl.images.tensor import TensorMultiChannel


@pytest.fixture(autouse=True)
def _agg():
    plt.switch_backend("Agg")
    yield
    plt.close("all")


def write(folder: Path, id_: str, planes, channels=HPA_CHANNELS) -> Path:
    """Write one grey PNG per channel and return the prefix."""
    folder.mkdir(exist_ok=True, parents=True)
    for c, p in zip(channels, planes, strict=True):
        Image.fromarray(np.asarray(p)).save(folder / f"{id_}_{c}.png")
    return folder / id_


def noise(n=4, h=12, w=10, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, h, w), dtype=np.uint8)


def truncate(file: Path, keep: float = 0.5) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


# ---------------------------------------------------------------- reading


def test_reads_every_channel_exactly_and_in_order(tmp_path):
    planes = noise()
    prefix = write(tmp_path, "a", planes)
    x = open_channels(prefix)
    assert type(x) is TensorMultiChannel and x.dtype == torch.uint8 and x.channels == HPA_CHANNELS
    assert np.array_equal(x.numpy(), planes)
    back = open_channels(str(prefix), channels=("blue", "red"))
    assert np.array_equal(back.numpy(), planes[[2, 0]]) and back.channels == ("blue", "red")


def test_channel_files_follow_the_pattern(tmp_path):
    assert ImageSet("d", ("a", "b"), "{channel}-{id}.tif").files("x") == [Path("d/a-x.tif"), Path("d/b-x.tif")]
    planes = noise(2)
    for c, p in zip(("a", "b"), planes, strict=True):
        Image.fromarray(p).save(tmp_path / f"{c}-x.tif")
    assert np.array_equal(open_channels(tmp_path / "x", ("a", "b"), pattern="{channel}-{id}.tif").numpy(), planes)


def test_an_id_with_dots_keeps_them(tmp_path):
    planes = noise(1)
    assert np.array_equal(open_channels(write(tmp_path, "a.b.1", planes, ("c",)), ("c",)).numpy(), planes)


@pytest.mark.parametrize("bands", [(0,), (1,), (0, 1), (0, 1, 2)])
def test_a_grey_file_saved_as_rgb_keeps_its_intensity(tmp_path, bands):
    grey = noise(1)[0]
    rgb = np.zeros((*grey.shape, 3), dtype=np.uint8)
    rgb[..., bands] = grey[..., None]
    assert np.array_equal(open_channels(write(tmp_path, "a", [rgb], ("c",)), ("c",))[0].numpy(), grey)


def test_resize_treats_each_channel_on_its_own(tmp_path):
    # As RGBA, the empty fourth channel would be alpha 0 and blacken the other three.
    planes = noise(4, 32, 40)
    planes[3] = 0
    prefix = write(tmp_path, "a", planes)
    x = open_channels(prefix, size=(16, 10))
    assert x.shape == (4, 16, 10)
    for got, p in zip(x, planes, strict=True):
        assert np.array_equal(got.numpy(), np.asarray(Image.fromarray(p).resize((10, 16), Image.Resampling.BILINEAR)))
    assert x[:3].float().mean() > 100 and not x[3].any()
    assert open_channels(prefix, size=8).shape == (4, 8, 8)


def test_resize_is_antialiased(tmp_path):
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (32, 16))
    x = open_channels(write(tmp_path, "a", [stripes], ("c",)), ("c",), size=8)
    assert (x.float() - 127.5).abs().max() < 16  # plain bilinear sampling would give stripes of 0 and 255


def test_channels_of_different_size_are_refused(tmp_path):
    planes = list(noise())
    planes[2] = planes[2][:6]
    with pytest.raises(ValueError, match=r"a_blue\.png is 6x10 but a_red\.png is 12x10"):
        open_channels(write(tmp_path, "a", planes))


def test_open_multi_channel_takes_str_and_path(tmp_path):
    planes = noise(2)
    prefix = write(tmp_path, "a", planes, ("x", "y"))
    t = pickle.loads(pickle.dumps(OpenMultiChannel(ImageSet(".", ("x", "y")))))
    for p in (prefix, str(prefix)):
        x = t(p)
        assert type(x) is TensorMultiChannel and np.array_equal(x.numpy(), planes)


@pytest.mark.parametrize("pattern", ["{id}.png", "{channel}.png", "sub/{id}_{channel}.png"])
def test_bad_pattern(pattern):
    with pytest.raises(ValueError, match=re.escape(pattern)):
        ImageSet(".", pattern=pattern)


def test_bad_channels():
    with pytest.raises(ValueError, match="red"):
        ImageSet(".", ("red", "red"))


# ---------------------------------------------------------------- tensor


def test_type_and_channels_survive_indexing_arithmetic_and_pickle():
    x = TensorMultiChannel(torch.rand(2, 3, 4, 4), channels=("a", "b", "c"))
    for y in (x[0], x.float(), x * 2, x.flip(-1), torch.stack([x[0], x[1]]), pickle.loads(pickle.dumps(x))):
        assert type(y) is TensorMultiChannel and y.channels == ("a", "b", "c")
    assert isinstance(x, TensorImage)


# ---------------------------------------------------------------- display


def one_hot_image(n: int, dtype=torch.uint8, high=255) -> TensorMultiChannel:
    """Row c of the image is lit in channel c only."""
    x = torch.zeros(n, n, 3, dtype=dtype)
    x[range(n), range(n)] = high
    return TensorMultiChannel(x)


def test_composite_adds_the_hpa_colours():
    rgb = one_hot_image(4).composite()
    assert rgb.shape == (4, 3, 3) and rgb.dtype == np.float32
    assert rgb[:, 0].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]
    both = torch.zeros(4, 1, 1, dtype=torch.uint8)
    both[0], both[3] = 51, 102
    assert TensorMultiChannel(both).composite()[0, 0] == pytest.approx([0.6, 0.4, 0])
    assert TensorMultiChannel(torch.full((4, 1, 1), 255, dtype=torch.uint8)).composite()[0, 0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 12])
def test_any_number_of_channels_is_shown_and_none_is_invisible(n):
    rgb = one_hot_image(n).composite()
    assert rgb.shape == (n, 3, 3)
    assert (rgb.max(-1) == 1).all()
    if 1 < n < 8:
        assert len({tuple(r) for r in rgb[:, 0].tolist()}) == n
    if n == 1:
        assert rgb[0, 0].tolist() == [1, 1, 1]


def test_named_channels_get_their_colour():
    x = one_hot_image(3)
    x.channels = ("blue", "dapi", "yellow")
    assert x.composite()[:, 0].tolist() == [[0, 0, 1], [0, 1, 1], [1, 1, 0]]
    assert x[:2].composite().shape == (3, 3, 3)  # fewer channels than names: standard colours
    lone = one_hot_image(1)
    lone.channels = ("green",)
    assert lone.composite()[0, 0].tolist() == [0, 1, 0]
    for colors in (
        [(1, 1, 1), (0, 1, 1), (1, 0, 0)],
        np.array([[1, 1, 1], [0, 1, 1], [1, 0, 0]]),
        ["white", "aqua", "r"],
    ):
        assert x.composite(colors=colors)[:, 0].tolist() == [[1, 1, 1], [0, 1, 1], [1, 0, 0]]
    with pytest.raises(ValueError, match="one for each of the 2 channels that are drawn"):
        x.composite(["blue", "dapi"], colors=["red"])
    with pytest.raises(ValueError, match="RGBA"):
        x.composite(colors=["red", "green", "no colour"])


def test_a_lone_name_is_one_channel():
    x = one_hot_image(3)
    x.channels = "red"  # of three letters
    assert np.array_equal(x.composite(), one_hot_image(3).composite())
    assert np.array_equal(x.composite("green"), x.composite(["green"])) and np.array_equal(
        x.composite(1), x.composite([1])
    )
    lone = one_hot_image(1)
    lone.channels = "green"
    assert lone.composite()[0, 0].tolist() == [0, 1, 0]


def test_channels_can_be_picked_by_name_or_position():
    x = one_hot_image(4)
    assert x.composite(channels=["green"])[:, 0].tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert np.array_equal(x.composite(channels=[0, -1]), x.composite(channels=["red", "yellow"]))
    with pytest.raises(ValueError, match=r"'violet'.*red, green, blue, yellow"):
        x.composite(channels=["violet"])


@pytest.mark.parametrize(
    ("dtype", "high"),
    [
        (torch.bool, True),
        (torch.uint8, 255),
        (torch.int64, 255),
        (torch.int32, 65535),
        (torch.float16, 1.0),
        (torch.bfloat16, 1.0),
        (torch.float32, 1.0),
        (torch.float32, 255.0),
    ],
)
def test_every_dtype_and_range_shows_full_intensity(dtype, high):
    assert one_hot_image(4, dtype, high).composite()[3, 0].tolist() == [1, 1, 0]


def test_true_brightness_is_kept_and_stretch_is_per_image_and_channel():
    x = TensorMultiChannel(torch.tensor([[[10, 20, 30]], [[0, 51, 102]], [[7, 7, 7]]], dtype=torch.uint8))
    assert x.composite()[0, 2] == pytest.approx([30 / 255, 102 / 255, 7 / 255])
    s = x.composite(stretch=100)
    assert s[0, :, :2] == pytest.approx(np.array([[0, 0], [0.5, 0.5], [1, 1]]))
    assert s[0, :, 2].tolist() == pytest.approx([7 / 255] * 3)  # a channel of one value has nothing to stretch
    assert np.array_equal(x.composite(stretch=(0, 100)), s)
    for bad in (50, 101):
        with pytest.raises(ValueError, match=f"stretch={bad}"):
            x.composite(stretch=bad)


def test_normalised_and_non_finite_images_are_shown():
    x = TensorMultiChannel(torch.linspace(-2, 3, 4 * 5 * 5).view(4, 5, 5))
    rgb = x.composite()
    assert rgb.min() == 0 and rgb.max() == 1 and np.isfinite(rgb).all()
    x[0, 0, 0] = float("nan")
    assert np.isfinite(x.composite()).all()
    assert np.isfinite(TensorMultiChannel(torch.full((4, 3, 3), -7.0)).composite()).all()


def test_show_draws_the_composite_with_a_title():
    x = TensorMultiChannel(torch.from_numpy(noise()))
    ax = x.show(title="cells", figsize=(2, 2))
    assert np.array_equal(ax.images[0].get_array(), x.composite()) and ax.get_title() == "cells"
    _, ax = plt.subplots()
    assert x.show(ctx=ax, channels=("blue",)) is ax
    assert not ax.images[0].get_array()[..., :2].any()
    TensorMultiChannel(torch.rand(5, 4, 4)).show()
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 4\)"):
        TensorMultiChannel(torch.rand(2, 4, 4, 4)).show()


# ---------------------------------------------------------------- finding


def test_image_ids_are_sorted_strings(tmp_path):
    for i in ("b_1", "a", "10", "9"):
        write(tmp_path, i, noise())
    (tmp_path / "notes.txt").write_text("x")
    ids = image_ids(tmp_path)
    assert isinstance(ids, L) and list(ids) == ["10", "9", "a", "b_1"]
    assert list(image_ids(str(tmp_path), channels=("green",))) == ["10", "9", "a", "b_1"]


def test_image_ids_when_one_channel_name_ends_in_another(tmp_path):
    channels = ("red", "far_red")
    write(tmp_path, "a", noise(2), channels)
    assert list(image_ids(tmp_path, channels)) == ["a"]


def test_image_ids_with_another_pattern(tmp_path):
    for c in "xy":
        Image.fromarray(noise(1)[0]).save(tmp_path / f"{c}.w(1).a+b.png")
    assert list(image_ids(tmp_path, ("x", "y"), "{channel}.w(1).{id}.png")) == ["a+b"]


def test_image_ids_name_the_missing_file(tmp_path):
    for i in "abcdefgh":
        write(tmp_path, i, noise())
    for i in "bcdefg":
        (tmp_path / f"{i}_yellow.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"6 in all.*b_yellow\.png.*f_yellow\.png, …") as e:
        image_ids(tmp_path)
    assert "g_yellow" not in str(e.value)


def test_folder_missing_empty_or_without_images(tmp_path):
    for f in (image_ids, check_folder):
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            f(tmp_path / "nowhere")
        (tmp_path / "void").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match="void is empty"):
            f(tmp_path / "void")
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "cat.jpg").write_text("x")
        with pytest.raises(FileNotFoundError, match=r"cat\.jpg"):
            f(tmp_path / "other")


# ---------------------------------------------------------------- checking


def test_check_folder_counts_the_sizes(tmp_path):
    write(tmp_path, "a", noise())
    write(tmp_path, "b", noise())
    write(tmp_path, "c", noise(4, 5, 6))
    write(tmp_path / "plate", "d", noise(4, 5, 6))
    assert check_folder(tmp_path) == {(12, 10): 2, (5, 6): 1}
    assert check_folder(tmp_path, ["c", "plate/d"]) == {(5, 6): 2}
    with pytest.raises(ValueError, match=r"a 12x10, c 5x6.*size=256"):
        check_folder(tmp_path, same_size=True)


def test_check_folder_names_duplicates_and_missing_files(tmp_path):
    write(tmp_path, "a", noise())
    write(tmp_path, "b", noise())
    with pytest.raises(ValueError, match=r"Duplicate ids.*: b"):
        check_folder(tmp_path, ["a", "b", "b"])
    (tmp_path / "b_red.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 in all.*b_red\.png"):
        check_folder(tmp_path, ["a", "b"])
    with pytest.raises(FileNotFoundError, match=r"4 in all.*ghost_red\.png"):
        check_folder(tmp_path, ["a", "ghost"])
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        write(tmp_path, unicodedata.normalize(form, f"é{form}"), noise())
        with pytest.raises(FileNotFoundError, match=rf"another Unicode form: unicodedata.normalize\('{form}', id\)"):
            check_folder(tmp_path, [unicodedata.normalize(other, f"é{form}")])


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9])
def test_check_folder_names_a_truncated_file(tmp_path, keep):
    write(tmp_path, "a", noise(4, 64, 64))
    truncate(tmp_path / "a_blue.png", keep)
    with pytest.raises(ValueError, match=r"1 in all.*a_blue\.png \("):
        check_folder(tmp_path)


def test_check_folder_accepts_an_intact_png_with_bytes_after_its_end(tmp_path):
    write(tmp_path, "a", noise())
    with open(tmp_path / "a_blue.png", "ab") as f:
        f.write(b"trailer")
    assert check_folder(tmp_path) == {(12, 10): 1}


def test_check_folder_names_channels_of_different_size(tmp_path):
    planes = list(noise())
    planes[1] = planes[1][:6]
    write(tmp_path, "a", planes)
    with pytest.raises(ValueError, match=r"a \(red 12x10, green 6x10"):
        check_folder(tmp_path)
