"""What a learner got right and wrong, label by label: tables, each with its plot."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from fastai.learner import Learner
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from sklearn.metrics import ConfusionMatrixDisplay, precision_recall_curve

from fastai_crl._checks import check_choice
from fastai_crl.labels import label_counts, label_names
from fastai_crl.mining.profile import within_limit
from fastai_crl.unknown import UNKNOWN, unknown_of

from .decider import threshold_in_use
from .decisions import as_array, as_probabilities, check_thresholds, decisions
from .metrics import label_report
from .predictions import in_order, predict_probabilities

_RARE, _COMMON = "#c26a00", "#0067a5"  # orange and blue: colour-blind eyes, too, tell them apart


class CRLInterpretation:
    """What a learner got right and wrong, label by label: `CRLInterpretation.from_learner(learn)`.

    Multi-label or single-label. Tables are DataFrames; each plot returns the matplotlib axes that it drew on.

    Args:
        probs: (n, C) probabilities.
        targets: (n, C) of 0 and 1, ½ where unknown; (n,) or (n, 1) class indices.
        names: C names of the labels; default the column numbers.
        counts: (C,) positives in the training set. Default: those of `targets`.
        n_train: images in the training set. Default: n.
        thresh: a probability above it, one or (C,), is a yes.
        dl: loader of the images, in order, for the pictures.
        triplets: triplets mined per epoch and label, as `learn.crl.counts_frame()` tells.

    Attributes:
        targets, chosen: (n, C) bool, the true labels and the decisions; both False where the target is unknown.
        known: (n, C) bool: where it is not. The other arguments, under their names.
        counted: whether `counts` were given, so are those of the training set.
    """

    def __init__(
        self,
        probs: ArrayLike,
        targets: ArrayLike,
        names: Sequence[str] | None = None,
        counts: ArrayLike | None = None,
        n_train: int | None = None,
        thresh: float | ArrayLike = 0.5,
        dl: Any = None,
        triplets: pd.DataFrame | None = None,
    ):
        self.probs = as_probabilities(probs)
        (self.targets, self.known, self.single_label), self.chosen = decisions(self.probs, targets, thresh, names)
        self.names = list(names) if names is not None else [str(c) for c in range(self.probs.shape[1])]
        self.counts = self.targets.sum(0) if counts is None else as_array(counts)
        self.n_train, self.counted = n_train or len(self.probs), counts is not None
        self.thresh, self.dl, self.triplets = check_thresholds(thresh, self.probs.shape[1], names), dl, triplets

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
        train = learn.dls.train.dataset
        is_export = hasattr(train, "__len__") and not len(train)
        counts = None if is_export else label_counts(train, n_classes, unknown_of(learn))
        n_train = None if counts is None else len(train)
        return cls(probs, targets, label_names(learn.dls, n_classes), counts, n_train, thresh, dl, triplets)

    # ---- tables ----
    def report(self) -> pd.DataFrame:
        """`label_report`: one row per label, with its count in training and the triplets mined."""
        targets = self.targets.argmax(1) if self.single_label else np.where(self.known, self.targets, UNKNOWN)
        table = label_report(self.probs, targets, self.names, self.thresh, self.counts)
        return table if self.triplets is None else table.assign(triplets=self.triplets.sum().to_numpy())

    def column(self, label: str | int) -> int:
        """Return the column of a label, given by name or number; ValueError for an unknown one."""
        if label in self.names:
            return self.names.index(label)
        if isinstance(label, int) and 0 <= label < len(self.names):
            return label
        raise ValueError(f"label={label!r} is none of {', '.join(self.names)}: give a name or a column number.")

    # ---- how the labels are distributed ----
    def distribution(self, rho: float = 0.5) -> pd.DataFrame:
        """Labels of the training set from rare to common: `count`, `cumulative` count, `minority`.

        `minority` says which labels would be rectified were the training set one batch: the rarest whose cumulative
        count stays within `rho` of the images. Batches, being small, differ: see `minority_classes`.
        """
        counts = torch.as_tensor(self.counts)
        is_minority = within_limit(counts, self.n_train, rho, "joint") & (counts > 1)
        table = {"count": self.counts, "minority": is_minority.numpy()}
        frame = pd.DataFrame(table, index=pd.Index(self.names, name="label")).sort_values("count", kind="stable")
        frame.insert(1, "cumulative", frame["count"].cumsum())
        return frame

    # ---- what is hard ----
    def hardest(
        self,
        label: str | int,
        kind: Literal["positive", "negative"] = "positive",
        n: int = 9,
        epochs: Sequence[ArrayLike] | None = None,
    ) -> pd.DataFrame:
        """Return the images that CRL would mine first for a label, hardest first; wrong labels gather here.

        Args:
            label: name or column number.
            kind: "positive": lowest scores among the images with the label; "negative": highest among those without.
            n: images at most.
            epochs: (n_images, C) probabilities of the same images after several epochs (`EpochPreds.epochs`): the order
                is that of their mean. An image that was hard throughout is more suspect than one that is so now.

        Returns:
            Columns `index` in the data set, `item` (a row's first column), `prob`, `labels` (the true ones), and with
            `epochs` the mean, `mean_prob`.

        Raises:
            ValueError: an unknown label or kind, epochs of other images.
        """
        check_choice("kind", kind, ("positive", "negative"))
        c, sign = self.column(label), 1 if kind == "positive" else -1
        scores = self.probs[:, c]
        if epochs is not None:
            if not len(epochs) or any(np.shape(e) != self.probs.shape for e in epochs):
                raise ValueError(f"epochs must be probabilities of this data, each of shape {self.probs.shape}.")
            scores = np.mean([as_array(e)[:, c].astype(float) for e in epochs], 0)
        among = np.flatnonzero(self.known[:, c] & (self.targets[:, c] == (kind == "positive")))
        order = among[np.argsort(sign * scores[among], kind="stable")][:n]
        true = [[self.names[j] for j in np.flatnonzero(self.targets[i])] for i in order]
        table = {"index": order, "item": [self._item(i) for i in order], "prob": self.probs[order, c], "labels": true}
        if epochs is not None:
            table["mean_prob"] = scores[order]
        return pd.DataFrame(table)

    def _item(self, i: int) -> Any:
        items = getattr(self.dl, "items", None)
        if items is None:
            return int(i)
        return items.iloc[i].iloc[0] if isinstance(items, pd.DataFrame) else items[i]

    # ---- how decisions depend on the threshold ----
    def curve(self, label: str | int) -> pd.DataFrame:
        """Precision, recall and F1 of a label with each of its probabilities as the lowest yes (`cut`), ascending."""
        c = self.column(label)
        known = self.known[:, c]
        precision, recall, cuts = precision_recall_curve(self.targets[known, c], self.probs[known, c])
        frame = pd.DataFrame({"cut": cuts, "precision": precision[:-1], "recall": recall[:-1]})
        frame["F1"] = (2 * frame.precision * frame.recall / (frame.precision + frame.recall)).fillna(0)
        return frame

    # ---- which labels are taken for each other ----
    def confusion(self) -> pd.DataFrame:
        """Images that truly have the row's label and were falsely given the column's, (C, C); diagonal: rightly given.

        For a single-label task this is the confusion matrix. With several labels an image counts for every true label
        that it has, whichever it was that misled.
        """
        false = self.chosen & ~self.targets
        matrix = self.targets.T.astype(int) @ false
        np.fill_diagonal(matrix, (self.targets & self.chosen).sum(0))
        return pd.DataFrame(matrix, index=self.names, columns=self.names)

    # ---- what was gained over another run ----
    def gain(self, baseline: CRLInterpretation) -> pd.DataFrame:
        """Return differences to a baseline on the same images, from rare to common labels.

        Args:
            baseline: interpretation of the same images, in the same order.

        Returns:
            Columns `train` (count), `support`, and for AP and F1 the value here, the `_baseline` and the `_gain`.

        Raises:
            ValueError: a baseline of other images or labels.
        """
        same = all(np.array_equal(getattr(self, name), getattr(baseline, name)) for name in ("targets", "known"))
        if self.names != baseline.names or not same:
            raise ValueError("The baseline has other labels or targets: interpret the same images, in one order.")
        here, there = self.report(), baseline.report()
        frame = here[["train", "support"]].copy()
        for name in ("AP", "F1"):
            frame[[name, f"{name}_baseline", f"{name}_gain"]] = np.c_[here[name], there[name], here[name] - there[name]]
        return frame.sort_values("train", kind="stable")

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
                title = f"{hard.prob:.3f}  {', '.join(hard.labels) or '(none)'}"
                ax.set_title(textwrap.fill(title, 34), fontsize=8)
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
        """`confusion` as shares of the images with the row's label; written into the fields of up to 16 labels."""
        shares = self.confusion().div(np.maximum(self.targets.sum(0), 1), axis=0)
        few = len(shares) <= 16
        side = (0.45 if few else 0.25) * len(shares) + 2
        ax = _axes(ax, side + 1, side)
        display = ConfusionMatrixDisplay(shares.to_numpy(), display_labels=self.names)
        look = {"im_kw": {"vmin": 0, "vmax": 1}, "text_kw": {"fontsize": "small"} if few else None}
        display.plot(ax=ax, cmap="Blues", include_values=few, values_format=".2f", xticks_rotation=90, **look)
        return ax

    def plot_gain(self, baseline: CRLInterpretation, by: Literal["AP", "F1"] = "AP", ax: Axes | None = None) -> Axes:
        """Bars of the gain in AP or F1, from rare to common labels, with their counts in training."""
        frame = self.gain(baseline)
        ax = _axes(ax, 7, 0.22 * len(frame) + 1.2)
        gain, rows = frame[f"{by}_gain"], range(len(frame))
        ax.barh(rows, gain.fillna(0), color=np.where(gain < 0, _RARE, _COMMON))
        ax.axvline(0, color="black", lw=0.8)
        ax.axvline(gain.mean(), color="gray", ls="--", label=f"mean {gain.mean():+.3f}")
        ax.set_yticks(rows, [f"{name} ({count})" for name, count in zip(frame.index, frame.train, strict=True)])
        ax.set(xlabel=f"gain in {by}", ylabel="label (training images)", ylim=(len(frame) - 0.4, -0.6))
        ax.legend()
        return ax


def _axes(ax: Axes | None, width: float = 6, height: float = 4) -> Axes:
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax
