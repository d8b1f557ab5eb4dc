"""Samplers: what they draw, against theory."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from fastai_crl.data.annotations import Annotations
from fastai_crl.samplers import ClassAwareSampler, RepeatFactorSampler


def make_targets(n=600, seed=0, counts=(300, 150, 80, 40, 20, 8, 2)):
    """(n, 7) bool; about a quarter of the samples have no label."""
    rng = np.random.default_rng(seed)
    y = np.zeros((n, len(counts)), bool)
    for c, k in enumerate(counts):
        y[rng.choice(n, k, replace=False), c] = True
    return y


# ---------------------------------------------------------------- class-aware


@st.composite
def labels(draw):
    """(n, C) bool of any kind: labels without images, images without labels, images of several."""
    n, c = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    return np.array(draw(st.lists(st.lists(st.booleans(), min_size=c, max_size=c), min_size=n, max_size=n)))


def classes_of(targets):
    """The images of each class, by plain loops: of each label that occurs, and those without a label."""
    classes = []
    for c in range(targets.shape[1]):
        classes.append([i for i in range(len(targets)) if targets[i, c]])
    classes.append([i for i in range(len(targets)) if not targets[i].any()])
    return [members for members in classes if members]


@given(labels(), st.integers(0, 5))
def test_expected_draws_are_those_of_theory(targets, epoch):
    """Each class is drawn n/K times, rounded up or down, and each image of it equally often, give or take one."""
    n, classes = len(targets), classes_of(targets)
    drawn = np.bincount(ClassAwareSampler(targets, 3).indices(epoch), minlength=n)
    assert drawn.sum() == n
    low, high = np.zeros(n), np.zeros(n)
    for members in classes:
        for i in members:
            low[i] += math.floor(math.floor(n / len(classes)) / len(members))
            high[i] += math.ceil(math.ceil(n / len(classes)) / len(members))
    assert (low <= drawn).all() and (drawn <= high).all()


@given(st.integers(1, 6), st.data())
def test_labels_come_equally_often(n_classes, data):
    """With one label per image, and without: the label of a draw is that of the class that was drawn."""
    y = np.array(data.draw(st.lists(st.integers(-1, n_classes - 1), min_size=1, max_size=60)))
    targets = (y[:, None] == np.arange(n_classes)).astype(int)  # -1 is an image without a label
    drawn = y[ClassAwareSampler(targets, data.draw(st.integers(0, 9))).indices()]
    occur, counts = np.unique(drawn, return_counts=True)
    assert set(occur) <= set(y) and len(occur) == min(len(set(y)), len(y))
    assert counts.max() - counts.min() <= 1
    k = len(set(y))
    for start in range(0, len(drawn) - k + 1, k):  # in turn: each round has every class once
        assert sorted(drawn[start : start + k]) == sorted(set(y))


def test_draws_over_many_epochs_are_those_of_theory():
    targets = make_targets()
    classes = classes_of(targets)
    expected = np.zeros(600)
    for members in classes:
        expected[members] += 600 / len(classes) / len(members)
    sampler, epochs = ClassAwareSampler(targets), 400
    mean = np.mean([np.bincount(sampler.indices(e), minlength=600) for e in range(epochs)], 0)
    # The draws of an image for one class vary by less than one from epoch to epoch: a standard deviation of at most
    # a half for each of its labels, of which there are at most four; and five of the mean's.
    assert np.abs(mean - expected).max() < 5 * 0.5 * np.sqrt(4 / epochs)


def test_images_without_a_label_are_a_class_of_their_own():
    targets = np.zeros((100, 2))
    targets[:2, 0] = 1
    drawn = ClassAwareSampler(targets).indices()
    assert (drawn < 2).sum() == 50
    assert sorted(ClassAwareSampler(np.zeros((50, 3)))) == list(range(50))


def test_every_label_of_hpa_comes_equally_often(shared):
    real = Annotations.from_csv(shared / "hpa2018" / "train.csv").targets().toarray()
    repeats = np.bincount(ClassAwareSampler(real).indices(), minlength=len(real))
    assert repeats.sum() == len(real) == 31072
    share = real.T @ repeats / len(real)  # of the draws, images of each label
    assert share.min() >= 1 / 28 - 1e-4  # and those that other labels bring along
    assert repeats[real[:, 27]].min() >= 31072 // 28 // 11


def test_class_indices():
    y = np.random.default_rng(0).choice(4, 800, p=[0.9, 0.06, 0.03, 0.01])
    a, b = ClassAwareSampler(y), ClassAwareSampler(np.eye(4)[y])
    assert (a.indices() == b.indices()).all()
    assert (ClassAwareSampler(torch.from_numpy(y)).indices() == a.indices()).all()


# ---------------------------------------------------------------- repeat factor


def test_repeat_factors_are_those_of_the_paper():
    y = make_targets()
    sampler = RepeatFactorSampler(y, t=0.1)
    expected = [max([1.0, *(np.sqrt(0.1 / f) for f in y.mean(0)[row])]) for row in y]
    np.testing.assert_allclose(sampler.factors, expected)
    assert len(sampler) == round(sum(expected))


def test_repeat_factor_draws_follow_the_factors():
    sampler = RepeatFactorSampler(make_targets(), t=0.3)
    draws = np.stack([np.bincount(sampler.indices(e), minlength=600) for e in range(400)])
    assert (draws.sum(1) == len(sampler)).all()
    assert (draws >= np.floor(sampler.factors)).all() and (draws <= np.floor(sampler.factors) + 1).all()
    # Five standard deviations of a share of 400, and what rounding the length moves.
    assert np.abs(draws.mean(0) - sampler.factors).max() < 5 * 0.5 / 20 + 0.5 / 600


def test_repeat_factor_of_whole_factors_and_of_no_labels():
    assert sorted(RepeatFactorSampler(np.zeros((5, 2)))) == list(range(5))
    y = np.zeros((16, 1))
    y[3] = 1
    assert np.bincount(RepeatFactorSampler(y, t=1.0).indices()).tolist() == [1, 1, 1, 4] + 12 * [1]


def test_the_default_t_is_the_median_frequency():
    assert RepeatFactorSampler(make_targets()).t == pytest.approx(40 / 600)


# ---------------------------------------------------------------- both


@pytest.mark.parametrize(
    "make", [lambda y, s=0: ClassAwareSampler(y, s), lambda y, s=0: RepeatFactorSampler(y, 0.3, s)]
)
class TestBoth:
    def test_epochs_differ_and_repeat_by_seed(self, make):
        y = make_targets()
        a, b, other = make(y), make(y), make(y, 1)
        first, second = list(a), list(a)
        assert first != second and len(first) == len(second) == len(a)
        assert [list(b), list(b)] == [first, second]
        assert list(other) != first and len(other) == len(a)
        b.set_epoch(0)
        assert list(b) == first

    @pytest.mark.parametrize(
        "kind",
        [
            lambda y: y.astype(np.float32),
            lambda y: y.astype(np.uint8),
            lambda y: y.tolist(),
            lambda y: torch.from_numpy(y),
            lambda y: torch.from_numpy(y).half(),
            lambda y: torch.from_numpy(y).bfloat16(),
            lambda y: sparse.csr_matrix(y.astype(float)),
            lambda y: sparse.coo_array(y),
            lambda y: sparse.csc_matrix(y.astype(np.int64)),
        ],
    )
    def test_targets_of_any_kind(self, make, kind):
        y = make_targets()
        assert (make(kind(y)).indices() == make(y).indices()).all()

    @pytest.mark.parametrize(
        ("bad", "says"),
        [
            (np.zeros((2, 3, 4)), r"\(2, 3, 4\).*give \(n, C\)"),
            (np.zeros(5), r"\(5,\) and float64.*class indices"),
            (np.zeros((0, 3)), r"\(0, 3\) are empty"),
            (np.zeros(0, int), "empty"),
            (np.array([0, -1]), "class index -1: indices start at 0"),
            (np.array([[0, 2]]), r"from 0 to 2: they must be in \[0, 1\]"),
            (np.array([[0.0, np.nan]]), r"must be in \[0, 1\]"),
            (np.array([["a", "b"]]), "fit no task"),
        ],
    )
    def test_bad_targets(self, make, bad, says):
        with pytest.raises(ValueError, match=says):
            make(bad)

    @pytest.mark.parametrize("seed", [-1, 1.5, True])
    def test_bad_seed(self, make, seed):
        with pytest.raises(ValueError, match=r"seed=.*whole number"):
            make(make_targets(), seed)


@pytest.mark.parametrize("t", [0, -0.1, 1.1, float("nan")])
def test_bad_t(t):
    with pytest.raises(ValueError, match=r"t=.*\(0, 1\].*try"):
        RepeatFactorSampler(make_targets(), t)


BIG = """
import resource, sys
import numpy as np
from scipy import sparse
from fastai_crl.data.annotations import Annotations
from fastai_crl.samplers import ClassAwareSampler, RepeatFactorSampler

mb = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
before, rng, n, c = mb(), np.random.default_rng(0), 1_000_000, 1000
size, p = rng.integers(2, 6, n), 1 / np.arange(1, c + 1) ** 0.8
rows = np.repeat(np.arange(n), size)
y = sparse.csr_matrix((np.ones(len(rows), bool), (rows, rng.choice(c, len(rows), p=p / p.sum()))), shape=(n, c))
for sampler in (ClassAwareSampler(y), RepeatFactorSampler(y)):
    assert np.bincount(sampler.indices(), minlength=n).sum() == len(sampler)
print(mb() - before)
"""


@pytest.mark.slow
def test_a_million_samples_of_a_thousand_labels_take_little_memory():
    pytest.importorskip("resource")
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", BIG], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 1000, out.stdout
