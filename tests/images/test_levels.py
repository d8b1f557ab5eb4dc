"""Grey levels that 16-bit files lose: found, and not where nothing is lost."""

import numpy as np
import pandas as pd
import pytest
import tifffile

from fastai_crl.data import MultiChannelDataLoaders, check
from fastai_crl.images import ImageSet
from fastai_crl.images.levels import lost_levels


def write(folder, low, high, dtype=np.uint16, n=6):
    rng = np.random.default_rng(0)
    for k in range(n):
        a = rng.integers(low, high + 1, (2, 32, 32)).astype(dtype)
        tifffile.imwrite(folder / f"i{k}.tif", a, photometric="minisblack")
    return ImageSet(folder, ("r", "g"), "{id}.tif"), [f"i{k}" for k in range(n)]


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (
            776,
            1009,
            "values from 776 to 1009 of 65535 become 2 grey levels: pass bits=10, white=1009",
        ),
        (0, 4095, "become 17 grey levels: pass bits=12, white="),
        (0, 10000, "become 40 grey levels: pass bits=14, white="),
        (0, 1, "values from 0 to 1 of 65535 become 1 grey levels: pass bits=9, white="),
        (60000, 61000, "become 5 grey levels: pass stretch=99.5"),
        (0, 65535, None),
        (0, 20000, None),
        (500, 500, None),
    ],
)
def test_a_small_part_of_the_range(tmp_path, low, high, says):
    images, ids = write(tmp_path, low, high)
    lost = lost_levels(images, ids)
    assert list(lost) == (["r", "g"] if says else []) and all(says in text for text in lost.values())
    if says:  # what it says is what becomes of the pixels
        shown = len(np.unique(np.stack([images.open(i).numpy() for i in ids])))
        assert abs(int(lost["r"].split(" become ")[1].split()[0]) - shown) <= 1
        assert not lost_levels(images.with_(stretch=99.5), ids)


def test_a_white_level_of_any_number(tmp_path):
    images, ids = write(tmp_path, 0, 10000)
    whites = images.with_(white=10000)
    assert not lost_levels(whites, ids) and whites.check(ids) == {(32, 32): 6}
    for i in ids:  # by hand
        want = np.round(tifffile.imread(tmp_path / f"{i}.tif") / 10000 * 255)
        assert np.array_equal(whites.open(i).numpy(), want)
    with pytest.raises(ValueError, match=r"i0\.tif cannot be read \(values .* are not from 0 to 5000, see .*white="):
        images.with_(white=5000).open("i0")
    for white in (0, -1, 1.5, True, "10000"):
        with pytest.raises(ValueError, match=f"white={white!r}: the value of full intensity"):
            ImageSet(".", white=white)
    with pytest.raises(ValueError, match="white=10000 and bits=14 both say"):
        ImageSet(".", bits=14, white=10000)


def test_files_of_8_bits_a_hot_pixel_and_no_image(tmp_path):
    (tmp_path / "b").mkdir()
    assert not lost_levels(*write(tmp_path / "b", 0, 9, np.uint8)) and not lost_levels(ImageSet(tmp_path), [])
    images, ids = write(tmp_path, 0, 4095)
    a = tifffile.imread(tmp_path / "i0.tif")
    a[:, 0, 0] = 65535
    tifffile.imwrite(tmp_path / "i0.tif", a, photometric="minisblack")
    assert all("become 17 grey levels: pass stretch=99.5" in text for text in lost_levels(images, ids).values())


def test_from_csv_and_check_say_so(tmp_path):
    (tmp_path / "train").mkdir()
    images, ids = write(tmp_path / "train", 0, 4095)
    pd.DataFrame({"Id": ids, "Target": ["a", "b"] * 3}).to_csv(tmp_path / "train.csv", index=False)
    options = {"channels": ("r", "g"), "pattern": "{id}.tif", "bs": 2, "num_workers": 0, "size": None}
    with pytest.warns(UserWarning, match=r"Channel g in .*train: values from .* become 17 grey levels: pass bits=12"):
        MultiChannelDataLoaders.from_csv(tmp_path, **options)
    report = check(images, tmp_path / "train.csv", progress=False)
    assert report.ok and report.summary().set_index("problem")["n"]["grey levels lost"] == 2
    assert not lost_levels(images.with_(bits=12), ids)
    assert len(check(images.with_(bits=12), tmp_path / "train.csv", progress=False).problems) == 0
