"""The hinge criteria at class level on a CPU: the plain loops of the paper (arXiv:1804.10851), compiled by numba.

What `_hinge` does in tensor operations, which on a CPU cost more to start than to run. Without numba, with a memory of
past positives, and on other devices, that one is used.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

try:
    import numba
except ImportError:  # absent, or not for this NumPy
    numba = None

__all__ = ["NUMBA", "hinge_weights"]

NUMBA = numba is not None


def _compiled(function: Callable) -> Callable:
    """Compiled at its first call, and kept on disk for the next process where there is a place for it."""
    if numba is None:
        return function
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # nowhere to write
        return numba.njit(nogil=True)(function)


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
def _hard_samples(scores, y, c, sign, n_inside, n_far):
    """Eqs. 4 and 5: the minority samples of label c, lowest score first, and the `n_far` highest of the other samples.

    Ties go to the lower index. `sign` is -1 where the label's negatives are the minority. Returns indices and scores.
    """
    inside, own = np.empty(n_inside, np.int64), np.empty(n_inside, scores.dtype)
    far, others, found, size = np.empty(n_far, np.int64), np.empty(n_far, scores.dtype), 0, 0
    side = 1 if sign > 0 else 0
    for i in range(len(scores)):
        score = sign * scores[i, c]
        if y[i, c] == side:
            inside[found], own[found] = i, score
            found += 1
        elif y[i, c] == 1 - side and (size < n_far or score > others[size - 1]):
            j = min(size, n_far - 1)
            while j > 0 and score > others[j - 1]:
                far[j], others[j] = far[j - 1], others[j - 1]
                j -= 1
            far[j], others[j] = i, score
            size = min(size + 1, n_far)
    order = np.argsort(own, kind="mergesort")
    return inside[order], own[order], far, others


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
def _relative(own, others, k, margin, own_weight, hist):
    """Eq. 9: adds to the minority samples' weights, and to `hist`: pairs (a, +) by their number of active hinges.

    max(0, m + |p_a - p_+| - p_a + p_-) is active where p_- > p_a - |p_a - p_+| - m: for the first so many of the hard
    negatives. Each function of the kind returns the number of all active hinges.
    """
    active, n_near = 0, min(k + 1, len(own))
    # For an anchor that scores above p_+ that is p_- > p_+ - m, whichever anchor it is.
    below = np.array([_n_above(others, p - margin) for p in own[:n_near]])
    for a in range(len(own)):
        for i in range(n_near if a <= k else k):  # the κ lowest but for the anchor itself
            if i == a:
                continue
            count = below[i] if own[i] <= own[a] else _n_above(others, 2 * own[a] - own[i] - margin)
            hist[count] += 1
            active += count
            # The slopes of |p_a - p_+| - p_a, where that of |0| is 0.
            if own[i] < own[a]:
                own_weight[i] -= count
            elif own[i] > own[a]:
                own_weight[i] += count
                own_weight[a] -= 2 * count
            else:
                own_weight[a] -= count
    return active


@_compiled
def _ranking(own, others, margin, own_weight, hist):
    """The same for max(0, m - p_a + p_-)."""
    active = 0
    for a in range(len(own)):
        count = _n_above(others, own[a] - margin)
        hist[count] += 1
        active += count
        own_weight[a] -= count
    return active


@_compiled
def _weigh(scores, y, frequency, limit, k, margin, attribute, ranking, by_label, weights, counts):
    """Fills (n, C) weights and (C,) counts of triplets (pairs, for ranking); returns the number of active hinges."""
    n, n_classes = y.shape
    h, g = np.zeros(n_classes, np.int64), np.zeros(n_classes, np.int64)
    for i in range(n):
        for c in range(n_classes):
            h[c] += y[i, c] == 1
            g[c] += y[i, c] == 0
    flipped = np.zeros(n_classes, np.bool_)
    if attribute:
        flipped = 2 * h > n
        h, g = np.where(flipped, g, h), np.where(flipped, h, g)
    key = h.astype(np.float64) if len(frequency) == 0 else frequency
    minority, total = _minority(h, key, limit, attribute), 0.0
    for c in range(n_classes):
        counts[c] = h[c] * min(g[c], k) * (1 if ranking else min(max(h[c] - 1, 0), k)) if minority[c] else 0
        if counts[c] == 0:
            continue
        sign = -1 if flipped[c] else 1
        inside, own, far, others = _hard_samples(scores, y, c, sign, h[c], min(g[c], k))
        own_weight, hist = np.zeros(h[c], np.int64), np.zeros(len(far) + 1, np.int64)
        if ranking:
            active = _ranking(own, others, margin, own_weight, hist)
        else:
            active = _relative(own, others, k, margin, own_weight, hist)
        share = 1 / counts[c] if by_label else 1.0
        total += active * share
        for a in range(h[c]):
            weights[inside[a], c] = own_weight[a] * share * sign
        pairs = 0  # in which negative j is active
        for j in range(len(far) - 1, -1, -1):
            pairs += hist[j + 1]
            weights[far[j], c] = pairs * share * sign
    return total


@torch.library.custom_op(
    "fastai_crl::hinge_weights",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor scores, Tensor y, Tensor? frequency, int limit, int k, float margin, bool attribute, bool ranking, "
    "bool by_label) -> (Tensor, Tensor, Tensor)",
)
def hinge_weights(
    scores: Tensor,
    y: Tensor,
    frequency: Tensor | None,
    limit: int,
    k: int,
    margin: float,
    attribute: bool,
    ranking: bool,
    by_label: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the hinges of a batch as weights of its scores, which it is linear in while the active ones stay the same.

    Args:
        scores: (n, C) float32 or float64.
        y: (n, C) memberships of the same dtype, see `membership`.
        frequency: (C,), see `minority`, or None.
        limit: ⌊ρ·n⌋, the most positives of the minority classes; of any one in attribute scope.
        k: κ.
        margin: m.
        attribute: attribute scope, else joint.
        ranking: criterion `"ranking"`, else `"relative"`.
        by_label: each label's sum is divided by its number of triplets.

    Returns:
        (n·C,) weights, m · number of active hinges as a scalar, both in the dtype of the scores, and (C,) long triplets
        (ranking: pairs) of each label.
    """
    weights, counts = scores.new_zeros(scores.shape), torch.empty(scores.shape[1], dtype=torch.long)
    key = np.empty(0) if frequency is None else frequency.double().numpy()
    arrays = (scores.contiguous().numpy(), y.contiguous().numpy(), key)
    options = (limit, k, margin, attribute, ranking, by_label)
    active = _weigh(*arrays, *options, weights.numpy(), counts.numpy())
    return weights.flatten(), scores.new_tensor(margin * active), counts


@hinge_weights.register_fake
def _(scores, y, *_):
    counts = scores.new_empty(scores.shape[1], dtype=torch.long)
    return scores.new_empty(scores.numel()), scores.new_empty(()), counts
