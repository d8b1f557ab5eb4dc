"""The complete loss, and the imbalance measure that weighs its parts (arXiv:1804.10851, eq. 8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from torch import Tensor, nn

from fastai_crl._checks import as_plain_tensor, check_choice
from fastai_crl.mining.profile import split_targets

from .crl import CRITERIA, CRL, Criterion, ScoreSpace

__all__ = ["CRITERIA", "CRL", "CRLLoss", "Criterion", "ScoreSpace", "imbalance"]


def imbalance(counts: Sequence[float] | Tensor, how: Literal["move", "fill", "ratio"] = "move") -> float:
    """Ω of the paper's α = η·Ω (eq. 8): "the minimum percentage of samples to make the classes uniform", as a fraction.

    The sentence has been read in three ways; the values are those of the 28 labels of HPA 2018.

    - `"move"`: ½·Σ|h_c/Σh - 1/C|, the share of labels to move to other classes. 0.476.
    - `"fill"`: 1 - Σh/(C·max h), the share of a uniform set that would have to be added. 0.859.
    - `"ratio"`: min h/max h. 0.00085. A known mistake, kept for comparison: it falls as imbalance grows.

    With Ω in percent and the paper's η = 0.01, α is this fraction.

    Args:
        counts: C numbers of positives h_c, ≥ 0, not all zero.
        how: one of the three.

    Returns:
        A float in [0, 1]; 0 for uniform counts (`"ratio"`: 1).

    Raises:
        ValueError: counts that are empty, negative, not finite or all zero; unknown how.

    Example:
        >>> imbalance([30, 10])
        0.25
    """
    check_choice("how", how, ("move", "fill", "ratio"))
    h = torch.as_tensor(counts, dtype=torch.float64).flatten()
    if not len(h) or not bool(h.isfinite().all()) or bool((h < 0).any()) or not float(h.sum()) > 0:
        raise ValueError(f"counts={h.tolist()}: give one finite count per class, none negative, not all zero.")
    if how == "move":
        return float((h / h.sum() - 1 / len(h)).abs().sum() / 2)
    return float(1 - h.sum() / (len(h) * h.max())) if how == "fill" else float(h.min() / h.max())


class CRLLoss(nn.Module):
    """L = α·L_crl + (1 - α)·L_base (paper, eq. 8): a complete loss function, for fastai or plain PyTorch.

    In a batch without any triplet L is L_base exactly. `reduction`, `activation` and `decodes` are those of the base
    loss, so `predict`, `get_preds(with_loss=True)` and `show_results` work. With `reduction="none"` and in `eval()`
    mode it returns the base loss alone: the rectification term belongs to a batch, not to an item. (fastai never
    switches a loss to `eval()`. `CRLCallback` is the way to keep `valid_loss` the plain base loss.)

    Args:
        base_loss: any loss of (logits, targets). Default: binary cross entropy for (n, C) targets, cross entropy for
            (n,) class indices, decided at the first batch.
        alpha: α in [0, 1], or `"auto"`: Ω of the labels seen so far, `imbalance(counts, "move")`.
        counts: positives per label of the training set, (C,), for `alpha="auto"`: fixes α instead of counting batches.
        **crl: arguments of `CRL`.

    Call:
        `(logits, targets, features=None) -> scalar`, see `CRL`.

    Raises:
        ValueError: alpha neither `"auto"` nor in [0, 1]; what `CRL` and `imbalance` raise.
    """

    def __init__(
        self,
        base_loss: Callable[..., Tensor] | None = None,
        alpha: float | Literal["auto"] = "auto",
        counts: Sequence[float] | Tensor | None = None,
        **crl: Any,
    ):
        super().__init__()
        self.alpha = imbalance(counts) if check_alpha(alpha) == "auto" and counts is not None else alpha
        self.crl = CRL(**crl)
        self.base_loss = base_loss
        self.seen: Tensor | None = None

    def forward(self, logits: Tensor, targets: Tensor, features: Tensor | None = None) -> Tensor:
        if self.base_loss is None:
            self.base_loss = default_base_loss(targets.ndim == 1)
        base = self.base_loss(logits, targets)
        if not self.training or getattr(self, "reduction", "mean") == "none":
            return base
        alpha = self._count(logits, targets) if self.alpha == "auto" else self.alpha
        return rectify(base, *self.crl.loss_and_counts(logits, targets, features), alpha)

    @torch.no_grad()
    def _count(self, logits: Tensor, targets: Tensor) -> Tensor:
        """α from the labels of all batches so far, on their device."""
        h = split_targets(as_plain_tensor(targets), logits.shape[1])[0].sum(0)
        self.seen = h if self.seen is None else self.seen.to(h.device) + h
        return (self.seen / self.seen.sum().clamp_min(1) - 1 / len(h)).abs().sum() / 2

    def _delegate(self, name: str, x: Tensor) -> Tensor:
        method = getattr(self.base_loss, name, None)
        if method is None:
            method = getattr(default_base_loss(isinstance(self.base_loss, nn.CrossEntropyLoss)), name)
        return method(x)

    def activation(self, x: Tensor) -> Tensor:
        """Probabilities of logits, as the base loss defines them."""
        return self._delegate("activation", x)

    def decodes(self, x: Tensor) -> Tensor:
        """Decisions from probabilities, as the base loss defines them."""
        return self._delegate("decodes", x)

    @property
    def reduction(self) -> str:
        return "mean" if self.base_loss is None else self.base_loss.reduction

    @reduction.setter
    def reduction(self, value: str) -> None:
        if self.base_loss is None:
            self.base_loss = default_base_loss(False)
        self.base_loss.reduction = value


def check_alpha(alpha: float | str) -> float | str:
    """`alpha`, or a ValueError if it is neither `auto` nor in [0, 1]."""
    if alpha != "auto" and (isinstance(alpha, str) or not 0 <= alpha <= 1):
        raise ValueError(f'alpha={alpha!r}: the weight of the rectification term must be in [0, 1], or "auto".')
    return alpha


def default_base_loss(single_label: bool) -> Callable[..., Tensor]:
    """What the paper rectifies: cross entropy, binary for multi-label tasks."""
    return CrossEntropyLossFlat() if single_label else BCEWithLogitsLossFlat()


def rectify(base: Tensor, crl: Tensor, counts: Tensor, alpha: float | Tensor) -> Tensor:
    """α·crl + (1 - α)·base, and base exactly where no triplet was mined (eq. 8)."""
    alpha = torch.where(counts.sum() > 0, alpha, 0.0)
    return alpha * crl + (1 - alpha) * base
