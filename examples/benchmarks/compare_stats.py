"""Tables and pictures of the runs of `compare.py`: means, paired differences with intervals, gains by label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

__all__ = [
    "ARM",
    "MEASURES",
    "difference",
    "effects",
    "gains",
    "paired",
    "plot_differences",
    "plot_gains",
    "plot_traces",
    "tables",
]

ARM = ["regime", "task", "base", "sampler", "crl"]
MEASURES = {
    "map": "mAP",
    "map_tail": "tail mAP",
    "f1_shift": "macro-F1, shift",
    "f1_tuned": "macro-F1, thresholds",
    "f1": "macro-F1 at 0.5",
    "tail_recall": "tail recall, shift",
    "probe": "linear probe",
    "knn": "k-NN",
}
CHOSEN_BY = {"valid_map": "mAP", "valid_f1_shift": "macro-F1, shift"}
PLAIN = ("bce", "ce")
DEFAULT = {
    False: ("bce_prior", "ranking_quarter"),
    True: ("logit_adjusted", "ranking_adjusted_quarter"),
}  # of crl_learner, by single-label
STYLES = {"none": "-", "ranking": "--", "ranking_adjusted": "-.", "published": (0, (1, 3)), "instance": ":"}
STYLES |= dict.fromkeys(("ranking_quarter", "ranking_half"), (0, (5, 1)))
STYLES |= dict.fromkeys(("ranking_adjusted_quarter", "ranking_adjusted_half"), (0, (5, 1, 1, 1)))


def difference(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % interval of Student's t over the seeds, two or more.

    Not a bootstrap: of three to five seeds that is much too narrow.
    """
    values = np.asarray(values, float)
    mean, half = values.mean(), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(mean), float(mean - half), float(mean + half)


def paired(runs: pd.DataFrame, first: dict[str, str], second: dict[str, str], measure: str) -> pd.Series:
    """second - first of a measure, by seed: arms given by columns of ARM, over the seeds both have."""
    a, b = (runs[(runs[list(arm)] == pd.Series(arm)).all(axis=1)].set_index("seed")[measure] for arm in (first, second))
    return (b - a).dropna()


def measured(runs: pd.DataFrame) -> list[str]:
    """Those of `MEASURES` that the rows have."""
    return [m for m in MEASURES if m in runs and runs[m].notna().any()]


def _compare(runs: pd.DataFrame, first: dict[str, str], second: dict[str, str]) -> list[dict[str, object]]:
    """One row per measure of what the second arm is better by, if both have run; no interval below three seeds."""
    rows = []
    for measure in measured(runs):
        values = paired(runs, first, second, measure)
        if len(values):
            mean, low, high = difference(values) if len(values) > 2 else (values.mean(), np.nan, np.nan)
            verdict = "better" if low > 0 else "worse" if high < 0 else "level" if len(values) > 2 else "too few"
            rows.append(
                {
                    **second,
                    "measure": measure,
                    "n": len(values),
                    "mean": mean,
                    "low": low,
                    "high": high,
                    "verdict": verdict,
                }
            )
    return rows


def effects(runs: pd.DataFrame, against: str = "none") -> pd.DataFrame:
    """Every arm against another, one row per measure: mean, low and high of the differences by seed.

    against: "none", the same loss and sampler without CRL; "plain", plain cross entropy alone, uniform batches; or
        "default", what `crl_learner` trains with.
    """
    rows = []
    for arm in runs[ARM].drop_duplicates().to_dict("records"):
        reference = arm | {"crl": "none"}
        if against != "none":
            bases = runs.loc[(runs["task"] == arm["task"]) & runs["base"].isin(PLAIN), "base"]
            plain = next(iter(bases), "")
            base, crl = (plain, "none") if against == "plain" else DEFAULT[plain == "ce"]
            reference |= {"base": base, "crl": crl, "sampler": "uniform"}
        if arm != reference:
            rows += _compare(runs[runs["task"] == arm["task"]], reference, arm)
    return pd.DataFrame(rows, columns=[*ARM, "measure", "n", "mean", "low", "high", "verdict"])


# ---- tables ----
def _markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _cell(found: dict[str, float]) -> str:
    interval = "" if np.isnan(found["low"]) else f" ({found['low']:+.3f} to {found['high']:+.3f})"
    mark = "**" if found["verdict"] in ("better", "worse") else ""
    return f"{mark}{found['mean']:+.3f}{mark}{interval}"


def _differences(found: pd.DataFrame, measures: list[str]) -> str:
    """Markdown of differences, one row per arm."""
    rows = []
    for key, arm in found.groupby(["base", "sampler", "crl"], sort=False):
        cells = arm.set_index("measure").to_dict("index")
        rows.append([*key, int(arm["n"].max()), *(_cell(cells[m]) if m in cells else "" for m in measures)])
    return _markdown(["base loss", "sampler", "added", "pairs", *(MEASURES[m] for m in measures)], rows)


def _means(runs: pd.DataFrame, keys: list[str], header: list[str], measures: list[str]) -> str:
    """Markdown of means over the seeds, one row per arm; the best of each column in bold."""
    groups = runs.groupby(keys, sort=False)
    means, n = groups[measures].mean(), groups.size()
    rows = []
    for key, values in means.iterrows():
        cells = [
            "" if np.isnan(v) else f"**{v:.3f}**" if v == means[m].max() else f"{v:.3f}" for m, v in values.items()
        ]
        rows.append([*key, n[key], *cells])
    return _markdown([*header, "seeds", *(MEASURES[m] for m in measures)], rows)


def tables(runs: pd.DataFrame) -> str:
    """Tables in Markdown.

    Of each task the mean of every arm on the test images, what CRL adds, what each arm has over plain cross entropy
    and over the default, and one arm at all learning rates; how often CRL is better; and the validation images' choice.
    """
    tested, parts = runs[runs["stage"] == "test"], []
    added = effects(tested)
    for (regime, task), group in tested.groupby(["regime", "task"], sort=False):
        measures = measured(group)
        rates = group.drop_duplicates("base").set_index("base")["lr"]
        parts.append(f"## {task} ({regime})\n\nMeans over the seeds, on test:\n")
        parts.append(_means(group, ["base", "sampler", "crl"], ["base loss", "sampler", "added"], measures))
        parts.append("Learning rates: " + ", ".join(f"{base} {lr}" for base, lr in rates.items()) + ".\n")
        for found, title in (
            (added, "What is added to the same loss and sampler"),
            (effects(group, "plain"), "Over plain cross entropy"),
            (effects(group, "default"), "Over the default of crl_learner"),
        ):
            mine = found[(found["regime"] == regime) & (found["task"] == task)]
            if len(mine):
                parts.append(f"{title}: mean difference by seed and 95 % interval, bold where that leaves 0 out:\n")
                parts.append(_differences(mine, measures))
        parts.append(_at_all_rates(runs[(runs["regime"] == regime) & (runs["task"] == task)], measures))
    if (added["verdict"] != "too few").any():
        parts.append(_counted(added[added["verdict"] != "too few"]))
    parts.append(_chosen(tested))
    return "\n".join(part for part in parts if part)


def _at_all_rates(runs: pd.DataFrame, measures: list[str]) -> str:
    """Markdown of the default and its loss alone at every learning rate, over the seeds that all of them have."""
    runs = runs[runs["stage"] != "tune"]
    arms = runs.loc[runs["stage"] == "lr", ["base", "sampler", "crl"]].drop_duplicates()
    mine = runs.merge(arms).sort_values("lr", key=lambda lr: lr.astype(float))
    mine["base"] += ", " + mine["lr"]  # a rate's runs are compared with those of that rate
    seeds = [set(group) for _, group in mine.groupby(["base", "crl"])["seed"]]
    mine = mine[mine["seed"].isin(set.intersection(*seeds))] if seeds else mine
    if not len(mine):
        return ""
    means = _means(mine, ["base", "sampler", "crl"], ["base loss, learning rate", "sampler", "added"], measures)
    added = _differences(effects(mine), measures)
    return f"The default and its loss alone at each learning rate:\n\n{means}\nWhat is added, by rate:\n\n{added}"


def _counted(found: pd.DataFrame) -> str:
    counted = found.groupby(["crl", "measure", "verdict"]).size().unstack(fill_value=0)
    counted = counted.reindex(columns=["better", "level", "worse"], fill_value=0)
    keys = [(crl, m) for crl in dict.fromkeys(found["crl"]) for m in MEASURES if (crl, m) in counted.index]
    rows = [[crl, MEASURES[m], *counted.loc[(crl, m)]] for crl, m in keys]
    header = _markdown(["added", "measure", "better", "level", "worse"], rows)
    return (
        f"## All tasks\n\nIn how many arms what is added is better, level or worse (three seeds or more):\n\n{header}"
    )


def _chosen(runs: pd.DataFrame) -> str:
    """Markdown of what the validation images say of each arm that uniform batches of all tasks of a kind have trained.

    Of the seeds that all arms of a task have: those are as hard for each.
    """
    runs, parts = runs[(runs["sampler"] == "uniform")], []
    single = set(runs.loc[runs["base"] == "ce", "task"])
    for name, one_label in (("several labels", False), ("one label", True)):
        rows = runs[runs["task"].isin(single) == one_label]
        n_tasks = rows.groupby(["base", "crl"])["task"].nunique()
        arms = n_tasks[n_tasks == n_tasks.max()].index.to_frame(index=False)
        rows = rows.merge(arms)
        shared = rows.groupby(["task", "seed"])["base"].transform("size") == len(arms)
        means = rows[shared].groupby(["task", "base", "crl"], sort=False)[list(CHOSEN_BY)].mean()
        if means.isna().all(axis=None):
            continue
        tasks = list(dict.fromkeys(means.index.get_level_values("task")))
        table = []
        for arm in dict.fromkeys(key[1:] for key in means.index):
            by_task = means.xs(arm, level=("base", "crl"))
            over_tasks = [f"{by_task[m].mean():.3f}" for m in CHOSEN_BY]
            table.append([*arm, *over_tasks, *(" / ".join(f"{v:.3f}" for v in by_task.loc[t]) for t in tasks)])
        header = ["base loss", "added", *CHOSEN_BY.values(), *(f"{task}: both" for task in tasks)]
        parts.append(f"Tasks of {name}, mean over them:\n\n{_markdown(header, table)}")
    return "## On validation, by which a default is chosen\n\n" + "\n".join(parts) if parts else ""


# ---- pictures ----
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
    arms = list(dict.fromkeys(zip(found["base"].replace(dict.fromkeys(PLAIN, "plain")), found["crl"], strict=True)))
    found = found.assign(
        arm=[
            arms.index((b if b not in PLAIN else "plain", c)) for b, c in zip(found["base"], found["crl"], strict=True)
        ]
    )
    tasks = list(dict.fromkeys(found["task"]))
    size = (2.2 + 2 * len(measures), 0.8 + len(tasks) * (0.5 + 0.18 * len(arms)))
    fig, axes = plt.subplots(len(tasks), len(measures), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for task, row in zip(tasks, axes, strict=True):
        for measure, ax in zip(measures, row, strict=True):
            mine = found[(found["task"] == task) & (found["measure"] == measure)]
            ax.plot(mine["mean"], mine["arm"], "o", ms=4)
            ax.hlines(mine["arm"], mine["low"], mine["high"])
            ax.axvline(0, color="0.5", lw=0.8)
            ax.set_title(f"{task}: {MEASURES[measure]}", fontsize="small")
            ax.tick_params(labelsize="x-small")
    names = [f"{base} + {crl}" if crl != "none" else base for base, crl in arms]
    axes[0, 0].set_yticks(range(len(arms)), names)
    axes[0, 0].invert_yaxis()
    fig.suptitle(
        "Difference to plain cross entropy, paired by seed, and 95 % interval (three seeds or more)", fontsize="small"
    )
    fig.savefig(out, dpi=110)
    plt.close(fig)


def plot_traces(folder: Path, out: Path) -> None:
    """Distances of the tail's samples in the embedding over training, outside / within, one picture per task."""
    files = sorted(folder.glob("*.csv"))
    if not files:
        return
    named = [(*file.stem.split("-")[:4], pd.read_csv(file)) for file in files]  # task, base, sampler, added
    tasks = list(dict.fromkeys(task for task, *_ in named))
    fig, axes = plt.subplots(1, len(tasks), figsize=(3.5 + 3.5 * len(tasks), 3.6), squeeze=False, layout="constrained")
    for task, ax in zip(tasks, axes[0], strict=True):
        for name, base, _, crl, trace in named:
            if name == task:
                loss = "plain" if base in PLAIN else base
                color = {"plain": "C0", "logit_adjusted": "C1"}.get(loss, "C2")
                label = loss if crl == "none" else f"{loss} + {crl}"
                distance = trace["outside"] / trace["within"]
                ax.plot(trace["epoch"], distance, ls=STYLES.get(crl, "-"), color=color, label=label)
        ax.axhline(1, color="0.7", lw=0.8)
        shown = np.concatenate([line.get_ydata() for line in ax.lines])
        top = 1.2 * np.nanquantile(shown, 0.95)  # a distance near 0 makes a ratio of anything
        ax.set(title=task, xlabel="epoch", ylabel="distance outside / within", ylim=(0.8, top))
    axes[0, -1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    title = "Rare labels in the embedding, on validation:\ncosine distance to other samples over that to their own"
    fig.suptitle(title, fontsize="small")
    fig.savefig(out, dpi=110)
    plt.close(fig)
