"""Test-time augmentation against a loop over the flips and turns of torch."""

import random

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback  # noqa: F401  (gives learners their no_bar)
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from torch import nn

from fastai_crl.callback import CRLCallback
from fastai_crl.data.loaders import HPADataLoaders
from fastai_crl.predict.tta import d4_tta


def net(n_out: int) -> nn.Module:
    """A network whose answer depends on the orientation, and, in training mode, on chance."""
    return nn.Sequential(
        nn.Conv2d(4, 5, 3, 2), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(80, n_out)
    )


def learner(dls, n_out: int, loss=None, **kwargs) -> Learner:
    return Learner(dls, net(n_out), loss_func=loss or BCEWithLogitsLossFlat(), **kwargs)


def quiet(learn: Learner, *args, **kwargs):
    with learn.no_bar(), learn.no_logging():
        return d4_tta(learn, *args, **kwargs)


def variants(x: torch.Tensor) -> list[torch.Tensor]:
    x = x.as_subclass(torch.Tensor)
    turns = range(4) if x.shape[-2] == x.shape[-1] else (0, 2)
    return [v for k in turns for v in (torch.rot90(x, k, (-2, -1)), torch.rot90(x, k, (-2, -1)).flip(-1))]


def by_hand(learn: Learner, dl, act) -> torch.Tensor:
    learn.model.eval()
    with torch.no_grad():
        return torch.cat([torch.stack([act(learn.model(v)) for v in variants(x)]).mean(0) for x, _ in dl])


def test_the_mean_over_eight_turns_in_the_order_of_the_data(hpa_dls):
    learn = learner(hpa_dls, hpa_dls.c)
    probs, targets = quiet(learn)
    with learn.no_bar():
        plain, want = learn.get_preds()
    assert torch.equal(targets, want) and probs.shape == plain.shape and probs.device.type == "cpu"
    assert torch.allclose(probs, by_hand(learn, hpa_dls.valid, torch.sigmoid), atol=1e-6)
    assert not torch.allclose(probs, plain, atol=1e-4) and not probs.requires_grad


def test_turning_an_image_does_not_change_its_prediction(hpa_dls):
    x, y = hpa_dls.valid.one_batch()
    learn = learner(hpa_dls, hpa_dls.c)
    first = quiet(learn, dl=[(x, y)])[0]
    for turned in variants(x):
        assert torch.allclose(quiet(learn, dl=[(turned, y)])[0], first, atol=1e-6)


def test_images_that_are_not_square_are_flipped_only(hpa):
    dls = HPADataLoaders.from_csv(hpa, size=(20, 32), bs=16, num_workers=0)
    learn = learner(dls, dls.c)
    assert len(variants(dls.valid.one_batch()[0])) == 4
    assert torch.allclose(quiet(learn)[0], by_hand(learn, dls.valid, torch.sigmoid), atol=1e-6)


def test_training_data_is_predicted_whole_and_without_augmentation(hpa):
    dls = HPADataLoaders.from_csv(hpa, size=32, bs=16, num_workers=0)
    plain = HPADataLoaders.from_csv(hpa, size=32, bs=16, num_workers=0, batch_tfms=[], shuffle=False, drop_last=False)
    learn = learner(dls, dls.c)
    probs = quiet(learn, 0)[0]
    assert len(probs) == len(dls.train_ds) and torch.equal(probs, quiet(learn, 0)[0])
    assert torch.allclose(probs, by_hand(learn, plain.train, torch.sigmoid), atol=1e-5)
    assert dls.train_ds.split_idx == 0  # as before


def test_single_label():
    items = [(torch.rand(4, 9, 9), torch.tensor(i % 3)) for i in range(10)]
    dl = DataLoader(items, bs=4)
    learn = learner(DataLoaders(dl, dl), 3, CrossEntropyLossFlat())
    probs, targets, decoded, losses = quiet(learn, with_decoded=True, with_loss=True)
    want = by_hand(learn, dl, lambda o: o.softmax(-1))
    assert torch.allclose(probs, want, atol=1e-6) and targets.tolist() == [i % 3 for i in range(10)]
    assert torch.equal(decoded, probs.argmax(-1))
    with learn.no_bar():
        assert torch.allclose(losses, learn.get_preds(with_loss=True)[2])


def test_images_without_labels_and_several_inputs(hpa, hpa_dls):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(3)

        def forward(self, x, bias):
            return self.net(x) + bias

    learn = learner(hpa_dls, hpa_dls.c)
    dl = hpa_dls.test_dl(hpa_dls.valid_ds.items)
    assert torch.equal(quiet(learn, dl=dl)[0], quiet(learn)[0])
    x, bias, y = torch.rand(5, 4, 8, 8), torch.randn(5, 3), torch.zeros(5, 3)
    learn = Learner(DataLoaders([(x, bias, y)], [(x, bias, y)]), Two(), loss_func=BCEWithLogitsLossFlat())
    learn.dls.n_inp = 2
    probs = quiet(learn, dl=DataLoader([(x[i], bias[i], y[i]) for i in range(5)], bs=2, n_inp=2))[0]
    with torch.no_grad():
        want = torch.stack([learn.model(v, bias).sigmoid() for v in variants(x)]).mean(0)
    assert torch.allclose(probs, want, atol=1e-6)


def test_the_learner_is_left_as_it_was(hpa_dls):
    class LastPreds(Callback):
        order = 60

        def after_batch(self):
            self.kept = self.pred

    learn = learner(hpa_dls, hpa_dls.c, cbs=[CRLCallback(), LastPreds()])
    names = sorted(cb.name for cb in learn.cbs)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    probs, last = quiet(learn)[0], learn.last_preds.kept
    state = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with learn.no_bar(), learn.no_logging():
        learn.get_preds()
    assert state == (random.random(), np.random.rand(), torch.rand(1).item())  # draws no more than get_preds
    assert sorted(cb.name for cb in learn.cbs) == names
    x = list(hpa_dls.valid)[-1][0]  # what later callbacks see are the predictions for the images as they are
    with torch.no_grad():
        assert torch.allclose(last, learn.model(x), atol=1e-6) and probs.max() <= 1
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)


def test_half_precision_runs_inside_autocast(hpa_dls):
    class Half(Callback):
        """As fastai's MixedPrecision, on the CPU."""

        order = 10

        def before_batch(self):
            self.autocast = torch.autocast("cpu", torch.bfloat16)
            self.autocast.__enter__()

        def after_pred(self):
            self.learn.pred = self.pred.float()

        def after_loss(self):
            self.autocast.__exit__(None, None, None)

    learn = learner(hpa_dls, hpa_dls.c, cbs=Half())
    seen = []
    learn.model.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    probs = quiet(learn)[0]
    assert set(seen) == {torch.bfloat16} and len(seen) == 8 * len(hpa_dls.valid) and probs.dtype == torch.float32
    assert torch.allclose(probs, by_hand(learn, hpa_dls.valid, torch.sigmoid), atol=0.02)


def test_inputs_that_are_no_image_batches_are_named():
    dl = DataLoader([(torch.rand(7), torch.zeros(2)) for _ in range(4)], bs=2)
    learn = Learner(DataLoaders(dl, dl), nn.Linear(7, 2), loss_func=BCEWithLogitsLossFlat())
    with pytest.raises(ValueError, match=r"the first input is a Tensor of shape \(2, 7\): use get_preds"):
        quiet(learn)
