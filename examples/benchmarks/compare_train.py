"""One run of `compare.py`: a small network, a loss, perhaps CRL in a form, weight and time of its own, and a seed.

A plain loop, with the arithmetic of fastai's `fit_one_cycle` under `CRLCallback`: AdamW, one cycle of the learning
rate, L = α·L_crl + (1 - α)·L_base with the callback's ramp of α. For networks this small it takes a fraction of a
`Learner`'s time; that the losses agree is tested.

Every network is an `nn.Sequential` whose last layer is linear: what goes into that layer is the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from compare_tasks import Split
from torch import Tensor, nn

from fastai_crl.losses import CRL, imbalance, make_loss, start_at_frequency
from fastai_crl.losses.criteria import Ranking
from fastai_crl.losses.crl import Rectified
from fastai_crl.losses.imbalance import mix, ramp
from fastai_crl.mining import minority_classes

__all__ = ["PRIOR", "TERMS", "Config", "Outputs", "Term", "easy_anchors", "outputs", "train"]


PRIOR = "_prior"  # behind the name of a base loss: the network starts at the frequencies of the labels


@dataclass(frozen=True)
class Config:
    """What is trained.

    Attributes:
        base: name of the base loss, of `make_loss`; with `PRIOR` behind it of a network that starts at the frequencies.
        term: what is added to it, a name of `TERMS`; Ω of its weight is that of the training counts.
        lr: the highest learning rate of the cycle.
        epochs: of how many the cycle is.
        bs: size of a batch.
        flips: "h" and "v", the flips that images are augmented by. Pixels are shifted, too.
        bf16: whether the network computes in bfloat16 (the losses do not).
    """

    base: str = "bce"
    term: str = "none"
    lr: float = 1e-2
    epochs: int = 10
    bs: int = 64
    flips: str = ""
    bf16: bool = False


# ---- what is added to a base loss ----
def easy_anchors(logits: Tensor, targets: Tensor, sure: float, k: int = 25, margin: float = 0.5) -> Rectified:
    """CRL as published, at class level, but that only positives the network is sure of are anchors.

    The others are still hard positives, and are pushed up to the anchors. With `sure` 0 it is the published loss.
    """
    p = logits.softmax(1) if targets.ndim == 1 else logits.sigmoid()
    hinges = [p.new_zeros(0)]
    for c in minority_classes(targets, n_classes=p.shape[1]).nonzero()[:, 0].tolist():
        positive = targets == c if targets.ndim == 1 else targets[:, c] == 1
        own = p[positive, c]
        negatives = p[~positive, c].topk(min(k, int((~positive).sum()))).values
        for i in (own > sure).nonzero()[:, 0].tolist():
            others = torch.cat([own[:i], own[i + 1 :]])
            positives = others.topk(min(k, len(others)), largest=False).values
            to_positive, to_negative = (own[i] - positives).abs(), own[i] - negatives
            hinges.append((margin + to_positive[:, None] - to_negative).relu().flatten())
    found = torch.cat(hinges)
    return Rectified(found.sum() / max(1, len(found)), torch.tensor([len(found)]))


@dataclass(frozen=True)
class Term:
    """What is added to a base loss.

    Attributes:
        crl: arguments of `CRL`.
        adjusted: whether it works on the logits that the base loss adjusts, rather than on those of the network.
        active: the part of training in which it is added, from and to, of 0 to 1.
        share: of Ω, that its weight α is.
        most: α at the most.
        sure: the probability above which a positive is an anchor of `easy_anchors`, which then replaces `crl`.
    """

    crl: dict[str, Any] = field(default_factory=dict)
    adjusted: bool = False
    active: tuple[float, float] = (0.0, 1.0)
    share: float = 1.0
    most: float = 1.0
    sure: float | None = None

    def alpha(self, omega: float, done: float) -> float:
        """Its weight when `done`, 0 to 1, of training is done: it ramps up from where it becomes active."""
        start, stop = self.active
        return min(self.share * omega, self.most) * (ramp(done - start) if start <= done < stop else 0.0)

    def of(self, shift: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Rectified]:
        """What makes it of logits, targets and the embedding; `shift` is what the base loss adds to logits."""
        if self.sure is not None:
            return lambda logits, targets, _: easy_anchors(logits, targets, self.sure)
        return CRL(**self.crl, shift=shift if self.adjusted else None).loss_and_triplets


TERMS: dict[str, Term | None] = {
    "none": None,
    "ranking": Term({"criterion": "ranking"}),
    "ranking_adjusted": Term({"criterion": "ranking"}, adjusted=True),
    "published": Term({"criterion": "relative"}),
    "instance": Term({"criterion": "relative", "level": "instance"}),
    "ranking_quarter": Term({"criterion": "ranking"}, most=Ranking.alpha_limit),  # the package's default
    "ranking_adjusted_quarter": Term({"criterion": "ranking"}, adjusted=True, most=Ranking.alpha_limit),
    # Not among the arms that run by default:
    "ranking_half": Term({"criterion": "ranking"}, share=0.5),
    "ranking_adjusted_half": Term({"criterion": "ranking"}, adjusted=True, share=0.5),
    "ranking_eighth": Term({"criterion": "ranking"}, most=Ranking.alpha_limit / 2),
    "ranking_early": Term({"criterion": "ranking"}, active=(0.0, 0.5), most=Ranking.alpha_limit),
    "ranking_late": Term({"criterion": "ranking"}, active=(0.5, 1.0), most=Ranking.alpha_limit),
    "easy_anchors": Term(sure=0.9),
}


# ---- networks ----
def head(n_features: int, n_classes: int, hidden: int = 128) -> nn.Sequential:
    """One hidden layer, for features."""
    return nn.Sequential(
        nn.Linear(n_features, hidden, bias=False),
        nn.ReLU(),
        nn.BatchNorm1d(hidden),
        nn.Dropout(0.5),
        nn.Linear(hidden, n_classes),
    )


class Scale(nn.Module):
    """Pixels 0 to 255 to -1 to 1."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _conv(n_in: int, n_out: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, size, stride, size // 2, bias=False), nn.BatchNorm2d(n_out))


class Block(nn.Module):
    """Two convolutions and a short cut."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.convs = nn.Sequential(_conv(n_in, n_out, 3, stride), nn.ReLU(), _conv(n_out, n_out, 3))
        self.short = nn.Identity() if n_in == n_out and stride == 1 else _conv(n_in, n_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return (self.convs(x) + self.short(x)).relu()


def resnet8(channels: int, side: int, n_classes: int, width: int = 16) -> nn.Sequential:
    """ResNet-8 (He et al., arXiv:1512.03385, section 4.2, n = 1), whose stem halves images of more than 32 pixels."""
    net = nn.Sequential(
        Scale(),
        _conv(channels, width, 3, 1 if side <= 32 else 2),
        nn.ReLU(),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, n_classes),
    )
    return net.to(memory_format=torch.channels_last)


# ---- batches ----
def batches(n: int, bs: int, seed: int) -> Iterator[np.ndarray]:
    """Yield batches of indices without end, epoch after epoch in another order; incomplete ones are left out."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(n)
        yield from (order[i : i + bs] for i in range(0, n - bs + 1, bs))


def augment(x: Tensor, flips: str, rng: np.random.Generator) -> Tensor:
    """Shift images (n, channels, H, W) by up to an eighth of their side, black where nothing is, and flip them."""
    n, _, height, width = x.shape
    pad = height // 8
    windows = nn.functional.pad(x, [pad] * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.from_numpy(rng.integers(0, 2 * pad + 1, (2, n)))
    x = windows[torch.arange(n), :, top, left]
    for flip, axis in (("h", 3), ("v", 2)):
        if flip in flips:
            chosen = torch.from_numpy(rng.random(n) < 0.5)
            x[chosen] = x[chosen].flip(axis)
    return x


# ---- training ----
def train(
    data: Split, config: Config, seed: int, after_epoch: Callable[[int, nn.Sequential], None] | None = None
) -> nn.Sequential:
    """Return the trained network, in `eval()` mode.

    Args:
        data: training images and targets.
        config: what to train.
        seed: of the first weights, of batches and of augmentation.
        after_epoch: called with the number of epochs done and the network, in `eval()` mode.
    """
    torch.manual_seed(seed)
    x, y, counts, pixels = data.x["train"], data.y["train"], data.counts(), data.x["train"].ndim == 4
    model = resnet8(x.shape[1], x.shape[2], len(counts)) if pixels else head(x.shape[1], len(counts))
    base = make_loss(config.base.removesuffix(PRIOR), counts, len(y), single_label=y.ndim == 1)
    if config.base.endswith(PRIOR):
        start_at_frequency(model, counts, len(y), pos_weight=getattr(base.func, "pos_weight", None))
    added = TERMS[config.term]
    rectify = added and added.of(getattr(base, "shift", None))
    omega, per_epoch, rng = imbalance(counts), len(y) // config.bs, np.random.default_rng([seed, 2])
    steps = per_epoch * config.epochs
    optimizer = torch.optim.AdamW(parameters(model, config), config.lr, weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, steps, pct_start=0.25, final_div_factor=1e5)
    model.train()
    for step, rows in zip(range(steps), batches(len(y), config.bs, seed), strict=False):
        rows = torch.from_numpy(rows)
        inputs, targets = augment(x[rows], config.flips, rng) if pixels else x[rows], y[rows]
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            features = model[:-1](inputs)
        logits = model[-1](features.float())
        loss = base(logits, targets)
        if added and (alpha := added.alpha(omega, step / steps)):
            term = rectify(logits, targets, features.float())
            loss = mix(loss, term.loss, term.triplets.any(), alpha)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        if after_epoch and (step + 1) % per_epoch == 0:
            after_epoch((step + 1) // per_epoch, model.eval())
            model.train()
    return model.eval()


def parameters(model: nn.Sequential, config: Config) -> list[dict[str, Any]]:
    """Parameters in two groups: weight decay would take away the bias that a network starts with.

    fastai decays no bias at all; here the others are decayed, in all arms.
    """
    kept = [model[-1].bias] if config.base.endswith(PRIOR) else []
    decayed = [p for p in model.parameters() if all(p is not k for k in kept)]
    return [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]


class Outputs(NamedTuple):
    """Logits (n, C) and embeddings (n, d) of images."""

    logits: np.ndarray
    embedding: np.ndarray


@torch.no_grad()
def outputs(model: nn.Sequential, x: Tensor, bf16: bool = False) -> Outputs:
    """What a network makes of images."""
    parts = []
    for part in x.split(256):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            parts.append(model[:-1](part))
    embedding = torch.cat(parts).float()
    return Outputs(model[-1](embedding).numpy(), embedding.numpy())
