"""Mining against plain loops, the published worked example, and what must not matter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastai_crl.mining.hard_samples import pairwise_distance
from fastai_crl.mining.mine import mine, minority_classes
from tests import oracle

# One batch of 32 from a 2019 article on the loss: (sample, label) anchors, their scores, the hardest negatives.
ANCHORS = [(0, 2), (4, 1), (7, 4), (8, 3), (16, 2), (17, 3), (22, 4), (23, 0), (24, 4), (27, 0), (30, 1)]
ANCHOR_SCORES = [0.9298, 0.5929, 0.5990, 0.6970, 0.2911, 0.5889, 0.5090, 0.4656, 0.3560, 0.0699, 0.9966]
HARDEST_NEGATIVES = {2: {5, 30, 8}, 1: {23, 24, 9}, 4: {13, 2, 26}, 3: {16, 5, 7}, 0: {10, 1, 17}}


def article_batch():
    """The article's batch; what it does not print (easy negatives, frequent labels) is filled in."""
    targets, scores = torch.zeros(32, 7), torch.rand(32, 7) * 0.01
    for (i, c), p in zip(ANCHORS, ANCHOR_SCORES, strict=True):
        targets[i, c], scores[i, c] = 1, p
    for c, samples in HARDEST_NEGATIVES.items():
        for place, i in enumerate(sorted(samples)):
            scores[i, c] = 0.3 + 0.1 * place
    targets[:20, 5], targets[10:30, 6] = 1, 1
    return scores, targets


def test_worked_example():
    scores, targets = article_batch()
    assert minority_classes(targets).tolist() == [True] * 5 + [False] * 2
    mined = mine(scores, targets, k=3)
    assert int(mined.n_anchors) == 11
    assert int(mined.n_triplets) == 42
    assert mined.by_label().tolist() == [6, 6, 6, 6, 18, 0, 0]
    found = mined.triplets().tolist()
    assert {(a, c) for a, _, _, c in found} == set(ANCHORS)
    for c, samples in HARDEST_NEGATIVES.items():
        assert {j for _, _, j, label in found if label == c} == samples


@st.composite
def batches(draw, max_n=12, max_classes=4):
    """Small batches full of ties, empty labels, fractional rows and k > n."""
    n, n_classes = draw(st.integers(1, max_n)), draw(st.integers(1, max_classes))
    values = draw(st.sampled_from([(0, 1), (0, 0, 0, 1), (0, 1, 0.5), (0,), (1,)]))
    cells = st.lists(st.sampled_from(values), min_size=n_classes, max_size=n_classes)
    levels = st.sampled_from([0.0, -0.0, 0.1, 0.25, 0.5, 0.75, 1.0])
    score = draw(st.sampled_from([levels, st.floats(0, 1, width=32)]))
    scores = st.lists(score, min_size=n_classes, max_size=n_classes)
    features = st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.5]), min_size=2, max_size=2)
    rows = [draw(st.lists(x, min_size=n, max_size=n)) for x in (scores, cells, features)]
    return (*rows, draw(st.integers(1, max_n + 2)), draw(st.sampled_from([0.2, 0.5, 0.7, 1.0])))


@pytest.mark.parametrize("level", ["class", "instance"])
@pytest.mark.parametrize("scope", ["joint", "attribute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=150, deadline=None)
@given(batch=batches())
def test_triplets_equal_plain_loop(batch, scope, level, dtype):
    scores, targets, features, k, rho = batch
    expected = oracle.triplets(scores, targets, k, rho, scope, level, features)
    mined = mine(
        torch.tensor(scores, dtype=dtype),
        torch.tensor(targets, dtype=dtype),
        k,
        rho,
        scope,
        level,
        torch.tensor(features, dtype=dtype),
    )
    found = [tuple(t) for t in mined.triplets().tolist()]
    assert sorted(found) == sorted(expected)
    assert int(mined.n_triplets) == len(expected)
    assert int(mined.n_anchors) == len({(a, c) for a, _, _, c in expected})
    assert mined.by_label().tolist() == [sum(t[3] == c for t in expected) for c in range(len(targets[0]))]
    minority = minority_classes(torch.tensor(targets), rho, scope)
    assert minority.nonzero().flatten().tolist() == sorted(oracle.profile(targets, rho, scope))


@settings(max_examples=50, deadline=None)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=20), scope=st.sampled_from(["joint", "attribute"]))
def test_class_indices_equal_one_hot(labels, scope):
    indices = torch.tensor(labels)
    one_hot = torch.nn.functional.one_hot(indices, 5)
    scores = torch.rand(len(labels), 5)
    assert torch.equal(minority_classes(indices, scope=scope, n_classes=5), minority_classes(one_hot, scope=scope))
    assert torch.equal(
        mine(scores, indices, 3, scope=scope).triplets(), mine(scores, one_hot, 3, scope=scope).triplets()
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16])
def test_any_target_dtype(dtype):
    scores, targets = article_batch()
    assert torch.equal(mine(scores, targets.to(dtype), 3).triplets(), mine(scores, targets, 3).triplets())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores(dtype):
    scores, targets = torch.rand(40, 6).to(dtype), torch.rand(40, 6) < 0.15
    expected = oracle.triplets(scores.tolist(), targets.int().tolist(), 4, 0.5, "joint")
    assert sorted(map(tuple, mine(scores, targets, 4).triplets().tolist())) == sorted(expected)


def test_permutation_equivariance():
    scores, targets, features = torch.rand(48, 6), torch.rand(48, 6) < 0.1, torch.randn(48, 5)
    order = torch.randperm(48)
    for level in ("class", "instance"):
        there = mine(scores, targets, 5, level=level, features=features).triplets()
        here = mine(scores[order], targets[order], 5, level=level, features=features[order]).triplets()
        back = torch.cat([order[here[:, :3]], here[:, 3:]], 1)
        assert set(map(tuple, back.tolist())) == set(map(tuple, there.tolist()))


def test_other_labels_scores_do_not_leak():
    scores, targets = torch.rand(48, 6), torch.rand(48, 6) < 0.1
    other = scores.clone()
    other[:, 1:] = torch.rand(48, 5)
    for scope in ("joint", "attribute"):
        first, second = (mine(x, targets, 5, scope=scope).triplets() for x in (scores, other))
        assert torch.equal(first[first[:, 3] == 0], second[second[:, 3] == 0])
        assert len(first[first[:, 3] == 0])


def test_ties_go_to_the_lower_index():
    targets = torch.zeros(20, 1)
    targets[[3, 5, 7, 9]] = 1
    found = mine(torch.full((20, 1), 0.5), targets, k=2).triplets()
    assert set(found[:, 2].tolist()) == {0, 1}
    assert {(a, i) for a, i, _, _ in found.tolist()} == {(3, 5), (3, 7), (5, 3), (5, 7), (7, 3), (7, 5), (9, 3), (9, 5)}


def test_a_whole_number_of_any_type_will_do_for_k():
    scores, targets = article_batch()
    assert torch.equal(mine(scores, targets, 3.0).triplets(), mine(scores, targets, 3).triplets())


def test_minus_zero_ties_with_zero():
    """Equal scores whose bits differ: among positives, negatives, and where the label is flipped."""
    scores, targets = (
        torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0, -0.0])[:, None],
        torch.tensor([1, 1, 1, 0, 0, 0])[:, None],
    )
    for y, scope in ((targets, "joint"), (1 - targets, "joint"), (targets, "attribute")):
        expected = oracle.triplets(scores.tolist(), y.tolist(), 1, 0.5, scope)
        assert sorted(map(tuple, mine(scores, y, 1, scope=scope).triplets().tolist())) == sorted(expected)
        assert expected


def test_sparse_label_space_equals_dense():
    """More labels than can be minority at once: the rows that are left out hold nothing."""
    targets = torch.zeros(16, 300)
    targets[torch.arange(16), torch.arange(16) // 2 * 37] = 1
    scores = torch.rand(16, 300)
    used = targets.any(0).nonzero().flatten()
    dense = mine(scores[:, used], targets[:, used], 3).triplets()
    dense[:, 3] = used[dense[:, 3]]
    assert set(map(tuple, mine(scores, targets, 3).triplets().tolist())) == set(map(tuple, dense.tolist()))
    assert len(dense)


def test_padding_is_bounded():
    """Shapes follow from the arguments alone, and joint scope never pads beyond ρ·n anchors."""
    for targets in (torch.zeros(64, 28), torch.rand(64, 28) < 0.05, torch.ones(64, 28)):
        mined = mine(torch.rand(64, 28), targets)
        assert mined.anchor.shape == (32,) and mined.positive.shape == (32, 26) and mined.negative.shape == (32, 25)


def test_empty_batch():
    mined = mine(torch.zeros(0, 3), torch.zeros(0, 3))
    assert int(mined.n_triplets) == 0 and mined.triplets().shape == (0, 4) and mined.by_label().tolist() == [0, 0, 0]


def test_pairwise_distance():
    features = torch.randn(20, 7, dtype=torch.float64) + 100
    features[3] = features[8]
    features.requires_grad_()
    found = pairwise_distance(features)
    assert torch.allclose(
        found, torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist"), atol=1e-6
    )
    assert found[3, 8].item() == 0 and not found.diagonal().any()
    found.sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.rand(4)}, r"scores must be .* \(n, C\)"),
        ({"scores": torch.ones(4, 3, dtype=torch.long)}, "floating-point"),
        ({"scores": torch.full((4, 3), torch.nan)}, "scores must be finite"),
        ({"targets": torch.zeros(5, 3)}, r"targets of shape \(5, 3\) do not fit scores of shape \(4, 3\)"),
        ({"targets": torch.zeros(4)}, "integer class indices"),
        ({"targets": torch.full((4, 3), 1.5)}, r"targets must be in \[0, 1\]"),
        ({"targets": torch.full((4, 3), -1)}, r"targets must be in \[0, 1\]"),
        ({"targets": torch.tensor([0, 1, 2, 3])}, r"targets must be in \[0, 2\]: class indices of 3 classes"),
        ({"k": 0}, "k=0"),
        ({"k": 2.5}, "k=2.5"),
        ({"rho": 0}, "rho=0"),
        ({"rho": 1.1}, "rho=1.1"),
        ({"scope": "all"}, "scope='all'.*'joint', 'attribute'"),
        ({"level": "pixel"}, "level='pixel'"),
        ({"level": "instance"}, "pass features"),
        ({"level": "instance", "features": torch.rand(3, 2)}, "n = 4"),
        ({"level": "instance", "features": torch.full((4, 2), torch.inf)}, "features must be finite"),
    ],
)
def test_errors_name_value_and_rule(change, message):
    with pytest.raises(ValueError, match=message):
        mine(**{"scores": torch.rand(4, 3), "targets": torch.zeros(4, 3), **change})
