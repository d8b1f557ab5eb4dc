"""Losses by name: each against a direct call of its library, and under CRL in a learner."""

import pickle
import sys

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.training import ShortEpochCallback
from fastai.data.core import DataLoaders
from fastai.learner import load_learner
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fastai_crl.images.image_set import ImageSet
from fastai_crl.labels import label_counts
from fastai_crl.learner import crl_learner
from fastai_crl.losses.baselines import MULTI_LABEL_LOSSES, SINGLE_LABEL_LOSSES, make_loss
from fastai_crl.losses.crl_loss import CRL

pytest.importorskip("timm", minversion="1.0.31", reason="timm with the multi-label losses is not installed")
import timm.loss

N, COUNTS = 100, torch.tensor([60.0, 20.0, 5.0, 0.0])
LOGITS = torch.linspace(-3, 3, 24).reshape(6, 4)[torch.tensor([3, 0, 5, 1, 4, 2])]
TARGETS = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0]]).float()
CLASSES = torch.tensor([0, 1, 2, 3, 0, 2])
NEEDS_COUNTS = {"weighted_bce", "db", "class_balanced", "logit_adjusted"}


def make(name, **options):
    return make_loss(name, COUNTS if name in NEEDS_COUNTS else None, N if name in NEEDS_COUNTS else None, **options)


def direct(name):
    """The library's own call."""
    if name == "bce":
        return F.binary_cross_entropy_with_logits(LOGITS, TARGETS)
    if name == "weighted_bce":
        weight = torch.tensor([(40 / 60) ** 0.5, (80 / 20) ** 0.5, (95 / 5) ** 0.5, 99**0.5])
        return F.binary_cross_entropy_with_logits(LOGITS, TARGETS, pos_weight=weight)
    if name == "focal":
        p_t = torch.where(TARGETS == 1, LOGITS.sigmoid(), (-LOGITS).sigmoid())
        return (-((1 - p_t) ** 2) * p_t.log()).mean()
    if name == "asl":
        return timm.loss.AsymmetricLossMultiLabel()(LOGITS, TARGETS) / 4  # sums over the labels by default
    if name == "db":
        return timm.loss.DistributionBalancedLoss(COUNTS, N)(LOGITS, TARGETS)
    if name == "two_way":
        return timm.loss.TwoWayLoss()(LOGITS, TARGETS)
    if name == "zlpr":
        return timm.loss.ZlprLoss()(LOGITS, TARGETS)
    shift = torch.tensor([60 / 40, 20 / 80, 5 / 95, 1 / 99]).log()
    return F.binary_cross_entropy_with_logits(LOGITS + shift, TARGETS)


def direct_single(name):
    if name == "ce":
        return F.cross_entropy(LOGITS, CLASSES)
    if name == "focal":
        p_t = LOGITS.softmax(1)[range(6), CLASSES]
        return (-((1 - p_t) ** 2) * p_t.log()).mean()
    if name == "class_balanced":
        weight = (1 - 0.999) / (1 - 0.999 ** COUNTS.clamp(1).double())
        return F.cross_entropy(LOGITS, CLASSES, weight=(weight / weight.mean()).float())
    return F.cross_entropy(LOGITS + torch.tensor([60.0, 20, 5, 1]).div(85).log(), CLASSES)


@pytest.mark.parametrize("name", MULTI_LABEL_LOSSES)
def test_values_multi_label(name):
    torch.testing.assert_close(torch.Tensor(make(name)(LOGITS, TARGETS)), direct(name))


@pytest.mark.parametrize("name", SINGLE_LABEL_LOSSES)
def test_values_single_label(name):
    loss = make_loss(name, COUNTS if name in NEEDS_COUNTS else None, single_label=True)
    torch.testing.assert_close(torch.Tensor(loss(LOGITS, CLASSES)), direct_single(name))


def test_options():
    asl = make_loss("asl", gamma_neg=2, gamma_pos=0, clip=0.1, reduction="batchmean")
    torch.testing.assert_close(asl(LOGITS, TARGETS), timm.loss.AsymmetricLossMultiLabel(2, 0, 0.1)(LOGITS, TARGETS))
    assert make("weighted_bce", power=1, max_weight=7).func.pos_weight.tolist() == pytest.approx([40 / 60, 4, 7, 7])
    assert make("logit_adjusted", tau=2).shift[1] == pytest.approx(2 * np.log(20 / 80))
    plain, balanced = (make_loss("focal", **o)(LOGITS, TARGETS) for o in ({"balance": 0.25}, {"balance": 0.75}))
    torch.testing.assert_close(plain + balanced, direct("focal"))  # a quarter, and the other three
    with pytest.raises(TypeError, match="gama"):
        make_loss("asl", gama=1)


@pytest.mark.parametrize("name", [*MULTI_LABEL_LOSSES, *(f"single {n}" for n in SINGLE_LABEL_LOSSES)])
def test_a_complete_fastai_loss(name):
    single, targets = name.startswith("single "), CLASSES if name.startswith("single ") else TARGETS
    loss = make(name.removeprefix("single "), single_label=single)
    loss = pickle.loads(pickle.dumps(loss))
    value = float(loss(LOGITS, targets))
    probs = loss.activation(LOGITS)
    expected = LOGITS.softmax(1) if single else LOGITS.sigmoid()
    torch.testing.assert_close(torch.Tensor(probs), expected)
    assert loss.decodes(probs).tolist() == (LOGITS.argmax(1) if single else LOGITS > 0).tolist()
    assert loss.reduction == "mean"
    loss.reduction = "none"
    each = torch.Tensor(loss(LOGITS, targets)).reshape(6, -1).mean(1)
    if name == "two_way":  # compares the items of the batch: as a batch of its own an item is something else
        assert float(each[1]) == pytest.approx(float(timm.loss.TwoWayLoss()(LOGITS[1:2], TARGETS[1:2])))
    elif name == "single class_balanced":
        assert float(each.sum() / loss.func.weight[CLASSES].sum()) == pytest.approx(value)
    else:
        assert float(each.mean()) == pytest.approx(value, rel=1e-5)
    loss.reduction = "mean"
    assert float(loss(LOGITS, targets)) == value


@pytest.mark.parametrize("name", [*MULTI_LABEL_LOSSES, *(f"single {n}" for n in SINGLE_LABEL_LOSSES)])
@pytest.mark.parametrize("count", [0, N])
def test_a_label_that_never_or_always_occurs_is_learned(name, count):
    """As if it had, or had not, once: the gradient pulls it the right way, and stays finite."""
    if name == "two_way":
        pytest.skip("knows no counts: it compares the positives of a batch with its negatives")
    single, name = name.startswith("single "), name.removeprefix("single ")
    counts = torch.tensor([float(count), float(N - count) if single else 20.0])
    loss = make_loss(name, counts if name in NEEDS_COUNTS else None, N, single_label=single)
    for there in (0, 1):
        x = torch.tensor([[-3.0, 0.0], [3.0, 0.0]][1 - there] * 4).reshape(4, 2).requires_grad_()
        y = torch.full((4,), 1 - there) if single else torch.tensor([[float(there), 0.0]] * 4)
        loss(x, y).backward()
        assert x.grad.isfinite().all()
        assert ((x.grad[:, 0] < -1e-5) if there else (x.grad[:, 0] > 1e-5)).all(), (there, x.grad)


def test_weight_of_a_label_that_is_always_there():
    weight = make_loss("weighted_bce", [20, 5, 0, 19], 20, power=1).func.pos_weight
    assert weight.tolist() == pytest.approx([1 / 19, 3, 19, 1 / 19])


def test_half_precision_is_computed_in_float32():
    hot = torch.tensor([[30.0, -30.0]], dtype=torch.float16, requires_grad=True)
    loss = make_loss("asl")(hot, torch.tensor([[0.0, 1.0]]))
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert hot.grad.isfinite().all()


class Probe(Callback):
    """Keeps what the first training batch gave, after CRLCallback (order 5)."""

    order = 6

    def after_loss(self):
        if self.training and not hasattr(self, "seen"):
            self.seen = self.learn.pred.detach(), self.learn.y, float(self.learn.loss.detach())


def tiny(pretrained=False):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def check_fit(dls, name, path):
    """One batch: α·L_crl + (1 - α)·L_base; then what fastai asks of a loss."""
    learn = crl_learner(dls, tiny, loss_func=name, alpha=0.4, schedule=[1.0, 1.0], scope="attribute", path=path)
    probe = Probe()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=[probe, ShortEpochCallback(pct=0.01)])
    logits, targets, loss = probe.seen
    with torch.no_grad():
        shift = learn.loss_func.shift if name == "logit_adjusted" else None
        crl = CRL(scope="attribute", criterion="ranking", average="label", rho=1.0, shift=shift)
        base, term = float(learn.loss_func(logits, targets)), float(crl(logits, targets))
    assert term > 0 and loss == pytest.approx(0.4 * term + 0.6 * base, rel=1e-4)
    probs, _, losses = learn.get_preds(with_loss=True)
    assert len(losses) == len(probs) and losses.isfinite().all() and probs.min() >= 0 and probs.max() <= 1
    learn.export("x.pkl")
    again = load_learner(path / "x.pkl")
    torch.testing.assert_close(again.loss_func(logits, targets), learn.loss_func(logits, targets))


@pytest.mark.parametrize("name", MULTI_LABEL_LOSSES)
def test_crl_composes(hpa_dls, name, tmp_path):
    check_fit(hpa_dls, name, tmp_path)


@pytest.mark.parametrize("name", SINGLE_LABEL_LOSSES)
def test_crl_composes_single_label(single_label_dls, name, tmp_path):
    check_fit(single_label_dls, name, tmp_path)


def test_counts_from_data_loaders(hpa_dls, single_label_dls):
    counts, n = label_counts(hpa_dls.train, hpa_dls.c), len(hpa_dls.train_ds)
    torch.testing.assert_close(make_loss("db", dls=hpa_dls).func.freq_inv, 1 / counts.clamp(1, n - 1))
    torch.testing.assert_close(make_loss("logit_adjusted", dls=hpa_dls).shift, (counts.clamp(1) / n).logit())
    counts = label_counts(single_label_dls.train, single_label_dls.c)
    single = make_loss("logit_adjusted", dls=single_label_dls)
    assert single.single_label and single.reduction == "mean"
    torch.testing.assert_close(single.shift, (counts / counts.sum()).log())


def test_the_kind_of_task_opens_no_image(hpa_dls, single_label_dls, monkeypatch):
    def fail(*args):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(ImageSet, "open", fail)
    with pytest.raises(AssertionError, match="was opened"):
        hpa_dls.train_ds[0]
    for dls, expected in ((hpa_dls, False), (single_label_dls, True)):
        assert make_loss("logit_adjusted", dls=dls).single_label is expected


def test_the_kind_of_task_of_plain_data():
    x = torch.rand(6, 4)
    for y, expected in ((torch.arange(6) % 3, True), (torch.rand(6), True), (torch.zeros(6, 3), False)):
        data = TensorDataset(x, y)
        dls = DataLoaders.from_dsets(data, data, bs=2, num_workers=0)
        assert make_loss("logit_adjusted", counts=[3, 2, 1], n=6, dls=dls).single_label is expected


def test_mixup_of_class_indices(single_label_dls):
    learn = crl_learner(single_label_dls, tiny, loss_func="logit_adjusted", cbs=MixUp())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert np.isfinite(learn.recorder.losses[-1])


def test_unknown_names_and_counts(hpa_dls):
    with pytest.raises(ValueError, match="'hinge' is unknown: use one of 'bce', "):
        make_loss("hinge", dls=hpa_dls)
    with pytest.raises(ValueError, match="'asl' is a loss of the other kind"):
        make_loss("asl", single_label=True)
    with pytest.raises(ValueError, match="db needs to know how common each label is: pass counts="):
        make_loss("db")
    with pytest.raises(ValueError, match=r"logit_adjusted needs .* n=, the number"):
        make_loss("logit_adjusted", counts=[1, 2])
    with pytest.raises(ValueError, match=r"counts=\[nan, 11.0\] of n=11 samples"):
        make_loss("class_balanced", counts=[float("nan"), 11], single_label=True)
    with pytest.raises(ValueError, match=r"counts=\[5.0, 11.0\] of n=10 samples"):
        make_loss("weighted_bce", counts=[5, 11], n=10)
    with pytest.raises(ValueError, match="reduction='sum' is unknown"):
        make_loss("zlpr").reduction = "sum"


def test_timm_missing_or_too_old(monkeypatch):
    monkeypatch.delattr(timm.loss, "TwoWayLoss")
    with pytest.raises(ImportError, match=r'TwoWayLoss of timm.loss.*pip install -U "timm>=1.0.31"'):
        make_loss("two_way")
    monkeypatch.setitem(sys.modules, "timm.loss", None)
    with pytest.raises(ImportError, match="needs AsymmetricLossMultiLabel"):
        make_loss("asl")
    assert float(make_loss("bce")(LOGITS, TARGETS)) > 0  # needs no timm
