"""The complete loss: rectification and base loss in one (arXiv:1804.10851, eq. 8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastcore.basics import noop
from torch import Tensor, nn

from fastai_crl._checks import Batch, check_choice, checked_targets, features_of
from fastai_crl._fastai import activation_of
from fastai_crl.task import is_single_label

from .complete import complete
from .crl import CRL
from .imbalance import SeenLabels, check_alpha, imbalance, mix

Shift = Literal["base"] | Sequence[float] | Tensor | None


class CRLLoss(nn.Module):
    """L = α·L_crl + (1 - α)·L_base (paper, eq. 8): a complete loss function, for fastai or plain PyTorch.

    In a batch without any triplet L is L_base exactly. `reduction`, `activation` and `decodes` are those of the base
    loss, so `predict`, `get_preds(with_loss=True)` and `show_results` work. With `reduction="none"` and in `eval()`
    mode it returns the base loss alone: the rectification term belongs to a batch, not to an item. (fastai never
    switches a loss to `eval()`. `CRLCallback` is the way to keep `valid_loss` the plain base loss.)

    Args:
        base_loss: any loss of (logits, targets). Default: binary cross entropy for (n, C) targets, cross entropy for
            (n,) class indices, decided at the first batch.
        alpha: α in [0, 1], or `"auto"`: Ω of the labels seen so far, see `imbalance`, for ranking at most ¼.
        counts: positives per label of the training set, (C,), for `alpha="auto"`: fixes α instead of counting batches.
            Of one binary label: its positives and its negatives.
        single_label: the kind of task, for predictions before the first batch, which shows it.
        shift: what is added to the logits before CRL scores them: `"base"`, what the base loss adds (its `shift`, such
            as that of `make_loss("logit_adjusted")`), (C,) numbers, or None.
        **crl: further arguments of `CRL`.

    Call:
        `(logits, targets, features=None) -> scalar`, see `CRL`.

    Raises:
        ValueError: alpha neither `"auto"` nor in [0, 1]; a base loss of probabilities, as `nn.BCELoss` is; what `CRL`
            and `imbalance` raise; targets that do not fit or are out of range. A batch whose logits are not finite is
            left to the base loss.

    Example:
        >>> import torch
        >>> loss = CRLLoss(alpha=0.3, criterion="ranking")
        >>> logits = torch.zeros(8, 3, requires_grad=True)
        >>> loss(logits, torch.eye(3)[[0, 0, 0, 0, 0, 1, 1, 2]]).backward()
        >>> logits.grad[7].sign().tolist()  # the rarest label is pushed up
        [1.0, 1.0, -1.0]
    """

    def __init__(
        self,
        base_loss: Callable[..., Tensor] | None = None,
        alpha: float | Literal["auto"] = "auto",
        counts: Sequence[float] | Tensor | None = None,
        single_label: bool | None = None,
        shift: Shift = "base",
        **crl: Any,
    ):
        super().__init__()
        self.alpha: float | str = alpha
        if check_alpha(alpha) == "auto" and counts is not None and len(counts) == 1:
            raise ValueError(
                f"counts={list(counts)} of one label leave α open: give two, its positives and its negatives."
            )
        self.follows_base, own = split_shift(shift)
        self.crl = CRL(shift=own, **crl)
        if alpha == "auto" and counts is not None:
            self.alpha = min(imbalance(counts), self.crl.criterion.alpha_limit)
        self.base_loss: Any = base_loss
        self._reduction: str = getattr(base_loss, "reduction", "mean")  # until the base loss is complete
        self.single_label = single_label
        if single_label is not None:
            self.settle(single_label)
        self.seen = SeenLabels()

    def forward(self, logits: Tensor, targets: Tensor, features: Tensor | None = None) -> Tensor:
        if self.single_label is None:
            self.settle(is_single_label(targets, logits.shape[1] if logits.ndim == 2 else 1))
        if not self.training or self.reduction == "none":
            return self.base_loss(logits, targets)
        features = features_of(self.crl.level, features)
        batch = Batch.of_training(*checked_targets(logits, targets), features, self.crl.bound)
        base = self.base_loss(logits, targets)
        term, triplets = self.crl.rectify(batch, base_shift(self.base_loss) if self.follows_base else None)
        alpha = self.alpha
        if isinstance(alpha, str):
            alpha = self.seen(batch).clamp_max(self.crl.criterion.alpha_limit)
        return mix(base, term, triplets.any(), alpha)

    def settle(self, single_label: bool) -> None:
        """Make the base loss one with a reduction and an activation, now that the kind of task is known.

        The first batch does it, if nothing has before.
        """
        self.single_label = single_label
        if self.base_loss is None:
            self.base_loss = default_base_loss(single_label)
        check_takes_logits(self.base_loss)
        self.base_loss = complete(self.base_loss, single_label)
        if hasattr(self.base_loss, "reduction"):
            self.base_loss.reduction = self._reduction

    def _known(self) -> Any:
        """The base loss, once it is known what it predicts: class indices or a value per label."""
        if self.single_label is None and not hasattr(self.base_loss, "activation"):
            raise ValueError(
                "CRLLoss has seen no batch, so that it does not know whether the task is single-label: pass "
                "CRLLoss(single_label=True) or False."
            )
        return self.base_loss

    def activation(self, x: Tensor) -> Tensor:
        """Probabilities of logits, as the base loss defines them; see `CompleteLoss` for those that do not."""
        return self._known().activation(x)

    def decodes(self, x: Tensor) -> Tensor:
        """Decisions from probabilities, as the base loss defines them; see `CompleteLoss` for those that do not."""
        return self._known().decodes(x)

    @property
    def reduction(self) -> str:
        return self._reduction if self.single_label is None else getattr(self.base_loss, "reduction", "mean")

    @reduction.setter
    def reduction(self, value: str) -> None:
        self._reduction = value
        if self.single_label is not None:
            self.base_loss.reduction = value


def check_takes_logits(base_loss: Any) -> None:
    """Raise ValueError for a loss of what is no logits: CRL would take the sigmoid of a sigmoid."""
    if activation_of(base_loss, False) is noop:
        name = type(getattr(base_loss, "func", base_loss)).__name__
        raise ValueError(
            f"{name} takes the outputs of the network as they are, and CRL takes logits: leave the last activation out "
            "of the network, and use a loss of logits, such as BCEWithLogitsLossFlat()."
        )


def split_shift(shift: Shift) -> tuple[bool, Any]:
    """Return a `shift=` as whether it is the base loss's, and the numbers given, or None."""
    if isinstance(shift, str):
        check_choice("shift", shift, ("base",))
        return True, None
    return False, shift


def base_shift(base_loss: Any) -> Tensor | None:
    """Return what the base loss adds to the logits, for the scores of CRL; None where it adds nothing.

    On raw logits CRL works against a logit-adjusted base.
    """
    return getattr(base_loss, "shift", None)


def default_base_loss(single_label: bool) -> Callable[..., Tensor]:
    """What the paper rectifies: cross entropy, binary for multi-label tasks."""
    return CrossEntropyLossFlat() if single_label else BCEWithLogitsLossFlat()
