"""The hinge criteria at class level on a CPU: the plain loops of the paper (arXiv:1804.10851), compiled by numba.

What `tensors` does in tensor operations, which on a CPU cost more to start than to run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastai_crl.mining.profile import limit

from . import tensors
from .tensors import HingeOptions

try:
    import numba
except ImportError:  # absent, or not for this NumPy
    numba = None  # type: ignore[assignment]

AVAILABLE = numba is not None


def _compiled(function: Callable) -> Callable:
    return function if numba is None else numba.njit(nogil=True)(function)


@_compiled
def _minority(h, key, limit, attribute):
    """Section 3.1 and eq. 3: which labels are minority, by their samples h; joint scope takes them by `key`."""
    if attribute:
        return h <= limit
    minority, total = np.zeros(len(h), np.bool_), 0
    for c in np.argsort(key, kind="mergesort"):
        total += h[c]
        minority[c] = total <= limit
    return minority


@_compiled
def _hard_samples(scores, y, c, sign, n_minority, n_far):
    """Eqs. 4 and 5: the minority samples of label c, lowest score first, and the `n_far` highest of the other samples.

    Ties go to the lower index. `sign` is -1 where the label's negatives are the minority. Returns indices and scores.
    """
    minority_side, own = np.empty(n_minority, np.int64), np.empty(n_minority, scores.dtype)
    far, others, found, size = np.empty(n_far, np.int64), np.empty(n_far, scores.dtype), 0, 0
    side = 1 if sign > 0 else 0
    for i in range(len(scores)):
        score = sign * scores[i, c]
        if y[i, c] == side:
            minority_side[found], own[found] = i, score
            found += 1
        elif y[i, c] == 1 - side and (size < n_far or score > others[size - 1]):
            j = min(size, n_far - 1)
            while j > 0 and score > others[j - 1]:
                far[j], others[j] = far[j - 1], others[j - 1]
                j -= 1
            far[j], others[j] = i, score
            size = min(size + 1, n_far)
    order = np.argsort(own, kind="mergesort")
    return minority_side[order], own[order], far, others


@_compiled
def _n_above(others, threshold):
    """How many of the hard negatives, highest first, score above `threshold`."""
    low, high = 0, len(others)
    while low < high:
        middle = (low + high) // 2
        if others[middle] > threshold:
            low = middle + 1
        else:
            high = middle
    return low


@_compiled
def _hard_positives(own, past, k):
    """Eq. 4 with a memory: the κ + 1 lowest of the minority samples and the past ones, both lowest first.

    The κ lowest of all but the anchor are among them. Ties go to the minority samples. Returns their scores, for each
    its place among the minority samples (-1: a past one), and for each minority sample its place among them.
    """
    n_near = min(k + 1, len(own) + len(past))
    near, source, place = np.empty(n_near, own.dtype), np.empty(n_near, np.int64), np.full(len(own), n_near)
    a = r = 0
    for i in range(n_near):
        if r == len(past) or (a < len(own) and own[a] <= past[r]):
            near[i], source[i], place[a] = own[a], a, i
            a += 1
        else:
            near[i], source[i] = past[r], -1
            r += 1
    return near, source, place


@_compiled
def _relative(own, past, others, k, margin, own_weight, hist):
    """Eq. 9: adds to the minority samples' weights, and to `hist`: pairs (a, +) by their number of active hinges.

    max(0, m + |p_a - p_+| - p_a + p_-) is active where p_- > p_a - |p_a - p_+| - m: for the first so many of the hard
    negatives. Each function of the kind returns the number of all active hinges, and what past scores add to the sum.
    """
    active, past_sum = 0, 0.0
    near, source, place = _hard_positives(own, past, k)
    near_weight = np.zeros(len(near), np.int64)
    # For an anchor that scores above p_+ that is p_- > p_+ - m, whichever anchor it is.
    below = np.array([_n_above(others, p - margin) for p in near])
    n_near, n_beyond = min(k, len(near)), 0
    for a in range(len(own)):
        itself, pulled = place[a], 0
        if itself == len(near) and own[a] > near[n_near - 1]:
            n_beyond += 1
            continue
        # The κ lowest but for the anchor itself.
        for i in range(len(near) if itself < len(near) else n_near):
            if i == itself:
                continue
            count = below[i] if near[i] <= own[a] else _n_above(others, 2 * own[a] - near[i] - margin)
            hist[count] += 1
            active += count
            # The slopes of |p_a - p_+| - p_a, where that of |0| is 0.
            if near[i] < own[a]:
                near_weight[i] -= count
            elif near[i] > own[a]:
                near_weight[i] += count
                pulled += 2 * count
            else:
                pulled += count
        own_weight[a] -= pulled
    for i in range(n_near):  # of the anchors that score above all of the κ lowest: the slope is that of -p_+
        hist[below[i]] += n_beyond
        active += n_beyond * below[i]
        near_weight[i] -= n_beyond * below[i]
    for i in range(len(near)):
        if source[i] < 0:
            past_sum += near_weight[i] * near[i]
        else:
            own_weight[source[i]] += near_weight[i]
    return active, past_sum


@_compiled
def _ranking(own, others, margin, own_weight, hist):
    """The same for max(0, m - p_a + p_-)."""
    active = 0
    for a in range(len(own)):
        count = _n_above(others, own[a] - margin)
        hist[count] += 1
        active += count
        own_weight[a] -= count
    return active, 0.0


def _weigh(scores, y, frequency, past, valid, limit, k, margin, attribute, lone_positive, by_label, weights, counts):
    """Fill (n, C) weights and (C,) counts of triplets (pairs, for ranking); return the constant."""
    n, n_classes = y.shape
    h, g, r = np.zeros(n_classes, np.int64), np.zeros(n_classes, np.int64), np.zeros(n_classes, np.int64)
    for i in range(n):
        for c in range(n_classes):
            h[c] += y[i, c] == 1
            g[c] += y[i, c] == 0
    flipped = np.zeros(n_classes, np.bool_)
    if attribute:
        flipped = 2 * h > n
        h, g = np.where(flipped, g, h), np.where(flipped, h, g)
    if len(past):
        for c in range(n_classes):
            r[c] = 0 if flipped[c] else valid[c].sum()  # it holds positives
    key = h.astype(np.float64) if len(frequency) == 0 else frequency
    minority, constant = _minority(h, key, limit, attribute), 0.0
    for c in range(n_classes):
        counts[c] = h[c] * min(g[c], k) * (1 if lone_positive else min(h[c] + r[c] - 1, k)) if minority[c] else 0
        if counts[c] <= 0:
            counts[c] = 0
            continue
        sign = -1 if flipped[c] else 1
        minority_side, own, far, others = _hard_samples(scores, y, c, sign, h[c], min(g[c], k))
        own_weight, hist = np.zeros(h[c], np.int64), np.zeros(len(far) + 1, np.int64)
        if lone_positive:
            active, past_sum = _ranking(own, others, margin, own_weight, hist)
        else:
            remembered = np.sort(past[c][valid[c]]) if r[c] else own[:0]
            active, past_sum = _relative(own, remembered, others, k, margin, own_weight, hist)
        share = 1 / counts[c] if by_label else 1.0
        constant += (margin * active + past_sum) * share
        for a in range(h[c]):
            weights[minority_side[a], c] = own_weight[a] * share * sign
        pairs = 0  # in which negative j is active
        for j in range(len(far) - 1, -1, -1):
            pairs += hist[j + 1]
            weights[far[j], c] = pairs * share * sign
    return constant


class _Compiler:
    """`_weigh`, compiled at its first call and kept on disk for the next process; without the disk where that fails.

    A cache may be cut short, full, or read-only, and numba raises whatever comes of that.
    """

    def __init__(self) -> None:
        self.cache_or_not = [True, False] if AVAILABLE else []
        self.function: Callable | None = None

    def __call__(self, *arguments: Any) -> float | None:
        """Return what `_weigh` does, or None where it cannot be compiled at all."""
        while self.cache_or_not:
            try:
                if self.function is None:
                    self.function = numba.njit(nogil=True, cache=self.cache_or_not[0])(_weigh)
                return self.function(*arguments)
            except Exception as error:
                self.function = None
                if self.cache_or_not.pop(0):
                    instead = "they are compiled anew in this process. Empty the folder, or set NUMBA_CACHE_DIR"
                    self._warn(f"numba's cache of the compiled loops failed ({error!r}): {instead}.")
                else:
                    self._warn(f"numba cannot compile the loops ({error!r}): tensor operations are used instead.")
        return None

    @staticmethod
    def _warn(message: str) -> None:
        warnings.warn(message, RuntimeWarning, stacklevel=2)


_weigh_compiled = _Compiler()
# What stands for no frequency and no memory, made once: of scores in float32 and in float64.
_NO_KEY = np.empty(0)
_NO_RINGS = {dtype: (np.empty((0, 0), dtype), np.empty((0, 0), np.bool_)) for dtype in map(np.dtype, "fd")}


@torch.library.custom_op(
    "fastai_crl::hinge_weights",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor scores, Tensor y, Tensor? frequency, Tensor? past, Tensor? valid, float rho, int k, float margin, "
    "bool attribute, bool lone_positive, bool by_label) -> (Tensor, Tensor, Tensor)",
)
def operator(
    scores: Tensor,
    y: Tensor,
    frequency: Tensor | None,
    past: Tensor | None,
    valid: Tensor | None,
    rho: float,
    k: int,
    margin: float,
    attribute: bool,
    lone_positive: bool,
    by_label: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`hinge_weights` with flat arguments, as `torch.compile` needs them."""
    weights, counts = torch.zeros_like(scores), torch.empty(scores.shape[1], dtype=torch.long)
    key, filled = _NO_KEY if frequency is None else frequency.double().numpy(), weights.numpy()
    if past is None or valid is None:
        rings = _NO_RINGS[filled.dtype]
    else:
        rings = (past.to(scores.dtype).contiguous().numpy(), valid.contiguous().numpy())
    arrays = (scores.contiguous().numpy(), y.contiguous().numpy(), key, *rings)
    options = (limit(rho, len(y)), k, margin, attribute, lone_positive, by_label)
    constant = _weigh_compiled(*arrays, *options, filled, counts.numpy())
    if constant is None:
        memory = None if past is None or valid is None else (past, valid)
        return tensors.hinge_weights(
            scores, y, frequency, memory, HingeOptions(rho, k, margin, attribute, lone_positive, by_label)
        )
    return weights.flatten(), scores.new_tensor(constant), counts


@operator.register_fake
def _(scores, y, *_):
    counts = scores.new_empty(scores.shape[1], dtype=torch.long)
    return scores.new_empty(scores.numel()), scores.new_empty(()), counts


def hinge_weights(
    scores: Tensor,
    y: Tensor,
    frequency: Tensor | None,
    memory: tuple[Tensor, Tensor] | None,
    options: HingeOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the hinges of a batch as weights of its scores: see `tensors.hinge_weights`."""
    past, valid = (None, None) if memory is None else memory
    return operator(scores, y, frequency, past, valid, *options)
