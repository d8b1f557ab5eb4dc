"""`compare_losses`: the losses for imbalanced data that this package has, each in the learner of `crl_learner`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastcore.meta import delegates
from torch import nn
from torchvision.models import resnet34

from fastai_crl._checks import check_keywords
from fastai_crl.learner import KEYWORDS, CRLLearner, crl_learner
from fastai_crl.losses import start_at_frequency
from fastai_crl.losses.imbalance import Schedule  # noqa: F401, the signature of compare_losses names it
from fastai_crl.task import check_dls, is_single_label

from .answer import Comparison
from .arm import Fit
from .compare import check_arms, compare_learners


@dataclass
class LossArm:
    """A function of data loaders that makes a `crl_learner`, and says so in code.

    Attributes:
        arch: network.
        options: of `crl_learner`.
        start: the network starts at the constant that costs the loss the least, its weights of positives counted in.
    """

    arch: Callable[..., nn.Module] | str
    options: Mapping[str, Any] = field(default_factory=dict)
    start: bool = False

    def __call__(self, dls: DataLoaders) -> CRLLearner:
        learn = crl_learner(dls, self.arch, **self.options)
        if self.start:
            start_at_frequency(learn, pos_weight=learn.loss_func.func.pos_weight)
        return learn

    @property
    def code(self) -> str:
        """The lines that make the learner."""
        arch = self.arch if isinstance(self.arch, str) else self.arch.__name__
        options = "".join(f", {k}={v!r}" for k, v in self.options.items())
        code = f"learn = crl_learner(dls, {repr(arch) if isinstance(self.arch, str) else arch}{options})"
        if self.start:
            code += "; start_at_frequency(learn, pos_weight=learn.loss_func.func.pos_weight)"
        return code


def loss_arms(arch: Callable[..., nn.Module] | str, single_label: bool, **options: Any) -> dict[str, LossArm]:
    """Return the arms of `compare_losses` by name, plain cross entropy first."""

    def arm(start: bool = False, **own: Any) -> LossArm:
        return LossArm(arch, {**options, **own}, start)

    if single_label:
        return {
            "cross entropy": arm(loss_func="ce", alpha=0),
            "class-balanced": arm(loss_func="class_balanced", alpha=0),
            "logit-adjusted": arm(alpha=0),
            "CRL": arm(alpha="auto"),
        }
    return {
        "cross entropy": arm(loss_func="bce", alpha=0),
        "started": arm(alpha=0),
        "√pos_weight": arm(True, loss_func="weighted_bce", alpha=0),
        "logit-adjusted": arm(loss_func="logit_adjusted", alpha=0),
        "CRL": arm(alpha="auto"),
        "CRL on √pos_weight": arm(True, loss_func="weighted_bce", alpha="auto"),
    }


@delegates(crl_learner, but=["loss_func", "alpha", "n_epoch"])
def compare_losses(
    dls: DataLoaders,
    arch: Callable[..., nn.Module] | str = resnet34,
    pretrained: bool = False,
    minutes: float = 60,
    epochs: int | None = None,
    fit: Fit | None = None,
    seeds: int = 5,
    lrs: Any = None,
    dl: Any = None,
    out: str | Path = "comparison",
    arms: Mapping[str, Callable[[DataLoaders], Learner] | None] | None = None,
    **kwargs: Any,
) -> Comparison:
    """Which loss for my data: `compare_learners` of `crl_learner(dls, arch)` with each of these losses.

    Several labels per image: `"cross entropy"`; `"started"`, the same of a network that starts by predicting each label
    as often as it occurs; `"√pos_weight"` from its own start; `"logit-adjusted"`; `"CRL"` on the start, the
    default of `crl_learner` from nothing; `"CRL on √pos_weight"`. One label per image: `"cross entropy"`;
    `"class-balanced"`; `"logit-adjusted"`; `"CRL"`. Image size, augmentation, batches and device are those of `dls`.

    Args:
        dls: as for `crl_learner`, like the next two.
        arch: see there.
        pretrained: see there. The default `fit` is then `learn.fine_tune(epochs)`, else `learn.fit_one_cycle(epochs)`.
        minutes: see `compare_learners`, like the next six.
        epochs: see there; default 10, as of `crl_learner`.
        fit: see there.
        seeds: see there.
        lrs: see there.
        dl: see there.
        out: see there.
        arms: more arms, as `compare_learners` takes them, or others in place of those of their name; None for one that
            is left out: `arms={"logit-adjusted": None}`.
        **kwargs: of `crl_learner`, for all arms.

    Returns:
        A `Comparison`.

    Raises:
        TypeError: a keyword that nothing takes; names the nearest.
        ValueError: None for an arm that there is not; loss_func, alpha or n_epoch, which arms have of their own; see
            `compare_learners`, `crl_learner`.
    """
    if own := sorted({"loss_func", "alpha", "n_epoch"} & set(kwargs)):
        raise ValueError(
            f"{', '.join(own)}: each arm has its own; give an arm of yours, arms={{'mine': ...}}, or epochs=."
        )
    check_dls(dls)
    if not isinstance(arch, str):
        known = {*inspect.signature(compare_losses).parameters, *KEYWORDS}
        check_keywords("compare_losses", kwargs, known)
    made = loss_arms(arch, is_single_label(dls), pretrained=pretrained, **kwargs)
    if strange := [name for name, arm in check_arms(arms or {}).items() if arm is None and name not in made]:
        raise ValueError(f"arms={strange} are None, to be left out, and are no arms here: there are {list(made)}.")
    made |= arms or {}
    chosen = {name: arm for name, arm in made.items() if arm is not None}
    epochs = 10 if epochs is None else epochs
    fit = FineTune(epochs, lrs is not None) if fit is None and pretrained else fit
    return compare_learners(chosen, dls, minutes, epochs, fit, seeds, lrs, dl, out)


@dataclass
class FineTune:
    """Fastai's `fine_tune`: the head alone for an epoch, then all.

    Attributes:
        epochs: of all.
        at_lr: at the learning rate that was given or chosen, `learn.lr`, else at fastai's own.
    """

    epochs: int
    at_lr: bool = False

    def __call__(self, learn: Learner) -> None:
        learn.fine_tune(self.epochs, *([learn.lr] if self.at_lr else []))
