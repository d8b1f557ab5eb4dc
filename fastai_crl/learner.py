"""`crl_learner`: everything put together for training on imbalanced data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision  # noqa: F401  (gives learners to_bf16 and to_fp16)
from fastai.data.core import DataLoaders
from fastai.data.transforms import get_c
from fastai.learner import Learner
from fastai.torch_core import default_device
from fastai.vision.learner import default_split, model_meta, vision_learner
from fastcore.foundation import L
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torchvision.models import resnet34

from fastai_crl._checks import check_keywords
from fastai_crl._fastai import labels_beside_weights, rebuild
from fastai_crl.callback import CRLCallback
from fastai_crl.evaluate.decider import (
    keep_thresholds,
    labels_of,
    set_thresholds,
    threshold_in_use,
    warn_of_other_labels,
)
from fastai_crl.evaluate.metrics import ClassBalancedAccuracy, MacroF1, MeanAP, MicroF1
from fastai_crl.evaluate.predictions import loader_of, predict_probabilities
from fastai_crl.evaluate.thresholds import FittedThresholds, fit_thresholds
from fastai_crl.images.tensor import TensorMultiChannel
from fastai_crl.labels import count_if_told, label_names
from fastai_crl.losses.baselines import make_loss
from fastai_crl.losses.complete import complete, of_known
from fastai_crl.losses.crl import CRL
from fastai_crl.losses.crl_loss import CRLLoss, default_base_loss
from fastai_crl.losses.imbalance import Schedule
from fastai_crl.network import (
    NO_COUNTS,
    ByteImages,
    check_arch,
    check_loss,
    downloading,
    start_or_warn,
)
from fastai_crl.predict import show_predictions, write_report
from fastai_crl.stem import StemSplitter, spread_rgb
from fastai_crl.task import check_dls, is_single_label
from fastai_crl.unknown import UnknownTargets, check_unknown, unknown_of

_CRL_OPTIONS = tuple(inspect.signature(CRL).parameters)
KEYWORDS = {*_CRL_OPTIONS, *inspect.signature(vision_learner).parameters}


class CRLLearner(Learner):
    """A fastai `Learner` whose `fit_one_cycle` needs no argument, and that can decide by a threshold per label.

    A loss of torch or timm, which cannot tell probabilities from logits, is completed: see `CompleteLoss`.

    Attributes:
        default_epochs: epochs of `fit_one_cycle()`.
        thresholds: (C,) thresholds that decisions go by, see `decide`, and an export keeps; None where one number, the
            loss function's, serves all labels. May be set: see `set_thresholds`.
    """

    default_epochs: int = 10

    @property
    def dls(self) -> DataLoaders:
        return self._dls

    @dls.setter
    def dls(self, dls: DataLoaders) -> None:
        warn_of_other_labels(labels_of(vars(self).get("_dls")), labels_of(dls), "The new loaders have")
        self._dls = dls

    @property
    def loss_func(self) -> Any:
        return self._loss_func

    @loss_func.setter
    def loss_func(self, loss: Any) -> None:
        if not isinstance(getattr(loss, "__self__", None), Callback):  # MixUp's stands in for the loss within a fit
            if not hasattr(loss, "activation"):  # predictions would be logits
                loss = complete(loss, is_single_label(self.dls, get_c(self.dls) or None))
            if unknown_of(self) is not None:
                loss = of_known(loss)
            loss = keep_thresholds(vars(self).get("_loss_func"), loss)
        self._loss_func = loss

    def save(self, file: str | Path, **kwargs: Any) -> Path:
        """Fastai's `save`; the weights remember the labels that they are for."""
        with labels_beside_weights(self.model, labels_of(self.dls)):
            return super().save(file, **kwargs)

    def load(self, file: str | Path, **kwargs: Any) -> CRLLearner:
        """Fastai's `load`; warns of weights that a learner of other labels saved."""
        with labels_beside_weights(self.model, labels_of(self.dls)) as saved:
            super().load(file, **kwargs)
        warn_of_other_labels(saved.get("labels"), labels_of(self.dls), "The learner's loaders have")
        return self

    def export(self, fname: str | Path = "export.pkl", *args: Any, **kwargs: Any) -> None:
        """Fastai's `export`; one that fails leaves the learner its data and optimizer."""
        dls, opt = self.dls, self.opt
        try:
            super().export(fname, *args, **kwargs)
        except BaseException:
            self.dls, self.opt = dls, opt
            raise

    def fit_one_cycle(self, n_epoch: int | None = None, *args: Any, **kwargs: Any) -> None:
        """Fastai's `fit_one_cycle`; n_epoch: number of epochs, default `self.default_epochs`."""
        super().fit_one_cycle(self.default_epochs if n_epoch is None else n_epoch, *args, **kwargs)

    @property
    def thresholds(self) -> np.ndarray | None:
        in_use = threshold_in_use(self)
        return in_use if isinstance(in_use, np.ndarray) else None

    @thresholds.setter
    def thresholds(self, values: float | ArrayLike) -> None:
        set_thresholds(self, values)

    def show_results(
        self, ds_idx: int = 1, dl: Any = None, max_n: int = 9, shuffle: bool = True, **kwargs: Any
    ) -> list[Axes] | None:
        """Images with the labels found, missed and falsely given, and their probabilities: see `show_predictions`.

        Of images other than `TensorMultiChannel`, fastai's own.
        """
        loader = loader_of(self, ds_idx) if dl is None else dl
        if isinstance(loader.one_batch()[0], TensorMultiChannel):
            return show_predictions(self, ds_idx, dl, max_n, shuffle, **kwargs)
        return super().show_results(ds_idx, dl, max_n, shuffle, **kwargs)

    def report(self, fname: str | Path = "report.html", dl: Any = None, about: Mapping[str, str] | None = None) -> Path:
        """Write all about the learner as one HTML file, for readers without Python: see `write_report`."""
        return write_report(self, fname, dl, about)

    def fit_thresholds(self, ds_idx: int = 1, dl: Any = None, **options: Any) -> FittedThresholds:
        """Fit `thresholds` to the predictions on the validation set, or on `dl`, and keep them.

        Args:
            ds_idx: 1 the validation set, 0 the training set, which flatters.
            dl: a loader with targets in its place.
            **options: of the function `fit_thresholds`; of one label per image the default is `how="shift"`.

        Returns:
            `FittedThresholds`: (thresholds, report).
        """
        probs, targets = predict_probabilities(self, ds_idx, dl, need_targets=True)
        options.setdefault("names", label_names(self.dls, probs.shape[1]))
        if is_single_label(targets, probs.shape[1]):
            options.setdefault("how", "shift")
        if options.get("how") == "shift" and "frequency" not in options:
            counts = count_if_told(self.dls.train, probs.shape[1], unknown_of(self))
            if counts is not None:
                options["frequency"], options["n"] = counts.frequency, counts.known
        fitted = fit_thresholds(probs, targets, **options)
        self.thresholds = fitted.thresholds
        return fitted


def crl_learner(
    dls: DataLoaders,
    arch: Callable[..., nn.Module] | str = resnet34,
    loss_func: Callable[..., Tensor] | str | None = None,
    alpha: float | Literal["auto"] | None = None,
    schedule: Schedule | None = None,
    pretrained: bool = False,
    n_epoch: int = 10,
    mixed_precision: bool | None = None,
    metrics: Any = None,
    cbs: Any = None,
    unknown: float | None = None,
    **kwargs: Any,
) -> CRLLearner:
    """A vision learner that trains with the Class Rectification Loss: `crl_learner(dls).fit_one_cycle()`.

    Channels and kind of task (multi-label or single-label) come from a batch of `dls`. With a pretrained network and
    more than three channels, the stem's extra channels start from the mean of its RGB filters, all scaled by 3/n_in to
    keep the activations' size, and the stem trains with the head from the first step, also while the body is frozen.
    (fastai starts the extra channels at zero and freezes them there.) On a GPU where there is one.

    Args:
        dls: (n, n_in, H, W) images, of which bytes become 0 to 1, with (n, C) 0/1 targets or (n,) class indices.
        arch: torchvision or fastai architecture, or the name of a timm model.
        loss_func: L_base. Default: for multi-label binary cross entropy, of a network that starts by predicting each
            label as often as it occurs, see `start_at_frequency` (`loss_func="bce"`: from one half); for single-label
            cross entropy of logits + log frequency, `make_loss("logit_adjusted")`, whose probabilities are those of
            balanced classes, see `training_probabilities`. The name of a loss, such as `"asl"`, stands for
            `make_loss(name, dls=dls)`. A loss of torch or timm is completed, see `CompleteLoss`.
        alpha: the weight of CRL, see `CRLCallback`. Default: `"auto"`; for a pretrained network 0, which is printed, as
            CRL has not been shown to help there (see the guide's page of results).
        schedule: see `CRLCallback`.
        pretrained: start from ImageNet weights, which fastai downloads, and frozen, as `vision_learner` does.
        n_epoch: epochs of `fit_one_cycle()` without an argument.
        mixed_precision: train in bfloat16 where the GPU has it, else in float16 with loss scaling. Default: on CUDA;
            False trains in float32.
        metrics: default macro F1 and mean average precision; for single-label accuracy, balanced accuracy and macro F1.
            All decide as the learner does, so at 0.5, or for the likeliest class, until thresholds are fitted.
        cbs: more callbacks, beside `CRLCallback`; a `CRLCallback` among them takes the place of crl_learner's own.
        unknown: the value of unknown targets, `float("nan")` or a number such as -1: the loss, CRL, counts, thresholds
            and the package's metrics leave these entries out (see `of_known`, `UnknownTargets`); other metrics see 0.5
            there. Default: such targets are an error. Soft targets, from 0 to 1, train as they are, and count as yes
            above 0.5, as no below; 0.5 is left out.
        **kwargs: options of `CRL` (k, rho, margin, scope, level, criterion, score_space, frequency, average, shift),
            and of fastai's `vision_learner`. Default: `criterion="ranking"`, where `CRL` itself has the paper's
            `"relative"`. With `level="instance"`, which ranking does not serve, a criterion must be given.

    Returns:
        A `CRLLearner`, with the callback as `learn.crl`.

    Raises:
        TypeError: a keyword that neither has; names the nearest. A network that is made already.
        OSError: weights that cannot be downloaded.
        ValueError: a name that timm does not know; a loss of the other kind of task; batches that are not one image
            tensor and one target tensor, mixed_precision without CUDA; a `CRLLoss`; alpha, schedule or options of CRL
            beside a `CRLCallback`, which has its own; schedule or options of CRL for a pretrained network without
            alpha; what `CRLCallback` raises; unknown targets of a single-label task, with a loss that cannot leave
            entries out, or, when training starts, with MixUp or CutMix.
    """
    check_arch(arch)
    check_dls(dls)
    if not isinstance(arch, str):  # timm's networks have keywords of their own
        check_keywords("crl_learner", kwargs, KEYWORDS)
    n_in, single_label, n_labels, is_bytes = _look(dls)
    options = {name: kwargs.pop(name) for name in _CRL_OPTIONS if name in kwargs}
    given = [*options, *["alpha"] * (alpha is not None), *["schedule"] * (schedule is not None)]
    own = [cb for cb in L(cbs) if isinstance(cb, CRLCallback) or cb is CRLCallback]
    if own and given:
        raise ValueError(
            f"cbs has a CRLCallback, which takes the place of crl_learner's own: give {', '.join(given)} to it, or "
            "leave one of the two out."
        )
    if isinstance(loss_func, CRLLoss):
        raise ValueError(
            "loss_func is a CRLLoss, which has the rectification term already, as CRLCallback has: give its base loss, "
            "and its alpha and options to crl_learner."
        )
    if alpha is None:
        alpha = _default_alpha(pretrained and not own, given)
    options.setdefault("criterion", "ranking")
    check_unknown(unknown, single_label)
    counts = None
    if loss_func is None:
        counts = count_if_told(dls, get_c(dls) or kwargs.get("n_out") or n_labels, unknown, NO_COUNTS)
        loss_func = default_base_loss(single_label)
        if single_label and counts is not None:
            loss_func = make_loss("logit_adjusted", counts.positives, single_label=True)
    elif isinstance(loss_func, str):
        loss_func = make_loss(loss_func, single_label=single_label, dls=dls, unknown=unknown)
    check_loss(loss_func, single_label and kwargs.get("n_out") != 1)
    loss_func = complete(loss_func, single_label) if unknown is None else of_known(loss_func)
    if metrics is None:
        metrics = [MacroF1(), MeanAP()]
        if single_label:
            metrics = [MicroF1(name="accuracy"), ClassBalancedAccuracy(), MacroF1()]
    device = getattr(dls, "device", None) or default_device()
    if mixed_precision and device.type != "cuda":
        raise ValueError("mixed_precision=True needs a CUDA device, and there is none: leave it off on a CPU.")
    rgb_stem = pretrained and not isinstance(arch, str) and n_in > 3  # timm spreads the RGB filters by itself
    if rgb_stem:
        split = kwargs.get("splitter") or model_meta.get(arch, {}).get("split", default_split)
        kwargs["splitter"] = StemSplitter(split)
    if not get_c(dls):
        kwargs.setdefault("n_out", n_labels)
    if not hasattr(dls, "after_batch"):
        kwargs.setdefault("normalize", False)  # loaders of torch have no batch transforms
    kwargs |= {"loss_func": loss_func, "n_in": n_in, "pretrained": pretrained, "metrics": metrics}
    with downloading(arch, pretrained):
        plain = vision_learner(dls, arch, **kwargs)
    if rgb_stem:
        spread_rgb(plain.model)
    if counts is not None and not single_label:
        start_or_warn(plain.model, *counts)
    added = [*([] if own else [CRLCallback(alpha, schedule, **options)]), *[ByteImages] * is_bytes, *L(cbs)]
    learn = rebuild(plain, CRLLearner, added + [UnknownTargets(unknown)] * (unknown is not None))
    learn.default_epochs = n_epoch
    return learn if mixed_precision is False or device.type != "cuda" else _in_mixed_precision(learn)


def _in_mixed_precision(learn: CRLLearner) -> CRLLearner:
    """Have a learner train in bfloat16, whose range is that of float32, or, on GPUs without it, in float16."""
    return learn.to_bf16() if torch.cuda.is_bf16_supported(including_emulation=False) else learn.to_fp16()


def _default_alpha(pretrained: bool, given: list[str]) -> float | Literal["auto"]:
    """The weight of CRL where none is given; for a pretrained network it is 0, and is printed."""
    if not pretrained:
        return "auto"
    if given:
        raise ValueError(
            f"{', '.join(given)}: a pretrained network trains without CRL unless alpha says how much; add "
            f'alpha="auto", or leave {", ".join(given)} out.'
        )
    print('A pretrained network trains with CRL\'s weight at 0: alpha="auto" sets it.')
    return 0.0


def _look(dls: DataLoaders) -> tuple[int, bool, int | None, bool]:
    """Channels of the images, whether the task is single-label, its labels where targets show it, whether of bytes."""
    batch = dls.one_batch() if hasattr(dls.train, "one_batch") else next(iter(dls.train))
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in batch]
    if isinstance(batch, dict):
        shapes = [f"a dict of {', '.join(map(str, batch))}"]
    if len(shapes) != 2 or len(shapes[0]) != 4 or not isinstance(batch[1], Tensor) or batch[1].ndim not in (1, 2):
        raise ValueError(
            f"A batch of dls holds {shapes}: crl_learner needs images (n, channels, height, width) and targets, (n, C) "
            "0/1 or (n,) class indices. Let the data set give (image, target), or use "
            "Learner(dls, model, cbs=CRLCallback()) for other inputs."
        )
    n_in, is_bytes = shapes[0][1], batch[0].dtype == torch.uint8
    if batch[1].ndim == 1:
        return n_in, True, None, is_bytes
    n_labels = batch[1].shape[1]
    if n_labels != (get_c(dls) or n_labels):
        raise ValueError(f"Targets have {n_labels} columns, but dls.c is {get_c(dls)}: they must agree.")
    return n_in, False, n_labels, is_bytes
