"""Targets that say nothing, and soft ones: within the package a target of ½ is unknown, and left out."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixHandler
from torch import Tensor

UNKNOWN = 0.5  # a target that says nothing, neither yes nor no


def half_if_unknown(targets: Tensor, unknown: float | None) -> Tensor:
    """Return targets with ½ where they are `unknown`, in floating point; None: as they are.

    Args:
        targets: (n, C).
        unknown: the value of unknown entries, NaN or a number.
    """
    if unknown is None:
        return targets
    mark = targets.isnan() if unknown != unknown else targets == unknown
    return (targets if targets.is_floating_point() else targets.float()).masked_fill(mark, UNKNOWN)


def hardened(targets: Tensor) -> Tensor:
    """Return (n, C) targets with 1 for fractions above ½ and 0 for those below; all else, NaN too, as it is."""
    if not targets.is_floating_point():
        return targets
    soft = (targets > 0) & (targets < 1) & (targets != UNKNOWN)
    return torch.where(soft, (targets > UNKNOWN).to(targets.dtype), targets)


def check_unknown(unknown: float | None, single_label: bool = False) -> float | None:
    """Return `unknown`; ValueError for what is no number, the value of a known target, or of a single-label task."""
    if unknown is not None and single_label:
        raise ValueError(f"unknown={unknown} is for several labels per image, and targets are class indices: drop it.")
    if unknown is not None and (not isinstance(unknown, numbers.Real) or unknown in (0, 1)):
        raise ValueError(
            f"unknown={unknown!r}: give the value of unknown targets, float('nan') or a number such as -1."
        )
    return unknown


class UnknownTargets(Callback):
    """Marks unknown targets in every batch, of training and of validation, by ½: what `crl_learner(unknown=)` adds.

    Args:
        unknown: the value of unknown entries, NaN or a number.

    Raises:
        ValueError: a value that known targets have; when training starts, beside MixUp or CutMix, which would blend
            unknown targets with known ones.
    """

    order = -5  # before MixUp (0), and whatever else sees targets

    def __init__(self, unknown: float):
        super().__init__()
        self.unknown = check_unknown(unknown)

    def before_train(self) -> None:
        if mixing := [type(cb).__name__ for cb in self.learn.cbs if isinstance(cb, MixHandler)]:
            raise ValueError(
                f"{mixing[0]} blends targets, and those that are unknown blend with none: train without it, or without "
                "unknown=."
            )

    def before_batch(self) -> None:
        self.learn.yb = tuple(half_if_unknown(y, self.unknown) for y in self.learn.yb)


def unknown_of(learn: Any) -> float | None:
    """Return the value of the unknown targets in a learner's data; None where all are known."""
    return next((cb.unknown for cb in vars(learn).get("cbs", ()) if isinstance(cb, UnknownTargets)), None)
