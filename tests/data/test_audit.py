"""The audit of a data set: each kind of damage is found, the rest is clean, the numbers are those of the pixels."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fastai_crl.data.audit import check
from fastai_crl.data.leaks import find_leaks
from fastai_crl.data.loaders import HPADataLoaders
from fastai_crl.hpa import HPA_CHANNELS
from fastai_crl.images.image_set import ImageSet, image_ids
from fastai_crl.images.open import open_channels


def listed(report) -> set[tuple[str, str, str, str]]:
    """Level, problem, id and channel of every problem."""
    return set(report.problems[["level", "problem", "id", "channel"]].itertuples(index=False, name=None))


def audited(root: Path, csv="train.csv", folder="train", layout=None, **kwargs):
    return check(ImageSet(root / folder, **(layout or {})), csv and root / csv, progress=False, **kwargs)


def plane(folder: Path, i: str, channel: str, change=lambda a: a) -> None:
    file = folder / f"{i}_{channel}.png"
    with Image.open(file) as im:
        a = change(np.array(im))
    Image.fromarray(a).save(file)


def black_out(a: np.ndarray) -> np.ndarray:
    return np.zeros_like(a)


def over_expose(a: np.ndarray) -> np.ndarray:
    a[:, : a.shape[1] // 2] = 255
    return a


@pytest.fixture
def root(hpa, tmp_path) -> Path:
    """The synthetic set at half its brightness, so that no channel is saturated."""
    path = tmp_path / "set"
    shutil.copytree(hpa, path)
    for file in path.glob("*/*.png"):
        with Image.open(file) as im:
            a = np.asarray(im) // 2
        Image.fromarray(a).save(file)
    return path


def test_files_that_no_row_names_are_warned_of(root):
    rows = pd.read_csv(root / "train.csv", dtype=str)
    rows[2:].to_csv(root / "train.csv", index=False)
    first, second = rows["Id"][:2]
    (root / "train" / f"{first}_red.png").write_bytes(b"not an image")
    (root / "train" / f"{second}_blue.png").unlink()
    report = audited(root)
    assert report.ok and {
        ("warning", "image without row", first, ""),
        ("warning", "unreadable file", first, "red"),
        ("warning", "missing file", second, "blue"),
    } <= listed(report)
    HPADataLoaders.from_csv(root, bs=4)  # it is not stopped by them


def test_a_sound_set_has_no_errors_and_the_statistics_of_its_pixels(root):
    report = audited(root)
    assert report.ok and report.n_rows == report.n_images == 60 and dict(report.sizes) == {(32, 32): 60}
    assert not {"duplicate", "near-duplicate", "low contrast", "saturated"} & set(report.problems["problem"])
    x = np.stack([open_channels(root / "train" / i) for i in image_ids(root / "train")]) / 255
    for c, channel in enumerate(HPA_CHANNELS):
        row = report.channels.loc[channel]
        assert row["mean"] == pytest.approx(x[:, c].mean()) and row["std"] == pytest.approx(x[:, c].std())
        assert row["min"] == x[:, c].min() and row["max"] == pytest.approx(x[:, c].max())
        assert row["black"] == (x[:, c] == 0).mean() and row["saturated"] == (x[:, c] == 1).mean()
    df = pd.read_csv(root / "train.csv", dtype=str, keep_default_na=False)
    for label, row in report.labels.iterrows():
        n = sum(label in text.split() for text in df["Target"])
        assert row["images"] == n and row["share"] == n / 60
    # The statistics are those that from_csv measures.
    dls = HPADataLoaders.from_csv(root, size=None, stats="data", valid_pct=0, num_workers=0)
    assert dls.after_batch.fs[-1].mean.flatten().tolist() == pytest.approx(report.channels["mean"].tolist(), abs=1e-6)


def test_every_problem_is_collected(root):
    folder, name = root / "train", "synthetic-{:06}".format
    ids = [name(i) for i in range(20)]
    (folder / f"{ids[0]}_blue.png").unlink()
    file = folder / f"{ids[1]}_red.png"
    file.write_bytes(file.read_bytes()[:100])
    (folder / f"{ids[1]}_green.png").write_bytes(b"no image")
    plane(folder, ids[2], "yellow", lambda a: a[:16])
    for c in HPA_CHANNELS:
        plane(folder, ids[3], c, lambda a: a[:16, :16])
        shutil.copy(folder / f"{ids[4]}_{c}.png", folder / f"extra_{c}.png")
        shutil.copy(folder / f"{ids[4]}_{c}.png", folder / f"more_{c}.png")
        (folder / f"{ids[5]}_{c}.png").unlink()
    plane(folder, ids[6], "red", black_out)
    plane(folder, ids[7], "green", over_expose)
    for c in HPA_CHANNELS:
        shutil.copy(folder / f"{ids[8]}_{c}.png", folder / f"{ids[9]}_{c}.png")
        shutil.copy(folder / f"{ids[10]}_{c}.png", folder / f"{ids[11]}_{c}.png")
    plane(folder, ids[11], "green", lambda a: np.where((a > 0) & (a < 255), a + np.eye(32, dtype=np.uint8), a))
    df = pd.read_csv(root / "train.csv", dtype=str, keep_default_na=False)
    df.loc[12, "Target"], df.loc[13, "Target"] = "", "3 99"
    extra = pd.DataFrame({"Id": [ids[14], " "], "Target": ["1", "1"]})
    pd.concat([df, extra]).to_csv(root / "train.csv", index=False)

    report = audited(root)
    unlabelled = {("warning", "no label", i, "") for i in df["Id"][df["Target"] == ""]}
    expected = {
        ("error", "missing file", ids[0], "blue"),
        ("error", "unreadable file", ids[1], "red"),
        ("error", "unreadable file", ids[1], "green"),
        ("error", "channels of different size", ids[2], ""),
        ("warning", "other size", ids[3], ""),
        ("warning", "image without row", "extra", ""),
        ("warning", "duplicate", "extra", ""),
        ("warning", "image without row", "more", ""),
        ("warning", "duplicate", "more", ""),
        ("error", "row without image", ids[5], ""),
        ("warning", "low contrast", ids[6], "red"),
        ("warning", "saturated", ids[7], "green"),
        ("warning", "duplicate", ids[9], ""),
        ("warning", "near-duplicate", ids[11], ""),
        ("error", "id in several rows", ids[14], ""),
        ("error", "row without id", "", ""),
    }
    assert listed(report) == expected | unlabelled and ("warning", "no label", ids[12], "") in unlabelled
    detail = report.problems.set_index(["problem", "id"])["detail"].to_dict()
    assert (
        detail["duplicate", "extra"] == detail["duplicate", "more"] == f"of {ids[4]}"
        and detail["duplicate", ids[9]] == f"of {ids[8]}"
    )
    assert detail["near-duplicate", ids[11]] == f"of {ids[10]}"
    assert detail["other size", ids[3]] == "16x16, most are 32x32"
    assert detail["id in several rows", ids[14]] == "rows 16, 62" and detail["row without id", ""] == "row 63"
    assert report.labels.loc["99", "images"] == 1
    assert detail["channels of different size", ids[2]] == "32x32, 32x32, 32x32, 16x32"
    assert not report.ok and report.n_rows == 62 and report.n_images == 61
    summary = report.summary().set_index("problem")
    assert summary.loc["unreadable file", "n"] == 2 and summary.loc["unreadable file", "ids"] == ids[1]
    assert list(report.summary()["level"]) == sorted(report.summary()["level"])
    text, html = str(report), report._repr_html_()
    for what in ("61 images, 62 rows", "row without image", "saturated", "yellow"):
        assert what in text and what in html
    # The csv that from_csv would stop at is the one with errors.
    with pytest.raises((ValueError, FileNotFoundError)):
        HPADataLoaders.from_csv(root, size=32)


def test_what_is_no_image_set(root):
    with pytest.raises(ValueError, match=r"images= takes an ImageSet, not a PosixPath: pass ImageSet\(folder\)"):
        check(root)


def test_without_a_csv(root):
    report = audited(root, None, "test")
    assert report.ok and report.n_rows is None and report.labels is None and report.n_images == 6
    assert "rows in the csv" not in str(report)


def test_one_label_per_row(root):
    df = pd.read_csv(root / "train.csv", dtype=str, keep_default_na=False)
    df["Target"] = ["", *["a b"] * 59]
    df.to_csv(root / "train.csv", index=False)
    report = audited(root, label_delim=None)
    assert ("error", "row without label", df["Id"][0], "") in listed(report)
    assert report.labels["images"].to_dict() == {"a b": 59}


@pytest.mark.parametrize(
    ("options", "problem", "says"),
    [
        ({"csv": "none.csv"}, "unreadable csv", r"none\.csv does not exist"),
        ({"folder": "nowhere"}, "unreadable folder", "nowhere does not exist"),
        ({"label_col": "label"}, "unreadable csv", r"no column 'label', only Id, Target"),
        ({"label_col": ["Target"]}, "unreadable csv", "A column of a label holds 0 and 1"),
        ({"id_col": 9}, "unreadable csv", "no column 9"),
    ],
)
def test_what_cannot_be_read_is_reported(root, options, problem, says):
    report = audited(root, **options)
    found = report.problems[report.problems["problem"] == problem]
    assert not report.ok and len(found) == 1 and found["detail"].str.contains(says).all() and problem in str(report)


def test_a_channel_that_is_nowhere(root):
    report = audited(root, layout={"channels": ("red", "far")})
    assert listed(report) >= {("error", "missing file", "synthetic-000000", "far")}
    assert np.isnan(report.channels.loc["far", "mean"]) and report.channels.loc["red", "mean"] > 0


def test_rows_that_are_not_what_they_seem(root):
    file = root / "train.csv"
    ids = pd.read_csv(file, dtype=str)["Id"].tolist()
    text = [
        f"{ids[0]},1",
        f"./{ids[0]},1",
        "../other/x,2",
        f"{ids[1]}",
        f"{ids[2]},1;2",
        f"{ids[3]},[1]",
        f"{ids[4]},2.0",
    ]
    file.write_text("\n".join(["Id,Target", *text, f'{ids[5]},"1', f'{ids[6]},2"', f'{ids[7]},"2\n1"', ""]))
    report = audited(root)
    assert listed(report) >= {
        ("error", "ids of one file", ids[0], ""),
        ("error", "id outside the folder", "../other/x", ""),
        ("error", "fields do not fit", "", ""),
        ("error", "stray quote", "", ""),
        ("error", "line break in id or label", ids[7], ""),
        ("warning", "label made of others", ids[2], ""),
        ("warning", "label with brackets or quotes", ids[3], ""),
        ("warning", "labels alike", ids[4], ""),
    }
    details = report.problems.set_index("problem")["detail"]
    assert details["fields do not fit"] == "line 5 has 1" and details["stray quote"] == "lines 9 to 10 are one row"
    assert "lines 9 to 10" in str(report)


def test_side_files_of_macos_are_no_images(root):
    for file in list((root / "train").iterdir())[:5]:
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7" + bytes(4092))
    report = audited(root)
    assert report.ok and report.n_images == 60


def test_all_channels_in_one_file(root):
    folder = root / "stack"
    folder.mkdir()
    for i in image_ids(root / "train")[:3]:
        planes = [Image.fromarray(p) for p in open_channels(root / "train" / i).numpy()]
        planes[0].save(folder / f"{i}.tif", save_all=True, append_images=planes[1:])
    (folder / "damaged.tif").write_bytes(b"II*\0")
    report = audited(root, None, "stack", {"pattern": "{id}.tif"})
    assert listed(report) == {("error", "unreadable file", "damaged", "")} and dict(report.sizes) == {(32, 32): 3}


def test_real_cells(shared):
    report = audited(shared / "hpa_cells")
    assert ("warning", "low contrast", "mixed_img20_22", "red") in listed(report) and report.ok
    for _, problem in report.problems.iterrows():  # in dim channels, judged by every fourth row and column or so
        plane = open_channels(shared / "hpa_cells" / "train" / problem["id"], (problem["channel"],)).numpy()[0]
        low, high = np.percentile(plane, (1, 99), method="inverted_cdf").astype(int)
        assert problem["problem"] == "low contrast" and high - low <= 16
        assert problem["detail"] == f"98 % of the pixels are {low} to {high} of 255"
    assert len(report.problems) == 10
    assert report.labels["images"].to_dict() == {"0": 314, "2": 45, "21": 90, "23": 36, "25": 324}
    assert dict(report.sizes) == {(128, 128): 809}


def test_images_in_sub_folders(root):
    "Plates in folders: those that no row names are found, too, and so is what leaks from one to another."
    rows = pd.read_csv(root / "train.csv", dtype=str)
    ids = [f"plate{k % 2}/{i}" for k, i in enumerate(rows["Id"])]
    for old, new in zip(rows["Id"], ids, strict=True):
        (root / "train" / new).parent.mkdir(exist_ok=True)
        for channel in HPA_CHANNELS:
            (root / "train" / f"{old}_{channel}.png").rename(root / "train" / f"{new}_{channel}.png")
    rows.assign(Id=ids)[1:].to_csv(root / "train.csv", index=False)
    report = audited(root)
    assert report.ok and report.n_images == len(ids) and ("warning", "image without row", ids[0], "") in listed(report)
    assert audited(root, None, subfolders=True).n_images == len(ids) and audited(root, None).n_images == 0
    table = pd.DataFrame({"Id": ids})
    leaks = find_leaks(table[:4], table[3:6], ImageSet(root / "train"), progress=False)
    assert leaks[leaks["leak"] == "exact"][["valid", "train"]].to_numpy().tolist() == [[ids[3], ids[3]]]
