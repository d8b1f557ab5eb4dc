"""The memory of past positives against rings of plain Python."""

import pickle
from collections import deque

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler  # noqa: F401  (adds lr_find to Learner)
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat
from torch import nn

from fastai_crl.callback import CRLCallback
from fastai_crl.losses.crl_loss import CRL
from fastai_crl.mining.memory import PositiveMemory
from fastai_crl.mining.mine import minority_classes
from tests import oracle


@pytest.mark.parametrize("level", ["class", "instance"])
def test_equals_plain_rings_over_hundreds_of_batches(level):
    n_classes, size, max_age = 4, 3, 7
    memory = PositiveMemory(size, max_age, level)
    rings = [deque(maxlen=size) for _ in range(n_classes)]
    for step in range(300):
        n = int(torch.randint(0, 9, ()))
        values = torch.rand(n, n_classes if level == "class" else 2, requires_grad=True)
        positive = torch.rand(n, n_classes) < torch.tensor([0.02, 0.1, 0.3, 0.9])
        memory.write(values, positive)
        for i, c in positive.nonzero().tolist():
            rings[c].append((values[i, c].tolist() if level == "class" else values[i].tolist(), step))
        kept, valid = memory.read()
        assert not kept.requires_grad and kept.shape[:2] == valid.shape == (n_classes, size)
        for c in range(n_classes):
            assert sorted(kept[c][valid[c]].tolist()) == sorted(
                v for v, written in rings[c] if step - written < max_age
            )


def test_empty_reset_and_pickle():
    memory = PositiveMemory(2, 5)
    assert memory.read() is None
    memory.write(torch.rand(3, 2), torch.ones(3, 2, dtype=torch.bool))
    copy = pickle.loads(pickle.dumps(memory))
    assert copy.read() is None and (copy.size, copy.max_age, copy.level) == (2, 5, "class")
    memory.reset()
    assert memory.read() is None


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0)])
def test_errors(arguments):
    with pytest.raises(ValueError, match="=0: the memory"):
        PositiveMemory(*arguments)


@pytest.mark.parametrize("engine", ["auto", "tensors"])
@pytest.mark.parametrize(("n_classes", "rate"), [(4, 0.15), (70, 0.02)])
def test_loss_with_memory_equals_plain_loop(n_classes, rate, engine):
    size, max_age, mined, lone = 3, 5, 0, 0
    crl = CRL(k=4, memory=size, max_age=max_age, engine=engine)
    rings = [deque(maxlen=size) for _ in range(n_classes)]
    for step in range(80):
        n = int(torch.randint(2, 20, ()))
        logits = torch.randn(n, n_classes, dtype=torch.float64, requires_grad=True)
        targets = (torch.rand(n, n_classes) < rate).double()
        p = logits.sigmoid()
        past = [[v for v, written in ring if step - written <= max_age] for ring in rings]
        expected, counts = oracle.relative_with_memory(p, targets.tolist(), past, 4, 0.5, 0.5)
        found, found_counts = crl.loss_and_counts(logits, targets)
        assert found_counts.tolist() == counts
        if expected is None:
            assert found.item() == 0
        else:
            mined += 1
            lone += any(counts[c] and targets[:, c].sum() == 1 for c in range(n_classes))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
            ours, theirs = (torch.autograd.grad(x, logits, materialize_grads=True)[0] for x in (found, expected))
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
        for i, c in targets.nonzero().tolist():
            rings[c].append((p[i, c].detach(), step))
    assert mined > 20 and lone > 10  # batches whose only positive of a label was mined all the same


@pytest.mark.parametrize("criterion", ["relative", "absolute", "distribution"])
@pytest.mark.parametrize("scope", ["joint", "attribute"])
@pytest.mark.parametrize("level", ["class", "instance"])
def test_memory_in_every_variant(level, scope, criterion):
    """A label with one positive in each batch is mined from the second batch on, with a finite gradient."""
    crl, moved = CRL(k=4, level=level, scope=scope, criterion=criterion, memory=8), False
    for step in range(10):
        logits, features = torch.randn(12, 3, requires_grad=True), torch.randn(12, 5, requires_grad=True)
        targets = torch.zeros(12, 3)
        targets[step, 0], targets[:7, 2] = 1, 1
        loss, counts = crl.loss_and_counts(logits, targets, features)
        assert (int(counts[0]) > 0) == (step > 0)
        if step:
            grad = torch.autograd.grad(loss, logits if level == "class" else features)[0]
            assert grad.isfinite().all()
            moved |= bool(grad.any())
    assert moved


def test_memory_lasts_a_fit_and_no_longer(tmp_path):
    data = torch.utils.data.TensorDataset(torch.randn(64, 8), (torch.rand(64, 6) < 0.1).float())
    dls = DataLoaders.from_dsets(data, data, bs=8, num_workers=0, device="cpu")

    class Look(Callback):
        order = 90

        def before_fit(self):
            self.empty = []

        def before_train(self):
            self.empty.append(self.learn.crl.term.past.read() is None)

        def before_validate(self):
            self.in_validation = pickle.dumps(self.learn.crl.term.past.values)

        def after_validate(self):
            assert pickle.dumps(self.learn.crl.term.past.values) == self.in_validation

    crl = CRLCallback(alpha=0.5, schedule=[1.0], memory=4)
    learn = Learner(dls, nn.Linear(8, 6), BCEWithLogitsLossFlat(), cbs=[crl, Look()], path=tmp_path)
    learn.fit(2)
    assert learn.look.empty == [True, False] and crl.term.past.read() is None
    learn.validate()
    learn.lr_find(num_it=6, show_plot=False)
    assert crl.term.past.read() is None
    assert pickle.loads(pickle.dumps(crl.term)).past.read() is None


def test_profile_by_training_frequency():
    """The training set's order decides, not the batch's: label 0, rare in the batch, is the common one."""
    targets = torch.zeros(8, 3)
    targets[:2, 0], targets[2:5, 1], targets[5:, 2] = 1, 1, 1
    assert minority_classes(targets).tolist() == [True, False, False]
    assert minority_classes(targets, frequency=torch.tensor([90, 5, 50])).tolist() == [False, True, False]
    _, counts = CRL(frequency=[90, 5, 50]).loss_and_counts(torch.randn(8, 3), targets)
    assert counts.bool().tolist() == [False, True, False]
