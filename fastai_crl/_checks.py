"""Checks of what a user passes: errors that name the value, the rule and the fix, and never wait for a GPU."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


def offenders(what: str, items: Sequence[Any], fix: str) -> str:
    """Return an error message that names up to five of `items`, says how many there are, and ends with the fix."""
    return f"{what} ({len(items)} in all): {', '.join(map(str, items[:5]))}{', …' if len(items) > 5 else ''}. {fix}"


def misspelt(unknown: Sequence[str], known: Collection[str], meant: Mapping[str, str | None] | None = None) -> str:
    """Return keywords that nobody knows, each with what is `meant` by it, or else with the nearest known one."""
    near = {name: next(iter(get_close_matches(name, known, n=1)), None) for name in unknown} | dict(meant or {})
    return ", ".join(f"{name}=" + (f" (did you mean {near[name]}=?)" if near[name] else "") for name in unknown)


def check_keywords(name: str, given: Collection[str], known: Collection[str]) -> None:
    """Raise TypeError for keywords of the function `name` that are not known; names the nearest."""
    if unknown := sorted(set(given) - set(known)):
        said = misspelt(unknown, known, {"kappa": "k"})
        raise TypeError(f"{name} has no keyword {said}: see help({name}).")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, allowed))}.")


def whole_number(name: str, value: Any, least: int, rule: str, most: int | None = None) -> int:
    """Return `value`, a whole number of any integer type, as an int.

    Args:
        name: of the argument, for the message.
        value: what the user passed.
        least: the smallest number allowed.
        rule: what the argument must be, for the message.
        most: the largest number allowed; None for no limit.

    Raises:
        ValueError: a bool, a float, text, or a number out of range.
    """
    try:
        is_bool = str(getattr(value, "dtype", type(value).__name__)).endswith("bool")
        number = None if is_bool else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        raise ValueError(f"{name}={value!r}: {rule}.")
    return number


def check_size(size: Any) -> tuple[int, int] | None:
    """Return a size as (height, width), or None for None.

    Args:
        size: one whole number, of any integer type, for a square; or two.

    Raises:
        ValueError: other than one or two whole numbers above 0.
    """
    if size is None:
        return None
    rule = "give a whole number of pixels above 0 for a square, or two, (height, width)"
    try:
        sides = [size] if isinstance(size, str | bytes) or np.ndim(size) == 0 else list(size)
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 2):
        raise ValueError(f"size={size!r}: {rule}.")
    sides = [whole_number("size", side, 1, rule) for side in sides]
    return sides[0], sides[-1]


def as_plain_tensor(x: Tensor) -> Tensor:
    """`x` without its tensor subclass: fastai's do not mix with each other, and cost time in every operation."""
    return x if type(x) is Tensor else x.as_subclass(Tensor)


def readable(x: Tensor) -> bool:
    """Whether a value of `x` can be read without waiting for a GPU or breaking a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_on_device(ok: Tensor, rule: str) -> None:
    """Raise ValueError with `rule` unless the bool scalar `ok` holds: at once on a CPU, without synchronising on a GPU.

    On a GPU, and inside a compiled graph, the check runs on the device and fails the next operation that waits for it.
    Torch's assertion is a private name; it is used here, as `_fastai` is above this module.
    """
    if not readable(ok):
        torch._assert_async(ok, rule)
        return
    try:
        torch._assert_async(ok, rule)
    except RuntimeError:
        raise ValueError(rule) from None


def check_arguments(k: int, rho: float, scope: str, level: str) -> None:
    """Raise ValueError for arguments that no batch could be mined with."""
    check_choice("scope", scope, ("joint", "attribute"))
    check_choice("level", level, ("class", "instance"))
    if isinstance(k, bool) or not math.isfinite(k) or k != int(k) or k < 1:
        raise ValueError(f"k={k!r}: the number of hard samples per anchor must be a whole number of at least 1.")
    if not 0 < rho <= 1:
        raise ValueError(f"rho={rho!r}: the minority's share of the batch must be in (0, 1]; the paper uses 0.5.")


def check_per_label(name: str, values: Sequence[float] | Tensor | None, lowest: float | None = None) -> Tensor | None:
    """Return (C,) numbers, one per label, in float32, or None for None.

    Raises:
        ValueError: another shape, NaN, infinity, a number below `lowest`.
    """
    if values is None:
        return None
    numbers = torch.as_tensor(values).detach().float()  # some devices have no float64
    at_least = "" if lowest is None else f" of at least {lowest}"
    if numbers.ndim != 1 or not bool(numbers.isfinite().all() & ((lowest is None) | (numbers >= (lowest or 0)).all())):
        raise ValueError(f"{name}={values!r}: give one finite number{at_least} per label, a sequence of C.")
    return numbers


def one_column(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """One logit per item, (n, 1) or (n,), with targets (n, 1) or (n,), as one binary label: both (n, 1).

    Class indices (n, 1), as fastai's tables give them, become (n,).
    """
    if logits.shape[1:] in ((), (1,)) and targets.shape[1:] in ((), (1,)) and targets.shape[:1] == logits.shape[:1]:
        return logits.reshape(-1, 1), targets.reshape(-1, 1)
    if targets.shape == (len(logits), 1) and not targets.is_floating_point() and targets.dtype != torch.bool:
        return logits, targets.squeeze(1)
    return logits, targets


def finite(x: Tensor, bound: float | None = None) -> Tensor:
    """Whether all of `x` is finite, and within ±`bound`, as a bool scalar on its device.

    Its extremes are NaN if any value is, and many times as fast to get as the finiteness of each.
    """
    if x.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=x.device)
    lowest, highest = x.detach().aminmax()
    return torch.maximum(highest, -lowest) <= min(bound or math.inf, torch.finfo(x.dtype).max)


def checked_targets(scores: Tensor, targets: Tensor, name: str = "logits") -> tuple[Tensor, Tensor]:
    """Return scores (n, C) and targets (n, C) or (n,) as plain tensors that fit; one score per item is one label.

    Raises:
        ValueError: targets that do not fit, or hold NaN or values outside their range. On a CPU the message names the
            first such value and where it is.
    """
    scores, targets = one_column(as_plain_tensor(scores), as_plain_tensor(targets))
    if scores.ndim != 2 or scores.shape[1] < 1 or not scores.is_floating_point():
        raise ValueError(
            f"{name} must be a floating-point tensor of shape (n, C) with C >= 1, one column per label; "
            f"got {tuple(scores.shape)}, {scores.dtype}."
        )
    expected = (scores.shape[:1], scores.shape)
    if targets.shape not in expected:
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} do not fit {name} of shape {tuple(scores.shape)}: give "
            f"{tuple(scores.shape)} values in [0, 1] (multi-label), or {tuple(scores.shape[:1])} class indices"
            + (" (targets.squeeze(1))." if targets.shape == (len(scores), 1) else ".")
        )
    if targets.is_complex() or (targets.ndim == 1 and (targets.is_floating_point() or targets.dtype == torch.bool)):
        raise ValueError(
            f"targets of shape {tuple(targets.shape)} and {targets.dtype} fit no task: give (n, C) values in [0, 1], "
            "or (n,) integer class indices (targets.long(), a CategoryBlock)."
        )
    if scores.shape[0] == 0:
        return scores, targets
    top = 1 if targets.ndim == 2 else scores.shape[1] - 1
    rule = f"targets must be in [0, {top}]" + (
        " (0/1, or fractions)" if targets.ndim == 2 else f": class indices of {top + 1} classes, the network's outputs"
    )
    lowest, highest = targets.detach().aminmax()
    try:
        check_on_device((lowest >= 0) & (highest <= top), f"{rule}.")
    except ValueError:
        odd = ~((targets >= 0) & (targets <= top))
        place = odd.nonzero()[0].tolist()
        where = f"item {place[0]}" + (f", label {place[1]}" if len(place) == 2 else "")
        raise ValueError(
            f"{rule}; {where} of the batch has {targets[tuple(place)].item()} ({int(odd.sum())} such in all). Correct "
            "them or leave the items out."
        ) from None
    return scores, targets


class Batch(NamedTuple):
    """A batch that has been checked, which nothing below checks again: made once, where a user's tensors come in.

    Attributes:
        logits: (n, C) floating point.
        targets: (n, C) in [0, 1], or (n,) class indices.
        features: (n, d) floating point, or None.
        broken: bool scalar on the device: whether logits or features were not finite; both are zeros then. None: they
            are finite for sure.
    """

    logits: Tensor
    targets: Tensor
    features: Tensor | None = None
    broken: Tensor | None = None

    @classmethod
    def of(
        cls,
        logits: Tensor,
        targets: Tensor,
        features: Tensor | None = None,
        name: str = "logits",
        bound: float | None = None,
    ) -> Batch:
        """Check everything, targets first.

        Raises:
            ValueError: tensors that do not belong together, or hold values outside their range.
        """
        logits, targets = checked_targets(logits, targets, name)
        if features is not None:
            features = _checked_features(features, logits)
        if len(logits):
            cause = "Has the training diverged?"
            check_on_device(finite(logits), f"{name} must be finite: NaN or infinity found. {cause}")
            if bound is not None:
                rule = f"{name} must be within ±{bound:g}, beyond which their differences are lost. {cause}"
                check_on_device(finite(logits, bound), rule)
            if features is not None:
                check_on_device(finite(features), f"features must be finite: NaN or infinity found. {cause}")
        return cls(logits, targets, features)

    @classmethod
    def of_training(
        cls, logits: Tensor, targets: Tensor, features: Tensor | None = None, bound: float | None = None
    ) -> Batch:
        """The batch of a training step, its targets checked before: logits that are not finite are no error.

        Args:
            logits: those of `checked_targets`, like the next.
            targets: see there.
            features: (n, d), or None.
            bound: logits beyond ±this are as good as infinite; None for no bound.
        """
        usable = finite(logits, bound)
        if features is not None:
            features = _checked_features(features, logits)
            usable = usable & finite(features)
        if readable(usable) and bool(usable):
            return cls(logits, targets, features)
        broken = ~usable
        features = None if features is None else features.masked_fill(broken, 0)
        return cls(logits.masked_fill(broken, 0), targets, features, broken)


def features_of(level: str, features: Tensor | None) -> Tensor | None:
    """Return the features that `level` compares, none at class level; ValueError where they are missing."""
    if level == "class":
        return None
    if features is None:
        raise ValueError('level="instance" compares embeddings: pass features of shape (n, d).')
    return features


def _checked_features(features: Tensor, logits: Tensor) -> Tensor:
    """Return features that are an embedding per row of `logits` as a plain tensor, or raise ValueError."""
    if (
        features.ndim != 2
        or features.shape[0] != logits.shape[0]
        or not features.shape[1]
        or not features.is_floating_point()
    ):
        raise ValueError(
            f"features must be a floating-point tensor of shape (n, d), n = {logits.shape[0]}, d >= 1, an embedding "
            f"per sample; got {tuple(features.shape)}, {features.dtype}. Flatten or pool them first."
        )
    return as_plain_tensor(features)
