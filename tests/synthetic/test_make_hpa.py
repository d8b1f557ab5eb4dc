"""Synthetic HPA-like data: files, label frequencies, reuse, errors, and patterns that can be told apart."""

import hashlib
import json
import subprocess
import sys
from importlib import import_module
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage as ndi

from fastai_crl.hpa import HPA_CHANNELS, HPA_COUNTS, HPA_LABELS, HPA_N_IDS
from fastai_crl.synthetic.make_hpa import make_hpa
from fastai_crl.synthetic.patterns import PATTERNS, Field, draw_field

synth = import_module("fastai_crl.synthetic.make_hpa")  # the package has a function of that name

N_LABELS, PER_LABEL = len(HPA_LABELS), 8


def small(path, n=6, **kwargs):
    return make_hpa(path, n, **{"size": 32, "progress": False, "workers": 1} | kwargs)


def digests(path):
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in path.rglob("*") if p.is_file()
    }


def parse(csv, column="Target"):
    """(n, 28) zeros and ones."""
    rows = pd.read_csv(csv, dtype=str)[column].str.split()
    hot = np.zeros((len(rows), N_LABELS), int)
    for i, row in enumerate(rows):
        hot[i, [int(t) for t in row]] = 1
        assert len(set(row)) == len(row)
    return hot


def dealt(n, imbalance="real", floor=0, seed=0):
    hot = np.zeros((n, N_LABELS), int)
    for i, labels in enumerate(synth._deal(n, synth._weights(imbalance), floor, np.random.default_rng(seed))):
        assert labels == sorted(set(labels)) and labels
        hot[i, labels] = 1
    return hot


# ---- files ----
def test_layout(tmp_path):
    path = small(tmp_path / "new" / "set", n_test=3, size=40)
    train, test = pd.read_csv(path / "train.csv"), pd.read_csv(path / "sample_submission.csv", dtype=str)
    assert list(train) == ["Id", "Target"] and list(test) == ["Id", "Predicted"]
    assert train.Id.tolist() == [f"synthetic-{i:06d}" for i in range(6)]
    assert test.Id.tolist() == [f"synthetic-{i:06d}" for i in range(6, 9)] and set(test.Predicted) == {"0"}
    assert pd.read_csv(path / "test_labels.csv").Id.tolist() == test.Id.tolist()
    for folder, ids in (("train", train.Id), ("test", test.Id)):
        names = sorted(f"{i}_{c}.png" for i in ids for c in HPA_CHANNELS)
        assert sorted(p.name for p in (path / folder).iterdir()) == names
        for name in names:
            image = Image.open(path / folder / name)
            assert image.mode == "L" and image.size == (40, 40)
    assert "SYNTHETIC" in (path / "SYNTHETIC.txt").read_text()
    assert parse(path / "train.csv").sum(1).min() >= 1 and parse(path / "test_labels.csv").sum(1).min() >= 1
    others = {"train", "test", "train.csv", "sample_submission.csv", "test_labels.csv", "SYNTHETIC.txt"}
    assert {p.name for p in path.iterdir()} == others | {"synthetic.json"}


def test_without_test_set(tmp_path):
    assert not {"test", "sample_submission.csv", "test_labels.csv"} & {p.name for p in small(tmp_path).iterdir()}


def test_same_bytes_whatever_the_workers(tmp_path):
    args = {"n": 40, "n_test": 2, "seed": 3}
    one, two = small(tmp_path / "a", **args), small(tmp_path / "b", **args, workers=2)
    assert digests(one) == digests(two)
    other = digests(small(tmp_path / "c", n=40, n_test=2, seed=4))
    same = [k for k, v in digests(one).items() if other[k] == v]
    assert not [k for k in same if k.endswith((".png", "train.csv", ".json"))]
    assert len({v for k, v in digests(one).items() if k.endswith("green.png")}) == 42


def test_progress_and_script_without_main_guard(tmp_path):
    code = f"from fastai_crl.synthetic import make_hpa\nprint(make_hpa({str(tmp_path / 's')!r}, 33, 32, workers=2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "100.00%" in done.stdout and done.stdout.strip().endswith(str(tmp_path / "s"))


# ---- labels ----
@pytest.mark.parametrize("n", [600, 5000])
def test_real_frequencies(n):
    hot = dealt(n)
    expected = np.array(HPA_COUNTS) * n / HPA_N_IDS
    assert np.abs(hot.sum(0) - expected).max() <= 1.01
    shares = np.bincount(hot.sum(1), minlength=5)[1:5] / n
    assert np.allclose(shares, [0.487, 0.402, 0.102, 0.0097], atol=0.004)


def test_labels_go_together_by_chance():
    hot = dealt(20000)
    for a, b in [(0, 25), (0, 2), (21, 25), (5, 7)]:
        apart = hot[:, a].mean() * hot[:, b].mean()
        assert 0.3 * apart < (hot[:, a] & hot[:, b]).mean() < 1.7 * apart
    half = hot[:10000].sum(0), hot[10000:].sum(0)  # the order of the fields tells nothing
    assert (np.abs(half[0] - half[1]) < 5 * np.sqrt(half[0] + half[1]) + 1).all()


def test_min_count(tmp_path):
    assert dealt(600).sum(0).min() < 1  # without it the rarest are absent
    lifted = dealt(600, floor=4).sum(0)
    assert lifted.min() == 4 and (lifted[:3] >= 0.96 * np.array(HPA_COUNTS[:3]) * 600 / HPA_N_IDS).all()
    path = small(tmp_path, n=60, n_test=30, min_count=2)
    assert parse(path / "train.csv").sum(0).min() == 2 and parse(path / "test_labels.csv").sum(0).min() == 1
    assert json.loads((path / "synthetic.json").read_text())["min_count"] == 2


def test_mild_and_explicit_weights():
    mild = dealt(4000, "mild").sum(0)
    assert 18 < mild.max() / mild.min() < 22
    assert (np.diff(mild[np.argsort(HPA_COUNTS)]) >= -1).all()
    weights = np.zeros(N_LABELS)
    weights[[3, 7, 9]] = 1, 1, 2
    counts = dealt(1000, weights.tolist(), floor=4).sum(0)
    assert counts[3] == counts[7] and abs(counts[9] - 2 * counts[3]) <= 1 and counts.sum() == counts[[3, 7, 9]].sum()
    assert dealt(50, np.eye(N_LABELS)[5])[:, 5].all()  # one label: one per field
    assert (dealt(50, [1] * N_LABELS, floor=2).sum(0) >= 2).all()


# ---- reuse, force, errors ----
def test_reuse_and_repair(tmp_path, monkeypatch):
    path = small(tmp_path)
    before = digests(path)
    drawn = []
    monkeypatch.setattr(synth, "_draw_all", lambda jobs, *_: drawn.append(len(jobs)))
    small(path)
    assert drawn == [0]
    monkeypatch.undo()
    (path / "train" / "synthetic-000002_blue.png").unlink()
    (path / "train.csv").unlink()
    small(path)
    assert digests(path) == before


def test_interrupted_is_redone(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(synth, "_draw_all", stop)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "a")
    assert not (tmp_path / "a" / "synthetic.json").exists()
    monkeypatch.undo()
    assert digests(small(tmp_path / "a")) == digests(small(tmp_path / "b"))


def test_other_parameters_need_force(tmp_path):
    path = small(tmp_path / "a", n_test=2)
    before = digests(path)
    with pytest.raises(FileExistsError, match=r"n=6 \(asked for: 4\).*seed=0 \(asked for: 1\).*force=True"):
        small(path, n=4, seed=1)
    assert digests(path) == before
    mine = path / "train" / "mine.png", path / "notes.txt"
    for file in mine:
        file.write_text("mine")
    small(path, n=4, seed=1, force=True)
    assert all(file.read_text() == "mine" for file in mine)
    for file in mine:
        file.unlink()
    assert digests(path) == digests(small(tmp_path / "b", n=4, seed=1))
    assert not (path / "test").exists()


def test_damaged_manifest(tmp_path):
    path = small(tmp_path)
    for text in ("{", "[]", '{"n": "6"}'):
        (path / "synthetic.json").write_text(text)
        with pytest.raises(FileExistsError, match=r"damaged.*another folder"):
            small(path, force=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["train.csv", "train/x_red.png", "sample_submission.csv"])
def test_real_data_is_never_touched(tmp_path, name, force):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("real")
    with pytest.raises(FileExistsError, match=r"not made by make_hpa.*another folder"):
        small(tmp_path, force=force)
    assert digests(tmp_path) == {name: hashlib.sha256(b"real").hexdigest()}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n": 0}, "n=0 must be at least 1; pass n=1"),
        ({"n": 2.5}, r"n=2\.5 must be a whole number"),
        ({"n_test": -1}, "n_test=-1 must be at least 0"),
        ({"size": 31}, "size=31 must be at least 32"),
        ({"seed": -1}, "seed=-1"),
        ({"workers": 0}, "workers=0"),
        ({"imbalance": "hard"}, 'imbalance=\'hard\' is not known; pass "real", "mild" or 28'),
        ({"imbalance": [1, 2]}, r"shape \(2,\).*28 labels"),
        ({"imbalance": [-1] + [1] * 27}, "not negative"),
        ({"imbalance": [0] * 28}, "not all 0"),
        ({"min_count": -1}, "min_count=-1"),
        ({"n": 50, "min_count": 4}, "min_count=4 for 28 labels needs 112.*n=50.*pass min_count=2"),
    ],
)
def test_errors(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path / "x", **kwargs)
    assert not (tmp_path / "x").exists()


# ---- pictures ----
@pytest.fixture(scope="module")
def fields():
    """label -> `PER_LABEL` single-label pictures (4, 128, 128), channels in HPA order."""
    return [
        np.stack(
            [list(draw_field(128, [label], np.random.default_rng([9, label, i])).values()) for i in range(PER_LABEL)]
        )
        for label in range(N_LABELS)
    ]


def test_pictures(fields):
    every = np.concatenate(fields)
    assert every.shape == (N_LABELS * PER_LABEL, 4, 128, 128) and every.dtype == np.uint8
    assert (every.std((2, 3)) > 1).all() and len(PATTERNS) == N_LABELS
    assert tuple(draw_field(32, [0, 25], np.random.default_rng(0))) == HPA_CHANNELS
    assert (every.mean((2, 3)) < 150).all()  # dark background, nothing washed out


def inside(images):
    """Share of the green light above the background that falls into the blue mask."""
    _, green, blue, _ = images.astype(float).transpose(1, 0, 2, 3)
    green = (green - 12).clip(0)
    mask = ndi.gaussian_filter(blue, (0, 1, 1))
    mask = ndi.binary_dilation(mask > 0.25 * mask.max((1, 2), keepdims=True), np.ones((1, 3, 3)))
    return (green * mask).sum((1, 2)) / green.sum((1, 2)).clip(1)


def test_where_the_protein_is(fields):
    for label in (0, 1, 2, 3, 4, 5):
        assert np.median(inside(fields[label])) > 0.75, HPA_LABELS[label]
    for label in (6, 7, 8, 9, 10, 11, 13, 20, 21, 22, 23, 24, 25, 26):
        assert np.median(inside(fields[label])) < 0.25, HPA_LABELS[label]


def test_follows_the_other_stains(fields):
    def likeness(label, channel):
        return np.median([np.corrcoef(image[1].ravel(), image[channel].ravel())[0, 1] for image in fields[label]])

    assert likeness(14, 0) > 0.7 and likeness(6, 3) > 0.7 and likeness(0, 2) > 0.7
    assert max(likeness(21, 2), likeness(8, 2), likeness(19, 3), likeness(1, 0)) < 0.4


def features(image):
    """Where the green light is and how coarse it is."""
    red, green, blue, yellow = image.astype(np.float32)
    green = (green - np.percentile(green, 5)).clip(0)
    spread = np.sqrt(ndi.gaussian_filter(green, 0.5).var() + 1)
    blurred = [green] + [ndi.gaussian_filter(green, s) for s in (0.7, 1.2, 2, 3.5, 6)]
    bands = [b - a for a, b in pairwise(blurred)]
    found = [band.std() / spread for band in bands] + [band.min() / spread for band in bands]
    found += [band.max() / spread for band in bands]
    found += [np.corrcoef(green.ravel(), other.ravel())[0, 1] for other in (red, blue, yellow)]
    nucleus = ndi.binary_opening(blue > 0.3 * blue.max(), iterations=2)
    cell = ndi.gaussian_filter(red + yellow + blue, 2) > 10
    parts = ndi.distance_transform_edt(~nucleus), ndi.distance_transform_edt(nucleus), ndi.distance_transform_edt(cell)
    for part, edges in zip(parts, [(0.1, 2, 4, 7, 11, 99), (0.1, 2, 4, 99), (0.1, 2, 4, 8, 99)], strict=True):
        found += [green[(part >= a) & (part < b)].sum() / (green.sum() + 1) for a, b in pairwise(edges)]
    n_spots = ndi.label(blurred[1] > 0.4 * blurred[1].max())[1]
    return np.nan_to_num([*found, np.log1p(n_spots), (green > 0.3 * green.max()).mean()])


def test_labels_can_be_told_apart(fields):
    from sklearn.ensemble import ExtraTreesClassifier

    x = np.array([[features(image) for image in images] for images in fields])
    y = np.repeat(np.arange(N_LABELS), PER_LABEL).reshape(N_LABELS, PER_LABEL)
    cut = 5
    model = ExtraTreesClassifier(200, random_state=0).fit(np.concatenate(x[:, :cut]), y[:, :cut].ravel())
    right = model.predict(np.concatenate(x[:, cut:])) == y[:, cut:].ravel()
    by_label = right.reshape(N_LABELS, -1).mean(1)
    assert right.mean() > 0.6  # chance: 0.036
    assert (by_label > 0).sum() >= 26


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


def test_labels_add_up():
    one = draw_field(64, [0], np.random.default_rng(1))["green"].astype(float)
    both = draw_field(64, [25, 0, 0], np.random.default_rng(1))["green"].astype(float)
    assert both.sum() > 1.5 * one.sum()
    again = draw_field(64, [0, 25], np.random.default_rng(1))["green"]
    assert (both == again).all()  # neither the order nor a repeat of a label matters
