"""Image sets: what a user passes is checked once; ids are those of images that exist."""

import dataclasses
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastai_crl._checks import check_size
from fastai_crl.images import (
    ImageSet,
    OpenMultiChannel,
    TensorMultiChannel,
    check_folder,
    image_ids,
    open_channels,
)
from fastai_crl.images.layout import check_channels


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6), len(name), np.uint8)).save(folder / name)


# ---------------------------------------------------------------- what is passed


@pytest.mark.parametrize(
    ("size", "want"),
    [
        (None, None),
        (16, (16, 16)),
        (np.int64(16), (16, 16)),
        (np.uint8(16), (16, 16)),
        (torch.tensor(16), (16, 16)),
        ((16,), (16, 16)),
        ([16, 12], (16, 12)),
        (np.array([16, 12]), (16, 12)),
        (torch.Size([16, 12]), (16, 12)),
        ((np.int32(16), 12), (16, 12)),
    ],
)
def test_sizes_are_one_or_two_whole_numbers_of_any_type(size, want):
    assert check_size(size) == want == ImageSet(".", size=size).size
    assert want is None or all(type(v) is int for v in want)


@pytest.mark.parametrize(
    "size",
    [
        "16",
        "256",
        b"16",
        16.0,
        np.float32(16),
        0,
        -4,
        (16, 16, 3),
        (),
        True,
        np.True_,
        (16, 0),
        (16, "9"),
        (True, 4),
        {16: 16}.keys,
        float("nan"),
        torch.tensor(True),
        (16, 16.0),
        [[16, 16]],
    ],
)
def test_other_sizes_are_refused(size):
    for make in (lambda: ImageSet(".", size=size), lambda: check_size(size)):
        with pytest.raises(ValueError, match=r"size=.*whole number of pixels above 0.*\(height, width\)"):
            make()


@pytest.mark.parametrize("bits", [9, 12, 16, np.int64(12), np.uint8(16)])
def test_bits_of_any_integer_type(bits):
    assert ImageSet(".", bits=bits).bits == int(bits) and type(ImageSet(".", bits=bits).bits) is int


@pytest.mark.parametrize("bits", [8, 17, 12.0, "12", True, np.float64(12), (12,)])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"bits=.*9 to 16 bits"):
        ImageSet(".", bits=bits)


@pytest.mark.parametrize("stretch", [99, 99.5, np.float32(99.5), (0.5, 99.5), [1, 99], np.array([1, 99])])
def test_stretch_is_a_pair_of_floats(stretch):
    lo, hi = ImageSet(".", stretch=stretch).stretch
    assert type(lo) is type(hi) is float and 0 < lo < hi < 100


@pytest.mark.parametrize("stretch", ["99", True, (1, 2, 3), (1,), float("nan"), (float("nan"), 99), 50, ("a", "b")])
def test_other_stretches_are_refused(stretch):
    with pytest.raises(ValueError, match="stretch="):
        ImageSet(".", stretch=stretch)


def test_ids_of_windows_are_named(tmp_path):
    (tmp_path / "plate1").mkdir()
    (tmp_path / "plate1" / "a_red.png").touch()
    with pytest.raises(FileNotFoundError, match=r"Missing .*They are there: the ids are of Windows, pass id"):
        ImageSet(tmp_path, "red").check(["plate1\\a"])


def test_a_lone_channel_is_one_channel_and_numbers_are_names():
    assert check_channels("red") == ("red",) and check_channels(405) == ("405",)
    assert check_channels((405, np.int64(488))) == ("405", "488") and check_channels(np.array([1, 2])) == ("1", "2")
    assert check_channels(c for c in "ab") == ("a", "b")
    with pytest.raises(ValueError, match="is a set, which has no order: give a list"):
        check_channels({"red", "green"})


@pytest.mark.parametrize(
    "channels", [(), "", ("a", ""), (None,), (True,), (1.5,), None, ("a", "a"), (1, "1"), ("a/b",)]
)
def test_other_channels_are_refused(channels):
    with pytest.raises(ValueError, match="channels"):
        ImageSet(".", channels)


def test_channels_named_by_numbers_work_everywhere(tmp_path):
    touch(tmp_path, "a_405.png", "a_488.png")
    images = ImageSet(tmp_path, (405, 488))
    assert list(images.ids()) == ["a"] and images.check() == {(4, 6): 1}
    x = images.open("a")
    assert x.channels == ("405", "488") and torch.equal(x, open_channels(tmp_path / "a", (405, 488)))
    assert torch.equal(x, OpenMultiChannel(ImageSet(".", (405, 488)))(tmp_path / "a"))
    assert np.array_equal(x.composite([488]), x.composite(["488"])) and np.array_equal(
        x.composite([488]), x.composite([1])
    )
    twisted = TensorMultiChannel(x, channels=("1", "0"))
    with pytest.raises(ValueError, match="both the name of one and the position of another"):
        twisted.composite([0])
    assert np.array_equal(twisted.composite(["0"]), twisted.composite([-1]))


@pytest.mark.parametrize(
    "pattern",
    [
        "{id}_{chan}.png",
        "{id",
        "{}_{channel}.png",
        "{id:>4}.png",
        "{id!r}.png",
        "{channel}.png",
        "a/{id}.png",
        "{0}.png",
        "{id.x}.png",
        None,
        3,
    ],
)
def test_other_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match=r"pattern=.* must be a file name with \{id\} and \{channel\}"):
        ImageSet(".", ("red",), pattern)


def test_the_value_is_frozen_comparable_and_changed_by_making_another():
    images = ImageSet("d", "red", size=8, stretch=99)
    assert images == ImageSet(Path("d"), ["red"], size=(8, 8), stretch=(1, 99)) and hash(images)
    assert images.with_(size=None).size is None and images.size == (8, 8)
    assert pickle.loads(pickle.dumps(images)) == images
    assert OpenMultiChannel(images).images == images.with_(folder=".")
    with pytest.raises(dataclasses.FrozenInstanceError):
        images.size = 3
    with pytest.raises(ValueError, match="size="):
        images.with_(size=0)


# ---------------------------------------------------------------- ids


def test_a_channel_name_that_ends_another_makes_no_image(tmp_path):
    touch(tmp_path, *(f"w{k}_{c}.png" for k in range(6) for c in ("red", "far_red")))
    with pytest.warns(UserWarning, match=r"further channels of other images.*6 in all.*w0_far, .*pass their ids"):
        assert list(image_ids(tmp_path, "red")) == [f"w{k}" for k in range(6)]
    assert list(image_ids(tmp_path, "far_red")) == [f"w{k}" for k in range(6)]
    assert list(image_ids(tmp_path, ("red", "far_red"))) == [f"w{k}" for k in range(6)]


@pytest.mark.parametrize(
    ("pattern", "channel", "other"),
    [
        ("{channel}_{id}.png", "red", "red_far"),
        ("{id}{channel}.png", "red", "farred"),
        ("{id}-{channel}.png", "r", "f-r"),
        ("x{channel}.{id}.tif", "488", "488.max"),
        ("{id}_{channel}.png", "red", "very_far_red"),
    ],
)
def test_whatever_the_pattern(tmp_path, pattern, channel, other):
    touch(tmp_path, *(pattern.format(id=i, channel=c) for i in ("w0", "w1") for c in (channel, other)))
    with pytest.warns(UserWarning, match="further channels"):
        assert list(image_ids(tmp_path, channel, pattern)) == ["w0", "w1"]


def test_two_channels_of_a_longer_name_are_an_image(tmp_path):
    touch(tmp_path, *(f"{i}_{c}.png" for i in ("a", "a_2", "b") for c in ("red", "green")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(image_ids(tmp_path, ("red", "green"))) == ["a", "a_2", "b"]
    touch(tmp_path, "a_far_red.png", "b_far_red.png", "a_2_far_red.png")
    with pytest.warns(UserWarning, match="a_far"):
        assert list(image_ids(tmp_path, ("red", "green"))) == ["a", "a_2", "b"]
    (tmp_path / "a_2_green.png").unlink()
    with pytest.warns(UserWarning), pytest.raises(FileNotFoundError, match=r"a_2_green\.png"):
        image_ids(tmp_path, ("red", "green"))


def test_a_longer_name_that_few_images_have_is_an_image_and_a_warning(tmp_path):
    touch(tmp_path, "a_red.png", "a_1_red.png", "b_red.png")
    with pytest.warns(UserWarning, match=r"Taken for images.*a_1"):
        assert list(image_ids(tmp_path, "red")) == ["a", "a_1", "b"]


def test_side_files_of_macos_are_no_images(tmp_path):
    touch(tmp_path, "a_red.png", "plate/b_red.png")
    for name in ("._a_red.png", "._b_red.png", "plate/._b_red.png"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7" + bytes(4092))
    assert list(image_ids(tmp_path, "red")) == ["a"] and check_folder(tmp_path, None, "red") == {(4, 6): 1}
    assert list(image_ids(tmp_path, "red", subfolders=True)) == ["a", "plate/b"]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "._a_red.png").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="is empty"):
        image_ids(tmp_path / "only", "red")


def test_ids_of_subfolders(tmp_path):
    touch(tmp_path, *(f"plate{p}/w{k}_{c}.png" for p in "12" for k in range(2) for c in ("red", "green")))
    images = ImageSet(tmp_path, ("red", "green"))
    with pytest.raises(FileNotFoundError, match="subfolders=True"):
        images.ids()
    (tmp_path / "plate1" / "again").symlink_to(tmp_path)  # in a circle
    ids = [i for i in images.ids(subfolders=True) if "again" not in i]
    assert ids == ["plate1/w0", "plate1/w1", "plate2/w0", "plate2/w1"] and images.check(ids) == {(4, 6): 4}
    assert images.files("plate1/w0") == [tmp_path / "plate1" / f"w0_{c}.png" for c in ("red", "green")]
    (tmp_path / "plate2" / "w1_green.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 in all.*plate2/w1_green\.png"):
        images.check(ids)


def test_a_field_that_stands_twice_in_the_pattern(tmp_path):
    touch(tmp_path, "a_red_a.png", "b_red_a.png")
    assert ImageSet(tmp_path, "red", "{id}_{channel}_{id}.png").found_ids() == ["a"]


def test_other_fields_and_braces_are_taken_literally(tmp_path):
    touch(tmp_path, "{a}+red.png")
    images = ImageSet(tmp_path, "red", "{{{id}}}+{channel}.png")
    assert list(images.ids()) == ["a"] and images.check() == {(4, 6): 1}


def test_the_path_of_a_file_is_that_of_its_image(hpa):
    "What a file dialogue gives: any of an image's files stands for all."
    images = ImageSet(hpa / "train")
    i = images.ids()[0]
    opened = OpenMultiChannel(images)
    for path in (f"{i}_red.png", f"{i}_yellow.png"):
        assert torch.equal(opened(str(hpa / "train" / path)), images.open(i))
    assert images.id_of(hpa / "train" / "nothing_red.png") == hpa / "train" / "nothing_red.png"  # no such file
    assert images.id_of(hpa / "train" / i) == hpa / "train" / i
