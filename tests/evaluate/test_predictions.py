"""Probabilities of learners with every kind of loss and loader."""

import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastai_crl.callback import CRLCallback
from fastai_crl.data.loaders import HPADataLoaders
from fastai_crl.evaluate.decider import set_thresholds
from fastai_crl.evaluate.interpret import CRLInterpretation
from fastai_crl.evaluate.metrics import CalibrationError, MacroF1, MeanAP, MicroF1
from fastai_crl.evaluate.predictions import EpochPreds, in_order, predict_probabilities
from fastai_crl.learner import CRLLearner
from fastai_crl.losses import CRLLoss, make_loss
from fastai_crl.predict.tta import d4_tta


def flat(n_classes, dtype=torch.float32):
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(4 * 16, n_classes)).to(dtype)


def quiet(learn, call, *args, **kwargs):
    with learn.no_bar(), learn.no_logging():
        return call(*args, **kwargs)


MULTI = {
    "fastai": BCEWithLogitsLossFlat,
    "torch": nn.BCEWithLogitsLoss,
    "soft margin": nn.MultiLabelSoftMarginLoss,
    "function": lambda: nn.functional.binary_cross_entropy_with_logits,
    "crl": lambda: CRLLoss(nn.BCEWithLogitsLoss()),
    "ours": lambda: make_loss("asl"),
}
SINGLE = {"fastai": CrossEntropyLossFlat, "torch": nn.CrossEntropyLoss, "crl": lambda: CRLLoss(nn.CrossEntropyLoss())}


@pytest.mark.parametrize("loss", MULTI)
def test_one_probability_everywhere(hpa_dls, tmp_path, loss):
    """The epoch table, the report, the predictions and test-time augmentation of every loss."""
    metrics = [MacroF1(), MicroF1(), MeanAP(), CalibrationError()]
    learn = CRLLearner(hpa_dls, flat(hpa_dls.c), loss_func=MULTI[loss](), metrics=metrics, path=tmp_path)
    nn.init.normal_(learn.model[-1].weight, std=4)
    logits = quiet(learn, learn.get_preds, act=torch.nn.Identity())[0]
    probs, targets = quiet(learn, predict_probabilities, learn)
    torch.testing.assert_close(probs, logits.sigmoid())
    assert probs.min() < 0.1 and probs.max() > 0.9 and targets.shape == probs.shape
    interp = quiet(learn, CRLInterpretation.from_learner, learn)
    assert np.array_equal(interp.probs, probs.numpy())
    table = dict(zip([m.name for m in metrics], quiet(learn, learn.validate)[1:], strict=True))
    report = interp.report()
    assert table["macro_f1"] == pytest.approx(report.F1.mean()) and table["mean_ap"] == pytest.approx(report.AP.mean())
    assert table["ece"] == pytest.approx(report.ECE.mean(), abs=1e-6)
    turned = quiet(learn, d4_tta, learn)[0]
    assert turned.min() >= 0 and turned.max() <= 1 and turned.shape == probs.shape


@pytest.mark.parametrize("loss", SINGLE)
def test_one_probability_everywhere_in_single_label_tasks(single_label_dls, tmp_path, loss):
    metrics = [MacroF1(), MicroF1(), MeanAP(), CalibrationError()]
    learn = CRLLearner(single_label_dls, flat(3), loss_func=SINGLE[loss](), metrics=metrics, path=tmp_path)
    nn.init.normal_(learn.model[-1].weight, std=4)
    probs, targets = quiet(learn, predict_probabilities, learn)
    torch.testing.assert_close(probs.sum(1), torch.ones(len(probs)))
    values = quiet(learn, learn.validate)[1:]
    report = quiet(learn, CRLInterpretation.from_learner, learn).report()
    assert values[0] == pytest.approx(report.F1.mean()) and values[2] == pytest.approx(report.AP.mean())
    assert values[1] == pytest.approx(float((probs.argmax(1) == targets).float().mean()))
    with pytest.raises(ValueError, match="single-label task takes the likeliest class"):
        quiet(learn, learn.fit_thresholds, how="f1")


def test_after_fitting_thresholds_everything_decides_alike(hpa_dls, tmp_path):
    learn = CRLLearner(
        hpa_dls, flat(hpa_dls.c), loss_func=BCEWithLogitsLossFlat(), metrics=[MacroF1(), MacroF1(0.5)], path=tmp_path
    )
    nn.init.normal_(learn.model[-1].weight, std=2)
    before = quiet(learn, learn.validate)[1:]
    assert before[0] == before[1]
    fitted = quiet(learn, learn.fit_thresholds, folds=2)
    value, fixed = quiet(learn, learn.validate)[1:]
    interp = quiet(learn, CRLInterpretation.from_learner, learn)
    assert value != fixed == before[1] and value == pytest.approx(interp.report().F1.mean())
    decided = quiet(learn, learn.get_preds, with_decoded=True)[2]
    assert np.array_equal(decided.numpy(), interp.chosen)
    assert quiet(learn, learn.predict, hpa_dls.valid_ds.items.iloc[3])[1].tolist() == interp.chosen[3].tolist()
    assert interp.report().threshold.tolist() == fitted.thresholds.tolist()
    set_thresholds(learn, 0.5)
    assert quiet(learn, learn.validate)[1] == fixed


# ---------------------------------------------------------------- loaders


def torch_loaders(shuffle=False, drop_last=False, n_classes=3, single_label=False):
    x = torch.rand(18, 4, 32, 32)
    y = torch.arange(18) % 3 if single_label else (torch.arange(3) == torch.arange(18)[:, None] % 3).float()
    loader = DataLoader(TensorDataset(x, y), 4, shuffle=shuffle, drop_last=drop_last)
    dls = DataLoaders(loader, loader)
    dls.c = n_classes
    return dls, x, y


@pytest.mark.parametrize("single_label", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_loaders_of_torch(tmp_path, drop_last, single_label):
    dls, x, y = torch_loaders(shuffle=True, drop_last=drop_last, single_label=single_label)
    loss = nn.CrossEntropyLoss() if single_label else nn.BCEWithLogitsLoss()
    learn = CRLLearner(dls, flat(3), loss_func=loss, metrics=MacroF1(), cbs=CRLCallback(), path=tmp_path)
    epochs = EpochPreds(ds_idx=0)
    quiet(learn, learn.fit, 1, cbs=epochs)
    for ds_idx in (0, 1):  # all items, in their own order
        probs, targets = quiet(learn, predict_probabilities, learn, ds_idx)
        with torch.no_grad():
            logits = learn.model.eval()(x)
        torch.testing.assert_close(probs, logits.softmax(1) if single_label else logits.sigmoid())
        assert torch.equal(targets, y)
    assert epochs.epochs[0].shape == (18, 3)
    interp = quiet(learn, CRLInterpretation.from_learner, learn)
    assert interp.report().support.tolist() == [6, 6, 6] and interp.counts.tolist() == [6, 6, 6]
    assert len(quiet(learn, d4_tta, learn)[0]) == 18
    if not single_label:
        assert len(quiet(learn, predict_probabilities, learn, dl=DataLoader(dls.valid.dataset, 5))[0]) == 18
        batches = (batch for batch in DataLoader(dls.valid.dataset, 5))
        assert torch.equal(quiet(learn, predict_probabilities, learn, dl=batches)[1], y)


def test_no_validation_set(hpa, tmp_path):
    dls = HPADataLoaders.from_csv(hpa, size=32, bs=16, num_workers=0, batch_tfms=[], valid_pct=0)
    learn = CRLLearner(dls, flat(dls.c), loss_func=BCEWithLogitsLossFlat(), path=tmp_path)
    for call in (
        learn.fit_thresholds,
        learn.show_results,
        lambda: CRLInterpretation.from_learner(learn),
        lambda: predict_probabilities(learn),
        lambda: d4_tta(learn),
        lambda: in_order(learn),
    ):
        with pytest.raises(ValueError, match=r"no validation set \(valid_pct=0\?\): pass dl= .*ds_idx=0"):
            quiet(learn, call)
    assert len(quiet(learn, predict_probabilities, learn, 0)[0]) == 60
    assert quiet(learn, learn.fit_thresholds, ds_idx=0, folds=2).thresholds.shape == (dls.c,)
    with pytest.raises(ValueError, match=r"dls\[2\] holds no item"):
        predict_probabilities(learn, 2)


def test_loaders_without_labels(hpa_dls, hpa, tmp_path):
    learn = CRLLearner(hpa_dls, flat(hpa_dls.c), loss_func=nn.BCEWithLogitsLoss(), path=tmp_path)
    dl = hpa_dls.test_dl([hpa / "test" / "synthetic-000060"])
    probs, targets = quiet(learn, predict_probabilities, learn, dl=dl)
    assert probs.shape == (1, hpa_dls.c) and targets is None and 0 <= probs.min() <= probs.max() <= 1
    for call in (lambda: learn.fit_thresholds(dl=dl), lambda: CRLInterpretation.from_learner(learn, dl=dl)):
        with pytest.raises(ValueError, match=r"gives no targets.*with_labels=True"):
            quiet(learn, call)


# ---------------------------------------------------------------- outputs


class Half(nn.Module):
    def __init__(self, n_classes):
        super().__init__()
        self.net = flat(n_classes, torch.bfloat16)

    def forward(self, x):
        return self.net(x.bfloat16())


def test_a_network_in_bfloat16(hpa_dls, tmp_path):
    loss = BCEWithLogitsLossFlat()
    learn = CRLLearner(hpa_dls, Half(hpa_dls.c), loss_func=loss, cbs=CRLCallback(), metrics=MacroF1(), path=tmp_path)
    quiet(learn, learn.fit, 1)
    probs = quiet(learn, predict_probabilities, learn)[0]
    assert probs.dtype == torch.float32
    interp = quiet(learn, CRLInterpretation.from_learner, learn)
    assert quiet(learn, learn.validate)[1] == pytest.approx(interp.report().F1.mean(), abs=0.02)


def test_outputs_that_are_no_probabilities(hpa_dls, tmp_path):
    learn = Learner(hpa_dls, flat(hpa_dls.c), loss_func=nn.MSELoss(), path=tmp_path)
    nn.init.constant_(learn.model[-1].bias, 3)
    with pytest.raises(ValueError, match=r"Predictions \(MSELoss\) run from .* give probabilities"):
        quiet(learn, predict_probabilities, learn)
    nn.init.constant_(learn.model[-1].bias, float("nan"))
    with pytest.raises(ValueError, match=r"hold NaN.*diverged"):
        quiet(learn, predict_probabilities, learn)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = flat(2)

        def forward(self, x):
            return self.net(x), x

    with pytest.raises(ValueError, match="2 parts"):
        learn = Learner(hpa_dls, Pair(), loss_func=lambda p, y: p[0].sum())
        quiet(learn, predict_probabilities, learn)
