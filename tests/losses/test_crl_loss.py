"""`CRLLoss`, the complete loss, and the imbalance measure."""

import pickle

import pytest
import torch
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from torch import nn

from fastai_crl.hpa import HPA_COUNTS
from fastai_crl.losses.crl_loss import CRL, CRLLoss, imbalance


def batch(n=40, n_classes=6, rate=0.1):
    return torch.randn(n, n_classes, requires_grad=True), (torch.rand(n, n_classes) < rate).float()


@pytest.mark.parametrize(("how", "expected"), [("move", 0.476), ("fill", 0.859), ("ratio", 0.00085)])
def test_imbalance_of_hpa(how, expected):
    assert imbalance(HPA_COUNTS, how) == pytest.approx(expected, rel=5e-3)


def test_imbalance_by_hand():
    assert imbalance([30, 10]) == pytest.approx(0.25)
    assert imbalance(torch.tensor([30, 10]), "fill") == pytest.approx(1 - 40 / 60)
    assert imbalance([7, 7, 7]) == 0 and imbalance([7, 7, 7], "fill") == 0 and imbalance([7, 7, 7], "ratio") == 1


@pytest.mark.parametrize("counts", [[], [0, 0], [1, -1], [1, float("nan")]])
def test_imbalance_refuses(counts):
    with pytest.raises(ValueError, match="counts="):
        imbalance(counts)
    with pytest.raises(ValueError, match="how='mean'"):
        imbalance([1, 2], "mean")


def test_total_is_the_mix():
    z, y = batch()
    base = nn.functional.binary_cross_entropy_with_logits(z, y)
    for alpha in (0.0, 0.3, 1.0):
        expected = alpha * CRL(k=3)(z, y) + (1 - alpha) * base
        torch.testing.assert_close(CRLLoss(alpha=alpha, k=3)(z, y), expected)
    indices = y.argmax(1)
    expected = 0.3 * CRL()(z, indices) + 0.7 * nn.functional.cross_entropy(z, indices)
    torch.testing.assert_close(CRLLoss(alpha=0.3)(z, indices), expected)


def test_no_triplet_is_the_base_loss_exactly():
    for y in (torch.zeros(40, 6), torch.ones(40, 6), torch.full((40, 6), 0.4)):
        z = torch.randn(40, 6, requires_grad=True)
        base = nn.functional.binary_cross_entropy_with_logits(z, y)
        loss = CRLLoss(alpha=0.7)(z, y)
        assert torch.equal(loss, base)
        ours, theirs = torch.autograd.grad(loss, z)[0], torch.autograd.grad(base, z)[0]
        assert torch.equal(ours, theirs)


def test_auto_alpha_is_the_imbalance_of_the_labels_seen():
    loss, h = CRLLoss(), torch.zeros(6)
    for _ in range(3):
        z, y = batch()
        h += y.sum(0)
        expected = CRLLoss(alpha=imbalance(h))(z, y)
        torch.testing.assert_close(loss(z, y), expected)
    z, y = batch()
    torch.testing.assert_close(CRLLoss(counts=HPA_COUNTS)(z, y), CRLLoss(alpha=imbalance(HPA_COUNTS))(z, y))


@pytest.mark.parametrize("base", [None, BCEWithLogitsLossFlat(), nn.BCEWithLogitsLoss()])
def test_behaves_as_a_fastai_loss(base):
    z, y = batch()
    loss = CRLLoss(base, alpha=0.3)
    assert loss.reduction == "mean"
    before = loss(z, y)
    loss.reduction = "none"
    per_item = loss(z, y)
    assert per_item.numel() == z.numel()
    torch.testing.assert_close(per_item.mean(), nn.functional.binary_cross_entropy_with_logits(z, y))
    loss.reduction = "mean"
    assert torch.equal(loss(z, y), before)
    assert torch.equal(loss.activation(z), z.sigmoid())
    assert torch.equal(loss.decodes(z.sigmoid()), z.sigmoid() > 0.5)
    copy = pickle.loads(pickle.dumps(loss))
    assert torch.equal(copy(z, y), before)
    loss.eval()
    torch.testing.assert_close(loss(z, y), nn.functional.binary_cross_entropy_with_logits(z, y))


def test_single_label_decisions():
    z, labels = torch.randn(8, 4), torch.tensor([0, 1, 2, 3] * 2)
    for base in (CrossEntropyLossFlat(), nn.CrossEntropyLoss()):
        loss = CRLLoss(base, alpha=0.3)
        loss(z, labels)
        torch.testing.assert_close(loss.activation(z), z.softmax(1))
        assert torch.equal(loss.decodes(z.softmax(1)), z.argmax(1))


def test_base_loss_without_a_reduction_keeps_it_that_way():
    loss = CRLLoss(lambda z, y: (z.sigmoid() - y).square().mean(), alpha=0.5)
    assert not hasattr(loss, "reduction")
    assert loss(*batch()).isfinite()


@pytest.mark.parametrize("alpha", [-0.1, 1.1, "automatic", float("nan")])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match="alpha="):
        CRLLoss(alpha=alpha)
