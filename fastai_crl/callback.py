"""The Class Rectification Loss as one callback, for any fastai `Learner`."""

from __future__ import annotations

import inspect
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pandas as pd
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.callback.mixup import MixHandler
from fastai.torch_core import default_device
from torch import Tensor, nn

from fastai_crl._checks import Batch, as_plain_tensor, check_keywords, checked_targets, one_column
from fastai_crl._fastai import (
    CaughtEmbedding,
    add_columns,
    drop_columns,
    guard_fit,
    is_lr_search,
    logits_and_targets,
    unguard_fit,
    watchers,
)
from fastai_crl.distributed import gather_rows, n_processes, scale_gradient
from fastai_crl.labels import UnknownLabelsError, count_labels, label_names, shown_names
from fastai_crl.losses.crl import CRL
from fastai_crl.losses.crl_loss import CRLLoss, Shift, base_shift, check_takes_logits, split_shift
from fastai_crl.losses.imbalance import Schedule, SeenLabels, check_alpha, check_schedule, mix, omega, scheduled
from fastai_crl.mined import NOTHING, Epoch, plot_table, table_of
from fastai_crl.unknown import hardened, unknown_of

_OPTIONS = frozenset(inspect.signature(CRL).parameters)  # of the term


@dataclass
class _Fit:
    """What the callback keeps for one fit, validation or prediction; nothing of it is left when that ends."""

    base_loss: Any  # the learner's loss, before another callback swaps it
    is_search: bool  # for the learning rate: it leaves no trace
    recorder: Any = None  # the one that has our columns
    hook: Any = None
    started: bool = False  # training, not validation or prediction alone
    alphas: list[float | Tensor] = field(default_factory=list)
    epoch: Epoch = field(default_factory=Epoch)
    omega: float | None = None  # Ω of the training set; None before the first batch, or where it does not tell
    seen: SeenLabels | None = None  # where it does not tell


class CRLCallback(Callback):
    """Train with L = α·L_crl + (1 - α)·L_base, L_base being the learner's own loss (arXiv:1804.10851, eq. 8).

    Only training batches change; `valid_loss`, `validate`, `get_preds`, `predict` and `learn.loss_func` stay the base
    loss's, so runs with and without the callback compare. Where alpha is 0 nothing is mined. What other callbacks add
    to the loss, such as `RNNRegularizer`, stays as it is. A batch whose logits are not finite is left to the base loss.

    Adds to the epoch table, and so to `CSVLogger`, `SaveModelCallback(monitor=...)` and the like:

    - `crl_alpha`: α at the epoch's last batch;
    - `crl_loss`: mean rectification term over the epoch's batches that had a triplet; NaN where none had;
    - `crl_triplets`: triplets mined in the epoch, total (criterion `"ranking"`: pairs);
    - `crl_labels`: labels of which at least one triplet was mined in the epoch.

    Args:
        alpha: α in [0, 1] at the schedule's full height, or `"auto"`: Ω of the training set's label counts, see
            `imbalance`, for ranking at most ¼; of one binary label Ω is |½ - share of positives|; where a data set does
            not tell its labels without opening its items, that of the labels seen so far.
        schedule: factor of α over training, as `f(pct)` with pct in [0, 1] (fastai's `SchedCos(0, 1)`, or any
            function), or an array spread evenly over training. Default: `ramp`, from 0 to 1 in the first quarter.
        gather: with several processes, mine the batches of all of them as one: profile, triplets and gradients are
            those of one process with the whole batch. False: each process mines its own.
        embedding: instance level only: the module whose output, flattened to (n, d), is the embedding. Default: the
            input of the model's last `nn.Linear`.
        term: a `CRL` module, in place of its arguments.
        shift: what is added to the logits before CRL scores them: `"base"`, what the base loss adds, (C,) numbers, or
            None; see `CRLLoss`.
        **crl: arguments of `CRL`: k, rho, margin, scope, level, criterion, score_space, frequency, average. Default:
            the loss as published; see `crl_learner` for what did better.

    Attributes:
        term: the `CRL` module.
        alphas: α of each training batch of the last fit.

    Raises:
        ValueError: at once, alpha, schedule or options out of range, a learner that has a `CRLCallback`, a callback
            that has a learner; when training starts, a learner whose loss is a `CRLLoss`, which has the term already,
            for instance level a model without a `nn.Linear`, a loss of probabilities, as `nn.BCELoss` is, and an empty
            training set; in a batch, targets out of
            range, and a factor of α that is so there alone.
        TypeError: a term that is no `CRL`; a keyword that nothing takes, with the nearest.
        AttributeError: an option of `CRL` set on the callback; alpha and schedule may be set between fits.
    """

    order, run_valid = 5, False  # after MixUp (0), before anything that scales the loss (GradientAccumulation, 6)

    def __init__(
        self,
        alpha: float | Literal["auto"] = "auto",
        schedule: Schedule | None = None,
        gather: bool = True,
        embedding: nn.Module | None = None,
        term: CRL | None = None,
        shift: Shift = "base",
        **crl: Any,
    ):
        super().__init__()
        if term is not None and not isinstance(term, CRL):
            raise TypeError(f"term={term!r}: give a CRL object, or leave it out and give its options, as criterion=.")
        if term is not None and crl:
            raise ValueError(f"term={type(term).__name__} has its options already: give {', '.join(crl)} to it.")
        follows, own = split_shift(shift)
        if term is not None and own is not None:
            raise ValueError(f"term={type(term).__name__} has its options already: give shift to it.")
        check_keywords("CRLCallback", crl, _OPTIONS | {"alpha", "schedule", "gather", "embedding"})
        self.alpha, self.schedule = alpha, schedule
        self.gather, self.embedding = gather, embedding
        self.term = CRL(shift=own, **crl) if term is None else term
        self.follows_base = follows and self.term.shift is None
        self.history: list[tuple[int, int, Tensor]] = []  # fit, epoch, triplets per label
        self.n_fits, self.alphas, self.caught = 0, [], CaughtEmbedding()
        self._now: _Fit | None = None

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_now": None, "alphas": list(map(float, self.alphas))}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "learn":
            self._change_learner(value)
        elif name in _OPTIONS:
            raise AttributeError(
                f"{name}={value!r}: the options of CRL are given when the callback is made, CRLCallback({name}=...). "
                "Put a new one in place of this: learn.remove_cb(learn.crl), learn.add_cb(...)."
            )
        elif name in ("alpha", "schedule"):
            value = check_alpha(value) if name == "alpha" else check_schedule(value)
        super().__setattr__(name, value)

    # ---- coming and going ----
    def _change_learner(self, learn: Any) -> None:
        """Refuse a second learner, or a second callback; when leaving, take along all that is ours."""
        if learn is None:
            self._clean_up()
            if self.learn is not None:
                unguard_fit(self.learn, self._fit)
            return
        if self.learn is not None:
            raise ValueError(
                f"This CRLCallback is in {'this' if self.learn is learn else 'another'} learner already, and serves "
                "one at a time: make a new one, or take it out first (learn.remove_cb(callback))."
            )
        if any(isinstance(cb, CRLCallback) for cb in learn.cbs):
            raise ValueError(
                "The learner has a CRLCallback already, learn.crl, and two would both rectify: take that one out first "
                "(learn.remove_cb(learn.crl))."
            )
        guard_fit(learn, self._fit)

    def _fit(self, *args: Any, **kwargs: Any) -> None:
        """Run `learn.fit`; nothing of ours stays behind, whatever ends it: an interrupt comes to no callback."""
        try:
            type(self.learn).fit(self.learn, *args, **kwargs)
        finally:
            self._clean_up()

    def _clean_up(self) -> None:
        now, self._now = self._now, None
        self.caught.features = None
        if now is None:
            return
        drop_columns(now.recorder)
        if now.hook is not None:
            now.hook.remove()
        now.alphas[:] = map(float, now.alphas)

    # ---- a fit's life: before_fit also comes before validation and prediction, before_train only before training ----
    def before_fit(self) -> None:
        self._clean_up()
        self._now = now = _Fit(self.learn.loss_func, is_lr_search(self.learn))
        shown = {"crl_alpha": self._alpha, **{f"crl_{name}": partial(self._shown, name) for name in NOTHING}}
        now.recorder = add_columns(self.learn, shown)
        if self.term.level == "instance" and self.alpha != 0:
            # Before validation too: a compiled model keeps the hooks of its first call.
            now.hook = self.caught.hook(self.learn.model, self.embedding)

    def before_train(self) -> None:
        if self._now is None:  # taken out and put back within a fit
            self.before_fit()
        if not self._now.started:
            self._start(self._now)
        self._now.epoch = Epoch()

    def before_validate(self) -> None:
        if self._now is not None and not self._now.started:  # validation or prediction on its own
            drop_columns(self._now.recorder)

    def after_train(self) -> None:
        if self._now is not None and (triplets := self._now.epoch.triplets) is not None:
            if n_processes() > 1 and not self.gather:
                dist.all_reduce(triplets)
            if not self._now.is_search:
                self.history.append((self.n_fits - 1, self.learn.epoch, triplets.cpu()))

    def after_fit(self) -> None:
        self._clean_up()

    def _start(self, now: _Fit) -> None:
        if isinstance(now.base_loss, CRLLoss):
            raise ValueError(
                "The learner's loss_func is a CRLLoss, which has the rectification term already: use CRLCallback with "
                "the plain loss (loss_func.base_loss), or CRLLoss without the callback."
            )
        dataset = getattr(self.learn.dls.train, "dataset", None)
        if hasattr(dataset, "__len__") and not len(dataset) and not len(self.learn.dls.train):
            raise ValueError(
                "The training set of the learner is empty, as in a learner from an export: nothing would be trained. "
                "Give it loaders, learn.dls = dls."
            )
        if now.hook is None and self.term.level == "instance" and self.alpha != 0:
            self.caught.refuse(self.learn.model)
        check_takes_logits(now.base_loss)
        if self.alpha != 0 and not now.is_search and (names := watchers(self.learn, "valid_loss")):
            has_it = "mean_ap" in (m.name for m in self.learn.metrics)
            warnings.warn(
                f"CRL may raise valid_loss, which decides for {', '.join(names)}, while rare labels get better: pass "
                'monitor="mean_ap"' + ("." if has_it else ", and give the learner metrics=MeanAP()."),
                stacklevel=2,
            )
        now.started = True
        self.term.to(getattr(self.learn.dls, "device", default_device()))  # where fastai moves the model
        if not now.is_search:
            self.alphas, self.n_fits = now.alphas, self.n_fits + 1

    # ---- the batch ----
    def after_pred(self) -> None:
        """Check the targets: before the base loss, and whatever α is."""
        pred, yb = self.learn.pred, self.learn.yb
        if isinstance(pred, Tensor) and pred.ndim in (1, 2) and len(yb) == 1 and isinstance(yb[0], Tensor):
            checked_targets(pred, yb[0])

    def after_loss(self) -> None:
        share = scheduled(self.schedule, float(self.learn.pct_train))
        now, features, self.caught.features = self._now, self.caught.features, None
        if share == 0 or self.alpha == 0:
            now.alphas.append(0.0)
            return
        batch, size = self._batch(features), n_processes() if self.gather else 1
        alpha = share * (self._omega(batch) if self.alpha == "auto" else self.alpha)
        rectified = self.term.rectify(batch, base_shift(now.base_loss) if self.follows_base else None)
        found = rectified.triplets.any()
        now.epoch.add(rectified, found)
        now.alphas.append(alpha)
        term = scale_gradient(rectified.loss, size) if size > 1 else rectified.loss
        base, total = as_plain_tensor(self.learn.loss), as_plain_tensor(self.learn.loss_grad)
        loss = mix(base, term, found, alpha)
        # What other callbacks have added to loss_grad, and not to loss, is added as it is.
        self.learn.loss_grad = loss + (total - base)
        self.learn.loss = loss.detach()

    def _batch(self, features: Tensor | None) -> Batch:
        """The batch to mine, of all processes where they mine as one; `after_pred` checked its targets."""
        logits, targets = one_column(*logits_and_targets(self.learn))
        if not any(isinstance(cb, MixHandler) for cb in self.learn.cbs):  # what that blends is neither yes nor no
            targets = hardened(targets)
        if self.term.level == "instance" and features is None:
            raise ValueError(
                "No embedding came by: the module it is taken from did not run in this batch, or the model was "
                "compiled and called before. Pass CRLCallback(embedding=module), or compile again "
                "(torch.compiler.reset())."
            )
        if self.gather and n_processes() > 1:
            logits, targets, *rest = gather_rows(logits, targets, *([] if features is None else [features]))
            features = rest[0] if rest else None
        return Batch.of_training(logits, targets, features, self.term.bound)

    def _omega(self, batch: Batch) -> float | Tensor:
        """Ω of the training set, read once per fit, or that of the labels seen so far; at most the criterion's."""
        now, most = self._now, self.term.criterion.alpha_limit
        if now.omega is None and now.seen is None:
            with suppress(UnknownLabelsError):
                counts, n = count_labels(self.learn.dls.train, batch.logits.shape[1], unknown_of(self.learn))
                if counts.any():
                    now.omega = float(omega(counts.double(), n))
            now.seen = None if now.omega is not None else SeenLabels()
        return min(now.omega, most) if now.seen is None else now.seen(batch).clamp_max(most)

    # ---- what happened ----
    def _alpha(self) -> float:
        return float(self._now.alphas[-1]) if self._now and self._now.alphas else 0.0

    def _shown(self, name: str) -> float:
        return (self._now.epoch.columns() if self._now else NOTHING)[name]

    def counts_frame(self) -> pd.DataFrame:
        """Triplets mined of each label in each epoch trained since the callback was made: totals, labels as columns.

        Rows are indexed by fit and epoch, both from 0; epochs without a mined batch (α = 0) are not listed.
        """
        names = label_names(getattr(self.learn, "dls", None), len(self.history[0][2]) if self.history else 0)
        return table_of(self.history, names)

    def plot_counts(self, ax: Any = None, top: int | None = None) -> Any:
        """Plot the triplets mined of each label over the epochs of `counts_frame`, on a logarithmic axis.

        Args:
            ax: matplotlib axes to draw on; None for new ones.
            top: number of labels, those with the most triplets; None for all.

        Returns:
            The axes.

        Raises:
            ValueError: nothing has been mined yet.
        """
        frame = self.counts_frame()
        if frame.empty:
            raise ValueError("Nothing has been mined yet: fit first, with alpha above 0.")
        frame.columns = shown_names(getattr(self.learn, "dls", None), frame.shape[1])
        return plot_table(frame, ax, top)
