"""What a comparison says: tables, a picture, advice."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastai_crl.predict.report import inline_image

from .stats import MEASURES, Difference, Measured, difference

COLORS = plt.get_cmap("tab10").colors
_SHOWN = MEASURES[:3]  # in the table that is printed after a round
_DIFFERENCE = ("difference", "low", "high")  # columns, of a `Difference`


@dataclass
class Comparison:
    """What the finished runs of `compare_learners` say. The first arm, "plain" here, is what others are compared with.

    Attributes:
        runs: a row for each run: its arm, rate, seed, measures, seconds; whether its first weights are those of plain
            (`weights`); what it was measured on (`measured`).
        measured: of each arm and seed.
        arms: from the name of each arm to the lines that make its learner.
        labels: from the name of each label measured to its training images.
        left_out: labels that the measured images say nothing about: fewer than two images there with it, or none
            without it.
    """

    runs: pd.DataFrame
    measured: Mapping[tuple[str, int], Measured]
    arms: Mapping[str, str]
    labels: Mapping[str, int]
    left_out: Sequence[str] = ()

    @property
    def plain(self) -> str:
        """The arm that the others are compared with."""
        return next(iter(self.arms))

    def _seeds(self, arm: str, other: str | None = None) -> list[int]:
        return [s for a, s in self.measured if a == arm and (other or a, s) in self.measured]

    def difference(self, arm: str, measure: str = "mAP", other: str | None = None) -> Difference | None:
        """Return what an arm has over another one, by default plain; None where no seed has both.

        Over seeds and images, widened for the number of arms compared: see `stats.difference`.
        """
        other = self.plain if other is None else other
        if not (seeds := self._seeds(arm, other)):
            return None
        a, b = ([self.measured[name, s] for s in seeds] for name in (arm, other))
        values = [x.values[measure] - y.values[measure] for x, y in zip(a, b, strict=True)]
        influence = [x.influence[measure] - y.influence[measure] for x, y in zip(a, b, strict=True)]
        return difference(values, influence, n_compared=len(self.arms) - 1)

    def mean(self, arm: str, measure: str = "mAP") -> float:
        """Return the mean of a measure over an arm's seeds; NaN where one of them diverged."""
        return float(np.mean([self.measured[arm, s].values[measure] for s in self._seeds(arm)] or [np.nan]))

    @property
    def frame(self) -> pd.DataFrame:
        """A row for each arm; of each measure the mean, and of the difference to plain its mean, low and high end."""
        rows = {}
        for arm in self.arms:
            mine = self.runs[self.runs["arm"] == arm]
            row: dict[tuple[str, str], Any] = {("runs", "seeds"): len(self._seeds(arm))}
            row["runs", "lr"] = next(iter(mine["lr"]), "")
            row["runs", "minutes"] = mine["seconds"].mean() / 60
            for measure in MEASURES:
                found = None if arm == self.plain else self.difference(arm, measure)
                row[measure, "mean"] = self.mean(arm, measure)
                ends = (np.nan,) * 3 if found is None else found
                row |= {(measure, name): v for name, v in zip(_DIFFERENCE, ends, strict=True)}
            rows[arm] = row
        frame = pd.DataFrame.from_dict(rows, orient="index")
        frame.columns = pd.MultiIndex.from_tuples(frame.columns)
        return frame.rename_axis("arm")

    @property
    def by_label(self) -> pd.DataFrame:
        """A row for each label: training images, plain's average precision, and of each arm the difference to it.

        With the ends of its interval, over seeds and images, not widened for the number of labels.
        """
        table: dict[tuple[str, str], Any] = {("", "training images"): list(self.labels.values())}
        plain = [self.measured[self.plain, s].ap for s in self._seeds(self.plain)]
        table["", f"AP, {self.plain}"] = np.mean(plain, 0)
        for arm in list(self.arms)[1:]:
            if seeds := self._seeds(arm, self.plain):
                pairs = [(self.measured[arm, s], self.measured[self.plain, s]) for s in seeds]
                values = np.stack([a.ap - b.ap for a, b in pairs], 1)
                influence = np.stack([(a.ap_influence - b.ap_influence).T for a, b in pairs], 1)
                columns = zip(*map(difference, values, influence), strict=True)
                table |= {(arm, name): column for name, column in zip(_DIFFERENCE, columns, strict=True)}
        return pd.DataFrame(table, index=pd.Index(list(self.labels), name="label"))

    @property
    def advice(self) -> str:
        """Two or three sentences: what is best in mAP, whether it is noise, and the lines that train it."""
        plain, others = self.plain, list(self.arms)[1:]
        n = min((len(self._seeds(arm, plain)) for arm in others), default=0)
        gone = [arm for arm in self.arms if self._seeds(arm) and np.isnan(self.mean(arm))]
        said = [f"Diverged: {', '.join(gone)}; a lower learning rate may help."] if gone else []
        if n < 3:
            said.append(f"{n} seed{'s' * (n != 1)} of all arms: with fewer than three no winner is named.")
            return " ".join([*said, "The same call goes on; give it more minutes= or seeds=."])
        found = {arm: self.difference(arm) for arm in others}
        ahead = sorted((a for a in others if found[a].verdict == "higher"), key=lambda a: -found[a].mean)
        if not ahead:
            said.append(f"No arm is ahead of {plain} in mAP by more than noise: keep {plain}, and fit the decision.")
            behind = [f"{arm} ({found[arm].mean:+.3f})" for arm in others if found[arm].verdict == "lower"]
            said += [f"Behind it: {', '.join(behind)}."] if behind else []
            for m in MEASURES[1:3]:
                gains = [
                    f"{arm} ({d.mean:+.3f})" for arm in others if (d := self.difference(arm, m)).verdict == "higher"
                ]
                said += [f"Ahead in {m}: {', '.join(gains)}."] if gains else []
            return " ".join([*said, f"Train with: {self.arms[plain]}"])
        best = ahead[0]
        interval = f"{found[best].low:+.3f} to {found[best].high:+.3f}, {n} seeds"
        said.append(f"Best in mAP is {best}, {found[best].mean:+.3f} over {plain} ({interval}): more than noise.")
        level = [arm for arm in ahead[1:] if self.difference(best, other=arm).verdict == "level"]
        said += [f"Not to be told from it: {', '.join(level)}."] if level else []
        costs = {m: d.mean for m in MEASURES[1:-1] if (d := self.difference(best, m)).verdict == "lower"}
        said += [f"It costs {', '.join(f'{m} {mean:+.3f}' for m, mean in costs.items())}."] if costs else []
        return " ".join([*said, f"Train with: {self.arms[best]}"])

    # ---- shown ----
    def _table(self, measures: Sequence[str], end: str) -> pd.DataFrame:
        """Texts of means and differences, an arm a row: `end` before ends."""
        rows = {}
        for arm in self.arms:
            rows[arm] = {"seeds": len(self._seeds(arm)), **{m: f"{self.mean(arm, m):.3f}" for m in measures}}
            for m in measures if arm != self.plain else ():
                if (found := self.difference(arm, m)) is not None:
                    rows[arm][m] += end + str(found).replace("**", "").replace(" (", f"{end}(")
        return pd.DataFrame.from_dict(rows, orient="index")

    def __str__(self) -> str:
        return self._table(_SHOWN, " ").to_string()

    def plot(self) -> Figure:
        """Draw each arm's difference to plain, with its interval: a panel for each measure, a colour for each arm."""
        arms = list(self.arms)[1:]
        panels = {}
        for m in MEASURES:
            title = f"{m}{' (lower is better)' * (m == MEASURES[-1])}\n{self.plain}: {self.mean(self.plain, m):.3f}"
            panels[title] = {arm: d for arm in arms if (d := self.difference(arm, m)) is not None}
        title = f"Difference to {self.plain}, 95 % intervals; filled: more than noise"
        return plot_differences([panels], self._colors(), title)

    def _colors(self) -> dict[str, Any]:
        return {arm: COLORS[i % len(COLORS)] for i, arm in enumerate(self.arms)}

    def _repr_html_(self) -> str:
        table = self._table(MEASURES, "<br>")
        table.insert(1, "learning rate", self.runs.groupby("arm")["lr"].first())
        squares = [f'<span style="color:{to_hex(color)}">&#9632;</span>' for color in self._colors().values()]
        table.index = [f"{square} {html.escape(arm)}" for square, arm in zip(squares, self.arms, strict=True)]
        left = f"Left out, too few images to measure: {', '.join(self.left_out)}." if self.left_out else ""
        return (
            f"<p><b>{html.escape(self.advice)}</b></p>{table.to_html(escape=False)}<p>{html.escape(left)}</p>"
            f"{inline_image(self.plot(), 'Differences')}"
        )

    def save(self, file: str | Path) -> Path:
        """Write `file`: a page (`.html`) with advice, tables and picture, or the picture alone (`.png`).

        Raises:
            ValueError: another ending.
        """
        file = Path(file)
        if file.suffix == ".png":
            figure = self.plot()
            figure.savefig(file, dpi=120)
            plt.close(figure)
        elif file.suffix == ".html":
            style = "<style>body{font-family:sans-serif} td,th{padding:4px 10px;text-align:right}</style>"
            labels = self.by_label.to_html(float_format="{:.3f}".format)
            page = f"<!doctype html><meta charset='utf-8'>{style}{self._repr_html_()}<h3>By label</h3>{labels}"
            file.write_text(page, encoding="utf-8")
        else:
            raise ValueError(f"file={str(file)!r}: give a name that ends in .html or .png.")
        return file


def plot_differences(
    rows: Sequence[Mapping[str, Mapping[str, Difference]]], colors: Mapping[str, Any], title: str
) -> Figure:
    """Draw differences with intervals: a panel by title in each row, in each an arm beside the other.

    Args:
        rows: from each panel's title to the difference of each arm; the panels of a row have the same arms.
        colors: of each arm, throughout.
        title: above all.
    """
    columns = max(map(len, rows))
    if len(rows) == 1 and columns > 3:  # two rows that can be read
        items = list(rows[0].items())
        rows = [dict(items[: (columns + 1) // 2]), dict(items[(columns + 1) // 2 :])]
        columns = (columns + 1) // 2
    heights = [0.9 + 0.3 * max((len(of_arm) for of_arm in row.values()), default=1) for row in rows]
    size = (2.4 + 2.9 * columns, 0.6 + sum(heights))
    fig, axes = plt.subplots(
        len(rows), columns, figsize=size, squeeze=False, sharey="row", height_ratios=heights, layout="constrained"
    )
    for row, line in zip(rows, axes, strict=True):
        for ax in line[len(row) :]:
            ax.set_axis_off()
        for (name, of_arm), ax in zip(row.items(), line, strict=False):
            for arm, found in of_arm.items():
                ax.plot([found.low, found.high], [arm, arm], color=colors[arm], lw=2.5, alpha=0.6)
                face = colors[arm] if found.verdict in ("higher", "lower") else "white"
                ax.plot([found.mean], [arm], "o", color=colors[arm], markerfacecolor=face, ms=7, mew=2)
            ax.axvline(0, color="0.4", lw=1)
            ax.set_title(name, fontsize="small")
            ax.tick_params(labelsize="small")
            ax.xaxis.set_major_locator(MaxNLocator(5))
        line[0].set_ylim(max(map(len, row.values()), default=1) - 0.4, -0.6)
    fig.suptitle(title, fontsize="medium")
    return fig
