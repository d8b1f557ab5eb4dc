"""`CRLLoss`, the complete loss."""

import pickle

import pytest
import torch
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from torch import nn

from fastai_crl._checks import Batch
from fastai_crl.hpa import HPA_COUNTS
from fastai_crl.losses import CRL, CRLLoss, imbalance, make_loss


def batch(n=40, n_classes=6, rate=0.1):
    return torch.randn(n, n_classes, requires_grad=True), (torch.rand(n, n_classes) < rate).float()


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


class Plain(nn.Module):
    """A loss with no reduction and no activation, as timm's."""

    def forward(self, logits, targets):
        if targets.ndim == 1:
            return nn.functional.cross_entropy(logits, targets)
        return nn.functional.multilabel_soft_margin_loss(logits, targets)


@pytest.mark.parametrize("base", [Plain(), nn.MultiLabelSoftMarginLoss(), lambda z, y: Plain()(z, y)])
def test_a_base_loss_of_torch_is_completed(base):
    z, y = batch()
    loss = CRLLoss(base, alpha=0.3)
    assert loss(z, y) == 0.3 * CRL()(z, y) + 0.7 * Plain()(z, y)
    torch.testing.assert_close(loss.activation(z), z.sigmoid())
    assert torch.equal(loss.decodes(z.sigmoid()), z > 0)
    loss.reduction = "none"
    assert loss(z, y).shape[0] == 40
    torch.testing.assert_close(loss(z, y).reshape(40, -1).mean(), Plain()(z, y))


def test_a_base_loss_of_class_indices_is_completed():
    z, labels = torch.randn(8, 4), torch.tensor([0, 1, 2, 3] * 2)
    loss = CRLLoss(Plain(), alpha=0.3)
    with pytest.raises(ValueError, match=r"seen no batch.*single_label=True"):
        loss.activation(z)
    loss(z, labels)
    torch.testing.assert_close(loss.activation(z), z.softmax(1))
    assert torch.equal(loss.decodes(z.softmax(1)), z.argmax(1))
    assert torch.equal(CRLLoss(Plain(), single_label=True).activation(z), z.softmax(1))
    assert torch.equal(CRLLoss(single_label=False).activation(z), z.sigmoid())


def test_shift_of_the_base_loss():
    """By default, as numbers, or not at all."""
    counts, z = [30, 8, 2], torch.randn(40, 3)
    multi, single = (torch.rand(40, 3) < 0.2).float(), torch.tensor([0] * 30 + [1] * 8 + [2] * 2)
    for targets in (multi, single):
        base = make_loss("logit_adjusted", counts, 40, single_label=targets.ndim == 1)
        for options, used in (({}, base.shift), ({"shift": None}, None), ({"shift": counts}, counts)):
            loss = CRLLoss(base, alpha=0.3, **options)
            expected = 0.3 * CRL(shift=used)(z, targets) + 0.7 * base(z, targets)
            torch.testing.assert_close(loss(z, targets), expected)
    with pytest.raises(ValueError, match="shift='none' is unknown"):
        CRLLoss(shift="none")


@pytest.mark.parametrize("alpha", [-0.1, 1.1, "automatic", float("nan")])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match="alpha="):
        CRLLoss(alpha=alpha)


@pytest.mark.parametrize("shape", [(40, 1), (40,)])
def test_auto_alpha_of_one_label(shape):
    """Its classes are its positives and its negatives: |½ - share of positives|."""
    loss, positives = CRLLoss(), 0
    for i in (1, 2):
        z, y = torch.randn(40, 1), torch.zeros(shape)
        y[: 4 * i] = 1
        positives += 4 * i
        crl = CRL()(z, y.reshape(40, 1))
        base = nn.functional.binary_cross_entropy_with_logits(z, y.reshape(40, 1))
        alpha = 0.5 - positives / (40 * i)
        assert alpha > 0.3 and crl > 0
        torch.testing.assert_close(loss(z, y), alpha * crl + (1 - alpha) * base)
    assert CRLLoss(counts=[10, 90]).alpha == pytest.approx(0.4)
    with pytest.raises(ValueError, match=r"counts=\[5\] of one label.*positives and its negatives"):
        CRLLoss(counts=[5])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "options", [{}, {"criterion": "ranking"}, {"level": "instance"}, {"criterion": "distribution"}]
)
def test_a_batch_that_is_not_finite_is_left_to_the_base_loss(value, options):
    good, targets = batch()
    features = torch.randn(40, 3, requires_grad=True) if options.get("level") else None
    loss = CRLLoss(alpha=0.4, **options)
    assert loss.crl.loss_and_triplets(good, targets, features).triplets.any()
    logits = good.detach().clone()
    logits[3, 1] = value
    logits.requires_grad_()
    total, base = loss(logits, targets, features), nn.functional.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(total, base, equal_nan=True)
    rectified = loss.crl.rectify(Batch.of_training(logits, targets, features))
    assert rectified.loss == 0 and not rectified.triplets.any()
    ours = torch.autograd.grad(rectified.loss, logits, allow_unused=True, materialize_grads=True)[0]
    assert not ours.any()  # 0, and not NaN
    with pytest.raises(ValueError, match="logits must be finite"):
        loss.crl(logits, targets, features)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([[1.0, torch.nan], [0, 1]]), r"\[0, 1\].*item 0, label 1 of the batch has nan \(1 such"),
        (
            torch.tensor([[1, 0], [-1, -1]]),
            r"item 1, label 0 of the batch has -1 \(2 such in all\).*leave the items out",
        ),
        (
            torch.tensor([1, 2]),
            r"class indices of 2 classes, the network's outputs; item 1 of the batch has 2",
        ),
        (torch.tensor([-1, 0]), r"item 0 of the batch has -1"),
    ],
)
def test_targets_are_checked_before_logits(targets, message):
    for logits in (torch.zeros(2, 2), torch.full((2, 2), torch.nan)):
        for call in (CRL(), CRLLoss(base_loss=lambda z, y: z.sum(), alpha=0.5), CRLLoss(lambda z, y: z.sum(), 0.0)):
            with pytest.raises(ValueError, match=message):
                call(logits, targets)


def test_a_saved_shift_loads_before_the_first_batch():
    def made():
        return CRLLoss(make_loss("logit_adjusted", [50, 20, 2], single_label=True), alpha=0.3, criterion="ranking")

    loss, logits, targets = made(), torch.randn(20, 3), torch.arange(20) % 3
    expected, fresh = loss(logits, targets), made()
    fresh.load_state_dict(loss.state_dict())
    assert torch.equal(fresh(logits, targets), expected)


def test_auto_alpha_is_limited_by_the_criterion():
    counts, z, y = [90, 1, 1], torch.randn(92, 3), torch.eye(3)[[0] * 90 + [1, 2]]
    full = imbalance(counts)
    assert full > 0.25
    for criterion, alpha in (("relative", full), ("ranking", 0.25)):
        base, term = nn.functional.binary_cross_entropy_with_logits(z, y), CRL(criterion=criterion)(z, y)
        assert CRLLoss(counts=counts, criterion=criterion).alpha == pytest.approx(alpha)
        mined = criterion == "ranking"  # a lone positive makes no triplet
        expected = alpha * term + (1 - alpha) * base if mined else base
        torch.testing.assert_close(CRLLoss(criterion=criterion)(z, y), expected)
    balanced = CRLLoss(counts=[30, 20, 20], criterion="ranking").alpha
    assert balanced == pytest.approx(imbalance([30, 20, 20])) and balanced < 0.25
