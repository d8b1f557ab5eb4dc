"""What predictions got right and wrong, label by label: numbers as DataFrames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from sklearn.metrics import precision_recall_curve

from fastai_crl.mining.profile import within_limit

from .decisions import as_array, as_probabilities, check_thresholds, decisions
from .metrics import label_report


class LabelTables:
    """What predictions got right and wrong, label by label, as DataFrames.

    Args:
        probs: (n, C) probabilities.
        targets: (n, C) of 0 and 1; (n,) or (n, 1) class indices.
        names: C names of the labels; default the column numbers.
        counts: (C,) positives in the training set. Default: those of `targets`.
        n_train: images in the training set. Default: n.
        thresh: a probability above it, one or (C,), is a yes.
        dl: loader of the images, in order, for the pictures.
        triplets: triplets mined per epoch and label, as `learn.crl.counts_frame()` tells.

    Attributes:
        targets, chosen: (n, C) bool, the true labels and the decisions. The other arguments, under their names.
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
        self.targets, self.chosen, self.single_label = decisions(self.probs, targets, thresh, names)
        self.names = list(names) if names is not None else [str(c) for c in range(self.probs.shape[1])]
        self.counts = self.targets.sum(0) if counts is None else as_array(counts)
        self.n_train = n_train or len(self.probs)
        self.thresh, self.dl, self.triplets = check_thresholds(thresh, self.probs.shape[1], names), dl, triplets

    def report(self) -> pd.DataFrame:
        """`label_report`: one row per label, with its count in training and the triplets mined."""
        targets = self.targets.argmax(1) if self.single_label else self.targets
        triplets = None if self.triplets is None else self.triplets.sum()
        return label_report(self.probs, targets, self.names, self.thresh, triplets, self.counts)

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
        if kind not in ("positive", "negative"):
            raise ValueError(f"kind={kind!r}: hard samples are 'positive' or 'negative'.")
        c, sign = self.column(label), 1 if kind == "positive" else -1
        scores = self.probs[:, c]
        if epochs is not None:
            if not len(epochs) or any(np.shape(e) != self.probs.shape for e in epochs):
                raise ValueError(f"epochs must be probabilities of this data, each of shape {self.probs.shape}.")
            scores = np.mean([as_array(e)[:, c].astype(float) for e in epochs], 0)
        among = np.flatnonzero(self.targets[:, c] == (kind == "positive"))
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
        precision, recall, cuts = precision_recall_curve(self.targets[:, c], self.probs[:, c])
        table = {"cut": cuts, "precision": precision[:-1], "recall": recall[:-1]}
        frame = pd.DataFrame(table)
        frame["F1"] = (2 * frame.precision * frame.recall / (frame.precision + frame.recall)).fillna(0)
        return frame

    # ---- which labels go together, and are taken for each other ----
    def cooccurrence(self) -> pd.DataFrame:
        """Images with both labels, (C, C); on the diagonal those with the label."""
        return self._square(self.targets.T.astype(int) @ self.targets)

    def confusion(self) -> pd.DataFrame:
        """Images that truly have the row's label and were falsely given the column's, (C, C); diagonal: rightly given.

        For a single-label task this is the confusion matrix. With several labels an image counts for every true label
        that it has, whichever it was that misled.
        """
        false = self.chosen & ~self.targets
        matrix = self.targets.T.astype(int) @ false
        np.fill_diagonal(matrix, (self.targets & self.chosen).sum(0))
        return self._square(matrix)

    def _square(self, matrix: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame(matrix, index=self.names, columns=self.names)

    # ---- what was gained over another run ----
    def gain(self, baseline: LabelTables) -> pd.DataFrame:
        """Return differences to a baseline on the same images, from rare to common labels.

        Args:
            baseline: interpretation of the same images, in the same order.

        Returns:
            Columns `train` (count), `support`, and for AP and F1 the value here, the `_baseline` and the `_gain`.

        Raises:
            ValueError: a baseline of other images or labels.
        """
        if self.names != baseline.names or not np.array_equal(self.targets, baseline.targets):
            raise ValueError("The baseline has other labels or targets: interpret the same images, in one order.")
        here, there = self.report(), baseline.report()
        frame = here[["train", "support"]].copy()
        for name in ("AP", "F1"):
            frame[[name, f"{name}_baseline", f"{name}_gain"]] = np.c_[here[name], there[name], here[name] - there[name]]
        return frame.sort_values("train", kind="stable")
