"""What the rectification mined in training: sums over an epoch, and a table and a picture of all epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
from torch import Tensor


class Mined(NamedTuple):
    """Sums over batches, all on the device of the batches; they add up by `plus`.

    Attributes:
        counts: (C,) long, the triplets of each label (pairs, for ranking).
        terms: the rectification terms of the batches that had a triplet.
        batches: how many had one.
    """

    counts: Tensor
    terms: Tensor
    batches: Tensor

    @classmethod
    def of(cls, counts: Tensor, term: Tensor) -> Mined:
        """Return that of one batch: its (C,) triplets and its term."""
        found = (counts.sum() > 0).float()
        return cls(counts, term.detach() * found, found)

    def plus(self, other: Mined | None) -> Mined:
        return self if other is None else Mined(*(a + b for a, b in zip(self, other, strict=True)))

    def columns(self) -> dict[str, float]:
        """Return what the epoch table shows: the mean term, the triplets, and the labels that have any.

        The mean is NaN without a triplet: 0 would be the best of all epochs to a callback that monitors it.
        """
        n_labels = int((self.counts > 0).sum())
        return {"loss": float(self.terms / self.batches), "triplets": int(self.counts.sum()), "labels": n_labels}


NOTHING = {"loss": float("nan"), "triplets": 0, "labels": 0}


def counts_frame(history: Sequence[tuple[int, int, Tensor]], names: Sequence[str]) -> pd.DataFrame:
    """Return the triplets of a history of (fit, epoch, (C,) triplets), indexed by fit and epoch, labels as columns."""
    index = pd.MultiIndex.from_tuples([h[:2] for h in history], names=["fit", "epoch"])
    return pd.DataFrame([h[2].tolist() for h in history], index=index, columns=list(names))


def plot_counts(frame: pd.DataFrame, ax: Any = None, top: int | None = None) -> Any:
    """Plot a `counts_frame` over the epochs, on a logarithmic axis: see `CRLCallback.plot_counts`."""
    if frame.empty:
        raise ValueError("Nothing has been mined yet: fit first, with alpha above 0.")
    frame = frame.reset_index(drop=True)
    order = frame.sum().sort_values(ascending=False, kind="stable").index[:top]
    ax = frame[order].plot(ax=ax, logy="sym", marker=".", colormap="turbo", xlabel="epoch", ylabel="mined triplets")
    ax.legend(fontsize="x-small", ncols=2, bbox_to_anchor=(1, 1), loc="upper left")
    return ax
