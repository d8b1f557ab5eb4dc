"""Targets that are unknown have no part in anything, and soft targets count as what they are nearer to."""

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders
from fastai.losses import BCEWithLogitsLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import trainable_params
from fastai.vision.models.xresnet import xresnet18
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as skm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastai_crl._checks import Batch
from fastai_crl.compare.data import Data
from fastai_crl.evaluate import metrics
from fastai_crl.evaluate.interpret import CRLInterpretation
from fastai_crl.evaluate.predictions import predict_probabilities
from fastai_crl.evaluate.recall import RecallAtLeast
from fastai_crl.evaluate.thresholds import fit_thresholds
from fastai_crl.labels import UnknownLabelsError, count_labels, label_counts, read_labels
from fastai_crl.learner import crl_learner
from fastai_crl.losses.baselines import make_loss
from fastai_crl.losses.complete import of_known
from fastai_crl.losses.crl import CRL
from fastai_crl.losses.frequency import start_at_frequency
from fastai_crl.losses.imbalance import SeenLabels
from fastai_crl.samplers import RepeatFactorSampler
from fastai_crl.unknown import UnknownTargets, half_if_unknown, hardened

from . import oracle

NAN, N, C = float("nan"), 96, 4
G = torch.Generator().manual_seed(3)
X = torch.rand(N, 3, 4, 4, generator=G)
Y = (torch.rand(N, C, generator=G) < torch.tensor([0.4, 0.2, 0.3, 0.2])).float()
GAP = torch.rand(N, C, generator=G) < torch.tensor([0.3, 0.2, 0.5, 1.0])  # of the last label nothing is known
BY_NAME = ("bce", "weighted_bce", "focal", "asl", "logit_adjusted")


def small_net(n_out=C):
    return nn.Sequential(nn.Flatten(), nn.Linear(48, n_out))


def loaders(y, n_valid=32):
    parts = [TensorDataset(X[k], y[k]) for k in (slice(n_valid, None), slice(None, n_valid))]
    dls = DataLoaders(*(DataLoader(part, 16) for part in parts))
    dls.c = y.shape[1]
    return dls


def learner(y, tmp_path, **kwargs):
    torch.manual_seed(0)
    learn = crl_learner(loaders(y), xresnet18, path=tmp_path, **kwargs)
    learn.model = small_net()
    learn.splitter, learn.opt_func, learn.opt = trainable_params, SGD, None
    return learn


def one_loss(name):
    counts, n = [40, 20, 30, 5], 100
    return make_loss(name, counts, n) if name in ("weighted_bce", "logit_adjusted", "db") else make_loss(name)


# ---- the base loss ----
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from(BY_NAME), st.sampled_from([0, 0.3, 1]))
@settings(max_examples=60, deadline=None)
def test_base_loss_is_the_mean_of_known_entries(seed, n, name, share):
    if name == "asl":
        pytest.importorskip("timm", minversion="1.0.31")
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, C, generator=g, dtype=torch.float64 if name != "asl" else torch.float32)
    targets = (torch.rand(n, C, generator=g) < 0.3).to(logits)
    known = torch.rand(n, C, generator=g) >= share
    logits.requires_grad_()
    loss, plain = of_known(one_loss(name)), one_loss(name)
    assert of_known(loss) is not None and loss.reduction == "mean"
    value = loss(logits, torch.where(known, targets, 0.5))
    # The plain loss of each entry: what a batch of that item changes by, label by label.
    each = [[C * plain(logits[i : i + 1], t) for t in one_entry(targets[i])] for i in range(n)]
    base = [[C * plain(logits[i : i + 1], t) for t in one_entry(targets[i], flip=True)] for i in range(n)]
    if name == "bce":
        full = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        expected = oracle.mean_of_known(full, known.tolist())
        torch.testing.assert_close(value, torch.as_tensor(expected).to(value), rtol=1e-6, atol=1e-7)
        loss.reduction = "none"
        items = [oracle.mean_of_known([full[i]], [known[i].tolist()]) for i in range(n)]
        torch.testing.assert_close(loss(logits, torch.where(known, targets, 0.5)), torch.tensor(items).to(value))
        return
    # Of entries independent of each other a change of one target shows its own loss and no other's.
    for i in range(n):
        for c in range(C):
            flipped = targets.clone()
            flipped[i, c] = 1 - flipped[i, c]
            changed = loss(logits, torch.where(known, flipped, 0.5)) - value
            if not known[i, c]:
                assert changed == 0
            else:
                difference = (base[i][c] - each[i][c]) / known.sum()
                torch.testing.assert_close(changed, difference.to(changed), rtol=1e-4, atol=1e-6)


def one_entry(row, flip=False):
    for c in range(len(row)):
        changed = row.clone()
        changed[c] = 1 - row[c] if flip else row[c]
        yield changed[None]


@pytest.mark.parametrize("name", [*BY_NAME, "db"])
def test_without_unknown_entries_nothing_changes(name):
    pytest.importorskip("timm", minversion="1.0.31")
    logits = torch.randn(9, C, requires_grad=True)
    targets = (torch.rand(9, C) < 0.4).float()
    for loss in (of_known(one_loss(name)), of_known(of_known(one_loss(name)))):
        expected, value = one_loss(name)(logits, targets), loss(logits, targets)
        torch.testing.assert_close(value, torch.as_tensor(expected).as_subclass(torch.Tensor))
        (a,), (b,) = torch.autograd.grad(value, logits), torch.autograd.grad(expected, logits)
        torch.testing.assert_close(a, b.as_subclass(torch.Tensor))


def test_gradient_and_half_precision():
    logits, known = torch.randn(9, C), torch.rand(9, C) < 0.5
    targets = torch.where(known, (torch.rand(9, C) < 0.4).float(), 0.5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        z = logits.to(dtype).requires_grad_()
        value = of_known(BCEWithLogitsLossFlat())(z, targets.to(dtype))
        assert value.dtype == torch.float32
        (gradient,) = torch.autograd.grad(value, z)
        assert not gradient[~known].any()
        expected = (z.detach().float().sigmoid() - targets) / known.sum()
        torch.testing.assert_close(gradient[known].float(), expected[known], rtol=1e-2, atol=1e-3)
    nothing = of_known(BCEWithLogitsLossFlat())(logits.requires_grad_(), torch.full((9, C), 0.5))
    nothing.backward()
    assert nothing == 0 and not logits.grad.any()


def test_losses_that_cannot_leave_entries_out():
    pytest.importorskip("timm", minversion="1.0.31")
    for name in ("zlpr", "two_way"):
        with pytest.raises(ValueError, match="Loss compares the labels of an item"):
            of_known(make_loss(name))
    with pytest.raises(ValueError, match="reduction='sum'"):
        of_known(nn.BCEWithLogitsLoss(reduction="sum"))
    with pytest.raises(ValueError, match="compares the labels"):
        of_known(nn.CrossEntropyLoss())(torch.zeros(3, C), torch.full((3, C), 0.5))
    own = nn.BCEWithLogitsLoss()
    assert of_known(own).reduction == "mean" and own.reduction == "mean"
    assert of_known(BCEWithLogitsLossFlat(thresh=0.2)).thresh == 0.2


# ---- counts ----
@pytest.mark.parametrize("unknown", [NAN, -1.0, 0.5])
def test_counts(unknown):
    y = Y.masked_fill(GAP, unknown)
    source = TensorDataset(X, y)
    counts = count_labels(source, unknown=unknown)
    for c in range(C):
        rows = [i for i in range(N) if not GAP[i, c]]
        assert counts.known[c] == len(rows) and counts.positives[c] == sum(Y[i, c] == 1 for i in rows)
    assert counts.frequency[3] == 0 and label_counts(source, C, unknown).equal(counts.positives)
    labels = read_labels(source, C, unknown)
    assert np.array_equal(labels.toarray(), ((Y == 1) & ~GAP).numpy())
    half = torch.utils.data.Subset(source, range(0, N, 2))
    assert count_labels(half, C, unknown).known.equal((~GAP)[::2].sum(0))
    assert count_labels(TensorDataset(X, Y), C, unknown).known == N
    assert len(RepeatFactorSampler(labels)) >= N
    if unknown != 0.5:
        with pytest.raises(UnknownLabelsError, match="say which"):
            read_labels(source)


def test_starts_at_the_frequency_among_known():
    dls = loaders(Y.masked_fill(GAP, -1))
    bias = start_at_frequency(small_net(), dls=dls, unknown=-1).bias
    y, gap = Y[32:], GAP[32:]
    share = [float(y[~gap[:, c], c].mean()) if c < 3 else 0.5 for c in range(C)]
    torch.testing.assert_close(bias.detach().sigmoid(), torch.tensor(share))
    weights = make_loss("weighted_bce", dls=dls, unknown=-1).func.pos_weight
    torch.testing.assert_close(weights, torch.tensor([(1 - p) / p for p in share]).sqrt())


def test_omega_of_one_label_seen():
    targets = torch.tensor([[1.0], [1], [0], [0.5], [0.5], [0.5]])
    omega = SeenLabels()(Batch(torch.zeros(6, 1), targets))
    torch.testing.assert_close(omega, torch.tensor(abs(0.5 - 2 / 3)))


# ---- measures and thresholds ----
def by_label(values):
    return np.mean([v for v in values if not np.isnan(v)]) if not np.isnan(values).all() else np.nan


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 40), st.sampled_from([0.0, 0.2, 0.7]))
@settings(max_examples=60, deadline=None)
def test_measures_equal_those_of_each_label_s_known_items(seed, c, n, share):
    rng = np.random.default_rng(seed)
    probs, true, known = rng.random((n, c)).round(1), rng.random((n, c)) < 0.4, rng.random((n, c)) >= share
    targets = np.where(known, true, 0.5)
    rows = {name: [] for name in ("ap", "auroc", "balanced", "f1", "ece")}
    chosen = probs > 0.5
    for k in range(c):
        p, y = probs[known[:, k], k], true[known[:, k], k]
        both = y.any() and not y.all()
        rows["ap"].append(skm.average_precision_score(y, p) if y.any() else np.nan)
        rows["auroc"].append(skm.roc_auc_score(y, p) if both else np.nan)
        rows["balanced"].append(skm.balanced_accuracy_score(y, p > 0.5) if both else np.nan)
        rows["f1"].append(oracle.f1_of_known(true.tolist(), chosen.tolist(), known.tolist(), k))
        rows["ece"].append(metrics.calibration_error(p[:, None], y[:, None]) if len(y) else np.nan)
    for name, function in (
        ("ap", metrics.mean_ap),
        ("auroc", metrics.mean_auroc),
        ("balanced", metrics.class_balanced_accuracy),
        ("f1", metrics.macro_f1),
        ("ece", metrics.calibration_error),
    ):
        assert function(probs, targets) == pytest.approx(by_label(np.array(rows[name])), nan_ok=True)
    if known.any():
        all_known = skm.f1_score(true[known], chosen[known], zero_division=0)
        assert metrics.micro_f1(probs, targets) == pytest.approx(all_known)
    else:
        assert np.isnan(metrics.micro_f1(probs, targets))
    table = metrics.label_report(probs, targets)
    for column, name in (("AP", "ap"), ("AUROC", "auroc"), ("F1", "f1"), ("balanced", "balanced"), ("ECE", "ece")):
        assert table[column].tolist() == pytest.approx(rows[name], nan_ok=True)
    assert table.support.tolist() == (true & known).sum(0).tolist()
    assert ("known" in table) == (not known.all())


@pytest.mark.parametrize("how", ["f1", "balanced", "rate", "shift", RecallAtLeast(0.6, 0.6)])
def test_thresholds_are_those_of_the_known_items(how):
    rng = np.random.default_rng(0)
    probs, true, known = rng.random((80, 1)), rng.random((80, 1)) < 0.4, rng.random((80, 1)) < 0.6
    probs[:40] = (probs[:40] + true[:40]) / 2
    rows = known[:, 0]
    masked, alone = fit_thresholds(probs, np.where(known, true, 0.5), how), fit_thresholds(probs[rows], true[rows], how)
    assert masked.thresholds.tolist() == alone.thresholds.tolist()
    assert masked.report.drop(columns="known").equals(alone.report) and masked.report.known.item() == rows.sum()


def test_thresholds_of_labels_hardly_known():
    probs, true = X[:, 0, 0].numpy(), Y.numpy()
    known = ~GAP.numpy()
    known[:, 2] = np.arange(N) < 3
    for how in ("f1", "balanced", "rate", "shift"):
        fitted = fit_thresholds(probs, np.where(known, true, 0.5), how)
        assert np.isfinite(fitted.thresholds).all() and np.isnan(fitted.report.in_sample.iloc[3])
    with pytest.raises(ValueError, match="cannot leave out targets that are unknown"):
        fit_thresholds(probs, np.where(known, true, 0.5), lambda targets, chosen: 0.0)
    with pytest.raises(ValueError, match=r"are 0 and 1, and 0\.5 where unknown"):
        metrics.macro_f1(true, probs)  # in the wrong order


def test_interpretation():
    probs, targets = X[:, 0, 0].numpy(), np.where(GAP, 0.5, Y)
    interp = CRLInterpretation(probs, targets, list("abcd"))
    assert interp.report().known.tolist() == (~GAP).sum(0).tolist()
    for kind, value in (("positive", 1), ("negative", 0)):
        assert (targets[interp.hardest("a", kind)["index"], 0] == value).all()
    assert interp.confusion().loc[:, "d"].sum() == 0
    known = ~GAP[:, 0].numpy()
    alone = CRLInterpretation(probs[known, :1], Y[known, :1].numpy(), ["a"])
    assert interp.curve("a").equals(alone.curve("a"))
    other = CRLInterpretation(probs, np.where(GAP, 0, Y), list("abcd"))
    with pytest.raises(ValueError, match="other labels or targets"):
        interp.gain(other)


# ---- training ----
class Steps(Callback):
    """Batches and losses of training."""

    order = 20  # after CRLCallback

    def __init__(self):
        self.seen = []

    def after_loss(self):
        if self.training:
            self.seen.append((self.pred.detach().clone(), self.learn.yb[0].clone(), self.learn.loss.item()))


def test_a_learner_equals_the_plain_loops(tmp_path):
    steps = Steps()
    learn = learner(
        Y.masked_fill(GAP, NAN), tmp_path, unknown=NAN, cbs=steps, alpha=0.3, schedule=[1.0], criterion="relative", k=3
    )
    learn.fit(2, 0.1)
    gap = GAP[32:].split(16) * 2
    for (logits, targets, loss), hidden in zip(steps.seen, gap, strict=True):
        assert torch.equal(targets == 0.5, hidden)
        each = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        base = float(oracle.mean_of_known(each.tolist(), (~hidden).tolist()))
        scores, told = logits.sigmoid().double(), targets.tolist()
        found = oracle.triplets(scores.tolist(), told, 3, 0.5, "joint")
        distances = oracle.pair_distances(found, scores, told, "joint", "class", None)[0]
        expected = 0.3 * float(oracle.relative(distances, 0.5)) + 0.7 * base if found else base
        assert loss == pytest.approx(expected, rel=1e-5)
    assert any(loss for *_, loss in steps.seen)


@pytest.mark.parametrize("loss_func", [None, "weighted_bce", "focal", "db"])
def test_what_stands_for_unknown_has_no_influence(loss_func, tmp_path):
    if loss_func == "db":
        pytest.importorskip("timm", minversion="1.0.31")
    results = []
    for unknown in (NAN, -1.0, 7.0):
        learn = learner(Y.masked_fill(GAP, unknown), tmp_path, unknown=unknown, loss_func=loss_func)
        learn.fit(2, 0.1)
        fitted = learn.fit_thresholds()
        shifted = learn.fit_thresholds(how="shift").thresholds
        report = CRLInterpretation.from_learner(learn).report()
        weights = [p.detach().clone() for p in learn.model.parameters()]
        alphas = list(map(float, learn.crl.alphas))
        results.append((learn.recorder.values, weights, fitted.thresholds.tolist(), shifted.tolist(), report, alphas))
    first = results[0]
    assert np.isfinite(first[0][-1][:4]).all() and first[-1][-1] > 0
    for other in results[1:]:
        assert [row[:-1] for row in first[0]] == [row[:-1] for row in other[0]]
        assert all(torch.equal(a, b) for a, b in zip(first[1], other[1], strict=True))
        assert first[2:4] == other[2:4] and first[4].equals(other[4]) and first[5] == other[5]


def test_decisions_and_losses_of_items(tmp_path):
    y = Y.masked_fill(GAP, NAN)
    learn = learner(y, tmp_path, unknown=NAN)
    learn.fit(1, 0.1)
    probs, targets, losses = learn.get_preds(dl=learn.dls.valid, with_loss=True)
    each = nn.functional.binary_cross_entropy(probs, Y[:32], reduction="none")
    expected = [oracle.mean_of_known([each[i]], [~GAP[i]]) for i in range(32)]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-5)
    assert torch.equal(targets == 0.5, GAP[:32])
    learn.thresholds = [0.1, 0.2, 0.3, 0.4]
    learn.loss_func = nn.BCEWithLogitsLoss()
    assert learn.loss_func.known_only and learn.thresholds.tolist() == [0.1, 0.2, 0.3, 0.4]
    assert np.isfinite(learn.validate()).all()
    learn.dls = DataLoaders(*learn.dls.loaders)
    assert isinstance(learn.unknown_targets, UnknownTargets)


# ---- what is refused ----
def test_without_being_told_unknown_targets_are_an_error(tmp_path):
    for unknown in (NAN, -1.0):
        learn = learner(Y.masked_fill(GAP, unknown), tmp_path, loss_func="bce", alpha=0)
        with pytest.raises(ValueError, match=r"targets must be in \[0, 1\]"):
            learn.fit(1)
    learn = learner(Y.masked_fill(GAP, -1), tmp_path, loss_func="bce", unknown=NAN)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 1\]"):
        learn.fit(1)


def test_what_does_not_go_with_unknown_targets(tmp_path):
    y = Y.masked_fill(GAP, NAN)
    for wrong in (0, 1, True, "nan"):
        with pytest.raises(ValueError, match="give the value of unknown targets"):
            crl_learner(loaders(y), xresnet18, unknown=wrong)
    with pytest.raises(ValueError, match="MixUp blends targets"):
        learner(y, tmp_path, unknown=NAN).fit(1, cbs=MixUp())
    one = DataLoaders(*(DataLoader(TensorDataset(X, Y[:, 0].long()), 16) for _ in range(2)))
    with pytest.raises(ValueError, match="is for several labels per image"):
        crl_learner(one, xresnet18, unknown=NAN)
    with pytest.raises(ValueError, match="compared on known targets alone"):
        Data(loaders(Y)).check(torch.where(GAP, 0.5, Y)[:32])


# ---- soft targets ----
def test_soft_targets_train_as_they_are_and_are_measured_as_hard_ones(tmp_path):
    soft = Y * 0.9 + 0.05
    steps = Steps()
    learn = learner(soft, tmp_path, cbs=steps, alpha=0.25, schedule=[1.0])
    learn.fit(1, 0.1)
    for logits, targets, loss in steps.seen:
        base = nn.functional.binary_cross_entropy_with_logits(logits, targets)
        term = CRL(criterion="ranking")(logits, (targets > 0.5).float())
        assert loss == pytest.approx(float(0.25 * term + 0.75 * base), rel=1e-5)
        assert set(targets.unique().tolist()) <= set(soft.unique().tolist())
    shown = learn.recorder.values[-1][2:4]
    probs, targets = predict_probabilities(learn, dl=learn.dls.valid)
    assert torch.equal(targets, Y[:32])
    expected = [metrics.macro_f1(probs, Y[:32]), metrics.mean_ap(probs, Y[:32])]
    assert list(shown) == pytest.approx(expected)
    assert label_counts(learn.dls, C).equal(Y[32:].sum(0).long())


def test_values_by_themselves():
    y = torch.tensor([[0.0, 0.3, 0.5, 0.7, 1.0, NAN, -1.0]])
    assert hardened(y).tolist()[0][:5] == [0, 0, 0.5, 1, 1] and hardened(y)[0, 5].isnan() and hardened(y)[0, 6] == -1
    assert half_if_unknown(torch.tensor([[1, -1]]), -1).tolist() == [[1, 0.5]]
    assert hardened(torch.tensor([1, 2])).tolist() == [1, 2]
