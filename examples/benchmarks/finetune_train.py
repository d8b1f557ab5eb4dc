"""What `finetune.py` trains: arms, and one run of an arm with fastai's `Learner`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import SchedCos
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.torch_core import params, set_seed
from finetune_tasks import Side, upper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastai_crl.all import CRLCallback, SampledDL, make_loss, start_at_frequency

__all__ = ["ARMS", "STAGES", "Arm", "train"]


# ---- arms ----
class OneSidedCRL(CRLCallback):
    """CRL whose gradient reaches the last layer alone (`"head"`), or everything but the last layer (`"body"`)."""

    def __init__(self, part: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.part = part

    def before_train(self) -> None:
        super().before_train()
        self.last = self.learn.model[-1]
        self.seen = self.last.register_forward_hook(lambda module, args, out: setattr(self, "features", args[0]))

    def after_train(self) -> None:
        self.seen.remove()
        super().after_train()

    def after_loss(self) -> None:
        whole, last, features = self.learn.pred, self.last, self.features
        if self.part == "head":
            self.learn.pred = last(features.detach())
        else:
            self.learn.pred = F.linear(features, last.weight.detach(), last.bias.detach())
        super().after_loss()
        self.learn.pred = whole


class WeightAverage(Callback):
    """Ends with an exponential moving average of the weights, over about `steps` steps."""

    def __init__(self, steps: int = 50):
        self.decay = 1 - 1 / steps

    def before_fit(self) -> None:
        self.average = None

    def before_train(self) -> None:
        if self.average is None:
            self.average = AveragedModel(
                self.learn.model, multi_avg_fn=get_ema_multi_avg_fn(self.decay), use_buffers=True
            )

    def after_step(self) -> None:
        self.average.update_parameters(self.learn.model)

    def after_fit(self) -> None:
        if self.average is not None:
            self.learn.model.load_state_dict(self.average.module.state_dict())


@dataclass(frozen=True)
class Arm:
    """What a run trains with.

    Attributes:
        base: name of the base loss, of `make_loss`.
        started: whether the network starts where the base loss of a constant is least.
        crl: options of `CRLCallback`; None: no CRL.
        part: "head" or "body": what CRL's gradient reaches; "" both.
        sampler: of training batches; None: shuffled.
        average: whether the weights at the end are a moving average.
        mixup: whether batches are mixed.
        longer: factor of the number of epochs.
        views: "strong": of images that are augmented strongly; "small": of small images in the first half of training.
        head_first: whether the first epoch trains the last layer alone.
        crl_in: with `head_first`, where CRL trains: "head", that epoch; "rest", those after it; "" all.
    """

    base: str = "bce"
    started: bool = False
    crl: dict[str, Any] | None = None
    part: str = ""
    sampler: str | None = None
    average: bool = False
    mixup: bool = False
    longer: int = 1
    views: str = ""
    head_first: bool = False
    crl_in: str = ""


def decay(done: float, over: float = 1 / 3) -> float:
    """Factor of α: 1 at the start, half a cosine down to 0 where `over` of training is done."""
    return SchedCos(1.0, 0.0)(min(done / over, 1.0))


def late(done: float, start: float = 0.5) -> float:
    """Factor of α: 0 in the first half of training, then half a cosine up to 1 within a quarter."""
    return SchedCos(0.0, 1.0)(min(max(done - start, 0.0) / 0.25, 1.0))


RANKING = {"criterion": "ranking"}  # the package's default
MAIN = {
    "plain": Arm(),
    "started": Arm(started=True),
    "started_crl": Arm(started=True, crl=RANKING),
    "weighted": Arm("weighted_bce", started=True),
    "weighted_crl": Arm("weighted_bce", started=True, crl=RANKING),
}
OTHERS = {
    "plain_crl": Arm(crl=RANKING),
    "adjusted": Arm("logit_adjusted"),
    "adjusted_crl": Arm("logit_adjusted", crl=RANKING),
    "published": Arm(started=True, crl={"criterion": "relative"}),
}


def _changed(part: str = "", sampler: str | None = None, **crl: Any) -> Arm:
    return replace(MAIN["started_crl"], crl=RANKING | crl, part=part, sampler=sampler)


MECHANISM = {
    "crl_64th": _changed(alpha=1 / 64),
    "crl_16th": _changed(alpha=1 / 16),
    "crl_early": _changed(schedule=decay),
    "crl_late": _changed(schedule=late),
    "crl_head": _changed("head"),
    "crl_body": _changed("body"),
    "crl_margin": _changed(margin=0.25),
    "crl_logit": _changed(score_space="logit", alpha=1 / 16),
    "crl_few": _changed(k=3),
    "head_first": replace(MAIN["started"], head_first=True),
    "head_first_crl": replace(MAIN["started_crl"], head_first=True, crl_in="head"),
    "head_first_then_crl": replace(MAIN["started_crl"], head_first=True, crl_in="rest"),
    "weighted_logit": replace(MAIN["weighted"], crl=RANKING | {"score_space": "logit", "alpha": 1 / 16}),
    "repeat": replace(MAIN["started"], sampler="repeat_factor"),
    "repeat_crl": _changed(sampler="repeat_factor"),
}
_RECIPES = {
    "ema": {"average": True},
    "mixup": {"mixup": True},
    "long": {"longer": 2},
    "strong": {"views": "strong"},
    "small": {"views": "small"},
}
RECIPE = {
    f"{name}_{recipe}": replace(MAIN[name], **change)
    for recipe, change in _RECIPES.items()
    for name in ("plain", "started_crl")
}
RECIPE |= {name: replace(MAIN["started"], longer=n) for name, n in {"started_long": 2, "started_longest": 4}.items()}
STAGES = {"main": MAIN, "others": OTHERS, "mechanism": MECHANISM, "recipe": RECIPE}
ARMS = {name: arm for arms in STAGES.values() for name, arm in arms.items()}
SINGLE = {"bce": "ce", "weighted_bce": "class_balanced", "logit_adjusted": "logit_adjusted"}  # of class indices


# ---- a run ----
class Views(torch.utils.data.Dataset):
    """Activations and targets; of each image the view that `chosen` says."""

    def __init__(self, side: Side):
        self.side, self.chosen = side, np.zeros(len(side.y), int)

    def __len__(self) -> int:
        return len(self.side.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.side.x[i, self.chosen[i]].astype(np.float32)), self.side.y[i]


class DrawViews(Callback):
    """Draws a view of each training image anew in each epoch: the same ones in every arm of a seed.

    With `small`, in the first half of training they are of small images.
    """

    def __init__(self, seed: int, small: Side | None = None):
        self.rng, self.small, self.large = np.random.default_rng([seed, 5]), small, None

    def before_train(self) -> None:
        views = self.learn.dls.train_ds
        if self.small is not None:
            self.large = self.large or views.side
            views.side = self.small if self.learn.epoch < self.learn.n_epoch / 2 else self.large
        views.chosen = self.rng.integers(0, views.side.x.shape[1], len(views))


def train(
    sides: dict[str, Side],
    arm: Arm,
    lr: float,
    seed: int,
    epochs: int = 6,
    bs: int = 32,
    make: Callable[[int], nn.Sequential] = upper,
) -> Learner:
    """Return a learner, trained; make: from the number of labels, a network whose last layer is linear."""
    set_seed(seed)
    y = sides["train"].y
    single = y.ndim == 1
    counts = torch.bincount(y).float() if single else y.sum(0)
    model = make(len(counts))
    loss = make_loss(SINGLE[arm.base] if single else arm.base, counts, len(y), single_label=single)
    if arm.started and not single:
        start_at_frequency(model, counts, len(y), pos_weight=getattr(loss.func, "pos_weight", None))
    cbs: list[Callback] = [DrawViews(seed, sides.get("small"))]
    if arm.crl is not None:
        cbs.append(OneSidedCRL(arm.part, **arm.crl) if arm.part else CRLCallback(**arm.crl))
    cbs += [WeightAverage()] * arm.average + [MixUp()] * arm.mixup
    few = Side(sides["valid"].x[:bs], sides["valid"].y[:bs])  # fastai goes through it in every epoch
    dl = SampledDL(Views(sides["train"]), bs, True, arm.sampler, targets=y, drop_last=True)
    dls = DataLoaders(dl, DataLoader(Views(few), bs), device="cpu")
    groups = {"splitter": lambda m: [params(m[:-1]), params(m[-1])]} if arm.head_first else {}
    learn = Learner(dls, model, loss_func=loss, cbs=cbs, **groups)
    with learn.no_bar(), learn.no_logging():
        if arm.head_first:
            _fit_head(learn, lr, arm.crl_in)
            epochs -= 1
        learn.fit_one_cycle(epochs * arm.longer, lr)
    return learn


def _fit_head(learn: Learner, lr: float, crl_in: str) -> None:
    """Train the last layer for an epoch; CRL trains there, after it, or in both."""
    alpha = learn.crl.alpha if crl_in else 0
    learn.freeze()
    if crl_in == "rest":
        learn.crl.alpha = 0
    learn.fit_one_cycle(1, lr)
    learn.unfreeze()
    if crl_in:
        learn.crl.alpha = 0 if crl_in == "head" else alpha
