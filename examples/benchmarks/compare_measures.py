"""What a run of `compare.py` is worth: its ranking, its decisions once they are fitted, and its embedding alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from compare_tables import PLAIN
from compare_train import Outputs
from matplotlib.lines import Line2D
from scipy.special import expit, softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from fastai_crl.evaluate.decisions import decide
from fastai_crl.evaluate.metrics import class_balanced_accuracy, macro_f1, mean_ap
from fastai_crl.evaluate.shift import frequency_odds
from fastai_crl.evaluate.thresholds import fit_thresholds

__all__ = ["evaluate", "evaluate_valid", "geometry", "knn", "plot_traces", "probabilities", "probe"]

GROUPS = ("head", "medium", "tail")  # thirds of the labels by training count
# What the picture of the embedding shows, as all arms would be a tangle: names of what is added and of base losses.
STYLES = {"alone": "-", "with CRL": "--", "with CRL as published": ":"}
ADDED = {"none": "alone", "published": "with CRL as published"}
ADDED |= dict.fromkeys(("ranking_quarter", "ranking_adjusted_quarter"), "with CRL")
LOSSES = dict.fromkeys(PLAIN, "cross entropy") | {
    "bce_prior": "started at the frequencies",
    "weighted_bce": "√pos_weight",
}
LOSSES |= {"logit_adjusted": "logit-adjusted"}
TASKS = {"cells": "HPA cells, mosaics", "cifar": "CIFAR-10", "drawn": "drawn cells"}


def groups(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of the labels of each third, by training count."""
    return dict(zip(GROUPS, np.array_split(np.argsort(-counts, kind="stable"), 3), strict=True))


def probabilities(logits: np.ndarray, single_label: bool) -> np.ndarray:
    """Probabilities of logits (n, C)."""
    return softmax(logits, 1) if single_label else expit(logits)


def evaluate_valid(valid: Outputs, y: np.ndarray, counts: np.ndarray, n: int) -> dict[str, float]:
    """Measures on the validation images that choices are made by: mAP, and macro-F1 with the shift fitted to them."""
    common = frequency_odds(counts / n, len(counts), y.ndim == 1, n)
    shifts = sorted(np.linspace(-3, 3, 121), key=abs)  # of equally good ones the nearest to 0
    scores = [macro_f1(probabilities(valid.logits + s * common, y.ndim == 1), y) for s in shifts]
    best = int(np.argmax(scores))
    return {
        "valid_map": mean_ap(probabilities(valid.logits, y.ndim == 1), y),
        "valid_f1_shift": scores[best],
        "shift": float(shifts[best]),
    }


def evaluate(found: dict[str, Outputs], y: dict[str, np.ndarray], counts: np.ndarray) -> dict[str, Any]:
    """Measures on the test images of one run.

    Args:
        found: outputs for "train", "valid" and "test".
        y: targets of each, (n, C) 0/1 or (n,) class indices.
        counts: (C,) training images of each label.

    Returns:
        - `map`, `map_head`, `map_medium`, `map_tail`: mean average precision of all labels and of each third;
        - `f1`: macro-F1 at 0.5; single-label, of the likeliest class;
        - `f1_shift`, `tail_recall`, `balanced`: macro-F1, mean recall of the tail and class-balanced accuracy of logits
          + s·log-odds of frequency (single-label: s·log frequency), `shift` = s fitted on validation;
        - `f1_tuned`: macro-F1 with thresholds per label fitted on validation; none for single-label;
        - `probe`, `knn`: see `probe` and `knn`, of the embedding;
        - `valid_map`, `valid_f1_shift`: see `evaluate_valid`;
        - `label_count`, `label_ap`, `label_recall`: of each label, the recall with the shift.
    """
    single, n = y["test"].ndim == 1, len(y["train"])
    values: dict[str, Any] = evaluate_valid(found["valid"], y["valid"], counts, n)
    probs = probabilities(found["test"].logits, single)
    common = frequency_odds(counts / n, len(counts), single, n)
    shifted = probabilities(found["test"].logits + values["shift"] * common, single)
    true = np.eye(len(counts), dtype=bool)[y["test"]] if single else y["test"] > 0.5
    chosen = np.eye(len(counts), dtype=bool)[shifted.argmax(1)] if single else decide(shifted)
    recall = np.where(true.any(0), (true & chosen).sum(0) / np.maximum(true.sum(0), 1), np.nan)
    ap = np.array([average_precision_score(t, p) if t.any() else np.nan for t, p in zip(true.T, probs.T, strict=True)])
    values |= {
        "map": mean_ap(probs, y["test"]),
        **{f"map_{name}": np.nanmean(ap[labels]) for name, labels in groups(counts).items()},
        "f1": macro_f1(probs, y["test"]),
        "f1_shift": macro_f1(shifted, y["test"]),
        "tail_recall": np.nanmean(recall[groups(counts)["tail"]]),
        "balanced": class_balanced_accuracy(shifted, y["test"]),
        "probe": probe(found["train"].embedding, y["train"], found["test"].embedding, y["test"]),
        "knn": knn(found["train"].embedding, y["train"], found["test"].embedding, y["test"]),
    }
    if not single:
        fitted = fit_thresholds(probabilities(found["valid"].logits, False), y["valid"], repeats=1).thresholds
        values["f1_tuned"] = macro_f1(probs, y["test"], fitted)
    by_label = {"label_count": counts, "label_ap": ap, "label_recall": recall}
    return values | {name: " ".join(f"{v:.4g}" for v in column) for name, column in by_label.items()}


# ---- the embedding alone ----
def probe(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> float:
    """A linear classifier of balanced classes, trained on the embedding.

    Single-label: its balanced accuracy. Multi-label, one classifier per label: its mean average precision.
    """
    scaler = StandardScaler().fit(train_x)
    train_x, test_x = scaler.transform(train_x), scaler.transform(test_x)
    model = LogisticRegression(class_weight="balanced", max_iter=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the scores have settled long before
        warnings.filterwarnings("ignore", "Label .* is present in all training examples")
        warnings.filterwarnings("ignore", "Label not .* is present in all training examples")
        if train_y.ndim == 1:
            scores = np.full((len(test_x), int(max(train_y.max(), test_y.max())) + 1), -np.inf)
            fitted = model.fit(train_x, train_y)
            scores[:, fitted.classes_] = fitted.predict_proba(test_x)
            return class_balanced_accuracy(scores, test_y)
        return mean_ap(OneVsRestClassifier(model).fit(train_x, train_y).predict_proba(test_x), test_y)


def knn(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, k: int = 10) -> float:
    """The k nearest training images by cosine, each weighing as much as it is similar.

    Single-label: balanced accuracy of the class of most weight. Multi-label: mean average precision of the weights.
    """
    nearest = NearestNeighbors(n_neighbors=min(k, len(train_x)), metric="cosine").fit(train_x)
    distance, rows = nearest.kneighbors(test_x)
    weight = np.maximum(1 - distance, 0)
    n_classes = int(max(train_y.max(), test_y.max())) + 1
    has = np.eye(n_classes)[train_y] if train_y.ndim == 1 else train_y
    scores = (weight[..., None] * has[rows]).sum(1) / np.maximum(weight.sum(1, keepdims=True), 1e-12)
    scores = scores.round(6)  # all neighbours have the label: 1 for all such images, not 1 and a rounding error
    return class_balanced_accuracy(scores, test_y) if train_y.ndim == 1 else mean_ap(scores, test_y)


def geometry(embedding: np.ndarray, y: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """How far apart rare labels are: mean cosine distances of the tail labels' samples, mean over those labels.

    `within`: between two samples of the label; `outside`: between one and a sample without the label. Labels with fewer
    than two samples are left out; NaN where that leaves none.
    """
    unit = embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-12)
    true = np.eye(len(counts), dtype=bool)[y] if y.ndim == 1 else y > 0.5
    within, outside = [], []
    for label in groups(counts)["tail"]:
        mine, others = unit[true[:, label]], unit[~true[:, label]]
        if (m := len(mine)) > 1 and len(others):
            within.append((m * m - (mine @ mine.T).sum()) / (m * (m - 1)))
            outside.append(1 - (mine @ others.T).mean())
    return (
        {"within": float(np.mean(within)), "outside": float(np.mean(outside))}
        if within
        else dict.fromkeys(("within", "outside"), float("nan"))
    )


def plot_traces(traces: pd.DataFrame, out: Path) -> None:
    """Distances of the tail's samples in the embedding over training, outside / within, one picture per task.

    Of some losses alone, with CRL as in the default, and as published; medians of five epochs, as a small tail jumps.
    """
    runs = traces.drop_duplicates(["run", "epoch"], keep="last").groupby("run")  # a killed run is traced again
    named = [(*name.split("-")[:4], trace) for name, trace in runs]  # task, base, sampler, added
    named = [found for found in named if found[1] in LOSSES and found[3] in ADDED]
    if not named:
        return
    tasks = list(dict.fromkeys(task for task, *_ in named))
    losses, added = list(dict.fromkeys(LOSSES[base] for _, base, *_ in named)), {ADDED[crl] for *_, crl, _ in named}
    fig, axes = plt.subplots(1, len(tasks), figsize=(3.4 * len(tasks), 4.2), squeeze=False, layout="constrained")
    for task, ax in zip(tasks, axes[0], strict=True):
        for name, base, _, crl, trace in named:
            if name == task:
                distance = (trace["outside"] / trace["within"]).rolling(5, min_periods=1).median()
                style, color = STYLES[ADDED[crl]], f"C{losses.index(LOSSES[base])}"
                ax.plot(trace["epoch"], distance, ls=style, color=color)
        ax.axhline(1, color="0.7", lw=0.8)
        shown = np.concatenate([line.get_ydata() for line in ax.lines])
        top = 1.2 * np.nanquantile(shown, 0.95)  # a distance near 0 makes a ratio of anything
        ax.set(title=TASKS.get(task, task), xlabel="epoch", ylim=(0.8, top))
    axes[0, 0].set_ylabel("distance outside / within")
    handles = [Line2D([], [], color=f"C{i}", lw=4, label=loss) for i, loss in enumerate(losses)]
    handles += [Line2D([], [], color="black", ls=style, label=name) for name, style in STYLES.items() if name in added]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    fig.suptitle("Rare labels in the embedding, on validation: cosine distance to other samples over that to their own")
    fig.savefig(out, dpi=110)
    plt.close(fig)
