"""The interpretation of a learner: the tables of its predictions, each with its plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from fastai.callback.core import Callback
from fastai.learner import Learner
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from fastai_crl.labels import label_counts, label_names

from .decider import threshold_in_use
from .predictions import in_order, predict_probabilities
from .tables import LabelTables

_RARE, _COMMON = "#c26a00", "#0067a5"  # orange and blue: colour-blind eyes, too, tell them apart


class EpochPreds(Callback):
    """Keeps the predictions on a data set after every epoch: `CRLInterpretation.hardest` shows what stayed hard.

    Args:
        ds_idx: 1 the validation set, 0 the training set, in its own order and with the transforms of validation. It
            costs one more pass through that data per epoch, and n·C numbers of memory.

    Attributes:
        epochs: (n, C) float16 probabilities after each epoch, of all fits.
    """

    remove_on_fetch = True

    def __init__(self, ds_idx: int = 1):
        super().__init__()
        self.ds_idx, self.epochs, self.fitting = ds_idx, [], False

    def before_fit(self) -> None:
        self.fitting = False  # this comes before a validation or prediction on its own, too

    def before_train(self) -> None:
        self.fitting = True

    def after_validate(self) -> None:
        if self.fitting:
            apart = [cb for cb in self.learn.cbs if getattr(cb, "remove_on_fetch", False)]
            with self.learn.removed_cbs(apart) as learn:
                self.epochs.append(predict_probabilities(learn, self.ds_idx, inner=True)[0].half())


class CRLInterpretation(LabelTables):
    """Interpretation of a multi-label or single-label learner: `CRLInterpretation.from_learner(learn)`.

    Arguments, tables and attributes are those of `LabelTables`. Each plot returns the matplotlib axes that it drew on.
    """

    @classmethod
    def from_learner(cls, learn: Learner, ds_idx: int = 1, dl: Any = None) -> CRLInterpretation:
        """Predict the validation set (`ds_idx=0`: the training set, without augmentation), or `dl`, and interpret.

        Decisions are those of the learner's own thresholds. Where its data set does not tell the labels of the training
        images without opening them, `counts` are those of the predicted images.
        """
        dl = in_order(learn, ds_idx) if dl is None else dl
        probs, targets = predict_probabilities(learn, dl=dl, need_targets=True)
        n_classes, thresh = probs.shape[1], threshold_in_use(learn)
        triplets = learn.crl.counts_frame() if hasattr(learn, "crl") and learn.crl.history else None
        counts = label_counts(learn.dls.train, n_classes)
        n_train = None if counts is None else len(learn.dls.train.dataset)
        return cls(probs, targets, label_names(learn.dls, n_classes), counts, n_train, thresh, dl, triplets)

    # ---- pictures ----
    def plot_distribution(self, rho: float = 0.5, ax: Axes | None = None) -> Axes:
        """Bars of `distribution` on a logarithmic axis, minority labels in orange, and the boundary."""
        frame = self.distribution(rho)
        ax = _axes(ax, width=0.3 * len(frame) + 2)
        colors = np.where(frame.minority, _RARE, _COMMON)
        ax.bar(range(len(frame)), frame["count"].clip(lower=0.5), color=colors)
        ax.plot(range(len(frame)), frame.cumulative.clip(lower=0.5), ".-", color="gray", label="cumulative")
        ax.axhline(rho * self.n_train, color="black", ls="--", label=f"{rho:g} of {self.n_train} images")
        ax.set(yscale="log", ylabel="training images")
        ax.set_xticks(range(len(frame)), frame.index, rotation=90)
        ax.legend()
        return ax

    def plot_hardest(
        self, label: str | int, n: int = 5, epochs: Sequence[ArrayLike] | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Draw the hardest positives (upper row) and negatives of a label, with their probabilities.

        Args:
            label: see `CRLInterpretation.hardest`, like the next two.
            n: see there; of each row.
            epochs: see there.
            **kwargs: of the image's `show`.

        Returns:
            The axes, (2, n).

        Raises:
            ValueError: no `dl`; what `hardest` raises.
        """
        if self.dl is None:
            raise ValueError("There are no images to show: use CRLInterpretation.from_learner(learn), or pass dl=.")
        axes = plt.subplots(2, n, figsize=(2.2 * n, 5), squeeze=False, layout="constrained")[1]
        for row, kind in zip(axes, ("positive", "negative"), strict=True):
            frame = self.hardest(label, kind, n, epochs)
            for ax in row:
                ax.axis("off")
            for ax, (_, hard) in zip(row, frame.iterrows(), strict=False):
                self.dl.dataset[int(hard["index"])][0].show(ctx=ax, **kwargs)
                ax.set_title(f"{hard.prob:.3f}  {', '.join(hard.labels) or '(none)'}", fontsize=8, wrap=True)
        axes[0, 0].figure.suptitle(f"{self.names[self.column(label)]}: hardest with the label, and without it")
        return axes

    def plot_precision_recall(self, labels: Sequence[str | int] | None = None, ax: Axes | None = None) -> Axes:
        """Precision against recall of some labels (default: all that occur), a dot where the decisions are."""
        return self._curves(labels, ax, "recall", "precision", "steps-post")

    def plot_thresholds(self, labels: Sequence[str | int] | None = None, ax: Axes | None = None) -> Axes:
        """F1 against the threshold, of some labels (default: all that occur), a dot where the threshold is."""
        ax = self._curves(labels, ax, "cut", "F1", "steps-pre")
        ax.set(xlabel="threshold", xscale="logit" if self.probs.min() > 0 and self.probs.max() < 1 else "linear")
        return ax

    def _curves(self, labels: Sequence[str | int] | None, ax: Axes | None, x: str, y: str, steps: str) -> Axes:
        columns = np.flatnonzero(self.targets.any(0)) if labels is None else [self.column(label) for label in labels]
        legend_columns = 1 + len(columns) // 16
        ax, report = _axes(ax, width=5 + 2 * legend_columns), self.report()
        colors = plt.colormaps["turbo"](np.linspace(0.05, 0.95, len(columns)))
        for c, color in zip(columns, colors, strict=True):
            frame, row = self.curve(int(c)), report.iloc[c]
            ax.plot(frame[x], frame[y], color=color, drawstyle=steps, label=f"{row.name} ({row.support})")
            if "threshold" in row:  # else the decision is the likeliest class
                ax.plot(row.threshold if x == "cut" else row[x], row[y], "o", color=color)
        ax.set(xlabel=x, ylabel=y)
        ax.legend(fontsize="x-small", ncols=legend_columns, bbox_to_anchor=(1, 1), loc="upper left")
        return ax

    def plot_confusion(self, ax: Axes | None = None) -> Axes:
        """`confusion` as shares of the images with the row's label."""
        shares = self.confusion().div(np.maximum(self.targets.sum(0), 1), axis=0)
        return _heatmap(shares, ax, "true label", "given label", vmin=0, vmax=1)

    def plot_cooccurrence(self, ax: Axes | None = None) -> Axes:
        """`cooccurrence` as shares of the images with the row's label."""
        shares = self.cooccurrence().div(np.maximum(self.targets.sum(0), 1), axis=0)
        return _heatmap(shares, ax, "label", "comes with", vmin=0, vmax=1)

    def plot_gain(self, baseline: CRLInterpretation, by: Literal["AP", "F1"] = "AP", ax: Axes | None = None) -> Axes:
        """Bars of the gain in AP or F1, from rare to common labels, with their counts in training."""
        frame = self.gain(baseline)
        ax = _axes(ax, width=0.3 * len(frame) + 2)
        gain = frame[f"{by}_gain"]
        ax.bar(range(len(frame)), gain.fillna(0), color=np.where(gain < 0, _RARE, _COMMON))
        ax.axhline(0, color="black", lw=0.8)
        ax.axhline(gain.mean(), color="gray", ls="--", label=f"mean {gain.mean():+.3f}")
        ticks = [f"{name} ({count})" for name, count in zip(frame.index, frame.train, strict=True)]
        ax.set_xticks(range(len(frame)), ticks, rotation=90)
        ax.set(ylabel=f"gain in {by}")
        ax.legend()
        return ax


def _axes(ax: Axes | None, width: float = 6, height: float = 4) -> Axes:
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax


def _heatmap(frame: pd.DataFrame, ax: Axes | None, rows: str, columns: str, **kwargs: Any) -> Axes:
    side = 0.25 * len(frame) + 2
    ax = _axes(ax, side + 1, side)
    image = ax.imshow(frame, cmap="Blues", **kwargs)
    ax.set_xticks(range(len(frame)), frame.columns, rotation=90)
    ax.set_yticks(range(len(frame)), frame.index)
    ax.set(xlabel=columns, ylabel=rows)
    ax.figure.colorbar(image, ax=ax, shrink=0.7)
    return ax
