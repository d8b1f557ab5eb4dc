"""The complete loss: rectification and base loss in one (arXiv:1804.10851, eq. 8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from torch import Tensor, nn

from fastai_crl._checks import as_plain_tensor, one_column
from fastai_crl.mining.profile import split_targets

from .crl import CRL
from .imbalance import imbalance, mix, omega

__all__ = ["CRLLoss", "check_alpha", "default_base_loss"]


class CRLLoss(nn.Module):
    """L = α·L_crl + (1 - α)·L_base (paper, eq. 8): a complete loss function, for fastai or plain PyTorch.

    In a batch without any triplet L is L_base exactly. `reduction`, `activation` and `decodes` are those of the base
    loss, so `predict`, `get_preds(with_loss=True)` and `show_results` work. With `reduction="none"` and in `eval()`
    mode it returns the base loss alone: the rectification term belongs to a batch, not to an item. (fastai never
    switches a loss to `eval()`. `CRLCallback` is the way to keep `valid_loss` the plain base loss.)

    Args:
        base_loss: any loss of (logits, targets). Default: binary cross entropy for (n, C) targets, cross entropy for
            (n,) class indices, decided at the first batch.
        alpha: α in [0, 1], or `"auto"`: Ω of the labels seen so far, see `imbalance`.
        counts: positives per label of the training set, (C,), for `alpha="auto"`: fixes α instead of counting batches.
            Of one binary label: its positives and its negatives.
        **crl: arguments of `CRL`.

    Call:
        `(logits, targets, features=None) -> scalar`, see `CRL`.

    Raises:
        ValueError: alpha neither `"auto"` nor in [0, 1]; what `CRL` and `imbalance` raise; targets that do not fit or
            are out of range. A batch whose logits are not finite is left to the base loss.
    """

    def __init__(
        self,
        base_loss: Callable[..., Tensor] | None = None,
        alpha: float | Literal["auto"] = "auto",
        counts: Sequence[float] | Tensor | None = None,
        **crl: Any,
    ):
        super().__init__()
        self.alpha: float | str = alpha
        if check_alpha(alpha) == "auto" and counts is not None:
            if len(counts) == 1:
                raise ValueError(
                    f"counts={list(counts)} of one label leave α open: give two, its positives and its negatives."
                )
            self.alpha = imbalance(counts)
        self.crl = CRL(**crl)
        self.base_loss = base_loss
        self.seen: Tensor | None = None  # positives of each label so far, and items
        self.n_seen = 0

    def forward(self, logits: Tensor, targets: Tensor, features: Tensor | None = None) -> Tensor:
        if self.base_loss is None:
            self.base_loss = default_base_loss(targets.ndim == 1 and logits.shape[1:] not in ((), (1,)))
        base = self.base_loss(logits, targets)
        if not self.training or getattr(self, "reduction", "mean") == "none":
            return base
        rectified = self.crl.loss_and_counts(logits, targets, features, skip_non_finite=True)
        return mix(base, rectified, self._count(logits, targets) if self.alpha == "auto" else self.alpha)

    @torch.no_grad()
    def _count(self, logits: Tensor, targets: Tensor) -> Tensor:
        """α from the labels of all batches so far, on their device."""
        logits, targets = one_column(as_plain_tensor(logits), as_plain_tensor(targets))
        h = split_targets(targets, logits.shape[1])[0].sum(0).double()
        self.seen, self.n_seen = h if self.seen is None else self.seen.to(h.device) + h, self.n_seen + len(targets)
        return omega(self.seen, self.n_seen)

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
