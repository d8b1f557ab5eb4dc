"""Tables and pictures of the runs of `compare.py`: means, paired differences with intervals, gains by label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

__all__ = ["ARM", "MEASURES", "against_rivals", "difference", "effects", "gains", "paired", "plot_gains", "tables"]

ARM = ["regime", "task", "base", "sampler", "crl"]
MEASURES = {"map": "mAP", "f1": "macro-F1 at 0.5", "f1_tuned": "macro-F1, tuned", "recall_tail": "tail recall at 0.5"}


def difference(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % percentile bootstrap interval over the seeds (10,000 resamples)."""
    values = np.asarray(values, float)
    means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    return float(values.mean()), *map(float, np.percentile(means, (2.5, 97.5)))


def paired(runs: pd.DataFrame, first: dict[str, str], second: dict[str, str], measure: str) -> pd.Series:
    """second - first of a measure, by seed: arms given by columns of ARM, over the seeds both have."""
    a, b = (runs[(runs[list(arm)] == pd.Series(arm)).all(1)].set_index("seed")[measure] for arm in (first, second))
    return (b - a).dropna()


def _compare(
    runs: pd.DataFrame, first: dict[str, str], second: dict[str, str], names: dict[str, str]
) -> list[dict[str, object]]:
    """One row per measure of what the second arm is better by, if both have run."""
    rows = []
    for measure in MEASURES:
        values = paired(runs, first, second, measure)
        if len(values):
            mean, low, high = difference(values)
            verdict = "better" if low > 0 else "worse" if high < 0 else "level"
            rows.append({**names, "measure": measure, "mean": mean, "low": low, "high": high, "verdict": verdict})
    return rows


def effects(runs: pd.DataFrame) -> pd.DataFrame:
    """What CRL adds, one row per arm with CRL and measure: mean, low and high of its difference to the same without.

    A memory belongs to CRL, so the arm "memory" is compared with the base loss under uniform batches.
    """
    rows = []
    for arm in runs.loc[runs["crl"] != "none", ARM].drop_duplicates().to_dict("records"):
        plain = arm | {"crl": "none"} | ({"sampler": "uniform"} if arm["sampler"] == "memory" else {})
        rows += _compare(runs, plain, arm, arm)
    return pd.DataFrame(rows)


def against_rivals(runs: pd.DataFrame, crl: str = "CRL") -> pd.DataFrame:
    """CRL on each task's first loss against every other loss alone (`rival`), uniform batches; as `effects`."""
    runs, rows = runs[runs["sampler"] == "uniform"], []
    for (regime, task), group in runs.groupby(["regime", "task"], sort=False):
        first, *rivals = dict.fromkeys(group["base"])
        mine = {"regime": regime, "task": task, "base": first, "crl": crl}
        for rival in rivals:
            rows += _compare(runs, mine | {"base": rival, "crl": "none"}, mine, mine | {"rival": rival})
    return pd.DataFrame(rows)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _differences(found: pd.DataFrame, keys: list[str], header: Sequence[str]) -> str:
    """Markdown of differences, one row per arm."""
    rows = []
    for key, arm in found.groupby(keys, sort=False):
        cells = arm.set_index("measure").loc[list(MEASURES)].to_dict("records")
        rows.append([*key, *(f"{c['mean']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f})" for c in cells)])
    return _markdown([*header, *MEASURES.values()], rows)


def tables(runs: pd.DataFrame) -> str:
    """Markdown: of each task the mean of every arm on the test images and what CRL adds; and how often it is better."""
    found, rivals, parts = effects(runs), against_rivals(runs), []
    for (regime, task), group in runs.groupby(["regime", "task"], sort=False):
        means = group.groupby(["base", "sampler", "crl"], sort=False)[list(MEASURES)].mean()
        n, best, rows = group.groupby(["base", "sampler", "crl"], sort=False).size(), means.max(), []
        for key, values in means.iterrows():
            cells = [f"**{v:.3f}**" if v == best[m] else f"{v:.3f}" for m, v in values.items()]
            rows.append([*key, n[key], *cells])
        parts.append(f"## {task} ({regime})\n\nMeans over the seeds, on test:\n")
        parts.append(_markdown(["base loss", "sampler", "CRL", "seeds", *MEASURES.values()], rows))
        parts.append("What CRL adds to the same loss and sampler, mean difference and 95 % interval:\n")
        mine = found[(found["regime"] == regime) & (found["task"] == task)]
        parts.append(_differences(mine, ["base", "sampler", "crl"], ["base loss", "sampler", "CRL"]))
        if len(rivals) and len(mine := rivals[(rivals["regime"] == regime) & (rivals["task"] == task)]):
            parts.append(f"CRL on {next(iter(means.index))[0]} against the other losses alone:\n")
            parts.append(_differences(mine, ["rival", "crl"], ["rival", "CRL"]))
    counted = found.groupby(["crl", "measure", "verdict"]).size().unstack(fill_value=0)
    counted = counted.reindex(columns=["better", "level", "worse"], fill_value=0)
    rows = [[crl, MEASURES[m], *counted.loc[(crl, m)]] for crl in dict.fromkeys(found["crl"]) for m in MEASURES]
    parts.append("## All tasks\n\nIn how many arms CRL is better, level or worse than the same without:\n")
    parts.append(_markdown(["CRL", "measure", "better", "level", "worse"], rows))
    return "\n".join(parts)


def gains(runs: pd.DataFrame, task: str, base: str, column: str, crl: str, sampler: str = "uniform") -> pd.DataFrame:
    """Training count and mean gain of `column` (label_ap, label_recall) by label, over seeds, of CRL over none."""
    runs = runs[(runs["task"] == task) & (runs["base"] == base) & (runs["sampler"] == sampler)].set_index("seed")
    sides = [_by_label(runs[runs["crl"] == name], column) for name in (crl, "none")]
    counts = _by_label(runs[runs["crl"] == crl], "label_count").mean()
    return pd.DataFrame({"count": counts, "gain": (sides[0] - sides[1]).mean()})


def _by_label(runs: pd.DataFrame, column: str) -> pd.DataFrame:
    return runs[column].str.split().apply(lambda values: pd.Series([float(v) for v in values]))


def plot_gains(runs: pd.DataFrame, crl: str, out: Path) -> None:
    """Gain of average precision and recall by label against its training count, one row per task, first base loss."""
    tasks = list(dict.fromkeys(runs.loc[runs["crl"] == crl, "task"]))
    fig, axes = plt.subplots(len(tasks), 2, figsize=(10, 2.6 * len(tasks)), squeeze=False, layout="constrained")
    for task, row in zip(tasks, axes, strict=True):
        mine = runs[runs["task"] == task]
        for ax, (column, name) in zip(row, (("label_ap", "AP"), ("label_recall", "recall at 0.5")), strict=True):
            for base in dict.fromkeys(mine["base"]):
                values = gains(mine, task, base, column, crl)
                ax.plot(values["count"], values["gain"], "o", ms=4, alpha=0.7, label=base)
            ax.axhline(0, color="0.5", lw=0.8)
            ax.set(xscale="log", title=task, xlabel="training images of the label", ylabel=f"gain of {name}")
        row[1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    fig.suptitle("What CRL adds to each loss, by label: mean over the seeds, test, uniform batches")
    fig.savefig(out, dpi=110)
    plt.close(fig)
