"""Facts of fastai and torch that the package relies on."""

import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import ParamScheduler  # noqa: F401  (adds lr_find to Learner)
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner, load_learner
from fastai.losses import (
    BaseLoss,
    BCELossFlat,
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    FocalLossFlat,
    LabelSmoothingCrossEntropy,
    MSELossFlat,
)
from fastai.metrics import accuracy_multi
from fastai.tabular.all import CategoryBlock, TabularDataLoaders
from fastai.vision.learner import vision_learner
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from fastai_crl._fastai import (
    activation_of,
    add_columns,
    blended_targets,
    drop_columns,
    guard_fit,
    inner_loader,
    is_lr_search,
    is_single_label,
    rebuild,
    record_schedule,
    unguard_fit,
)
from fastai_crl.losses import CRLLoss, make_loss


def test_the_loader_of_one_process_holds_the_whole_one():
    distributed = pytest.importorskip("fastai.distributed")
    whole = TfmdDL(list(range(8)), bs=2, num_workers=0, device="cpu")
    assert inner_loader(distributed.DistributedDL(whole, 0, 2, device="cpu")) is whole
    assert inner_loader(type("Own", (distributed.DistributedDL,), {})(whole, 0, 2, device="cpu")) is whole
    assert inner_loader(whole) is whole


# ---------------------------------------------------------------- activations

LOGITS = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
SIGMOID, SOFTMAX = LOGITS.sigmoid(), LOGITS.softmax(-1)


@pytest.mark.parametrize(
    ("loss", "multi", "single"),
    [
        (BCEWithLogitsLossFlat(), SIGMOID, SIGMOID),
        (CrossEntropyLossFlat(), SOFTMAX, SOFTMAX),
        (FocalLossFlat(), SOFTMAX, SOFTMAX),
        (LabelSmoothingCrossEntropy(), SOFTMAX, SOFTMAX),
        (make_loss("asl"), SIGMOID, SIGMOID),
        (make_loss("focal", single_label=True), SOFTMAX, SOFTMAX),
        (nn.BCEWithLogitsLoss(), SIGMOID, SOFTMAX),
        (nn.MultiLabelSoftMarginLoss(), SIGMOID, SOFTMAX),
        (F.binary_cross_entropy_with_logits, SIGMOID, SOFTMAX),
        (lambda outputs, targets: outputs.sum(), SIGMOID, SOFTMAX),
        (nn.MultiMarginLoss(), SIGMOID, SOFTMAX),
        (nn.CrossEntropyLoss(), SOFTMAX, SOFTMAX),
        (F.cross_entropy, SOFTMAX, SOFTMAX),
        (BaseLoss(nn.CrossEntropyLoss), SOFTMAX, SOFTMAX),
        (BaseLoss(nn.BCEWithLogitsLoss), SIGMOID, SOFTMAX),
        (CRLLoss(), SIGMOID, SOFTMAX),
        (CRLLoss(nn.CrossEntropyLoss()), SOFTMAX, SOFTMAX),
        (CRLLoss(nn.BCEWithLogitsLoss()), SIGMOID, SOFTMAX),
        (CRLLoss(LabelSmoothingCrossEntropy()), SOFTMAX, SOFTMAX),
        (nn.BCELoss(), LOGITS, LOGITS),  # its outputs are probabilities already
        (BCELossFlat(), LOGITS, LOGITS),
        (F.binary_cross_entropy, LOGITS, LOGITS),
        (MSELossFlat(), LOGITS, LOGITS),
    ],
)
def test_activation_of_losses(loss, multi, single):
    assert torch.equal(activation_of(loss, single_label=False)(LOGITS), multi)
    assert torch.equal(activation_of(loss, single_label=True)(LOGITS), single)


def test_log_probabilities_become_probabilities():
    logs = LOGITS.log_softmax(-1)
    torch.testing.assert_close(activation_of(nn.NLLLoss(), single_label=True)(logs), SOFTMAX)


@pytest.mark.parametrize(
    ("targets", "n_classes", "expected"),
    [
        (torch.tensor([0, 2, 1]), None, True),
        (torch.tensor([[0], [2], [1]], dtype=torch.int8), 3, True),
        (torch.tensor([0.0, 2.0]), 3, True),
        (torch.zeros(4, 3), None, False),
        (torch.zeros(4, 3), 3, False),
        (torch.tensor([0.0, 1.0]), 1, False),
        (torch.tensor([[1], [0]]), 1, False),
        (torch.tensor([0.0, 1.0]), None, False),
        (torch.tensor([True, False]), None, False),
    ],
)
def test_kind_of_targets(targets, n_classes, expected):
    assert is_single_label(targets, n_classes) is expected
    if targets.dtype != torch.bool:
        assert is_single_label(targets.numpy(), n_classes) is expected


def test_kind_of_loaders(hpa_dls, single_label_dls, tmp_path):
    assert not is_single_label(hpa_dls, hpa_dls.c) and is_single_label(single_label_dls, 3)
    for dls, expected in ((hpa_dls, False), (single_label_dls, True)):
        Learner(dls, nn.Linear(2, 2), path=tmp_path).export("x.pkl")
        assert is_single_label(load_learner(tmp_path / "x.pkl").dls) is expected  # it has no items
    x = torch.rand(6, 4)
    for y, expected in ((torch.arange(6) % 3, True), (torch.zeros(6, 3), False)):
        data = torch.utils.data.TensorDataset(x, y)
        loader = torch.utils.data.DataLoader(data, batch_size=2)
        assert is_single_label(DataLoaders(loader, loader)) is expected
        assert is_single_label(DataLoaders.from_dsets(data, data, bs=2, num_workers=0)) is expected
    frame = pd.DataFrame({"a": [0.1, 0.2] * 8, "y": list("xyzx") * 4})
    table = TabularDataLoaders.from_df(frame, y_names="y", cont_names=["a"], y_block=CategoryBlock(), bs=4)
    assert is_single_label(table, 3)


# ---------------------------------------------------------------- what a fit has


def small_learner(tmp_path, cbs=None, single_label=False, **options):
    y = torch.arange(16) % 3 if single_label else (torch.rand(16, 3) < 0.4).float()
    data = torch.utils.data.TensorDataset(torch.randn(16, 4), y)
    dls = DataLoaders.from_dsets(data, data, bs=8, num_workers=0, device="cpu")
    loss = CrossEntropyLossFlat() if single_label else BCEWithLogitsLossFlat()
    return Learner(dls, nn.Linear(4, 3), loss, cbs=cbs, path=tmp_path, **options)


class Now(Callback):
    """Calls `look` at one event, after all others."""

    order = 70

    def __init__(self, event, look):
        super().__init__()
        setattr(self, event, look)


def test_the_recorder_shows_columns_that_the_learner_does_not_have(tmp_path):
    learn = small_learner(tmp_path, metrics=accuracy_multi)
    start = Callback(before_fit=lambda self: add_columns(self.learn, {"answer": lambda: 42}))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=start)
        assert learn.recorder.metric_names == ["epoch", "train_loss", "valid_loss", "accuracy_multi", "answer", "time"]
        assert learn.recorder.values[-1][-1] == 42 and len(learn.metrics) == 1
        drop_columns(learn.recorder)
        learn.fit(1)
        assert "answer" not in learn.recorder.metric_names
    learn.remove_cbs([learn.recorder, learn.progress])
    assert add_columns(learn, {}) is None
    drop_columns(None)


def test_schedules_and_searches_run_the_fit_of_the_learner(tmp_path):
    learn, ran = small_learner(tmp_path), []

    def fit(*args, **kwargs):
        ran.append(args)

    guard_fit(learn, fit)
    learn.fit(1)
    learn.fit_one_cycle(2)
    learn.fine_tune(1)
    learn.lr_find(suggest_funcs=None, show_plot=False)
    assert len(ran) == 5
    unguard_fit(learn, print)  # not what guards it
    assert "fit" in vars(learn)
    unguard_fit(learn, fit)
    assert learn.fit.__func__ is Learner.fit


def test_a_search_for_the_learning_rate_is_known(tmp_path):
    learn, seen = small_learner(tmp_path), []
    look = Now("before_fit", lambda: seen.append(is_lr_search(learn)))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=look)
        learn.add_cb(look)
        learn.lr_find(num_it=3, suggest_funcs=None, show_plot=False)
        learn.validate()
    assert seen == [False, True, False]


def test_schedules_are_recorded(tmp_path):
    learn, values = small_learner(tmp_path), [0.0]
    look = Now("before_train", lambda: (record_schedule(learn, "x", values), values.append(1.0)))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, cbs=look)
    assert learn.recorder.hps["x"] == [0.0, 1.0] and {"lr", "mom"} < set(learn.recorder.hps)
    record_schedule(learn, "y", values)
    assert "y" not in learn.recorder.hps
    record_schedule(learn, "y", values, ended=True)
    assert learn.recorder.hps == {"y": values}


@pytest.mark.parametrize("single_label", [False, True])
def test_targets_that_mixup_blends(tmp_path, single_label):
    seen = []
    learn = small_learner(tmp_path, [MixUp(1.0)], single_label)
    look = Now(
        "after_loss", lambda: seen.append((blended_targets(learn), learn.yb[0], learn.loss.detach(), learn.pred))
    )
    look.run_valid = False
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=look)
    for blended, y, loss, pred in seen:
        if not single_label:
            assert blended is None and ((y > 0) & (y < 1)).any()
            continue
        other, share = blended
        each = [F.cross_entropy(pred, t, reduction="none") for t in (other, y)]
        torch.testing.assert_close(torch.Tensor(loss), torch.lerp(*each, share).mean())


def test_a_learner_is_rebuilt_as_another_class(hpa_dls, tmp_path):
    class Own(Learner):
        pass

    plain = vision_learner(hpa_dls, resnet18, weights=None, n_in=4, pretrained=False, path=tmp_path, lr=0.5, wd=0.25)
    plain.freeze()
    made = rebuild(plain, Own, [Now("after_fit", lambda: None)])
    assert type(made) is Own and made.model is plain.model and made.loss_func is plain.loss_func
    assert (made.lr, made.wd, made.path, made.arch, made.n_out) == (0.5, 0.25, tmp_path, resnet18, hpa_dls.c)
    assert [cb.name for cb in made.cbs if cb.learn is made] == [*(cb.name for cb in plain.cbs), "now"]
    assert made.opt.frozen_idx == plain.opt.frozen_idx > 0
