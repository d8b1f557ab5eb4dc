"""The Class Rectification Loss as one callback, for any fastai `Learner`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.callback.mixup import MixHandler
from fastai.callback.schedule import SchedCos
from fastai.learner import ValueMetric
from torch import Tensor, nn

from fastai_crl._checks import as_plain_tensor
from fastai_crl.distributed import gather_rows, n_processes, scale_gradient
from fastai_crl.labels import label_counts, label_names
from fastai_crl.losses.crl_loss import CRL, CRLLoss, check_alpha, imbalance, rectify
from fastai_crl.mining.profile import split_targets

__all__ = ["CRLCallback", "Schedule", "ramp"]

Schedule = Callable[[float], float] | Sequence[float]


def ramp(pct: float, over: float = 0.25) -> float:
    """Half a cosine from 0 to 1 over the first `over` of training, then 1: hard samples mean little at the start."""
    return SchedCos(0.0, 1.0)(min(pct / over, 1.0))


class _Caught:
    """Holds the embedding of the batch. Compiled models trace its methods, and a `Callback` is too much for that."""

    def __init__(self) -> None:
        self.features: Tensor | None = None

    def output(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.features = as_plain_tensor(output).flatten(1) if module.training else None

    def input(self, module: nn.Module, args: tuple) -> None:
        self.output(module, args, args[0])


class CRLCallback(Callback):
    """Train with L = α·L_crl + (1 - α)·L_base, L_base being the learner's own loss (arXiv:1804.10851, eq. 8).

    Only training batches change; `valid_loss`, `validate`, `get_preds`, `predict` and `learn.loss_func` stay the base
    loss's, so runs with and without the callback compare. Where alpha is 0 nothing is mined.

    Adds to the epoch table, and so to `CSVLogger`, `SaveModelCallback(monitor=...)` and the like:

    - `crl_alpha`: α at the epoch's last batch;
    - `crl_loss`: mean rectification term over the epoch's batches that had a triplet;
    - `crl_triplets`: triplets mined in the epoch, total (criterion `"ranking"`: pairs);
    - `crl_labels`: labels of which at least one triplet was mined in the epoch.

    Args:
        alpha: α in [0, 1] at the schedule's full height, or `"auto"`: Ω of the training set's label counts,
            `imbalance(counts, "move")`; where a data set does not tell its labels without opening its items, Ω of the
            labels seen so far.
        schedule: factor of α over training, as `f(pct)` with pct in [0, 1] (fastai's `SchedCos(0, 1)`, or any
            function), or an array spread evenly over training. Default: `ramp`, from 0 to 1 in the first quarter.
        gather: with several processes, mine the batches of all of them as one: profile, triplets and gradients are
            those of one process with the whole batch. False: each process mines its own.
        embedding: instance level only: the module whose output, flattened to (n, d), is the embedding. Default: the
            input of the model's last `nn.Linear`.
        **crl: arguments of `CRL`: k, rho, margin, scope, level, criterion, score_space, bins, memory, max_age,
            frequency, average. Default: the loss as published; see `crl_learner` for what did better. A memory is
            empty at the start of each fit and emptied at its end.

    Attributes:
        term: the `CRL` module.
        alphas: α of each training batch of the last fit.

    Raises:
        ValueError: alpha or options out of range, at once; when training starts, a learner whose loss is a `CRLLoss`,
            which has the term already; for instance level, a model without a `nn.Linear`.
    """

    order, run_valid = 5, False  # after MixUp (0), before anything that scales the loss (GradientAccumulation, 6)

    def __init__(
        self,
        alpha: float | Literal["auto"] = "auto",
        schedule: Schedule | None = None,
        gather: bool = True,
        embedding: nn.Module | None = None,
        **crl: Any,
    ):
        super().__init__()
        self.alpha, self.schedule, self.gather, self.embedding = check_alpha(alpha), schedule, gather, embedding
        self.term = CRL(**crl)
        self.history: list[tuple[int, int, Tensor]] = []  # fit, epoch, triplets per label
        self.n_fits, self.alphas, self.started, self.before = 0, [], False, None
        self.omega = self.counted = self.seen = self.totals = self.hook = None
        self.caught = _Caught()

    def __getstate__(self) -> dict:
        passing = dict.fromkeys(("hook", "totals", "before", "omega", "counted", "seen"))
        alphas = list(map(float, self.alphas))
        return {**super().__getstate__(), **passing, "caught": _Caught(), "alphas": alphas}

    def __call__(self, event_name: str) -> Any:
        try:
            return super().__call__(event_name)
        except Exception:
            self._clean_up()  # an error of ours must not leave anything of ours behind
            raise

    # ---- a fit's life: before_fit also comes before validation and prediction, before_train only before training ----
    def before_fit(self) -> None:
        self._clean_up()
        self.started = False
        if hasattr(self.learn, "lr_finder"):
            self.before = {name: getattr(self, name) for name in ("alphas", "history", "n_fits", "totals")}
            self.history = []
        recorder = getattr(self.learn, "recorder", None)
        if recorder is not None:
            # The recorder looks its metrics up here first: learn.metrics stays as the user made it, come what may.
            values = {"alpha": self._alpha, "loss": self._loss, "triplets": self._triplets, "labels": self._labels}
            vars(recorder)["metrics"] = self.learn.metrics + [ValueMetric(f, f"crl_{n}") for n, f in values.items()]
        if self.term.level == "instance" and self.alpha != 0:
            self._hook()  # before validation too: a compiled model keeps the hooks of its first call

    def before_train(self) -> None:
        if not self.started:
            self._start()
        self.totals = None

    def before_validate(self) -> None:
        if not self.started:  # validation or prediction on its own
            self._drop_columns()

    def after_train(self) -> None:
        if self.totals is not None:
            counts = self.totals[0]
            if n_processes() > 1 and not self.gather:
                dist.all_reduce(counts)
            self.history.append((self.n_fits - 1, self.learn.epoch, counts.cpu()))

    def after_fit(self) -> None:
        recorder = getattr(self.learn, "recorder", None)
        if self.started and recorder is not None and not hasattr(self.learn, "param_scheduler"):
            recorder.hps = {"crl_alpha": self.alphas}
        self.alphas[:] = map(float, self.alphas)
        self._clean_up()

    def _start(self) -> None:
        if isinstance(self.learn.loss_func, CRLLoss):
            raise ValueError(
                "The learner's loss_func is a CRLLoss, which has the rectification term already: use CRLCallback with "
                "the plain loss (loss_func.base_loss), or CRLLoss without the callback."
            )
        self.started, self.alphas, self.n_fits = True, [], self.n_fits + 1
        self.seen = None
        scheduler = getattr(self.learn, "param_scheduler", None)
        if scheduler is not None:
            scheduler.hps["crl_alpha"] = self.alphas  # plot_sched shows it beside the learning rate

    def _drop_columns(self) -> None:
        recorder = getattr(self.learn, "recorder", None)
        if recorder is not None:
            vars(recorder).pop("metrics", None)

    def _clean_up(self) -> None:
        self._drop_columns()
        if self.hook is not None:
            self.hook.remove()
        self.hook = self.caught.features = None
        self.term.reset()
        if self.before is not None:  # a search for the learning rate leaves no trace
            vars(self).update(self.before)
            self.before = None

    # ---- the batch ----
    def after_loss(self) -> None:
        share = self._scheduled()
        if share == 0 or self.alpha == 0:
            self.alphas.append(0.0)
            return
        logits, targets, features = self._logits(), self._targets(), self.caught.features
        if self.term.level == "instance" and features is None:
            raise ValueError(
                "No embedding came by: the module it is taken from did not run in this batch, or the model was "
                "compiled and called before. Pass CRLCallback(embedding=module), or compile again "
                "(torch.compiler.reset())."
            )
        size = n_processes() if self.gather else 1
        if size > 1:
            logits, targets, *features = gather_rows(logits, targets, *([] if features is None else [features]))
            features = features[0] if features else None
        alpha = share * (self._auto(logits, targets) if self.alpha == "auto" else self.alpha)
        crl, counts = self.term.loss_and_counts(logits, targets, features)
        self._count(crl.detach(), counts)
        if size > 1:
            crl = scale_gradient(crl, size)
        loss = rectify(self.learn.loss_grad, crl, counts, alpha)
        self.caught.features = None
        self.alphas.append(alpha)
        self.learn.loss_grad, self.learn.loss = loss, loss.clone()

    def _scheduled(self) -> float:
        pct, schedule = float(self.learn.pct_train), self.schedule
        if schedule is None:
            return ramp(pct)
        if callable(schedule):
            return float(schedule(pct))
        return float(np.interp(pct, np.linspace(0, 1, len(schedule)), schedule))

    def _logits(self) -> Tensor:
        pred = self.learn.pred
        if not isinstance(pred, Tensor) or pred.ndim != 2:
            shape = tuple(pred.shape) if isinstance(pred, Tensor) else type(pred).__name__
            raise ValueError(f"The model's output is {shape}: CRLCallback needs one tensor of logits, (n, C).")
        return pred

    def _targets(self) -> Tensor:
        """The batch's targets; those of images that MixUp or CutMix blended for a class-index loss as fractions."""
        if len(self.learn.yb) != 1:
            raise ValueError(f"The batch has {len(self.learn.yb)} targets: CRLCallback needs exactly one.")
        y = self.learn.yb[0]
        for mix in self.learn.cbs:
            if isinstance(mix, MixHandler) and getattr(mix, "stack_y", False) and hasattr(mix, "yb1"):
                n_classes, lam = self.learn.pred.shape[1], mix.lam.reshape(-1, 1)
                one_hot = [nn.functional.one_hot(as_plain_tensor(t).long(), n_classes) for t in (mix.yb1[0], y)]
                return torch.lerp(*(t.to(lam.dtype) for t in one_hot), as_plain_tensor(lam).to(y.device))
        return y

    def _auto(self, logits: Tensor, targets: Tensor) -> float | Tensor:
        """Ω of the training set's labels, or of those seen so far where the data set does not tell."""
        n_classes, data = logits.shape[1], getattr(self.learn.dls.train, "dataset", None)
        if self.counted is not data or (self.omega is None and self.seen is None):
            counts = label_counts(self.learn.dls.train, n_classes)
            self.omega = None if counts is None or not counts.any() else imbalance(counts)
            self.counted = data
        if self.omega is not None:
            return self.omega
        h = split_targets(as_plain_tensor(targets), n_classes)[0].sum(0)
        self.seen = h if self.seen is None else self.seen + h
        return (self.seen / self.seen.sum().clamp_min(1) - 1 / n_classes).abs().sum() / 2

    def _count(self, crl: Tensor, counts: Tensor) -> None:
        found = (counts.sum() > 0).float()
        new = (counts, crl * found, found)
        self.totals = new if self.totals is None else tuple(a + b for a, b in zip(self.totals, new, strict=True))

    def _hook(self) -> None:
        """Catch the embedding of each batch on its way through the model."""
        if self.embedding is not None:
            self.hook = self.embedding.register_forward_hook(self.caught.output)
            return
        linear = [m for m in self.learn.model.modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise ValueError(
                f"{type(self.learn.model).__name__} has no nn.Linear whose input could be the embedding: pass "
                "CRLCallback(embedding=module), the module whose output is to be compared, or use level='class'."
            )
        self.hook = linear[-1].register_forward_pre_hook(self.caught.input)

    # ---- what happened ----
    def _alpha(self) -> float:
        return float(self.alphas[-1]) if self.alphas else 0.0

    def _loss(self) -> float:
        return float(self.totals[1] / self.totals[2].clamp_min(1)) if self.totals else 0.0

    def _triplets(self) -> int:
        return int(self.totals[0].sum()) if self.totals else 0

    def _labels(self) -> int:
        return int((self.totals[0] > 0).sum()) if self.totals else 0

    def counts_frame(self) -> pd.DataFrame:
        """Triplets mined of each label in each epoch trained since the callback was made: totals, labels as columns.

        Rows are indexed by fit and epoch, both from 0; epochs without a mined batch (α = 0) are not listed.
        """
        index = pd.MultiIndex.from_tuples([h[:2] for h in self.history], names=["fit", "epoch"])
        n_classes = len(self.history[0][2]) if self.history else 0
        names = label_names(getattr(self.learn, "dls", None), n_classes)
        return pd.DataFrame([h[2].tolist() for h in self.history], index=index, columns=names)

    def plot_counts(self, ax: Any = None, top: int | None = None) -> Any:
        """Plot the triplets mined of each label over the epochs of `counts_frame`, on a logarithmic axis.

        `top`: only the labels with the most triplets. Returns the matplotlib axes.
        """
        frame = self.counts_frame().reset_index(drop=True)
        if frame.empty:
            raise ValueError("Nothing has been mined yet: fit first, with alpha above 0.")
        order = frame.sum().sort_values(ascending=False, kind="stable").index[:top]
        ax = frame[order].plot(ax=ax, logy="sym", marker=".", colormap="turbo", xlabel="epoch", ylabel="mined triplets")
        ax.legend(fontsize="x-small", ncols=2, bbox_to_anchor=(1, 1), loc="upper left")
        return ax
