"""Pictures of the runs of `compare.py`: differences with intervals, gains by label, the embedding over training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from compare_stats import MEASURES, PLAIN, effects

__all__ = ["gains", "plot_differences", "plot_gains", "plot_traces"]

DRAWN = {"none": "-", "published": ":"}  # what is added, in the picture of the embedding; all arms would be a tangle
DRAWN |= dict.fromkeys(("ranking_quarter", "ranking_adjusted_quarter", "ranking_adjusted_half"), "--")


def gains(runs: pd.DataFrame, task: str, base: str, column: str, crl: str, sampler: str = "uniform") -> pd.DataFrame:
    """Training count and mean gain of `column` (label_ap, label_recall) by label, over seeds, of CRL over none."""
    runs = runs[(runs["task"] == task) & (runs["base"] == base) & (runs["sampler"] == sampler)].set_index("seed")
    sides = [_by_label(runs[runs["crl"] == name], column) for name in (crl, "none")]
    counts = _by_label(runs[runs["crl"] == crl], "label_count").mean()
    return pd.DataFrame({"count": counts, "gain": (sides[0] - sides[1]).mean()})


def _by_label(runs: pd.DataFrame, column: str) -> pd.DataFrame:
    return runs[column].str.split().apply(lambda values: pd.Series([float(v) for v in values]))


def plot_gains(runs: pd.DataFrame, out: Path) -> None:
    """Gain of average precision and recall by label against its training count, one row per task."""
    crl = next((name for name in ("ranking_quarter", "ranking") if (runs["crl"] == name).any()), "")
    tasks = list(dict.fromkeys(runs.loc[runs["crl"] == crl, "task"]))
    if not tasks:
        return
    fig, axes = plt.subplots(len(tasks), 2, figsize=(10, 2.6 * len(tasks)), squeeze=False, layout="constrained")
    for task, row in zip(tasks, axes, strict=True):
        mine = runs[runs["task"] == task]
        for ax, (column, name) in zip(row, (("label_ap", "AP"), ("label_recall", "recall")), strict=True):
            for base in dict.fromkeys(mine.loc[mine["crl"] == crl, "base"]):
                values = gains(mine, task, base, column, crl)
                ax.plot(values["count"], values["gain"], "o", ms=4, alpha=0.7, label=base)
            ax.axhline(0, color="0.5", lw=0.8)
            ax.set(xscale="log", title=task, xlabel="training images of the label", ylabel=f"gain of {name}")
        row[1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    fig.suptitle(f"What {crl} adds to each loss, by label: mean over the seeds, test, uniform batches")
    fig.savefig(out, dpi=110)
    plt.close(fig)


def plot_differences(
    runs: pd.DataFrame, out: Path, measures: Sequence[str] = ("map", "map_tail", "f1_shift", "probe", "knn")
) -> None:
    """Every arm's difference to plain cross entropy with its interval: a row of axes per task, a column per measure."""
    found = effects(runs, "plain")
    measures = [m for m in measures if (found["measure"] == m).any()]
    if not measures:
        return
    tasks = list(dict.fromkeys(found["task"]))
    arms = found["base"].replace(dict.fromkeys(PLAIN, "plain")) + (" + " + found["crl"]).where(
        found["crl"] != "none", ""
    )
    found = found.assign(arm=arms)
    heights = [found.loc[found["task"] == task, "arm"].nunique() for task in tasks]
    size = (2.2 + 2 * len(measures), 0.8 + 0.5 * len(tasks) + 0.18 * sum(heights))
    fig, axes = plt.subplots(
        len(tasks),
        len(measures),
        figsize=size,
        squeeze=False,
        sharey="row",
        height_ratios=heights,
        layout="constrained",
    )
    for task, row in zip(tasks, axes, strict=True):
        for measure, ax in zip(measures, row, strict=True):
            mine = found[(found["task"] == task) & (found["measure"] == measure)]
            ax.plot(mine["mean"], mine["arm"], "o", ms=4)
            ax.hlines(mine["arm"], mine["low"], mine["high"])
            ax.axvline(0, color="0.5", lw=0.8)
            ax.set_title(f"{task}: {MEASURES[measure]}", fontsize="small")
            ax.tick_params(labelsize="x-small")
        row[0].invert_yaxis()
    fig.suptitle(
        "Difference to plain cross entropy, paired by seed, and 95 % interval (three seeds or more)", fontsize="small"
    )
    fig.savefig(out, dpi=110)
    plt.close(fig)


def plot_traces(folder: Path, out: Path) -> None:
    """Distances of the tail's samples in the embedding over training, outside / within, one picture per task.

    Of the losses alone, with CRL as in the default, and as published; medians of five epochs, as a small tail jumps.
    """
    named = [(*file.stem.split("-")[:4], file) for file in sorted(folder.glob("*.csv"))]  # task, base, sampler, added
    named = [found for found in named if found[3] in DRAWN]
    if not named:
        return
    tasks = list(dict.fromkeys(task for task, *_ in named))
    bases = list(dict.fromkeys("plain" if base in PLAIN else base for _, base, *_ in named))
    fig, axes = plt.subplots(1, len(tasks), figsize=(3 + 3.5 * len(tasks), 3.6), squeeze=False, layout="constrained")
    handles = {}
    for task, ax in zip(tasks, axes[0], strict=True):
        for name, base, _, crl, file in named:
            if name == task:
                loss, trace = "plain" if base in PLAIN else base, pd.read_csv(file)
                distance = (trace["outside"] / trace["within"]).rolling(5, min_periods=1).median()
                label = loss if crl == "none" else f"{loss} + {crl}"
                color = f"C{bases.index(loss)}"
                handles[label], *_ = ax.plot(trace["epoch"], distance, ls=DRAWN[crl], color=color, label=label)
        ax.axhline(1, color="0.7", lw=0.8)
        shown = np.concatenate([line.get_ydata() for line in ax.lines])
        top = 1.2 * np.nanquantile(shown, 0.95)  # a distance near 0 makes a ratio of anything
        ax.set(title=task, xlabel="epoch", ylabel="distance outside / within", ylim=(0.8, top))
    fig.legend(handles=list(handles.values()), fontsize="x-small", loc="outside right center")
    title = "Rare labels in the embedding, on validation:\ncosine distance to other samples over that to their own"
    fig.suptitle(title, fontsize="small")
    fig.savefig(out, dpi=110)
    plt.close(fig)
