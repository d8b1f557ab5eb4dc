"""The plots of a `CRLInterpretation`, its methods: each draws one of its tables, and returns the matplotlib axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from .interpret import CRLInterpretation

_RARE, _COMMON = "#c26a00", "#0067a5"  # orange and blue: colour-blind eyes, too, tell them apart


def plot_distribution(interp: CRLInterpretation, rho: float = 0.5, ax: Axes | None = None) -> Axes:
    """Bars of `distribution` on a logarithmic axis, minority labels in orange, and the boundary."""
    frame = interp.distribution(rho)
    ax = _axes(ax, width=0.3 * len(frame) + 2)
    colors = np.where(frame.minority, _RARE, _COMMON)
    ax.bar(range(len(frame)), frame["count"].clip(lower=0.5), color=colors)
    ax.plot(range(len(frame)), frame.cumulative.clip(lower=0.5), ".-", color="gray", label="cumulative")
    ax.axhline(rho * interp.n_train, color="black", ls="--", label=f"{rho:g} of {interp.n_train} images")
    ax.set(yscale="log", ylabel="training images")
    ax.set_xticks(range(len(frame)), frame.index, rotation=90)
    ax.legend()
    return ax


def plot_hardest(
    interp: CRLInterpretation, label: str | int, n: int = 5, epochs: Sequence[ArrayLike] | None = None, **kwargs: Any
) -> np.ndarray:
    """Draw the hardest positives (upper row) and negatives of a label, with their probabilities.

    Args:
        interp: with a `dl`.
        label: see `CRLInterpretation.hardest`, like the next two.
        n: see there; of each row.
        epochs: see there.
        **kwargs: of the image's `show`.

    Returns:
        The axes, (2, n).

    Raises:
        ValueError: no `dl`; what `hardest` raises.
    """
    if interp.dl is None:
        raise ValueError("There are no images to show: use CRLInterpretation.from_learner(learn), or pass dl=.")
    axes = plt.subplots(2, n, figsize=(2.2 * n, 5), squeeze=False, layout="constrained")[1]
    for row, kind in zip(axes, ("positive", "negative"), strict=True):
        frame = interp.hardest(label, kind, n, epochs)
        for ax in row:
            ax.axis("off")
        for ax, (_, hard) in zip(row, frame.iterrows(), strict=False):
            interp.dl.dataset[int(hard["index"])][0].show(ctx=ax, **kwargs)
            ax.set_title(f"{hard.prob:.3f}  {', '.join(hard.labels) or '(none)'}", fontsize=8, wrap=True)
    axes[0, 0].figure.suptitle(f"{interp.names[interp.column(label)]}: hardest with the label, and without it")
    return axes


def plot_precision_recall(
    interp: CRLInterpretation, labels: Sequence[str | int] | None = None, ax: Axes | None = None
) -> Axes:
    """Precision against recall of some labels (default: all that occur), a dot where the decisions are."""
    return _curves(interp, labels, ax, "recall", "precision", "steps-post")


def plot_thresholds(
    interp: CRLInterpretation, labels: Sequence[str | int] | None = None, ax: Axes | None = None
) -> Axes:
    """F1 against the threshold, of some labels (default: all that occur), a dot where the threshold is."""
    ax = _curves(interp, labels, ax, "cut", "F1", "steps-pre")
    ax.set(xlabel="threshold", xscale="logit" if interp.probs.min() > 0 and interp.probs.max() < 1 else "linear")
    return ax


def _curves(
    interp: CRLInterpretation, labels: Sequence[str | int] | None, ax: Axes | None, x: str, y: str, steps: str
) -> Axes:
    columns = np.flatnonzero(interp.targets.any(0)) if labels is None else [interp.column(label) for label in labels]
    legend_columns = 1 + len(columns) // 16
    ax, report = _axes(ax, width=5 + 2 * legend_columns), interp.report()
    colors = plt.colormaps["turbo"](np.linspace(0.05, 0.95, len(columns)))
    for c, color in zip(columns, colors, strict=True):
        frame, row = interp.curve(int(c)), report.iloc[c]
        ax.plot(frame[x], frame[y], color=color, drawstyle=steps, label=f"{row.name} ({row.support})")
        if "threshold" in row:  # else the decision is the likeliest class
            ax.plot(row.threshold if x == "cut" else row[x], row[y], "o", color=color)
    ax.set(xlabel=x, ylabel=y)
    ax.legend(fontsize="x-small", ncols=legend_columns, bbox_to_anchor=(1, 1), loc="upper left")
    return ax


def plot_confusion(interp: CRLInterpretation, ax: Axes | None = None) -> Axes:
    """`confusion` as shares of the images with the row's label."""
    shares = interp.confusion().div(np.maximum(interp.targets.sum(0), 1), axis=0)
    return _heatmap(shares, ax, "true label", "given label", vmin=0, vmax=1)


def plot_cooccurrence(interp: CRLInterpretation, ax: Axes | None = None) -> Axes:
    """`cooccurrence` as shares of the images with the row's label."""
    shares = interp.cooccurrence().div(np.maximum(interp.targets.sum(0), 1), axis=0)
    return _heatmap(shares, ax, "label", "comes with", vmin=0, vmax=1)


def plot_gain(
    interp: CRLInterpretation, baseline: CRLInterpretation, by: Literal["AP", "F1"] = "AP", ax: Axes | None = None
) -> Axes:
    """Bars of the gain in AP or F1, from rare to common labels, with their counts in training."""
    frame = interp.gain(baseline)
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
