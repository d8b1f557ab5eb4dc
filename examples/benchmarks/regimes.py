"""The tables and the picture of the results page: what each loss is worth, by how the network is trained.

python regimes.py     # prints the tables, draws results/regimes.png, from the rows of compare.py and finetune.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from fastcore.script import call_parse

from fastai_crl.compare.stats import difference

RESULTS = Path(__file__).parent / "results"
MEASURES = {"map": "mAP", "tail_map": "tail mAP", "f1": "macro-F1"}
NAMES = {
    "plain": "plain cross entropy",
    "published": "with CRL as published",
    "weighted": "√pos_weight",
    "adjusted": "logit-adjusted",
    "started": "started at the frequencies",
    "started_crl": "started, with CRL",
    "weighted_crl": "√pos_weight, with CRL",
    "repeat": "started, repeat-factor sampling",
    "plain_long": "plain, twice the epochs",
    "started_long": "started, twice the epochs",
    "started_crl_long": "started, with CRL, twice the epochs",
}
TASKS = {
    "cells": "HPA cells",
    "mosaics": "HPA cells, mosaics",
    "mosaics4": "the same, 4 channels",
    "digits": "digits",
    "drawn": "drawn cells",
    "photos": "photographs, mosaics",
}
# of compare.py: a loss and what is added to it
PIXELS = {
    ("bce", "none"): "plain",
    ("bce", "published"): "published",
    ("weighted_bce", "none"): "weighted",
    ("logit_adjusted", "none"): "adjusted",
    ("bce_prior", "none"): "started",
    ("bce_prior", "ranking_quarter"): "started_crl",
    ("weighted_bce", "ranking_quarter"): "weighted_crl",
}


def from_nothing(file: Path) -> pd.DataFrame:
    """Rows of `compare.py` on test, named as those of `finetune.py`."""
    rows = pd.read_csv(file).query("stage == 'test' and task != 'cifar'")
    rows["arm"] = [PIXELS.get(pair) for pair in zip(rows["base"], rows["crl"], strict=True)]
    columns = {"map": "map", "map_tail": "tail_map", "f1_tuned": "f1"}
    return rows[["task", "arm", "seed", *columns]].rename(columns=columns).dropna(subset=["arm"])


def fine_tuned(file: Path, side: str = "test") -> pd.DataFrame:
    """Rows of `finetune.py`, of several labels."""
    rows = pd.read_csv(file).query("task != 'cifar' and seed != 1000")
    columns = {f"{side}_{m}": m for m in MEASURES}
    return rows[["task", "arm", "seed", *columns]].rename(columns=columns)


def gains(rows: pd.DataFrame, arm: str, measure: str, over: str = "plain") -> pd.Series:
    """What an arm is ahead of another by, one value for each task and seed that both have."""
    values = rows.set_index(["task", "seed"])
    return (values[values["arm"] == arm][measure] - values[values["arm"] == over][measure]).dropna()


def table(rows: pd.DataFrame, least: int = 3) -> str:
    """Means of each arm with `least` seeds of a task, and of its differences to plain, pooled over tasks."""
    measures, pooled = ("map", "f1"), ("map", "f1", "tail_map")
    tasks = [t for t in TASKS if t in set(rows["task"])]
    head = ["", *(TASKS[t] for t in tasks), *(f"{MEASURES[m]} over plain" for m in pooled)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm, name in NAMES.items():
        cells = []
        for task in tasks:
            mine = rows[(rows["arm"] == arm) & (rows["task"] == task)]
            few = len(mine) < least
            cells.append("" if few else " / ".join(f"{mine[m].mean():.3f}".lstrip("0") for m in measures))
        if not any(cells):
            continue
        cells += ["" if arm == "plain" else interval(gains(rows, arm, m)) for m in pooled]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(values: pd.Series, n_compared: int = 1) -> str:
    """Mean, and the half width of the interval of Student's t over the pairs; bold where that leaves out 0.

    With `n_compared` arms compared at once (Bonferroni). Of one pair the difference alone.
    """
    mean, low, high = difference(values, n_compared=n_compared)
    if len(values) == 1:
        return f"{mean:+.3f}".replace("0.", ".")
    text = f"{mean:+.3f} ± {high - mean:.3f}".replace("0.", ".")
    return f"**{text}**" if low > 0 or high < 0 else text


def draw(regimes: dict[str, pd.DataFrame], out: Path, least: int = 3) -> None:
    """Differences to plain of each arm, task by task, with intervals; one column for each regime."""
    measures = ("map", "f1")
    arms = [arm for arm in NAMES if arm != "plain" and any(arm in set(rows["arm"]) for rows in regimes.values())]
    fig, axes = plt.subplots(len(measures), len(regimes), figsize=(11, 7.5), layout="constrained", sharey=True)
    drawn = {}
    for column, (title, rows) in zip(axes.T, regimes.items(), strict=True):
        tasks = [t for t in TASKS if t in set(rows["task"])]
        for ax, measure in zip(column, measures, strict=True):
            for i, task in enumerate(tasks):
                for y, arm in enumerate(arms):
                    found = gains(rows[rows["task"] == task], arm, measure)
                    if len(found) < least:
                        continue
                    mean, low, high = difference(found)
                    at = y + 0.6 * (i / max(len(tasks) - 1, 1) - 0.5)
                    color = f"C{list(TASKS).index(task)}"
                    drawn[TASKS[task]] = ax.errorbar(mean, at, xerr=[[mean - low], [high - mean]], fmt="o", color=color)
            ax.axvline(0, color="0.6", lw=0.8)
            ax.set(title=f"{title}: {MEASURES[measure]}", xlabel="over plain cross entropy, 95 % interval")
            ax.set_yticks(range(len(arms)), [NAMES[arm] for arm in arms])
            ax.set_ylim(len(arms) - 0.5, -0.5)
    fig.legend(drawn.values(), drawn, loc="outside lower center", ncols=len(drawn))
    fig.savefig(out, dpi=100)
    plt.close(fig)


@call_parse
def main(
    results: str = str(RESULTS),  # folder of the rows, and of the picture
):
    """Print the tables and draw the picture."""
    folder = Path(results)
    tuned = folder / "finetune" / "runs.csv"
    regimes = {"From nothing": from_nothing(folder / "pixels" / "runs.csv"), "Fine-tuned": fine_tuned(tuned)}
    for name, rows in regimes.items():
        print(f"\n**{name}**, test: mAP / macro-F1 with fitted thresholds\n\n{table(rows)}")
    print(f"\n**Fine-tuned**, validation\n\n{table(fine_tuned(tuned, 'valid'))}")
    draw(regimes, folder / "regimes.png")
