"""One seed sets weights, order and augmentation of all arms; what tells arms apart."""

import weakref
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.losses import BCEWithLogitsLossFlat
from torch import nn

from fastai_crl.callback import CRLCallback
from fastai_crl.compare.arm import Arm, as_text
from fastai_crl.samplers import with_sampler

from .toy import toy_dls, toy_learner


class Seen(Callback):
    """What a fit started from, and the inputs that it was given."""

    def __init__(self, kept: list):
        self.kept = kept

    def before_fit(self):
        if not hasattr(self.learn, "gather_preds"):
            self.kept.append([v.clone() for v in self.learn.model.state_dict().values()])

    def before_batch(self):
        if self.training:
            self.kept[-1].append(self.learn.xb[0].clone())


def one_epoch(learn):
    learn.fit(1)


def started(make, seed: int = 0, like=None, dls=None) -> tuple[list[torch.Tensor], str]:
    kept: list = []
    dls = toy_dls() if dls is None else dls
    arm = Arm("arm", lambda dls: _with(make(dls), Seen(kept)))
    for each in (arm, like):
        if each is not None:
            each.look(dls, one_epoch)
    *_, weights = arm.run(dls, seed, one_epoch, like=like)
    return kept[-1], weights


def _with(learn, callback):
    learn.add_cb(callback)
    return learn


def early_draws(dls):
    torch.rand(3), np.random.rand(2), dls.one_batch()
    return toy_learner(dls)


def test_a_seed_sets_weights_and_order_whatever_was_drawn_before():
    plain = Arm("plain", toy_learner)
    first, own = started(toy_learner)
    again, _ = started(toy_learner)
    other, _ = started(toy_learner, seed=1)
    shared, weights = started(early_draws, like=plain)
    crl, _ = started(lambda dls: toy_learner(dls, cbs=CRLCallback()), like=plain)
    assert len(first) > 4 + 5  # weights, and batches
    for same in (again, shared, crl):
        assert all(map(torch.equal, first, same))
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[-1], other[-1])
    assert own == weights == "shared"


def test_a_bias_that_is_set_stays_and_the_drawn_weights_are_shared():
    def set_bias(dls):
        learn = early_draws(dls)
        nn.init.constant_(learn.model[-1].bias, -3.0)
        return learn

    plain = Arm("plain", lambda dls: _with_bias(toy_learner(dls), 0.0))
    first, _ = started(plain.make)
    found, weights = started(set_bias, like=plain)
    assert torch.equal(found[0], first[0]) and found[3].tolist() == [-3.0] * 4 and weights == "shared"


def _with_bias(learn, value):
    nn.init.constant_(learn.model[-1].bias, value)
    return learn


def spread_wide(dls):
    torch.rand(1)
    learn = toy_learner(dls, hidden=32)
    nn.init.normal_(learn.model[0].weight, std=3.0)
    return learn


@pytest.mark.parametrize("make", [partial(toy_learner, hidden=16), spread_wide], ids=["shapes", "spread"])
def test_networks_that_are_not_alike_keep_their_own_weights(make):
    found, weights = started(make, like=Arm("plain", partial(toy_learner, hidden=32)))
    assert weights == "own: drawn otherwise than those of plain"
    assert torch.equal(found[0], started(make)[0][0])


def test_a_sampler_starts_anew_with_each_run():
    dls = with_sampler(toy_dls(), "repeat_factor", seed=0)
    first, _ = started(toy_learner, dls=dls)
    second, _ = started(toy_learner, dls=dls)
    assert all(map(torch.equal, first, second))


def test_random_numbers_of_others_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    started(toy_learner)
    assert torch.equal(torch.rand(1), expected)


def test_no_learner_is_left_and_one_is_held_at_a_time():
    alive: list[weakref.ref] = []
    most = []

    def make(dls):
        most.append(sum(ref() is not None for ref in alive))
        learn = toy_learner(dls)
        alive.append(weakref.ref(learn.model))
        return learn

    arm, dls = Arm("arm", make), toy_dls()
    arm.look(dls, one_epoch)
    for seed in range(2):
        arm.run(dls, seed, one_epoch)
    assert most == [0, 0, 0, 0]


def test_arms_that_cannot_be_compared_are_named():
    dls, network = toy_dls(), nn.Linear(8, 4)
    with pytest.raises(ValueError, match="'a' made the same network twice"):
        Arm("a", lambda dls: _of(dls, network)).look(dls, one_epoch)
    with pytest.raises(ValueError, match="'a' made a Linear: let it return a fastai Learner"):
        Arm("a", lambda dls: network).look(dls, one_epoch)
    with pytest.raises(ValueError, match="trains no epoch of the arm 'a'"):
        Arm("a", toy_learner).look(dls, lambda learn: None)


def _of(dls, network):
    from fastai.learner import Learner

    return Learner(dls, network, BCEWithLogitsLossFlat())


def test_epochs_are_counted_without_training():
    arm, before = Arm("a", toy_learner), []
    arm.look(toy_dls(), lambda learn: (learn.fine_tune(3), before.append(as_text(learn.model.state_dict()))))
    assert arm.epochs == 4  # one of them frozen
    arm.look(toy_dls(), lambda learn: (before.append(as_text(learn.model.state_dict())), learn.fit(2)))
    assert arm.epochs == 2 and before[0] == before[1]


def test_a_run_that_diverges_says_so():
    def broken(learn):
        learn.fit(1)
        nn.init.constant_(learn.model[0].weight, torch.nan)

    assert Arm("a", toy_learner).run(toy_dls(), 0, broken)[:2] == (None, None)


def test_a_text_tells_losses_and_callbacks_apart():
    def loss(*weight):
        return BCEWithLogitsLossFlat(pos_weight=torch.tensor(weight))

    assert as_text(loss(1.0, 2.0)) == as_text(loss(1.0, 2.0)) != as_text(loss(1.0, 3.0))
    assert as_text(CRLCallback(k=3)) != as_text(CRLCallback(k=4))
    assert as_text(partial(one_epoch, lr=1)) != as_text(partial(one_epoch, lr=2)) and as_text(lambda: 0) == "<lambda>"
    assert as_text({3, 1, 2}) == "[1, 2, 3]"
    assert "0x" not in as_text([CRLCallback(), loss(1.0), one_epoch])  # no address, which another process has not
