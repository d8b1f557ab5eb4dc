"""`CRLCallback` in plain fastai learners: what it changes, and all that it must leave alone."""

import io
import math
import pickle
import subprocess
import sys
import warnings
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision  # noqa: F401  (adds to_fp16 to Learner)
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.schedule import ParamScheduler, SchedCos  # noqa: F401  (adds fit_one_cycle to Learner)
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner, Recorder
from fastai.losses import BCELossFlat, BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.optimizer import SGD
from torch import nn

from fastai_crl.callback import CRLCallback
from fastai_crl.evaluate.metrics import MacroF1, MeanAP
from fastai_crl.losses import CRL, CRLLoss, imbalance, make_loss
from fastai_crl.losses.imbalance import ramp

N, C = 64, 6


def make_data(single_label=False, n=N):
    x = torch.randn(n, 8)
    y = torch.rand(n, C) < torch.tensor([0.6, 0.5, 0.2, 0.15, 0.1, 0.1])
    return torch.utils.data.TensorDataset(x, y.float().argmax(1) if single_label else y.float())


def make_model():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, C))


def make_learner(tmp_path, cbs=None, single_label=False, bs=32, model=None, shuffle=False, **kwargs):
    data = make_data(single_label)
    dls = DataLoaders.from_dsets(data, data, bs=bs, shuffle=shuffle, num_workers=0, device="cpu")
    loss = CrossEntropyLossFlat() if single_label else BCEWithLogitsLossFlat()
    model = make_model() if model is None else model
    return Learner(dls, model, loss_func=loss, cbs=cbs, path=tmp_path, metrics=kwargs.pop("metrics", None), **kwargs)


class Spy(Callback):
    """Keeps each training batch's loss and gradients, just before the step."""

    run_valid = False

    def before_fit(self):
        self.losses, self.grads = [], []

    def before_step(self):
        self.losses.append(float(self.learn.loss_grad))
        self.grads.append([p.grad.clone() for p in self.learn.model.parameters()])


def full(pct):
    return 1.0


def test_batch_loss_and_gradient_are_the_mix(tmp_path):
    learn = make_learner(tmp_path, [CRLCallback(alpha=0.3, schedule=full, k=3), Spy()])
    reference = pickle.loads(pickle.dumps(learn.model))
    x, y = learn.dls.train.dataset.tensors[0][:32], learn.dls.train.dataset.tensors[1][:32]
    z = reference(x)
    expected = 0.3 * CRL(k=3)(z, y) + 0.7 * nn.functional.binary_cross_entropy_with_logits(z, y)
    expected.backward()
    learn.fit(1)
    assert learn.spy.losses[0] == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(learn.spy.grads[0], reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad)


def test_columns_and_counts(tmp_path):
    learn = make_learner(tmp_path, CRLCallback(alpha=0.3, schedule=full, k=3), metrics=MacroF1())
    crl, x, y = CRL(k=3), *learn.dls.train.dataset.tensors
    with torch.no_grad():
        first = crl.loss_and_triplets(learn.model(x[:32]), y[:32])
    learn.fit(2, lr=0.0)  # a model that stays as it is
    with torch.no_grad():
        second = crl.loss_and_triplets(learn.model(x[32:]), y[32:])
    assert learn.recorder.metric_names == [
        *(
            "epoch",
            "train_loss",
            "valid_loss",
            "macro_f1",
            "crl_alpha",
            "crl_loss",
            "crl_triplets",
            "crl_labels",
            "time",
        )
    ]
    counts = first[1] + second[1]
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1], strict=False))  # no value for the time
    assert row["crl_alpha"] == 0.3 and row["crl_triplets"] == int(counts.sum()) > 0
    assert row["crl_labels"] == int((counts > 0).sum())
    assert row["crl_loss"] == pytest.approx(float(first[0] + second[0]) / 2, rel=1e-5)
    frame = learn.crl.counts_frame()
    assert frame.index.tolist() == [(0, 0), (0, 1)] and frame.loc[(0, 1)].tolist() == counts.tolist()
    assert list(frame.columns) == [str(c) for c in range(C)]
    assert learn.metrics == learn.metrics.filter(lambda m: m.name == "macro_f1")


def test_valid_loss_stays_the_base_loss(tmp_path):
    learn = make_learner(tmp_path, CRLCallback(alpha=0.9, schedule=full))
    learn.fit(1)
    logged = learn.recorder.values[-1][1]
    x, y = learn.dls.valid.dataset.tensors
    with torch.no_grad():
        base = nn.functional.binary_cross_entropy_with_logits(learn.model(x), y)
    assert logged == pytest.approx(base.item(), rel=1e-5)
    assert learn.validate()[0] == pytest.approx(base.item(), rel=1e-5)
    assert isinstance(learn.loss_func, BCEWithLogitsLossFlat)


def test_same_training_as_without_when_nothing_is_mined(tmp_path):
    results = []
    for cbs in (None, CRLCallback(alpha=0.0), CRLCallback(alpha=0.5, schedule=lambda pct: 0.0)):
        torch.manual_seed(1)
        learn = make_learner(tmp_path, cbs)
        learn.fit(2)
        results.append([p.detach().clone() for p in learn.model.parameters()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_alpha_zero_and_validation_mine_nothing(tmp_path):
    class Counted(CRL):
        calls = 0

        def rectify(self, *args, **kwargs):
            self.calls += 1
            return super().rectify(*args, **kwargs)

    term = Counted()
    make_learner(tmp_path, CRLCallback(alpha=0.0, term=term)).fit(1)
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5, schedule=full, term=term))
    learn.validate()
    learn.get_preds()
    assert term.calls == 0 and not learn.crl.history
    learn.fit(1)
    assert term.calls == len(learn.dls.train)


def test_auto_alpha(tmp_path, hpa_dls):
    learn = Learner(hpa_dls, nn.Sequential(nn.Flatten(), nn.Linear(4 * 32 * 32, len(hpa_dls.vocab))), path=tmp_path)
    learn.add_cb(CRLCallback(schedule=full))
    learn.fit(1)
    targets = torch.stack([y for _, y in hpa_dls.train_ds])
    assert learn.crl.alphas == pytest.approx([imbalance(targets.sum(0))] * len(learn.crl.alphas))
    learn = make_learner(tmp_path, CRLCallback(schedule=full))
    learn.fit(1)
    y = learn.dls.train.dataset.tensors[1]
    assert learn.crl.alphas == pytest.approx([imbalance(y.sum(0))] * 2)

    class Items(torch.utils.data.Dataset):
        """A data set that does not tell its labels apart: Ω of the labels seen so far."""

        def __init__(self, data):
            self.data = data

        def __len__(self):
            return len(self.data)

        def __getitem__(self, i):
            return self.data[i]

    learn = make_learner(tmp_path, CRLCallback(schedule=full))
    y = learn.dls.train.dataset.tensors[1]
    learn.dls.train.dataset = Items(learn.dls.train.dataset)
    learn.fit(1)
    assert learn.crl.alphas == pytest.approx([imbalance(y[:32].sum(0)), imbalance(y.sum(0))])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (None, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (SchedCos(0, 1), [0.5 - 0.5 * math.cos(math.pi * i / 8) for i in range(8)]),
        (lambda pct: pct, [i / 8 for i in range(8)]),
        ([0.0, 1.0, 0.0], [0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]),
        (np.array([1.0]), [1.0] * 8),
    ],
)
def test_schedules(tmp_path, schedule, expected):
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5, schedule=schedule))
    learn.fit(4)
    assert learn.crl.alphas == pytest.approx([0.5 * e for e in expected], abs=1e-6)


@pytest.mark.parametrize("wrong", [math.nan, 3, -1, math.inf, None, "x", lambda pct: 1 + pct, lambda pct: 0.5 - pct])
def test_factors_out_of_range_are_refused_at_once(wrong):
    with pytest.raises(
        ValueError, match=r"schedule gives .* of training is done: let it give factors of . in \[0, 1\]"
    ):
        CRLCallback(alpha=0.5, schedule=wrong if callable(wrong) else lambda pct: wrong)


def test_a_factor_that_is_out_of_range_between_those_tried_ends_training_at_its_batch(tmp_path):
    crl = CRLCallback(alpha=0.5, schedule=lambda pct: 3 if 0.501 < pct < 0.509 else 0.5)
    learn = make_learner(tmp_path, crl, bs=1)  # more batches than are tried
    with pytest.raises(ValueError, match=r"schedule gives 3 when 5.% of training is done"):
        learn.fit(2)
    assert len(crl.alphas) > 0 and all(p.isfinite().all() for p in learn.model.parameters())


def test_plots(tmp_path):
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5))
    with pytest.raises(ValueError, match="fit first"):
        learn.crl.plot_counts()
    learn.fit_one_cycle(2)
    lines = learn.crl.plot_counts(top=3).get_lines()
    frame = learn.crl.counts_frame()
    assert len(lines) == 3 and list(lines[0].get_ydata()) == frame[frame.sum().idxmax()].tolist()


def test_fine_tune_has_two_fits(tmp_path):
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5))
    learn.fine_tune(2, freeze_epochs=1)
    assert learn.crl.counts_frame().index.tolist() == [(0, 0), (1, 0), (1, 1)]
    assert learn.crl.alphas == pytest.approx([0.5 * ramp(i / 4) for i in range(4)])


def test_lr_find_leaves_no_trace(tmp_path):
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5), metrics=MacroF1())
    learn.fit(1)
    names = ("alphas", "history", "n_fits")
    before = pickle.dumps([getattr(learn.crl, name) for name in names])
    learn.lr_find(num_it=10, show_plot=False)
    assert pickle.dumps([getattr(learn.crl, name) for name in names]) == before
    assert [m.name for m in learn.metrics] == ["macro_f1"]
    learn.fit(1)
    assert learn.crl.counts_frame().index.tolist() == [(0, 0), (1, 0)]


def test_validate_and_predictions_mean_what_they_meant(tmp_path):
    torch.manual_seed(1)
    plain = make_learner(tmp_path, metrics=MacroF1())
    learn = Learner(
        plain.dls, plain.model, plain.loss_func, metrics=MacroF1(), cbs=CRLCallback(level="instance"), path=tmp_path
    )
    assert learn.validate() == plain.validate()
    for ours, theirs in zip(learn.get_preds(with_loss=True), plain.get_preds(with_loss=True), strict=True):
        assert torch.equal(ours, theirs)
    learn.fit(1)
    assert len(learn.validate()) == 2
    assert learn.final_record == learn.validate()


def left_behind(learn):
    """All of ours that is still in a learner whose callback is gone, or whose fit is over."""
    found = [m for m in learn.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    found += [name for name in vars(learn.recorder).get("metrics", []) if name]
    buffer = io.BytesIO()
    torch.save(learn.model, buffer)
    found += ["model"] * (b"fastai_crl" in buffer.getvalue())
    pickle.loads(pickle.dumps(learn.model)), deepcopy(learn.model)
    return found


class Stop(Callback):
    """Raises at one event of training."""

    order = 6

    def __init__(self, event, error):
        self.event, self.error = event, error

    def __call__(self, name):
        if name == self.event and (self.learn.train_iter == 3 or name in ("before_fit", "after_epoch")):
            raise self.error
        return super().__call__(name)


class Broken(nn.Sequential):
    """Raises in its own third forward of training, where no callback is asked."""

    def __init__(self, error):
        super().__init__(*make_model())
        self.error, self.left = error, 3

    def forward(self, x):
        self.left -= self.training
        if self.left == 0:
            raise self.error
        return super().forward(x)


EVENTS = ("before_fit", "before_batch", "after_pred", "after_loss", "before_step", "after_batch", "after_epoch")


@pytest.mark.parametrize("way", ["in the learner", "fit(cbs=)", "added and removed"])
@pytest.mark.parametrize("event", [*EVENTS, "in the model"])
def test_whatever_ends_a_fit_nothing_of_ours_stays(tmp_path, event, way):
    error = RuntimeError("no") if event in EVENTS[::2] else KeyboardInterrupt()
    learn = make_learner(tmp_path, model=None if event in EVENTS else Broken(error), metrics=MacroF1())
    crl, names, loss = CRLCallback(alpha=0.5, level="instance"), [cb.name for cb in learn.cbs], learn.loss_func
    if way != "fit(cbs=)":
        learn.add_cb(crl)
    stop = [Stop(event, error)] if event in EVENTS else []
    with pytest.raises(type(error)):
        learn.fit(2, cbs=[*stop, *([crl] if way == "fit(cbs=)" else [])])
    assert not left_behind(learn) and crl.caught.features is None and learn.loss_func is loss
    if way == "in the learner":
        assert [cb.name for cb in learn.cbs] == [*names, "crl"]
        learn.fit(1)
        assert not left_behind(learn)
        assert learn.crl.counts_frame().index[-1][1] == 0 and "crl_loss" in learn.recorder.metric_names
        return
    if way == "added and removed":
        learn.remove_cb(crl)
    assert [cb.name for cb in learn.cbs] == names and crl.learn is None and "fit" not in vars(learn)
    assert b"fastai_crl.callback" not in pickle.dumps(learn)
    learn.fit(1)
    assert learn.recorder.metric_names == ["epoch", "train_loss", "valid_loss", "macro_f1", "time"]
    assert len(learn.recorder.values[-1]) == len(learn.validate()) + 1 == 3


@pytest.mark.parametrize("level", ["class", "instance"])
def test_cancelled_fit(tmp_path, level):
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5, level=level), metrics=MacroF1())
    learn.fit(2, cbs=Stop("after_loss", CancelFitException()))
    assert not left_behind(learn) and len(learn.validate()) == 2
    learn.fit(1)
    assert learn.crl.counts_frame().index.tolist() == [(0, 0), (1, 0)]


@pytest.mark.parametrize("event", ["after_loss", "before_batch", "after_epoch"])
def test_interrupted_search_for_the_learning_rate(tmp_path, event):
    """What earlier fits left, the history, the alphas, is as it was; at once, and in an export."""
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5))
    learn.fit(2)
    frame, alphas = learn.crl.counts_frame(), list(learn.crl.alphas)
    learn.add_cb(Stop(event, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        learn.lr_find(show_plot=False)
    learn.remove_cb(Stop)
    again = pickle.loads(pickle.dumps(learn))
    for crl in (learn.crl, again.crl):
        assert crl.counts_frame().equals(frame) and crl.alphas == alphas and crl.n_fits == 1
    assert not left_behind(learn)


def test_interrupted_validation(tmp_path):
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5, level="instance"))
    learn.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        learn.validate()
    learn.model._forward_hooks.clear()
    assert not left_behind(learn)


def test_a_copy_of_the_model_made_in_training_has_no_graph(tmp_path):
    class Copy(Callback):
        order = 4

        def after_loss(self):
            if self.learn.training:
                self.copy = deepcopy(self.learn.model)

    learn = make_learner(tmp_path, [CRLCallback(alpha=0.5, level="instance"), Copy()])
    learn.fit(1)
    assert learn.copy.copy[0].weight.shape == (16, 8)


def test_an_error_of_ours_leaves_nothing_behind(tmp_path):
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5, schedule=full, level="instance"))
    learn.dls.train.dataset.tensors[1][5] = torch.nan
    with pytest.raises(ValueError, match=r"item 5, label 0 of the batch has nan \(6 such in all\)"):
        learn.fit(1)
    assert not left_behind(learn)


def test_one_learner_each(tmp_path):
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5))
    with pytest.raises(ValueError, match=r"in another learner already.*make a new one"):
        Learner(learn.dls, make_model(), learn.loss_func, cbs=learn.crl)
    with pytest.raises(ValueError, match=r"in this learner already"):
        learn.fit(1, cbs=learn.crl)
    with pytest.raises(ValueError, match=r"has a CRLCallback already.*remove_cb\(learn\.crl\)"):
        learn.fit(1, cbs=CRLCallback())
    with pytest.raises(ValueError, match="has a CRLCallback already"):
        make_learner(tmp_path, [CRLCallback(), CRLCallback()])
    crl = learn.crl
    learn.remove_cb(crl)
    other = Learner(learn.dls, make_model(), learn.loss_func, cbs=crl, path=tmp_path)
    other.fit(1)
    assert other.crl is crl and len(crl.history) == 1


def test_remove_and_add_again(tmp_path):
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5, schedule=full))
    crl = learn.crl
    with learn.removed_cbs([crl]):
        learn.fit(1)
        assert "crl_alpha" not in learn.recorder.metric_names
    learn.fit(1)
    assert len(crl.history) == 1
    learn.remove_cb(CRLCallback)
    assert not hasattr(learn, "crl")
    learn.fit(1)
    assert "crl_alpha" not in learn.recorder.metric_names and len(crl.history) == 1


def test_save_load_and_resume(tmp_path):
    """Stopped after two of four epochs, loaded into a new learner and resumed, alpha goes on where it was."""

    def cb():
        return CRLCallback(alpha=0.5, schedule=SchedCos(0, 1))

    torch.manual_seed(1)
    whole = make_learner(tmp_path, cb(), opt_func=SGD)
    start = pickle.dumps(whole.model)
    whole.fit_one_cycle(4)

    class Half(Callback):
        def before_epoch(self):
            if self.learn.epoch == 2:
                raise CancelFitException

    first = Learner(whole.dls, pickle.loads(start), whole.loss_func, SGD, path=tmp_path, cbs=cb())
    first.fit_one_cycle(4, cbs=Half())
    first.save("half", with_opt=True)
    second = Learner(whole.dls, make_model(), whole.loss_func, SGD, path=tmp_path, cbs=cb())
    second.load("half", with_opt=True)
    second.fit_one_cycle(4, start_epoch=2)
    assert second.crl.alphas == pytest.approx(whole.crl.alphas[4:])
    for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_export_and_load_in_a_fresh_process(tmp_path, hpa, hpa_dls):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4 * 32 * 32, len(hpa_dls.vocab)))
    learn = Learner(hpa_dls, model, path=tmp_path, cbs=CRLCallback(alpha=0.5, level="instance"))
    learn.fit(1)
    learn.export("learner.pkl")
    item = hpa / "train" / hpa_dls.valid_ds.items.iloc[0].Id
    code = (
        "import sys; from fastai.learner import load_learner; learn = load_learner(sys.argv[1]);"
        "print(*learn.predict(sys.argv[2])[2].tolist()); print(len(learn.crl.history))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path / "learner.pkl", item], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    probabilities, epochs = run.stdout.strip().splitlines()[-2:]
    expected = learn.predict(item)[2].tolist()
    assert list(map(float, probabilities.split())) == pytest.approx(expected, abs=1e-6) and epochs.split()[-1] == "1"


def test_loggers_and_trackers(tmp_path):
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5))
    learn.fit(
        3,
        cbs=[
            CSVLogger(),
            SaveModelCallback(monitor="crl_triplets", comp=np.greater, fname="best"),
            EarlyStoppingCallback(monitor="crl_loss", patience=10),
        ],
    )
    table = pd.read_csv(tmp_path / "history.csv")
    assert list(table.columns) == list(learn.recorder.metric_names)
    assert table.crl_triplets.tolist() == learn.crl.counts_frame().sum(axis=1).tolist()
    assert (tmp_path / "models" / "best.pth").exists()


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learn = make_learner(tmp_path, CRLCallback(alpha=0.5))
    learn.fit(2, cbs=TensorBoardCallback(log_dir=tmp_path / "tb", trace_model=False, log_preds=False))
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    logged = [e.value for e in events.Scalars("crl_triplets")]
    assert logged == learn.crl.counts_frame().sum(axis=1).tolist()


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from fastai.callback.wandb import WandbCallback

    monkeypatch.setenv("WANDB_SILENT", "true")
    # fastai 2.8.12 fails to list any learner's arguments with fastcore 2.2.39; what it logs of them is not ours.
    monkeypatch.setattr(Learner, "gather_args", lambda self: {})
    with wandb.init(mode="offline", dir=tmp_path) as run:
        learn = make_learner(tmp_path, CRLCallback(alpha=0.5))
        learn.fit(1, cbs=WandbCallback(log_preds=False, log_model=False))
        assert run.summary["crl_triplets"] == int(learn.crl.counts_frame().sum(axis=1).iloc[0])


@pytest.mark.parametrize("mix", [MixUp, CutMix])
@pytest.mark.parametrize("single_label", [False, True])
def test_mixed_images_are_neither_positive_nor_negative(tmp_path, mix, single_label):
    """Only a label that both blended images carry, or that neither does, counts."""
    seen = []

    class Seeing(CRL):
        def rectify(self, batch, *args):
            seen.append(batch.targets)
            return super().rectify(batch, *args)

    class Images(Callback):  # CutMix wants (n, channels, height, width)
        order = -5

        def before_batch(self):
            self.learn.xb = (self.learn.xb[0].reshape(-1, 2, 2, 2),)

    model = nn.Sequential(nn.Flatten(), *make_model())
    cbs = [CRLCallback(alpha=0.5, schedule=full, term=Seeing()), Images()]
    learn = make_learner(tmp_path, cbs, single_label, model=model)
    torch.manual_seed(3)
    learn.fit(1, cbs=mix(1.0))
    assert seen and all(y.ndim == 2 and ((y > 0) & (y < 1)).any() for y in seen)
    total = torch.cat([y.sum(1) for y in seen])
    if single_label:
        torch.testing.assert_close(total, torch.ones_like(total))


def test_single_label_learner(tmp_path):
    learn = make_learner(tmp_path, [CRLCallback(alpha=0.3, schedule=full, k=3), Spy()], single_label=True)
    x, y = (t[:32] for t in learn.dls.train.dataset.tensors)
    z = learn.model(x)
    expected = 0.3 * CRL(k=3)(z, y) + 0.7 * nn.functional.cross_entropy(z, y)
    learn.fit(1)
    assert learn.spy.losses[0] == pytest.approx(expected.item(), rel=1e-6)


def test_gradient_accumulation_scales_the_term_too(tmp_path):
    grads = []
    for accumulate in (False, True):
        torch.manual_seed(1)
        learn = make_learner(tmp_path, [CRLCallback(alpha=0.5, schedule=full), Spy()], bs=32, opt_func=SGD)
        model = pickle.loads(pickle.dumps(learn.model))
        learn.fit(1, lr=0.0, cbs=GradientAccumulation(64) if accumulate else None)
        grads.append(learn.spy.grads)
    # Spy's order puts it before the accumulation's own check: the second batch's gradient is the sum of both halves.
    x, y = learn.dls.train.dataset.tensors
    total = 0
    for part in (slice(0, 32), slice(32, 64)):
        z = model(x[part])
        base = nn.functional.binary_cross_entropy_with_logits(z, y[part])
        total = total + 0.5 * (0.5 * CRL()(z, y[part]) + 0.5 * base)
    total.backward()
    for ours, theirs in zip(grads[1][-1], model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad)


def test_other_callbacks(tmp_path):
    learn = make_learner(tmp_path, [CRLCallback(alpha=0.5, schedule=full), GradientClip(0.1), ChannelsLast()])
    learn.fit(1)
    assert learn.crl.counts_frame().to_numpy().sum() > 0


def test_low_precision_logits(tmp_path):
    """A model in bfloat16 autocast: the term is computed in float32 all the same."""

    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make_model()

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(x)

    learn = make_learner(tmp_path, [CRLCallback(alpha=0.5, schedule=full), Spy()], model=Autocast())
    x, y = (t[:32] for t in learn.dls.train.dataset.tensors)
    z = learn.model(x)
    assert z.dtype == torch.bfloat16
    expected = 0.5 * CRL()(z.float(), y) + 0.5 * nn.functional.binary_cross_entropy_with_logits(z, y)
    learn.fit(1)
    assert learn.spy.losses[0] == pytest.approx(expected.item(), rel=1e-3)


def test_fp16_callback_without_gpu(tmp_path):
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5, schedule=full)).to_fp16()
    learn.fit(1)
    assert learn.crl.counts_frame().to_numpy().sum() > 0


def test_instance_level_finds_the_embedding(tmp_path):
    learn = make_learner(tmp_path, [CRLCallback(alpha=0.4, schedule=full, level="instance"), Spy()])
    x, y = (t[:32] for t in learn.dls.train.dataset.tensors)
    f = learn.model[:2](x)
    z = learn.model[2](f)
    expected = 0.4 * CRL(level="instance")(z, y, f) + 0.6 * nn.functional.binary_cross_entropy_with_logits(z, y)
    reference = torch.autograd.grad(expected, list(learn.model.parameters()))
    learn.fit(1)
    assert learn.spy.losses[0] == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(learn.spy.grads[0], reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_instance_level_with_a_module_of_ones_own(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, C, 2), nn.Flatten())

    class Images(Callback):
        def before_batch(self):
            self.learn.xb = (self.learn.xb[0].reshape(-1, 2, 2, 2),)

    cb = CRLCallback(alpha=0.4, schedule=full, level="instance", embedding=model[0])
    learn = make_learner(tmp_path, [cb, Images()], model=model)
    learn.fit(1)
    assert learn.crl.counts_frame().to_numpy().sum() > 0
    learn = make_learner(tmp_path, [CRLCallback(alpha=0.4, level="instance"), Images()], model=model)
    assert learn.get_preds()[0].shape[1] == C and len(learn.validate()) == 1  # only training needs the embedding
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear.*embedding=module"):
        learn.fit(1)
    unused = CRLCallback(alpha=0.4, schedule=full, level="instance", embedding=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="No embedding came by"):
        make_learner(tmp_path, unused).fit(1)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["class", "instance"])
def test_compiled_model(tmp_path, level):
    torch.compiler.reset()  # the other level's graph, of an equal model, would serve again, without the hook
    learn = make_learner(tmp_path, [CRLCallback(alpha=0.4, schedule=full, level=level), Spy()])
    eager = pickle.loads(pickle.dumps(learn.model))
    learn.model = torch.compile(learn.model, backend="aot_eager")
    x, y = (t[:32] for t in learn.dls.train.dataset.tensors)
    f = eager[:2](x)
    z = eager[2](f)
    expected = 0.4 * CRL(level=level)(z, y, f) + 0.6 * nn.functional.binary_cross_entropy_with_logits(z, y)
    learn.validate()
    learn.fit(1)
    assert learn.spy.losses[0] == pytest.approx(expected.item(), rel=1e-5)
    learn.fit(1)
    assert learn.crl.counts_frame().shape[0] == 2


def test_several_learners_on_one_dls(tmp_path):
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5))
    other = Learner(learn.dls, make_model(), learn.loss_func, path=tmp_path, cbs=CRLCallback(alpha=0.2))
    learn.fit(1)
    other.fit(2)
    assert len(learn.crl.history) == 1 and len(other.crl.history) == 2


def test_crl_loss_and_callback_together_are_refused(tmp_path):
    learn = make_learner(tmp_path, CRLCallback())
    learn.loss_func = CRLLoss()
    with pytest.raises(ValueError, match="loss_func is a CRLLoss"):
        learn.fit(1)


def test_crl_loss_as_a_learners_loss(tmp_path):
    learn = make_learner(tmp_path)
    learn.loss_func = CRLLoss(alpha=0.5)
    learn.fit(1)
    probabilities, _, losses = learn.get_preds(with_loss=True)
    torch.testing.assert_close(probabilities, learn.model(learn.dls.valid.dataset.tensors[0]).sigmoid())
    assert losses.shape[0] == N


def test_models_that_give_no_logits(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make_model()

        def forward(self, x):
            return self.model(x)[None]

    learn = make_learner(tmp_path, CRLCallback(alpha=0.5, schedule=full), model=Two())
    learn.loss_func = lambda z, y: nn.functional.binary_cross_entropy_with_logits(z[0], y)
    with pytest.raises(ValueError, match=r"output is \(1, 32, 6\).*logits, \(n, C\)"):
        learn.fit(1)


class Reg(Callback):
    """Adds to loss_grad, and not to loss, as fastai's RNNRegularizer does."""

    order, run_valid = 1, False

    def after_loss(self):
        self.learn.loss_grad += 20 * self.learn.model[2].weight.pow(2).mean()


def test_what_other_callbacks_add_to_the_loss_stays_as_it_is(tmp_path):
    learn = make_learner(tmp_path, [CRLCallback(alpha=0.3, schedule=full, k=3), Reg(), Spy()], bs=64)
    reference = pickle.loads(pickle.dumps(learn.model))
    x, y = learn.dls.train.dataset.tensors
    z = reference(x)
    mixed = 0.3 * CRL(k=3)(z, y) + 0.7 * nn.functional.binary_cross_entropy_with_logits(z, y)
    expected = mixed + 20 * reference[2].weight.pow(2).mean()
    expected.backward()
    learn.fit(1)
    assert learn.spy.losses[0] == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(learn.spy.grads[0], reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad)
    assert float(learn.recorder.losses[0]) == pytest.approx(mixed.item(), rel=1e-5)  # train_loss is without theirs


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("level", ["class", "instance"])
def test_a_batch_that_is_not_finite_trains_as_without_us(tmp_path, value, level):
    grads = []
    for cbs in ([], [CRLCallback(alpha=0.5, schedule=full, level=level)]):
        torch.manual_seed(1)
        learn = make_learner(tmp_path, [*cbs, Spy()], bs=64)
        learn.dls.train.dataset.tensors[0][5] = value
        learn.fit(1)
        grads.append(learn.spy.grads[0])
    for ours, theirs in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1], strict=False))
    assert row["crl_triplets"] == row["crl_labels"] == 0 and math.isnan(row["crl_loss"])


def test_a_diverging_model_is_stopped_by_fastai(tmp_path):
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5, schedule=full), opt_func=SGD)
    learn.fit(5, lr=1e38, cbs=TerminateOnNaNCallback())
    assert 0 < len(learn.crl.alphas) < 10  # of 10 batches
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5, schedule=full), opt_func=SGD)
    learn.lr_find(end_lr=1e38, num_it=20, show_plot=False, suggest_funcs=None, stop_div=False)
    assert len(learn.recorder.lrs) == 20 and all(p.isfinite().all() for p in learn.model.parameters())


@pytest.mark.parametrize("value", [torch.nan, -1.0, 2.0])
@pytest.mark.parametrize("options", [{}, {"alpha": 0}, {"alpha": 0.5}, {"schedule": lambda pct: 0.0}])
def test_targets_are_checked_in_the_first_batch(tmp_path, value, options):
    learn = make_learner(tmp_path, CRLCallback(**options))
    learn.dls.train.dataset.tensors[1][3, 2] = value
    learn.dls.train.dataset.tensors[0][4] = torch.nan  # logits come after
    before = pickle.dumps(learn.model)
    with pytest.raises(ValueError, match=rf"in \[0, 1\].*item 3, label 2 of the batch has {value} .* leave the items"):
        learn.fit(1)
    assert pickle.dumps(learn.model) == before and not learn.crl.alphas


def test_class_indices_are_checked_before_the_base_loss(tmp_path):
    learn = make_learner(tmp_path, CRLCallback(), single_label=True)
    learn.dls.train.dataset.tensors[1][3] = -1
    with pytest.raises(ValueError, match="6 classes, the network's outputs; item 3 of the batch has -1"):
        learn.fit(1)


def test_an_epoch_without_a_triplet_has_no_loss(tmp_path):
    """NaN: an epoch of 0 would be the best to SaveModelCallback."""
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5, schedule=lambda pct: float(0.3 < pct < 0.7)))
    learn.fit(4, cbs=SaveModelCallback(monitor="crl_loss", fname="best"))
    losses = [row[3] for row in learn.recorder.values]
    assert [math.isnan(v) for v in losses] == [True, False, False, True]
    assert [row[4] > 0 for row in learn.recorder.values] == [False, True, True, False]
    best = learn.save_model.best if hasattr(learn, "save_model") else min(losses[1:3])
    assert best in losses[1:3]


@pytest.mark.parametrize("shape", [(N, 1), (N,)])
def test_auto_alpha_of_one_label(tmp_path, shape):
    data = torch.utils.data.TensorDataset(torch.randn(N, 8), torch.zeros(shape))
    data.tensors[1][:8] = 1
    dls = DataLoaders.from_dsets(data, data, bs=N, shuffle=False, num_workers=0, device="cpu")
    learn = Learner(dls, nn.Linear(8, 1), BCEWithLogitsLossFlat(), cbs=[CRLCallback(schedule=full), Spy()])
    with torch.no_grad():
        z, y = learn.model(data.tensors[0]), data.tensors[1].reshape(-1, 1)
        base = nn.functional.binary_cross_entropy_with_logits(z, y)
        expected = 0.375 * CRL()(z, y) + 0.625 * base
    learn.fit(1)
    assert learn.crl.alphas == pytest.approx([0.375])  # |½ - 8 / 64|
    assert learn.spy.losses[0] == pytest.approx(expected.item(), rel=1e-5) and expected != base


def test_float64(tmp_path):
    torch.manual_seed(1)
    learn = make_learner(tmp_path, [CRLCallback(alpha=0.1, schedule=full, k=3), Spy()], model=make_model().double())
    learn.remove_cbs([Recorder, ProgressCallback])  # fastai's recorder takes float32 only, and its own loss gives it
    learn.loss_func = nn.BCEWithLogitsLoss()
    for loader in (learn.dls.train, learn.dls.valid):
        loader.dataset.tensors = tuple(t.double() for t in loader.dataset.tensors)
    x, y = (t[:32] for t in learn.dls.train.dataset.tensors)
    z = learn.model(x)
    expected = 0.1 * CRL(k=3)(z, y) + 0.9 * nn.functional.binary_cross_entropy_with_logits(z, y)
    learn.fit(1)
    assert learn.spy.losses[0] == pytest.approx(expected.item(), rel=1e-14)


def test_a_ready_term(tmp_path):
    term = CRL(k=3, criterion="ranking")
    assert CRLCallback(term=term).term is term
    with pytest.raises(ValueError, match=r"term=CRL has its options already: give k to it"):
        CRLCallback(term=term, k=4)
    with pytest.raises(TypeError, match="term='ranking': give a CRL object"):
        CRLCallback(term="ranking")


class NoWait(Callback):
    """Forbids waiting for the GPU from the prediction of a training batch to its gradients."""

    order, run_valid = -1, False

    def after_pred(self):
        torch.cuda.set_sync_debug_mode("error" if self.learn.train_iter else "default")  # the first batch settles

    def before_step(self):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "ranking"},
        {"criterion": "ranking", "alpha": 0.3, "shift": [0.1] * C},
        {"frequency": range(C, 0, -1)},
        {"scope": "attribute"},
        {"level": "instance"},
        None,
    ],
)
def test_a_step_never_waits_for_the_gpu(tmp_path, options):
    """Of the callback; None: of `CRLLoss`, α that of the labels seen so far."""
    learn = make_learner(tmp_path, [NoWait()] if options is None else [CRLCallback(schedule=full, **options), NoWait()])
    learn.dls.cuda()
    if options is None:
        learn.loss_func = CRLLoss()
    try:
        learn.fit(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if options is not None:
        assert learn.crl.counts_frame().to_numpy().sum() > 0
        assert learn.crl.term.frequency is None or learn.crl.term.frequency.is_cuda


@pytest.mark.parametrize("watcher", [SaveModelCallback, EarlyStoppingCallback])
def test_who_goes_by_the_loss_is_warned(tmp_path, watcher):
    "CRL may raise the validation loss while rare labels get better."
    learn = make_learner(tmp_path, CRLCallback(criterion="ranking"), metrics=MacroF1())
    said = rf"raise valid_loss, which decides for {watcher.__name__}.*pass monitor=\"mean_ap\""
    with pytest.warns(UserWarning, match=rf"{said}, and give the learner metrics=MeanAP\(\)\."):
        learn.fit(1, cbs=watcher())
    with pytest.warns(UserWarning, match=rf"{said}\."):
        make_learner(tmp_path, CRLCallback(), metrics=MeanAP()).fit(1, cbs=watcher())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        learn.fit(1, cbs=watcher(monitor="macro_f1"))
        learn.fit(1, cbs=SaveModelCallback(every_epoch=True))
        make_learner(tmp_path, CRLCallback(alpha=0)).fit(1, cbs=watcher())


def test_what_is_changed_on_a_callback_is_checked_as_at_the_start(tmp_path):
    learn = make_learner(tmp_path, CRLCallback(alpha=0.5, schedule=full))
    for alpha in (3, -1, float("nan"), "Auto"):
        with pytest.raises(ValueError, match="alpha="):
            learn.crl.alpha = alpha
    with pytest.raises(ValueError, match="schedule"):
        learn.crl.schedule = [2.0]
    for name, value in (("k", 1), ("criterion", "absolute")):
        with pytest.raises(AttributeError, match=rf"CRLCallback\({name}=\.\.\.\)"):
            setattr(learn.crl, name, value)
    learn.crl.alpha = 0.25
    learn.fit(1)
    assert set(learn.crl.alphas) == {0.25}


def test_a_misspelt_keyword_is_named():
    with pytest.raises(TypeError, match=r"CRLCallback has no keyword critrion= \(did you mean criterion=\?\)"):
        CRLCallback(critrion="ranking")
    with pytest.raises(TypeError, match=r"kappa= \(did you mean k=\?\)"):
        CRLCallback(kappa=3)


@pytest.mark.parametrize("loss", [nn.BCELoss(), BCELossFlat()])
def test_a_loss_of_probabilities_is_refused(tmp_path, loss):
    "CRL would take the sigmoid of a sigmoid."
    model = nn.Sequential(make_model(), nn.Sigmoid())
    learn = make_learner(tmp_path, CRLCallback(), model=model)
    learn.loss_func = loss
    learn.validate()
    with pytest.raises(ValueError, match=r"BCELoss takes the outputs.*as they are.*BCEWithLogitsLossFlat"):
        learn.fit(1)
    with pytest.raises(ValueError, match="BCELoss takes the outputs"):
        CRLLoss(loss, single_label=False)


def test_a_fit_without_data_is_refused(tmp_path):
    "An export that fails leaves fastai's learner with empty loaders, whose fit would train nothing."
    learn = make_learner(tmp_path, CRLCallback())
    dls, learn.dls = learn.dls, DataLoaders(*(torch.utils.data.DataLoader([], 4) for _ in range(2)))
    with pytest.raises(ValueError, match=r"training set of the learner is empty.*learn\.dls = dls"):
        learn.fit(1)
    learn.dls = dls
    learn.fit(1)


class InColumn(Callback):
    "Class indices (n, 1), as fastai's loaders of tables give them."

    def before_batch(self):
        self.learn.yb = (self.learn.yb[0][:, None],)


def test_class_indices_in_a_column(tmp_path):
    weights = []
    for cbs in ([], [InColumn()]):
        torch.manual_seed(0)
        crl = CRLCallback(alpha=0.5, schedule=[1.0], k=3)
        learn = make_learner(tmp_path, [crl, *cbs], single_label=True)
        learn.fit(1)
        weights.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    assert crl.counts_frame().to_numpy().sum() > 0
    torch.testing.assert_close(*weights)
    logits, y = torch.randn(12, 3), torch.arange(12) % 3
    assert CRLLoss(alpha=0.3)(logits, y[:, None]) == CRLLoss(alpha=0.3)(logits, y)
    adjusted = make_loss("logit_adjusted", [5, 4, 3], single_label=True)
    assert adjusted(logits, y[:, None]) == adjusted(logits, y)
    with pytest.raises(ValueError, match=r"targets of shape \(12, 1\) do not fit logits of shape \(12, 3\)"):
        CRLLoss(alpha=0.3)(logits, y[:, None].float())  # no indices
