"""A criterion of a user's own, in one class, against its own plain loop; and how a criterion is asked for."""

import pickle

import pytest
import torch
from torch import nn

from fastai_crl.losses import CRL, CRLLoss
from fastai_crl.losses.criteria import CRITERIA, Criterion, Distribution, Relative, make_criterion
from tests import oracle


class Logistic(Criterion):
    """Mean of log(1 + exp(m + d(a,+) - d(a,-))) over all triplets, or over each label's."""

    name = "logistic"
    averages = ("triplet", "label")

    def sums(self, pairs, margin):
        gap = margin + pairs.to_positive[:, :, None] - pairs.to_negative[:, None, :]
        is_triplet = pairs.is_positive[:, :, None] & pairs.is_negative[:, None, :]
        by_anchor = (nn.functional.softplus(gap) * is_triplet).sum((1, 2))
        return ((by_anchor if pairs.share is None else by_anchor * pairs.share).sum(),)

    def loss(self, *sums, counts):
        return sums[0] / counts.sum().clamp_min(1)


class PushOnly(Criterion):
    """Mean of (1 - d(a,-))² over pairs of an anchor and a negative: a lone positive is enough."""

    name, lone_positive, rho = "push", True, 1.0

    def sums(self, pairs, margin):
        return (((1 - pairs.to_negative).square() * pairs.is_negative).sum(),)

    def loss(self, *sums, counts):
        return sums[0] / counts.sum().clamp_min(1)


@pytest.mark.parametrize("average", ["triplet", "label"])
@pytest.mark.parametrize("scope", ["joint", "attribute"])
@pytest.mark.parametrize("level", ["class", "instance"])
def test_a_criterion_of_ones_own_equals_its_plain_loop(level, scope, average):
    mined = 0
    for seed in range(20):
        torch.manual_seed(seed)
        logits = torch.randn(14, 3, dtype=torch.float64, requires_grad=True)
        features = torch.randn(14, 2, dtype=torch.float64, requires_grad=True)
        targets = (torch.rand(14, 3) < 0.3).double()
        crl = CRL(3, level=level, scope=scope, criterion=Logistic(), margin=0.2, average=average)
        p = logits.sigmoid()
        found = oracle.triplets(p.tolist(), targets.tolist(), 3, 0.5, scope, level, features.tolist())
        loss, counts = crl.loss_and_triplets(logits, targets, features)
        assert counts.tolist() == [sum(c == label for *_, label in found) for c in range(3)]
        if not found:
            assert loss == 0
            continue
        mined += 1
        each, _, _ = oracle.pair_distances(found, p, targets.tolist(), scope, level, features)
        values = [torch.log1p(torch.exp(0.2 + near - far)) for near, far in each]
        expected = oracle.average(values, [c for *_, c in found], average)
        torch.testing.assert_close(loss, expected)
        compared = logits if level == "class" else features
        torch.testing.assert_close(*(torch.autograd.grad(x, compared)[0] for x in (loss, expected)))
    assert mined > 10


def test_a_lone_positive_is_enough_where_the_criterion_says_so():
    logits, targets = torch.randn(10, 3, dtype=torch.float64, requires_grad=True), torch.zeros(10, 3)
    targets[0, 0] = targets[1, 1] = targets[2, 1] = 1
    targets[3:, 2] = 1
    loss, counts = CRL(4, criterion=PushOnly()).loss_and_triplets(logits, targets)
    expected, p = [], logits.sigmoid()
    for c, (anchors, others) in oracle.profile(targets.tolist(), 1.0, "joint", least=1).items():
        hardest = sorted(others, key=lambda j, c=c: -float(p[j, c].detach()))[:4]
        expected += [(1 - p[a, c] + p[j, c]) ** 2 for a in anchors for j in hardest]
    assert counts.tolist() == [4, 8, 21] and len(expected) == 33
    torch.testing.assert_close(loss, oracle.mean(expected))


def test_an_object_goes_wherever_a_name_does():
    logits, targets = torch.randn(30, 4, requires_grad=True), (torch.rand(30, 4) < 0.2).float()
    for name, kind in CRITERIA.items():
        assert torch.equal(CRL(criterion=name)(logits, targets), CRL(criterion=kind())(logits, targets))
        assert CRL(criterion=name).rho == kind.rho and CRL(criterion=name).average == kind.average
    few = CRL(criterion=Distribution(5))(logits, targets)
    assert not torch.equal(few, CRL(criterion="distribution")(logits, targets))
    crl = CRLLoss(alpha=0.5, criterion=Logistic()).crl
    assert "logistic" in repr(crl) and pickle.loads(pickle.dumps(crl)).criterion.name == "logistic"
    assert repr(CRL(**crl.options)) == repr(crl)


@pytest.mark.parametrize(
    ("make", "argument", "message"),
    [
        (make_criterion, "cosine", "criterion='cosine' is unknown: use one of 'relative'.*or an object"),
        (make_criterion, Logistic, "Logistic.* is unknown"),
        (Distribution, 1, "bins=1: a histogram needs"),
        (Distribution, 2.5, "bins=2.5"),
    ],
)
def test_what_is_no_criterion(make, argument, message):
    with pytest.raises(ValueError, match=message):
        make(argument)


def test_a_criterion_without_its_methods_says_so():
    logits, targets = torch.randn(30, 4), (torch.rand(30, 4) < 0.2).float()
    with pytest.raises(NotImplementedError, match=r"Criterion needs a method sums\(pairs, margin\)"):
        CRL(criterion=Criterion())(logits, targets)


class SoftRelative(Relative):
    """Relative with sums of its own, which are not those that the engines compute."""

    name = "soft"
    sums = Logistic.sums


class Squared(Relative):
    """Relative with a loss of its own."""

    name = "squared"

    def loss(self, *sums, counts):
        return super().loss(*sums, counts=counts).square()


class Renamed(Relative):
    """Relative by another name."""

    name = "renamed"


def test_sums_of_ones_own_are_used_in_a_class_derived_from_one_of_ours():
    logits, targets = torch.randn(30, 4), (torch.rand(30, 4) < 0.2).float()
    assert torch.equal(CRL(criterion=SoftRelative())(logits, targets), CRL(criterion=Logistic())(logits, targets))
    assert torch.equal(CRL(criterion=Renamed())(logits, targets), CRL()(logits, targets))
    assert Renamed.hinge and not SoftRelative.hinge
    torch.testing.assert_close(CRL(criterion=Squared())(logits, targets), CRL()(logits, targets).square())


class ByLabel(Logistic):
    name, averages, average = "mine", ("triplet",), "label"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": ByLabel()}, r"not 'mine', whose `averages` are \('triplet',\)"),
        ({"criterion": "ranking", "level": "instance"}, "no level='instance': it serves 'class'"),
    ],
)
def test_what_a_criterion_does_not_serve_is_named_alone(options, message):
    with pytest.raises(ValueError, match=message):
        CRL(**options)
