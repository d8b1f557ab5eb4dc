"""How common labels are: what losses add to logits, and where a network starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fastai.data.core import DataLoaders
from fastai.data.transforms import get_c
from fastai.learner import Learner
from torch import Tensor, nn

from fastai_crl._fastai import renew_optimizer
from fastai_crl.labels import count_if_told
from fastai_crl.task import single_label_if_known


def frequency_log_odds(frequency: Tensor, n: int | Tensor, single_label: bool = False) -> Tensor:
    """Return the log-odds (C,) of the labels' frequencies; single-label, their logarithms.

    A label counts as there once, and missing once, at least.

    Args:
        frequency: (C,) shares of the training samples with each label, in [0, 1], floating point.
        n: number of training samples; (C,) of those of which a label is known.
        single_label: the shares are those of classes.
    """
    once = torch.as_tensor(1 / n, dtype=frequency.dtype)
    return frequency.clamp(once).log() if single_label else frequency.clamp(once, 1 - once).logit()


@torch.no_grad()
def start_at_frequency(
    model: nn.Module | Learner,
    counts: Sequence[float] | Tensor | None = None,
    n: int | Tensor | None = None,
    dls: DataLoaders | None = None,
    pos_weight: Tensor | None = None,
    unknown: float | None = None,
) -> nn.Linear:
    """Have a multi-label network start by predicting each label as often as it occurs: set its last layer's bias.

    Without it a network starts at one half for every label, however rare, and the first epochs go into learning how
    rare they are (Lin et al., arXiv:1708.02002, sections 3.3 and 4.1). Heads of fastai's `vision_learner` have no such
    bias at all: theirs gets one. Give the learner where there is one: what it optimizes, and what is frozen, is settled
    before the first fit of a pretrained network, and it must learn of the new bias.

    Args:
        model: a network whose last layer with parameters is an `nn.Linear` that gives the C logits, or its learner.
        counts: (C,) positives of each label in the training set.
        n: number of its samples; (C,) of those of which a label is known, where some targets are unknown.
        dls: in place of both: data whose labels can be read without opening images. Default: those of the learner.
        pos_weight: (C,) what the loss weighs positives by, of `nn.BCEWithLogitsLoss`. The network then starts where
            that loss is least: at the odds of the frequencies times the weights.
        unknown: the value of unknown targets in dls, see `read_labels`.

    Returns:
        The layer.

    Raises:
        ValueError: the last layer is another one, or has another number of outputs; counts, n or pos_weight that are
            missing or do not fit; dls of a single-label task.

    Example:
        >>> layer = start_at_frequency(nn.Sequential(nn.Flatten(), nn.Linear(8, 2)), counts=[50, 1], n=100)
        >>> [round(p, 3) for p in layer.bias.sigmoid().tolist()]
        [0.5, 0.01]
    """
    learn = model if isinstance(model, Learner) else None
    if learn is not None:
        model, dls = learn.model, learn.dls if dls is None and counts is None else dls
    if single_label_if_known(dls):
        raise ValueError(
            "dls has one class index per image: start_at_frequency is for several labels. For one, "
            'make_loss("logit_adjusted", dls=dls) is what starts at the frequencies.'
        )
    counts, n = check_counts("start_at_frequency", counts, n, False, dls, unknown)
    layer = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))][-1:]
    if not layer or not isinstance(layer[0], nn.Linear) or layer[0].out_features != len(counts):
        found = layer[0] if layer else "none"
        raise ValueError(
            f"The last layer with parameters of {type(model).__name__} is {found}: start_at_frequency sets the bias of "
            f"an nn.Linear with {len(counts)} outputs, one for each label. Set that of your model by yourself."
        )
    bias = frequency_log_odds(counts / n, n)
    if pos_weight is not None:
        weight = torch.as_tensor(pos_weight, dtype=torch.float32).to(bias.device)
        if weight.shape != bias.shape or not bool(((weight > 0) & weight.isfinite()).all()):
            raise ValueError(
                f"pos_weight={weight.tolist()} does not fit {len(bias)} labels: give one number above 0 for each."
            )
        bias = bias + weight.log()
    bias = bias.to(layer[0].weight)
    if layer[0].bias is None:
        layer[0].bias = nn.Parameter(bias)
        if learn is not None:
            renew_optimizer(learn)
    layer[0].bias.copy_(bias)
    return layer[0]


def check_counts(
    name: str, counts: Any, n: Any, single_label: bool, dls: DataLoaders | None, unknown: float | None = None
) -> tuple[Tensor, int | Tensor]:
    """Return the positives per label, (C,) float, and the number of samples, given or read from the training set.

    Args:
        name: of what needs them, for the message.
        counts: (C,) positives of each label, or None.
        n: number of samples, (C,) of those of which a label is known, or None.
        single_label: the counts are those of classes, and n is their sum.
        dls: data to read them from, or None.
        unknown: the value of unknown targets in dls.

    Raises:
        ValueError: they are missing, cannot be read without opening images, or do not fit.
    """
    if counts is None and dls is not None:
        counts, n = count_if_told(dls.train, get_c(dls) or None, unknown) or (None, None)
    if counts is None or (n is None and not single_label):
        raise ValueError(
            f"{name} needs to know how common each label is: pass counts=, (C,) positives in the training set, and n=, "
            "the number of its samples; or dls= of a data set that tells its labels without opening its images."
        )
    counts = torch.as_tensor(counts, dtype=torch.float32).flatten()
    if single_label or n is None:
        n = counts.nansum()
    n = torch.as_tensor(n, dtype=torch.float32)
    n = int(n) if n.numel() == 1 else n.clamp_min(2)  # a label that is hardly known starts at one half
    if (isinstance(n, int) and n < 2) or not len(counts) or not bool((counts >= 0).all() & (counts <= n).all()):
        raise ValueError(
            f"counts={counts.tolist()} of n={n} samples: give one count per label, from 0 to n, and n > 1."
        )
    return counts, n
