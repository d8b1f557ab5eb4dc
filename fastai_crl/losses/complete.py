"""What makes a loss of (logits, targets) one that fastai can predict with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastai_crl._checks import as_plain_tensor, check_choice
from fastai_crl._fastai import activation_of
from fastai_crl.unknown import UNKNOWN


class CompleteLoss(nn.Module):
    """Any loss of (logits, targets) as a complete fastai loss: `reduction`, `activation`, `decodes`; it pickles.

    Computed in float32, whatever the autocast around it, or in float64 for float64 logits.

    Args:
        func: a module or function that averages over the batch. Where it has a `reduction`, that is the loss's; where
            it has none, `reduction="none"` gives each item's loss as a batch of its own.
        single_label: targets are (n,) class indices, else (n, C) in [0, 1].
        shift: (C,) added to the logits in the loss, and not in predictions.
        thresh: multi-label: a probability above it is a yes; a number or (C,). Single-label: with (C,) the decision is
            the class of the highest probability / thresh; a number plays no part.
        known_only: targets of ½ are unknown: the mean is over the other entries, of all items together; `func` gives
            the loss of each entry, (n, C). See `of_known`.

    Example:
        >>> loss = CompleteLoss(torch.nn.MultiLabelSoftMarginLoss(), thresh=0.4)
        >>> loss.decodes(loss.activation(torch.tensor([[0.0, -1.0]]))).tolist()
        [[True, False]]
    """

    shift: Tensor | None

    def __init__(
        self,
        func: Callable[..., Tensor],
        single_label: bool = False,
        shift: Tensor | None = None,
        thresh: float | Tensor = 0.5,
        known_only: bool = False,
    ):
        super().__init__()
        self.func: Any = func
        self.single_label = single_label
        self.thresh = thresh
        self.y_int = single_label  # what tells fastai's MixUp that targets cannot be blended
        self.by_item, self.known_only = False, known_only
        self.register_buffer("shift", None if shift is None else shift.float())  # some devices have no float64

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = as_plain_tensor(logits), as_plain_tensor(targets)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.single_label and targets.shape in ((len(logits),), (len(logits), 1)):
            targets = targets.reshape(-1).long()
        else:
            targets = targets.to(logits.dtype)
        if self.shift is not None:
            logits = logits + self.shift
        if self.known_only:
            return self._mean_of_known(logits, targets)
        if self.by_item:
            pairs = zip(logits.split(1), targets.split(1), strict=True)
            return torch.stack([self.func(*pair) for pair in pairs])
        return self.func(logits, targets)

    def extra_repr(self) -> str:
        shown = {} if isinstance(self.func, nn.Module) else {"func": self.func}
        shown |= {} if self.shift is None else {"shift": f"{len(self.shift)} numbers, added to the logits"}
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    def _mean_of_known(self, logits: Tensor, targets: Tensor) -> Tensor:
        known = targets != UNKNOWN
        each = as_plain_tensor(self.func(logits, targets.masked_fill(~known, 0)))  # what stands there plays no part
        if each.numel() != known.numel():
            raise ValueError(_no_entries(self.func))
        each, known = (x.reshape(len(known), -1) for x in (each, known))
        each = torch.where(known, each, 0.0)
        if self.by_item:
            return each.sum(1) / known.sum(1).clamp_min(1)
        return each.sum() / known.sum().clamp_min(1)

    @property
    def reduction(self) -> str:
        if self.known_only:
            return "none" if self.by_item else "mean"
        return getattr(self.func, "reduction", "none" if self.by_item else "mean")

    @reduction.setter
    def reduction(self, value: str) -> None:
        if hasattr(self.func, "reduction") and not self.known_only:
            self.func.reduction = value
        else:
            check_choice("reduction", value, ("mean", "none"))
            self.by_item = value == "none"

    def activation(self, x: Tensor) -> Tensor:
        """Probabilities of logits, see `activation_of`: softmax for single-label, else sigmoid, as a rule."""
        return activation_of(self.func, self.single_label)(x)

    def decodes(self, x: Tensor) -> Tensor:
        """Decisions from probabilities: the labels above `thresh`, or the class; see `thresh`."""
        device = x.device
        if isinstance(self.thresh, Tensor):
            x = x.cpu()  # thresholds are float64, which not every device has
            if self.single_label:
                x = x / self.thresh.clamp(torch.finfo(self.thresh.dtype).tiny)
        return (x.argmax(-1) if self.single_label else x > self.thresh).to(device)


def complete(loss_func: Any, single_label: bool) -> Any:
    """Return `loss_func`, or if it has no `activation`, as losses of torch and timm, a `CompleteLoss` around it."""
    return loss_func if hasattr(loss_func, "activation") else CompleteLoss(loss_func, single_label)


def of_known(loss_func: Any) -> Any:
    """Return a multi-label loss that leaves out targets of ½, which are unknown: the mean is over all other entries.

    An item without a known entry has no part in it; a batch without any has loss 0.

    Args:
        loss_func: a loss that averages over the entries, and that can give each one's loss: by a `reduction`, an
            attribute or an argument. It is copied.

    Raises:
        ValueError: a loss of whole items or batches, as two_way and zlpr are, or one that does not average.
    """
    loss = deepcopy(complete(loss_func, False))
    if getattr(loss, "known_only", False):
        return loss
    inner = loss if isinstance(loss, CompleteLoss) else CompleteLoss(loss, thresh=getattr(loss, "thresh", 0.5))
    func = inner.func
    if hasattr(func, "reduction"):
        if func.reduction != "mean":
            raise ValueError(f"The loss has reduction={func.reduction!r}, but unknown= averages: give it 'mean'.")
        func.reduction = "none"
    elif callable(func) and not isinstance(func, nn.Module) and "reduction" in inspect.signature(func).parameters:
        inner.func = partial(func, reduction="none")
    else:
        raise ValueError(_no_entries(func))
    inner.known_only = True
    return inner


def _no_entries(func: Any) -> str:
    return (
        f"{type(func).__name__} compares the labels of an item, so that unknown ones cannot be left out: take a loss "
        "of each entry that has a reduction, such as bce, weighted_bce, focal or asl, or leave out unknown=."
    )
