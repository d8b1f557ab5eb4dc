"""One run of `compare.py`: a small network, a loss, perhaps CRL, a sampler, a seed; and what it is worth.

A plain loop, with the arithmetic of fastai's `fit_one_cycle` under `CRLCallback`: AdamW, one cycle of the learning
rate, L = α·L_crl + (1 - α)·L_base with the callback's ramp of α. For networks this small it takes a fraction of a
`Learner`'s time; that the losses agree is tested.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from compare_tasks import Split
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from fastai_crl.callback import ramp
from fastai_crl.evaluate.metrics import class_balanced_accuracy, decide, macro_f1, mean_ap
from fastai_crl.evaluate.thresholds import fit_thresholds
from fastai_crl.losses.baselines import make_loss
from fastai_crl.losses.crl_loss import CRL, imbalance, rectify
from fastai_crl.samplers import ClassAwareSampler, RepeatFactorSampler

__all__ = ["Config", "evaluate", "predict", "train", "tune"]

GROUPS = ("head", "medium", "tail")  # thirds of the labels by training count


@dataclass(frozen=True)
class Config:
    """What is trained. alpha=0: the base loss alone. crl: options of `CRL`. epochs: of uniform batches; the samplers,
    whose own epochs are longer, get the same number of steps."""

    base: str = "bce"
    alpha: float | str = 0.0
    crl: dict[str, Any] = field(default_factory=dict)
    sampler: str = "uniform"
    lr: float = 1e-2
    epochs: int = 10
    bs: int = 64


def head(n_features: int, n_classes: int, hidden: int = 128) -> nn.Module:
    """One hidden layer, for features."""
    return nn.Sequential(
        nn.Linear(n_features, hidden, bias=False),
        nn.ReLU(),
        nn.BatchNorm1d(hidden),
        nn.Dropout(0.5),
        nn.Linear(hidden, n_classes),
    )


class SmallNet(nn.Sequential):
    """Four strided convolutions and a linear layer, for uint8 pixels."""

    def __init__(self, channels: int, n_classes: int):
        widths = (channels, 32, 64, 128, 128)
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        ]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, n_classes))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() / 127.5 - 1)


def batches(sampler: str, y: Tensor, bs: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of indices without end, one epoch of the sampler after another, without its incomplete batch."""
    rng = np.random.default_rng(seed)
    made = {
        "uniform": lambda: None,
        "class_aware": lambda: ClassAwareSampler(y, bs, seed),
        "repeat_factor": lambda: RepeatFactorSampler(y, seed=seed),
    }[sampler]()
    epoch = 0
    while True:
        order = rng.permutation(len(y)) if made is None else made.indices(epoch)
        for i in range(0, len(order) - bs + 1, bs):
            yield order[i : i + bs]
        epoch += 1


def train(data: Split, config: Config, seed: int) -> nn.Module:
    """The trained network, in `eval()` mode."""
    torch.manual_seed(seed)
    x, y, counts = data.x["train"], data.y["train"], data.counts()
    model = head(x.shape[1], len(counts)) if x.ndim == 2 else SmallNet(x.shape[1], len(counts))
    base = make_loss(config.base, counts, len(y), single_label=y.ndim == 1)
    term = CRL(**config.crl)
    alpha = imbalance(counts) if config.alpha == "auto" else config.alpha
    steps = len(y) // config.bs * config.epochs
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, steps, pct_start=0.25, final_div_factor=1e5)
    model.train()
    for step, rows in zip(range(steps), batches(config.sampler, y, config.bs, seed), strict=False):
        rows = torch.from_numpy(rows)
        logits, targets = model(x[rows]), y[rows]
        loss = base(logits, targets)
        if share := alpha * ramp(step / steps):
            loss = rectify(loss, *term.loss_and_counts(logits, targets), share)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    return model.eval()


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, single_label: bool) -> np.ndarray:
    """Probabilities, (n, C)."""
    logits = torch.cat([model(part) for part in x.split(512)])
    return (logits.softmax(1) if single_label else logits.sigmoid()).numpy()


def evaluate(probs: np.ndarray, y: Tensor, counts: Tensor, thresholds: np.ndarray | None = None) -> dict[str, Any]:
    """Measures of probabilities (n, C), and by label its training count, average precision and recall.

    F1, recall and balanced accuracy are at 0.5 (single-label: of the likeliest class); `f1_tuned` at `thresholds`.
    """
    y, counts = y.numpy(), counts.numpy().astype(int)
    chosen = decide(probs) if y.ndim == 2 else np.eye(len(counts), dtype=bool)[probs.argmax(1)]
    true = y > 0.5 if y.ndim == 2 else np.eye(len(counts), dtype=bool)[y]
    positives = np.maximum(true.sum(0), 1)
    recall = np.where(true.any(0), (true & chosen).sum(0) / positives, np.nan)
    ap = [average_precision_score(t, p) if t.any() else np.nan for t, p in zip(true.T, probs.T, strict=True)]
    groups = dict(zip(GROUPS, np.array_split(np.argsort(-counts, kind="stable"), 3), strict=True))
    values = {
        "map": mean_ap(probs, y),
        **{f"map_{name}": np.nanmean(np.array(ap)[labels]) for name, labels in groups.items()},
        "f1": macro_f1(probs, y),
        "f1_tuned": macro_f1(probs, y, 0.5 if thresholds is None else thresholds),
        "recall_tail": np.nanmean(recall[groups["tail"]]),
        "balanced": class_balanced_accuracy(probs, y),
        "accuracy": (true == chosen).all(1).mean(),
    }
    by_label = {"label_count": counts, "label_ap": ap, "label_recall": recall}
    return {k: round(float(v), 5) for k, v in values.items()} | {
        k: " ".join(f"{v:.4g}" for v in column) for k, column in by_label.items()
    }


def tune(probs: np.ndarray, y: Tensor) -> np.ndarray | None:
    """Thresholds of the highest F1 on validation; None for single-label."""
    return fit_thresholds(probs, y.numpy(), repeats=1).thresholds if y.ndim == 2 else None
