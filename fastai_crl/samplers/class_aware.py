"""Batches for the profile of the loss, all batches of an epoch built at once.

In uniform batches most rare labels are never rectified: a label needs two positives in the batch, and it and all rarer
ones together at most ρ·n. These batches are built for that rule, of label sets alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import sparse

from .base import EpochSampler, register_sampler

# What one more sample does to a batch's budget ρ·n, for each label it carries, by the label's positives so far (0, 1,
# 2, more): a label that is not wanted costs one as long as it has few positives, its second makes it minable, and from
# three on it is one of the batch's majority; a wanted label gains up to two, and may itself be lost from there on.
_COST = np.array([[1.0, 0.0, 1.0, 0.0], [-1.0, -1.0, 2.0, 2.0]])
# Candidates per draw; rounds per label, between which images drawn more often than others lose favour, and how much.
_CANDIDATES, _ROUNDS, _EVEN = 12, 6, 2.0
# Shares of the budget: left for labels that come along in multi-label images, and had by the focus in any case; and the
# share of batches in which the commonest label should not be the majority, where the batch has room for it.
_SLACK, _LEAST, _TOP = 0.1, 0.5, 0.67


class ClassAwareSampler(EpochSampler):
    """Batches in which as many labels as fit have two positives each, all labels taking turns.

    A batch (consecutive `bs` indices) has three parts. *Background*: every sample is in the background of exactly one
    batch of the epoch, hence covered; with `group` samples of the same or similar label sets are together, so that few
    labels are the batch's majority and each label is absent from the background of most batches. *Focus*: labels, in
    turn and equally often, brought to two positives by images that bring along as few other labels as possible, each
    of a label's images about equally often. *Rest*: more of the background's kind. No image comes twice in a batch
    unless the data set is smaller. Labels of a single image cannot have two positives: they are covered, not cycled.

    An epoch has whole batches only, the same number each time: `len()`, n/(1 - ρ) indices at most, up to rounding, and
    fewer for large batches (HPA: 1.8 times its images at bs=32, 1.4 at 512). `repeats()` is the price in repeated
    images.

    Args:
        targets: (n, C) of 0 and 1, of any dtype, NumPy, PyTorch or scipy.sparse; or (n,) class indices.
        bs: samples in a batch, at least 2; in distributed training of all processes together.
        seed: of all epochs, at least 0.
        rho: largest share of the batch, in (0, 1), that the minority may make up: that of the loss.
        group: False draws the background at random: batches are more alike, but the commonest labels are the majority
            of nearly all (HPA at bs=64: 0 and 25 are mined in almost none, the rare labels as often as with True).

    Raises:
        ValueError: bs < 2, rho outside (0, 1), a negative seed, targets of no known shape, outside [0, 1] or empty.

    Example:
        >>> targets = np.array([0] * 90 + [1] * 8 + [2] * 2)
        >>> sampler = ClassAwareSampler(targets, bs=10)
        >>> batches = targets[sampler.indices()].reshape(-1, 10)
        >>> bool(((batches == 2).sum(1) >= 2).mean() > 0.6)  # a label of two images in a hundred
        True
    """

    def __init__(self, targets: Any, bs: int, seed: int = 0, rho: float = 0.5, group: bool = True):
        super().__init__(targets, seed)
        if isinstance(bs, bool) or bs != int(bs) or bs < 2:
            raise ValueError(f"bs={bs!r}: a batch with two positives of a label has a whole number of samples, >= 2.")
        if not 0 < rho < 1:
            raise ValueError(f"rho={rho!r}: the minority's share of the batch must be in (0, 1); the paper uses 0.5.")
        self.bs, self.rho, self.group = int(bs), rho, group
        y, self.n_labels = self.labels, self.labels.shape[1]
        count = y.getnnz(0)
        # Labels are numbered by rank from here on, the commonest is 0: the order that sets of labels are sorted in.
        rank = np.empty(self.n_labels, np.int32)
        rank[np.argsort(-count, kind="stable")] = np.arange(self.n_labels)
        ranked = sparse.csr_matrix((np.ones(y.nnz, bool), rank[y.indices], y.indptr), shape=y.shape)
        ranked.sort_indices()
        self.start, self.flat = ranked.indptr.astype(np.int64), ranked.indices
        columns = ranked.tocsc()
        self.column, self.members = columns.indptr, columns.indices
        self.able = int((count >= 2).sum())  # labels that can have two positives
        # Even, as labels take two each; and less than ρ·n, for what comes along.
        self.budget = max(2, int(rho * bs * (1 - _SLACK) + 1e-6) // 2 * 2)
        self._sort()
        self._cut()

    def __len__(self) -> int:
        return (len(self.cuts) - 1) * self.bs

    def _sort(self) -> None:
        """Samples ordered by label set, commonest labels first (their first eight), and where each set begins."""
        n, size = self.labels.shape[0], np.diff(self.start)
        keys = np.full((min(8, max(1, size.max())), n), self.n_labels, np.int32)
        for d, key in enumerate(keys if self.group else []):
            rows = np.flatnonzero(size > d)
            key[rows] = self.flat[self.start[rows] + d]
        self.order = np.lexsort(keys[::-1])
        new = np.r_[True, (keys[:, self.order[1:]] != keys[:, self.order[:-1]]).any(0)]
        self.set_of, self.set_start = np.cumsum(new) - 1, np.r_[np.flatnonzero(new), n]

    def _cut(self) -> None:
        """Cut that order into the backgrounds of batches, as large as the focus leaves room for.

        Sets are shuffled within themselves only, so the labels of a background, and the cuts, are those of any epoch.
        """
        n, top, bs = self.labels.shape[0], self.column[1], self.bs  # the first `top` samples have the commonest label
        least = max(1, bs - min(self.budget, 2 * self.able))
        label = self._labels(self.order)[1]
        ends = np.r_[0, np.cumsum(np.diff(self.start)[self.order])]

        def room(a: int, f: int) -> int:
            """Slots that the focus leaves for a background of f samples from position a."""
            h = np.bincount(label[ends[a] : ends[min(n, a + f)]], minlength=self.n_labels)[: self.able]
            return bs - min(int(np.maximum(0, 2 - h).sum()), int(self._room(h[None])[0]))

        def cut(cap: int) -> np.ndarray:
            cuts = [0]
            while (a := cuts[-1]) < n:
                f = least
                if self.group:
                    f = max(least, room(a, max(least, room(a, least))))
                    f = f if f <= room(a, f) else (f + least) // 2
                    f = f if a < top else min(f, cap)
                cuts.append(min(n, a + f))
            return np.array(cuts)

        self.cuts = cut(bs)
        # Where the commonest label is in the background of too many batches for its share, the others' backgrounds
        # shrink, to be more; as long as the epoch stays below its bound.
        with_top = int(np.searchsorted(self.cuts, top))
        share = _TOP * min(1.0, self.rho * bs / (2 * max(1, self.able)))
        others = min(with_top * share / (1 - share), n / ((1 - self.rho) * bs) - with_top)
        if self.group and len(self.cuts) - 1 - with_top < others:
            self.cuts = cut(max(1, math.ceil((n - top) / others)))

    def _room(self, h: np.ndarray) -> np.ndarray:
        """Positives that the focus may add to batches with h (T, C): what labels with one or two leave of the budget.

        But never less than a share: where images have so many labels that nothing is left, every label still has its
        turn (for attribute scope, and for the base loss).
        """
        left = self.budget - np.count_nonzero(h == 1, axis=1) - 2 * np.count_nonzero(h == 2, axis=1)
        return np.maximum(left, int(_LEAST * self.budget))

    def _labels(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All labels of some samples: position of the sample, and label."""
        size = np.diff(self.start)[samples]
        own = np.repeat(np.arange(len(samples)), size)
        return own, self.flat[np.arange(len(own)) + np.repeat(self.start[samples] - (np.cumsum(size) - size), size)]

    def indices(self, epoch: int = 0) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        (n, n_batches), size = (self.labels.shape[0], len(self.cuts) - 1), np.diff(self.cuts)
        order = self.order[np.lexsort((rng.random(n), self.set_of))]
        row = np.repeat(np.arange(n_batches), size)
        work = _Work(self, n_batches, rng)
        work.batch[row, np.arange(n) - self.cuts[row]] = order
        work.used += size
        own, label = self._labels(order)
        np.add.at(work.h, (row[own], label), 1)
        work.plan(self.able)
        for c in reversed(range(self.able)):  # rare labels first: their images bring common ones along
            work.focus(c, rng.permutation(self.members[self.column[c] : self.column[c + 1]]))
        while len(rows := np.flatnonzero(work.used < self.bs)):
            # Others of the sets of the batch's own background, and any, in equal parts.
            at = self.cuts[rows, None] + (rng.random((len(rows), _CANDIDATES // 2)) * size[rows, None]).astype(int)
            low, high = self.set_start[self.set_of[at]], self.set_start[self.set_of[at] + 1]
            alike = order[low + (rng.random(low.shape) * (high - low)).astype(int)]
            work.add(rows, np.concatenate([alike, rng.integers(0, n, alike.shape)], 1), complete=True)
        return rng.permuted(work.batch[rng.permutation(n_batches)], axis=1).ravel().astype(np.int64)


class _Work:
    """All batches of an epoch in the making."""

    def __init__(self, sampler: ClassAwareSampler, n_batches: int, rng: np.random.Generator):
        self.s, self.rng = sampler, rng
        self.batch = np.full((n_batches, sampler.bs), -1, np.int32)
        self.used = np.zeros(n_batches, np.int64)
        self.h = np.zeros((n_batches, sampler.n_labels), np.int16)  # positives of each label
        self.wanted = np.zeros(self.h.shape, bool)  # labels in focus

    def plan(self, able: int) -> None:
        """Choose the labels in focus: each of as many batches as any, those with the most budget left."""
        room = np.minimum(self.s._room(self.h), self.s.bs - self.used)
        for c in range(able):  # common labels first: they have fewer batches to choose from
            share = round(np.maximum(room // 2, 0).sum() / (able - c))
            cost = 2 - self.h[:, c]
            rows = np.flatnonzero((cost > 0) & (room >= cost))
            rows = rows[np.argsort(cost[rows] - room[rows] - self.rng.random(len(rows)), kind="stable")[:share]]
            self.wanted[rows, c] = True
            room[rows] -= cost[rows]

    def focus(self, c: int, members: np.ndarray) -> None:
        """Bring label c to two positives in the batches that want it."""
        todo = self.rng.permutation(np.flatnonzero(self.wanted[:, c] & (self.h[:, c] < 2)))
        total = int((2 - self.h[todo, c]).sum())
        drawn, at = np.zeros(len(members)), 0
        for rows in np.array_split(todo, min(_ROUNDS, -(-total // len(members)))) if total else []:
            for _ in range(2):
                rows = rows[(self.h[rows, c] < 2) & (self.used[rows] < self.s.bs)]
                if len(rows):
                    pick = self.rng.integers(0, len(members), (len(rows), _CANDIDATES))
                    pick[:, 0] = (at + np.arange(len(rows))) % len(members)  # in turn, unless another fits better
                    at += len(rows)
                    taken = self.add(rows, members[pick], _EVEN * drawn[pick] / max(1, total / len(members)))
                    np.add.at(drawn, pick[np.arange(len(rows)), taken], taken >= 0)

    def add(self, rows: np.ndarray, candidates: np.ndarray, cost: Any = 0.0, complete: bool = False) -> np.ndarray:
        """Add to each of these batches the candidate that costs its budget least and is not in it yet.

        Returns which, (len(rows),): -1 where all are in it; then `complete` takes any other, or any at all.
        """
        own, label = self.s._labels(candidates.ravel())
        batch = rows[own // candidates.shape[1]]
        budget = _COST[self.wanted[batch, label].view(np.int8), np.minimum(self.h[batch, label], 3)]
        cost = cost + np.bincount(own, budget, candidates.size).reshape(candidates.shape)
        taken, check = cost.argmin(1), np.arange(len(rows))
        # Twins are rare: the best candidate is looked up in its batch, and only where it is there the next best.
        while len(check := check[(self.batch[rows[check]] == candidates[check, taken[check], None]).any(1)]):
            cost[check, taken[check]] = np.inf
            taken[check] = cost[check].argmin(1)
            none = np.isinf(cost[check, taken[check]])
            taken[check[none]], check = -1, check[~none]
        samples = candidates[np.arange(len(rows)), taken]
        if complete:
            for i in np.flatnonzero(taken < 0):
                free = np.setdiff1d(np.arange(self.s.labels.shape[0]), self.batch[rows[i]])
                samples[i] = self.rng.choice(free) if len(free) else samples[i]
        else:
            rows, samples = rows[taken >= 0], samples[taken >= 0]
        self.batch[rows, self.used[rows]] = samples
        self.used[rows] += 1
        own, label = self.s._labels(samples)
        self.h[rows[own], label] += 1
        return taken


register_sampler("class_aware", ClassAwareSampler)
