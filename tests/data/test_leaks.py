"""Leaks between training and validation are found and named; folds have none."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fastai_crl.data.annotations import Annotations
from fastai_crl.data.leaks import find_leaks
from fastai_crl.data.loaders import HPADataLoaders
from fastai_crl.data.stratify import make_folds
from fastai_crl.images.image_set import ImageSet


def copy_image(folder: Path, old: str, new: str, change=lambda a: a) -> None:
    for file in sorted(folder.glob(f"{old}_*.png")):
        with Image.open(file) as im:
            Image.fromarray(change(np.asarray(im))).save(folder / file.name.replace(old, new), compress_level=1)


@pytest.fixture
def twins(hpa, tmp_path) -> Path:
    """The synthetic set with a copy of its image 0 (other files, equal pixels) and a noisy copy of its image 1."""
    path = tmp_path / "twins"
    shutil.copytree(hpa, path)
    rng = np.random.default_rng(0)
    copy_image(path / "train", "synthetic-000000", "copy")
    copy_image(
        path / "train",
        "synthetic-000001",
        "noisy",
        lambda a: np.where(a < 250, a + rng.integers(0, 2, a.shape), a).astype("uint8"),
    )
    df = pd.read_csv(path / "train.csv", dtype=str, keep_default_na=False)
    extra = pd.DataFrame({"Id": ["copy", "noisy"], "Target": df["Target"][:2].tolist()})
    pd.concat([df, extra]).to_csv(path / "train.csv", index=False)
    return path


def test_leaks(twins):
    images = ImageSet(twins / "train")
    df = Annotations.from_csv(twins / "train.csv").frame
    df["Group"] = [f"g{i // 10}" for i in range(len(df))]
    last = df["Id"].isin(["copy", "noisy"])
    leaks = find_leaks(df[~last], df[last], images, progress=False)
    assert leaks[["leak", "valid", "train"]].to_numpy().tolist() == [
        ["exact", "copy", "synthetic-000000"],
        ["near", "noisy", "synthetic-000001"],
    ]
    assert leaks["detail"][0] == "equal pixels" and leaks["detail"][1].endswith("% of the hash differs")
    assert find_leaks(df[~last], df[last], images, max_distance=0, progress=False)["leak"][0] == "exact"
    assert find_leaks(df[:20], df[20:60], images, "Group", progress=False).empty
    groups = find_leaks(df[:25], df[25:], group_col="Group")
    assert groups.to_numpy().tolist() == [["group", "synthetic-000025", "synthetic-000020", "g2"]]
    assert find_leaks(df, df[:0], images, "Group").empty
    with pytest.raises(ValueError, match=r"images=.*group_col="):
        find_leaks(df[:20], df[20:])
    with pytest.raises(ValueError, match=r"no column 'Plate', only .*group_col="):
        find_leaks(df[:20], df[20:], group_col="Plate")
    with pytest.raises(ValueError, match=r"max_distance=0\.6"):
        find_leaks(df[:20], df[20:], images, max_distance=0.6)


def test_leaks_of_loaders(twins):
    dls = HPADataLoaders.from_csv(twins, size=32, num_workers=0, seed=3)
    images = ImageSet(twins / "train")
    sides = [dls.train_ds.items, dls.valid_ds.items]
    assert find_leaks(*sides, images, progress=False).empty == all(
        ({a, b} <= set(sides[0]["Id"])) or ({a, b} <= set(sides[1]["Id"]))
        for a, b in (("copy", "synthetic-000000"), ("noisy", "synthetic-000001"))
    )


def test_folds_keep_duplicates_together(twins):
    df = Annotations.from_csv(twins / "train.csv").frame
    df["Group"] = [f"g{i}" for i in range(len(df))]
    df.loc[df["Id"] == "copy", "Group"] = "g5"  # so that image 5, image 0 and its copy belong together
    annotations, images = Annotations.from_frame(df), ImageSet(twins / "train")
    for seed in range(4):
        fold = make_folds(annotations, group_col="Group", images=images, seed=seed).set_index("Id")["fold"]
        assert fold["copy"] == fold["synthetic-000000"] == fold["synthetic-000005"]
        assert fold["noisy"] == fold["synthetic-000001"]
        assert fold.value_counts().between(7, 18).all()
    folds = [make_folds(annotations, seed=s).set_index("Id")["fold"] for s in range(4)]
    assert any(f["copy"] != f["synthetic-000000"] for f in folds)
