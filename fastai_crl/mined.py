"""What CRL mined: the triplets of one epoch, and the table and the picture of all epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from matplotlib.ticker import MaxNLocator, StrMethodFormatter, SymmetricalLogLocator
from torch import Tensor

from fastai_crl.losses.crl import Rectified

NOTHING = {"loss": float("nan"), "triplets": 0, "labels": 0}  # columns of an epoch without a triplet


@dataclass
class Epoch:
    """What one epoch mined, on the device of the batches: adding to it reads nothing."""

    triplets: Tensor | None = None  # (C,) long
    terms: list[Tensor] = field(default_factory=list)  # of each batch
    found: list[Tensor] = field(default_factory=list)  # of each batch: whether it had a triplet

    def add(self, rectified: Rectified, found: Tensor) -> None:
        self.triplets = rectified.triplets if self.triplets is None else self.triplets + rectified.triplets
        self.terms.append(rectified.loss.detach())
        self.found.append(found)

    def columns(self) -> dict[str, float]:
        """What the epoch table shows: the mean term of the batches with a triplet, triplets, labels that have any."""
        if self.triplets is None:
            return NOTHING
        loss = torch.stack(self.terms)[torch.stack(self.found)].mean()
        return {"loss": float(loss), "triplets": int(self.triplets.sum()), "labels": int((self.triplets > 0).sum())}


def table_of(history: Sequence[tuple[int, int, Tensor]], names: Sequence[str]) -> pd.DataFrame:
    """Return a row for each (fit, epoch, triplets (C,)) of `history`, a column for each label."""
    index = pd.MultiIndex.from_tuples([h[:2] for h in history], names=["fit", "epoch"])
    return pd.DataFrame([h[2].tolist() for h in history], index=index, columns=names)


def plot_table(frame: pd.DataFrame, ax: Any = None, top: int | None = None) -> Any:
    """Plot the columns of `table_of` that mined the most, `top` of them, on a logarithmic axis; return the axes."""
    order = frame.sum().sort_values(ascending=False, kind="stable").index[:top]
    frame = frame[order].reset_index(drop=True)
    ax = frame.plot(ax=ax, logy="sym", marker=".", colormap="turbo", xlabel="epoch", ylabel="mined triplets")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5)))  # within a decade, too
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.legend(fontsize="x-small", ncols=2, bbox_to_anchor=(1, 1), loc="upper left")
    return ax
