"""Tables of the runs of `compare.py`: means, and paired differences with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from fastai_crl.compare.answer import COLORS, plot_differences
from fastai_crl.compare.stats import Difference, difference

__all__ = ["ARM", "DEFAULT", "MEASURES", "PLAIN", "effects", "plot_tasks", "tables"]

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
CHOSEN_BY = {"valid_map": "validation mAP", "valid_f1_shift": "validation macro-F1, shift"}
TITLES = CHOSEN_BY | MEASURES
PLAIN = ("bce", "ce")
DEFAULT = {
    False: ("bce_prior", "ranking_quarter"),
    True: ("logit_adjusted", "ranking_adjusted_quarter"),
}  # of crl_learner, by single-label


def measured(runs: pd.DataFrame) -> list[str]:
    """Those of `MEASURES` that the rows have."""
    return [m for m in MEASURES if m in runs and runs[m].notna().any()]


def _compare(
    runs: pd.DataFrame, first: dict[str, str], second: dict[str, str], measures: Sequence[str]
) -> list[dict[str, object]]:
    """One row per measure of what the second arm is better by, if both have run; no interval below three seeds."""
    arms = [runs[(runs[list(arm)] == pd.Series(arm)).all(axis=1)].set_index("seed") for arm in (first, second)]
    rows = []
    for measure in measures:
        values = (arms[1][measure] - arms[0][measure]).dropna()
        if len(values):
            found = difference(values) if len(values) > 2 else Difference(values.mean(), np.nan, np.nan)
            rows.append(second | {"measure": measure, "n": len(values), "found": found, "verdict": found.verdict})
    return rows


def effects(
    runs: pd.DataFrame, against: str | dict[str, str] = "none", measures: Sequence[str] | None = None
) -> pd.DataFrame:
    """Every arm against another, one row per measure: the paired difference over the seeds that both have.

    against: "none", the same loss and sampler without CRL; "plain", plain cross entropy alone, uniform batches;
        "default", what `crl_learner` trains with; or the columns of `ARM` in which the other arm differs.
    measures: columns; default those of `MEASURES` that the rows have.
    """
    rows = []
    for arm in runs[ARM].drop_duplicates().to_dict("records"):
        mine = runs[runs["task"] == arm["task"]]
        if isinstance(against, dict):
            other = against
        elif against == "none":
            other = {"crl": "none"}
        else:
            plain = next(iter(mine.loc[mine["base"].isin(PLAIN), "base"]), "")
            base, crl = (plain, "none") if against == "plain" else DEFAULT[plain == "ce"]
            other = {"base": base, "crl": crl, "sampler": "uniform"}
        if arm != arm | other:
            rows += _compare(mine, arm | other, arm, measured(mine) if measures is None else measures)
    return pd.DataFrame(rows, columns=[*ARM, "measure", "n", "found", "verdict"])


# ---- tables ----
def _markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _differences(found: pd.DataFrame, measures: list[str]) -> str:
    """Markdown of differences, one row per arm."""
    rows = []
    for key, arm in found.groupby(["base", "sampler", "crl"], sort=False):
        cells = arm.set_index("measure")["found"]
        rows.append([*key, int(arm["n"].max()), *(cells.get(m, "") for m in measures)])
    return _markdown(["base loss", "sampler", "added", "pairs", *(TITLES[m] for m in measures)], rows)


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
    return _markdown([*header, "seeds", *(TITLES[m] for m in measures)], rows)


def tables(runs: pd.DataFrame) -> str:
    """Tables in Markdown.

    Of each task the mean of every arm on the test images, what CRL adds, what each arm has over plain cross entropy
    and over the default, and some arms at all learning rates; how often CRL is better; those arms over tasks and rates;
    and the validation images' choice.
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
        parts.append(_by_rate(runs[(runs["regime"] == regime) & (runs["task"] == task)], measures))
    if (added["verdict"] != "too few").any():
        parts.append(_counted(added[added["verdict"] != "too few"]))
    parts.append(_over_rates(runs))
    parts.append(_chosen(tested))
    return "\n".join(part for part in parts if part)


def _all_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of the arms that have run at the most tasks and learning rates, over the seeds that all have at each."""
    arm, runs = ["base", "sampler", "crl"], runs[runs["stage"] != "tune"]
    mine = runs.merge(runs.loc[runs["stage"] == "lr", arm].drop_duplicates())
    if not len(mine):
        return mine
    cells = mine[[*arm, "task", "lr"]].drop_duplicates().groupby(arm).size()
    mine = mine.merge(cells[cells == cells.max()].index.to_frame(index=False))
    seeds = [set(group) for _, group in mine.groupby([*arm, "task", "lr"])["seed"]]
    return mine[mine["seed"].isin(set.intersection(*seeds))]


def _by_rate(runs: pd.DataFrame, measures: list[str]) -> str:
    """Markdown of a task's arms that were run at every learning rate: means, and what is added, rate by rate."""
    mine = _all_rates(runs).sort_values("lr", key=lambda lr: lr.astype(float))
    if not len(mine):
        return ""
    mine["base"] += ", " + mine["lr"]  # a rate's runs are compared with those of that rate
    means = _means(mine, ["base", "sampler", "crl"], ["base loss, learning rate", "sampler", "added"], measures)
    added = _differences(effects(mine), measures)
    return f"At each learning rate:\n\n{means}\nWhat is added, by rate:\n\n{added}"


def _over_rates(runs: pd.DataFrame) -> str:
    """Markdown of the same arms, a seed's mean over all tasks of a kind and all rates in place of its runs."""
    single, parts = set(runs.loc[runs["base"] == "ce", "task"]), []
    for name, one_label in (("several labels", False), ("one label", True)):
        mine = _all_rates(runs[runs["task"].isin(single) == one_label])
        if not len(mine):
            continue
        measures = [*(m for m in CHOSEN_BY if mine[m].notna().any()), *measured(mine)]
        by_seed = mine.groupby(["regime", "base", "sampler", "crl", "seed"], sort=False)[measures].mean().reset_index()
        by_seed["task"] = "all"
        tasks, rates = ", ".join(dict.fromkeys(mine["task"])), ", ".join(sorted(set(mine["lr"])))
        parts.append(f"Tasks of {name}: {tasks}; rates {rates}.\n")
        parts.append(_means(by_seed, ["base", "sampler", "crl"], ["base loss", "sampler", "added"], measures))
        default = dict(zip(("base", "crl"), DEFAULT[one_label], strict=True)) | {"sampler": "uniform"}
        for title, against in (
            ("What is added to the same loss", "none"),
            ("Over the default of crl_learner", default),
        ):
            parts.append(f"{title}:\n\n{_differences(effects(by_seed, against, measures), measures)}")
    return "## Over tasks and learning rates, on validation and test\n\n" + "\n".join(parts) if parts else ""


def _counted(found: pd.DataFrame) -> str:
    counted = found.groupby(["crl", "measure", "verdict"]).size().unstack(fill_value=0)
    counted = counted.reindex(columns=["higher", "level", "lower"], fill_value=0)
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


def plot_tasks(
    runs: pd.DataFrame, out: Path, measures: Sequence[str] = ("map", "map_tail", "f1_shift", "probe", "knn")
) -> None:
    """Every arm's difference to plain cross entropy with its interval: a row of panels per task, one per measure."""
    found = effects(runs, "plain", measures)
    found = found[found["verdict"] != "too few"]
    added = (" + " + found["crl"]).where(found["crl"] != "none", "")
    found["arm"] = found["base"].replace(dict.fromkeys(PLAIN, "plain")) + added
    colors = {arm: COLORS[i % len(COLORS)] for i, arm in enumerate(dict.fromkeys(found["arm"]))}
    rows = []
    for task, mine in found.groupby("task", sort=False):
        panels = mine.groupby("measure", sort=False)
        rows.append({f"{task}: {MEASURES[m]}": of.set_index("arm")["found"].to_dict() for m, of in panels})
    if rows:
        figure = plot_differences(rows, colors, "Difference to plain cross entropy, paired by seed, 95 % intervals")
        figure.savefig(out, dpi=110)
        plt.close(figure)
