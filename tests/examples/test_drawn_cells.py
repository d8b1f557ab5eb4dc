"""Drawn cells: the files, the labels' frequencies, what is made again, and the pictures."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from drawn_cells import make_hpa, write
from drawn_cells.patterns import PATTERNS, Field, draw_field
from fastai_crl.hpa import HPA_CHANNELS, HPA_COUNTS, HPA_N_IDS


def small(path, n=6, **kwargs):
    return make_hpa(path, n, **{"size": 32, "progress": False} | kwargs)


def digests(path):
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).digest() for p in path.rglob("*.*") if p.is_file()}


def dealt(n, imbalance="real", floor=0):
    """(n, 28) zeros and ones."""
    hot = np.zeros((n, 28), int)
    for row, labels in zip(
        hot, write._deal(n, write._weights(imbalance), floor, np.random.default_rng(0)), strict=True
    ):
        assert labels == sorted(set(labels)) and labels
        row[labels] = 1
    return hot


def test_files(tmp_path):
    path = small(tmp_path / "new" / "set", n=60, n_test=30, size=40, min_count=2)
    ids = [f"synthetic-{i:06d}" for i in range(90)]
    for name, folder, part, least in (("train", "train", ids[:60], 2), ("test_labels", "test", ids[60:], 1)):
        table = pd.read_csv(path / f"{name}.csv", dtype=str)
        counts = table.Target.str.split().explode().astype(int).value_counts()
        assert list(table) == ["Id", "Target"] and table.Id.tolist() == part
        assert sorted(counts.index) == list(range(28)) and counts.min() == least
        assert {p.name for p in (path / folder).iterdir()} == {f"{i}_{c}.png" for i in part for c in HPA_CHANNELS}
        for file in (path / folder).iterdir():
            with Image.open(file) as image:
                assert image.mode == "L" and image.size == (40, 40)
    submission = pd.read_csv(path / "sample_submission.csv", dtype=str)
    assert submission.Id.tolist() == ids[60:] and set(submission.Predicted) == {"0"}
    assert "SYNTHETIC" in (path / "SYNTHETIC.txt").read_text()
    only_train = {p.name for p in small(tmp_path / "b").iterdir()}
    assert only_train == {"train", "train.csv", "SYNTHETIC.txt", "synthetic.json"}


@pytest.mark.parametrize("n", [600, 5000])
def test_frequencies(n):
    real, mild, lifted = dealt(n), dealt(n, "mild").sum(0), dealt(n, floor=4).sum(0)
    wanted = np.array(HPA_COUNTS) * n / HPA_N_IDS
    assert np.abs(real.sum(0) - wanted).max() <= 1.01
    assert np.allclose(np.bincount(real.sum(1), minlength=5)[1:5] / n, [0.487, 0.402, 0.102, 0.0097], atol=0.004)
    assert 18 < mild.max() / mild.min() < 22 and (np.diff(mild[np.argsort(HPA_COUNTS)]) >= -1).all()
    assert lifted.min() == 4 and (lifted[:3] >= 0.96 * wanted[:3]).all()


@pytest.mark.parametrize("name", ["train/synthetic-000002_blue.png", "train.csv"])
def test_an_interrupted_repair_leaves_no_half_file(tmp_path, monkeypatch, name):
    before = digests(small(tmp_path))
    (tmp_path / name).unlink()

    def killed(file, content):
        with file.open("wb") as half:
            half.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "write_bytes", killed)
        small(tmp_path)
    assert not (tmp_path / name).exists()
    assert digests(small(tmp_path)).items() >= before.items()


def test_several_processes_at_once(tmp_path):
    code = f"from drawn_cells import make_hpa; make_hpa({str(tmp_path / 'a')!r}, 6, 32)"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert all("100.00%" in run.communicate(timeout=120)[0] and run.returncode == 0 for run in runs)
    assert digests(tmp_path / "a") == digests(small(tmp_path / "b"))


def test_what_is_there_is_never_changed(tmp_path):
    before = digests(small(tmp_path / "a"))
    with pytest.raises(FileExistsError, match=r"n=6 \(asked for: 4\).*seed=0 \(asked for: 1\).*another folder"):
        small(tmp_path / "a", n=4, seed=1)
    assert digests(tmp_path / "a") == before
    (tmp_path / "train.csv").write_text("real")
    with pytest.raises(FileExistsError, match=r"holds train.csv, not made by make_hpa.*another folder"):
        small(tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n": 2.5}, r"n=2\.5 must be a whole number of at least 1"),
        ({"size": 31}, "size=31 must be a whole number of at least 32"),
        ({"imbalance": "hard"}, "imbalance='hard' is not known"),
        ({"n": 50, "min_count": 4}, "min_count=4 for 28 labels needs 112.*n=50.*pass min_count=2"),
    ],
)
def test_errors(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path / "x", **kwargs)
    assert not (tmp_path / "x").exists()


def test_pictures_are_those_of_the_stored_results():
    """Where this must change, raise `_DRAWING`, and mark the results in `benchmarks/` as of other pictures."""
    fields = [draw_field(48, [label], np.random.default_rng(1)) for label in range(28)]
    assert all(tuple(field) == HPA_CHANNELS and field["red"].dtype == np.uint8 for field in fields)
    found = np.array([[plane.mean() for plane in field.values()] for field in fields])
    green = [16.69, 14.63, 9.97, 8.98, 10.39, 6.02, 25.65, 22.18, 18.22, 10.04, 9.6, 27.11, 49.42, 27.46, 65.43, 31.28]
    green += [7.95, 11.09, 8.51, 9.98, 26.29, 21.12, 15.5, 28.33, 10.91, 40.81, 5.82, 9.65]
    assert np.allclose(found[:, 1], green, atol=0.02)
    assert np.allclose(found[:, [0, 2, 3]].mean(0), [59.46, 13.7, 33.63], atol=0.02)


def test_no_two_patterns_coincide_on_the_same_cells():
    flat = [draw(Field(96, [16, 17, 22], np.random.default_rng(5))).ravel() for draw in PATTERNS]
    assert len(flat) == 28 and np.isfinite(flat).all() and np.max(flat, 1).min() > 0.3
    assert (np.corrcoef(flat) - np.eye(28)).max() < 0.9
