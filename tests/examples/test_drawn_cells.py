"""Drawn cells: files, label frequencies, what is made again, errors, and patterns that can be told apart."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from drawn_cells import make_hpa, write
from drawn_cells.patterns import PATTERNS, Field, draw_field
from fastai_crl.hpa import HPA_CHANNELS, HPA_COUNTS, HPA_LABELS, HPA_N_IDS

N_LABELS = len(HPA_LABELS)


def small(path, n=6, **kwargs):
    return make_hpa(path, n, **{"size": 32, "progress": False} | kwargs)


def digests(path):
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in path.rglob("*") if p.is_file()
    }


def dealt(n, imbalance="real", floor=0):
    """(n, 28) zeros and ones."""
    hot = np.zeros((n, N_LABELS), int)
    for i, labels in enumerate(write._deal(n, write._weights(imbalance), floor, np.random.default_rng(0))):
        assert labels == sorted(set(labels)) and labels
        hot[i, labels] = 1
    return hot


def test_files(tmp_path):
    path = small(tmp_path / "new" / "set", n=60, n_test=30, size=40, min_count=2)
    tables = {name: pd.read_csv(path / name, dtype=str) for name in ("train.csv", "test_labels.csv")}
    ids = [f"synthetic-{i:06d}" for i in range(90)]
    for (name, table), part, least in zip(tables.items(), (ids[:60], ids[60:]), (2, 1), strict=True):
        assert list(table) == ["Id", "Target"] and table.Id.tolist() == part
        counts = table.Target.str.split().explode().astype(int).value_counts()
        assert sorted(counts.index) == list(range(N_LABELS)) and counts.min() == least
        folder = path / name.split(".")[0].split("_")[0]
        assert sorted(p.name for p in folder.iterdir()) == sorted(f"{i}_{c}.png" for i in part for c in HPA_CHANNELS)
        for file in folder.iterdir():
            with Image.open(file) as image:
                assert image.mode == "L" and image.size == (40, 40)
    submission = pd.read_csv(path / "sample_submission.csv", dtype=str)
    assert submission.Id.tolist() == ids[60:] and set(submission.Predicted) == {"0"}
    assert "SYNTHETIC" in (path / "SYNTHETIC.txt").read_text()
    others = {"train", "test", "sample_submission.csv", "SYNTHETIC.txt", "synthetic.json"}
    assert {p.name for p in path.iterdir()} == others | set(tables)
    assert not {"test", "sample_submission.csv", "test_labels.csv"} & {p.name for p in small(tmp_path / "b").iterdir()}


def test_pictures_are_those_of_the_stored_results():
    """Where this must change, raise `_DRAWING`, and mark the results in `benchmarks/` as of other pictures."""
    means = {(0,): [42.13, 24.57, 12.89, 33.19], (25, 2): [46.77, 27.73, 18.20, 26.88]}
    means[16, 17, 22] = [47.41, 12.59, 14.94, 43.34]
    for labels, wanted in means.items():
        field = draw_field(64, labels, np.random.default_rng(7))
        assert tuple(field) == HPA_CHANNELS and all(plane.dtype == np.uint8 for plane in field.values())
        assert np.allclose([plane.mean() for plane in field.values()], wanted, atol=0.02)
    assert write._DRAWING == 1


@pytest.mark.parametrize("n", [600, 5000])
def test_real_frequencies(n):
    hot = dealt(n)
    assert np.abs(hot.sum(0) - np.array(HPA_COUNTS) * n / HPA_N_IDS).max() <= 1.01
    assert np.allclose(np.bincount(hot.sum(1), minlength=5)[1:5] / n, [0.487, 0.402, 0.102, 0.0097], atol=0.004)


def test_a_floor_and_a_mild_imbalance():
    assert dealt(600).sum(0).min() < 1  # without a floor the rarest are absent
    lifted = dealt(600, floor=4).sum(0)
    assert lifted.min() == 4 and (lifted[:3] >= 0.96 * np.array(HPA_COUNTS[:3]) * 600 / HPA_N_IDS).all()
    mild = dealt(4000, "mild").sum(0)
    assert 18 < mild.max() / mild.min() < 22 and (np.diff(mild[np.argsort(HPA_COUNTS)]) >= -1).all()


@pytest.mark.parametrize("name", ["train/synthetic-000002_blue.png", "train.csv"])
def test_a_killed_repair_leaves_no_half_file(tmp_path, name):
    path = small(tmp_path)
    before = digests(path)
    (path / name).unlink()
    pid = os.fork()
    if pid == 0:
        real = Path.write_bytes

        def half(self, content):
            real(self, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        Path.write_bytes = half
        small(tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert not (path / name).exists()
    assert digests(small(tmp_path)).items() >= before.items()


def test_several_processes_at_once(tmp_path):
    code = f"from drawn_cells import make_hpa; make_hpa({str(tmp_path / 'a')!r}, 6, 32)"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert all("100.00%" in run.communicate(timeout=120)[0] and run.returncode == 0 for run in runs)
    assert digests(tmp_path / "a") == digests(small(tmp_path / "b"))


def test_other_data_is_never_touched(tmp_path):
    path = small(tmp_path / "a")
    before = digests(path)
    with pytest.raises(FileExistsError, match=r"n=6 \(asked for: 4\).*seed=0 \(asked for: 1\).*another folder"):
        small(path, n=4, seed=1)
    assert digests(path) == before
    for name in ("train.csv", "train/x_red.png", "sample_submission.csv"):
        file = tmp_path / name.replace("/", "_") / name
        file.parent.mkdir(parents=True)
        file.write_text("real")
        with pytest.raises(FileExistsError, match=r"not made by make_hpa.*another folder"):
            small(tmp_path / name.replace("/", "_"))
        assert file.read_text() == "real"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n": 0}, "n=0 must be a whole number of at least 1"),
        ({"n": 2.5}, r"n=2\.5 must be a whole number"),
        ({"size": 31}, "size=31 must be a whole number of at least 32"),
        ({"imbalance": "hard"}, 'imbalance=\'hard\' is not known; pass "real" or "mild"'),
        ({"n": 50, "min_count": 4}, "min_count=4 for 28 labels needs 112.*n=50.*pass min_count=2"),
    ],
)
def test_errors(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path / "x", **kwargs)
    assert not (tmp_path / "x").exists()


def test_patterns_of_one_field_differ():
    """On the same cells no two labels' patterns coincide."""
    flat = []
    for pattern in PATTERNS:
        field = Field(96, [16, 17, 22], np.random.default_rng(5))
        image = pattern(field)
        assert image.shape == (96, 96) and np.isfinite(image).all() and image.max() > 0.3
        flat.append(image.ravel())
    alike = np.corrcoef(flat) - np.eye(N_LABELS)
    assert alike.max() < 0.9
