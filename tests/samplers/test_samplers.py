"""Samplers: what they draw, against theory and against the mining rule."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback import schedule  # noqa: F401  (adds fit_one_cycle)
from scipy import sparse

from fastai_crl.hpa import HPA_COUNTS, HPA_N_IDS
from fastai_crl.mining.mine import minority_classes
from fastai_crl.samplers import ClassAwareSampler, RepeatFactorSampler


def make_targets(n=600, seed=0, counts=(300, 150, 80, 40, 20, 8, 2)):
    """(n, 7) bool; about a quarter of the samples have no label."""
    rng = np.random.default_rng(seed)
    y = np.zeros((n, len(counts)), bool)
    for c, k in enumerate(counts):
        y[rng.choice(n, k, replace=False), c] = True
    return y


def batches(sampler):
    return sampler.indices().reshape(-1, sampler.bs)


def mined_share(targets, sampler):
    """Share of the sampler's batches in which each label is mined."""
    rows = [minority_classes(torch.from_numpy(targets[b]), 0.5, "joint").numpy() for b in batches(sampler)]
    return np.mean(rows, 0)


def ceiling(bs, n_labels):
    """Of an even share: ρ·n/2 labels of a batch can have two positives each."""
    return min(1.0, int(bs / 2) // 2 / n_labels)


@pytest.fixture(scope="module")
def real(shared):
    labels = pd.read_csv(shared / "hpa2018" / "train.csv").Target.str.get_dummies(" ")
    return labels[[str(c) for c in range(28)]].to_numpy(bool)


@pytest.fixture(scope="module")
def like_hpa():
    return make_targets(HPA_N_IDS, counts=HPA_COUNTS)


# ---------------------------------------------------------------- class-aware


@pytest.mark.parametrize("kind", ["real", "like_hpa"])
@pytest.mark.parametrize("bs", [32, 64, 128])
def test_every_label_of_hpa_reaches_60_percent_of_the_ceiling(kind, bs, request):
    targets = request.getfixturevalue(kind)
    share = mined_share(targets, ClassAwareSampler(targets, bs))
    assert share.min() >= 0.6 * ceiling(bs, 28), (share / ceiling(bs, 28)).round(2)


def test_uniform_batches_do_not_reach_the_rare_labels_of_hpa(like_hpa):
    order = np.random.default_rng(0).permutation(len(like_hpa))[: HPA_N_IDS // 32 * 32]
    mined = [minority_classes(torch.from_numpy(like_hpa[b])).numpy() for b in order.reshape(-1, 32)]
    assert (np.mean(mined, 0) < 0.01).sum() >= 5


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("bs", [2, 3, 16, 64, 500])
def test_an_epoch_covers_every_sample_in_whole_batches_without_twins(bs, group):
    sampler = ClassAwareSampler(make_targets(), bs, group=group)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) and len(sampler) % bs == 0
    assert set(drawn) == set(range(600))
    assert all(len(set(b)) == bs for b in batches(sampler).tolist())


@pytest.mark.parametrize("bs", [8, 16, 32, 64, 128])
def test_an_epoch_is_no_longer_than_stated(bs):
    assert len(ClassAwareSampler(make_targets(), bs)) <= 600 / 0.5 + 2 * bs


def test_labels_have_two_positives_equally_often():
    y = make_targets(4000, counts=(400, 300, 200, 100, 50, 25, 12))
    pairs = (y[batches(ClassAwareSampler(y, 16))].sum(1) >= 2).mean(0)
    uniform = (y[np.random.default_rng(0).permutation(4000).reshape(-1, 16)].sum(1) >= 2).mean(0)
    assert uniform.min() < 0.01 and uniform.max() / max(uniform.min(), 1e-9) > 50
    assert pairs.min() > 0.3 and pairs.max() / pairs.min() < 3


def test_the_images_of_a_label_are_drawn_about_equally_often(like_hpa):
    sampler = ClassAwareSampler(like_hpa, 32)
    draws = sampler.repeats()
    for c in (27, 15, 10, 8):
        own = draws[like_hpa[:, c]]
        assert own.min() >= own.mean() / 2.5 and own.max() <= own.mean() * 2.5
    assert np.isclose(sampler.label_repeats()[27], draws[like_hpa[:, 27]].mean())
    assert draws.sum() == len(sampler) and draws.min() == 1


def test_a_label_of_one_image_is_covered_and_one_of_none_does_no_harm():
    y = np.c_[make_targets(), np.zeros(600, bool), np.zeros(600, bool)]
    y[17, 7] = True
    sampler = ClassAwareSampler(y, 16)
    assert sampler.repeats()[17] >= 1
    assert (y[batches(sampler)].sum(1)[:, 7] <= 1).all()
    assert sampler.label_repeats()[8] == 0


def test_samples_without_labels_are_covered():
    sampler = ClassAwareSampler(np.zeros((50, 3)), 8)
    assert set(sampler) == set(range(50)) and len(sampler) == 56


def test_a_set_smaller_than_a_batch_repeats_what_it_must():
    sampler = ClassAwareSampler(make_targets(10, counts=(5, 3, 2)), 16)
    drawn = np.bincount(sampler.indices(), minlength=10)
    assert len(sampler) == 16 and drawn.min() >= 1


def test_many_labels_per_image_leave_every_label_its_turn():
    rng = np.random.default_rng(0)
    y = np.zeros((3000, 200), bool)
    y[np.repeat(np.arange(3000), 4), rng.choice(200, 12000, p=(p := 1.0 / np.arange(1, 201)) / p.sum())] = True
    pairs = (y[batches(ClassAwareSampler(y, 32))].sum(1) >= 2).mean(0)
    assert pairs[y.sum(0) >= 2].min() > 0.01


def test_class_indices():
    y = np.random.default_rng(0).choice(4, 800, p=[0.9, 0.06, 0.03, 0.01])
    a, b = ClassAwareSampler(y, 16), ClassAwareSampler(np.eye(4)[y], 16)
    assert (a.indices() == b.indices()).all()
    assert (ClassAwareSampler(torch.from_numpy(y), 16).indices() == a.indices()).all()
    share = mined_share(np.eye(4)[y], a)
    assert share[1:].min() > 0.8 and share[0] > 0.2  # nine of ten samples are of class 0


# ---------------------------------------------------------------- repeat factor


def test_repeat_factors_are_those_of_the_paper():
    y = make_targets()
    sampler = RepeatFactorSampler(y, t=0.1)
    expected = [max([1.0, *(np.sqrt(0.1 / f) for f in y.mean(0)[row])]) for row in y]
    np.testing.assert_allclose(sampler.factors, expected)
    assert (sampler.repeats() == sampler.factors).all() and len(sampler) == round(sum(expected))


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
    "make", [lambda y, s=0: ClassAwareSampler(y, 16, s), lambda y, s=0: RepeatFactorSampler(y, 0.3, s)]
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


@pytest.mark.parametrize("bs", [1, 0, -4, 2.5, True])
def test_bad_batch_size(bs):
    with pytest.raises(ValueError, match=r"bs=.*>= 2"):
        ClassAwareSampler(make_targets(), bs)


@pytest.mark.parametrize("rho", [0, 1, -0.1, 2])
def test_bad_rho(rho):
    with pytest.raises(ValueError, match=r"rho=.*\(0, 1\)"):
        ClassAwareSampler(make_targets(), 16, rho=rho)


@pytest.mark.parametrize("t", [0, -0.1, 1.1, float("nan")])
def test_bad_t(t):
    with pytest.raises(ValueError, match=r"t=.*\(0, 1\].*try"):
        RepeatFactorSampler(make_targets(), t)


BIG = """
import resource, sys
import numpy as np
from scipy import sparse
from fastai_crl.samplers import ClassAwareSampler, RepeatFactorSampler

mb = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
before, rng, n, c = mb(), np.random.default_rng(0), 1_000_000, 1000
size, p = rng.integers(2, 6, n), 1 / np.arange(1, c + 1) ** 0.8
rows = np.repeat(np.arange(n), size)
y = sparse.csr_matrix((np.ones(len(rows), bool), (rows, rng.choice(c, len(rows), p=p / p.sum()))), shape=(n, c))
for sampler in (ClassAwareSampler(y, 64), RepeatFactorSampler(y)):
    drawn = np.bincount(sampler.indices(), minlength=n)
    assert drawn.sum() == len(sampler) and drawn.min() >= 1
print(mb() - before)
"""


@pytest.mark.slow
def test_a_million_samples_of_a_thousand_labels_take_little_memory():
    pytest.importorskip("resource")
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", BIG], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 1000, out.stdout
