"""Hard samples of a batch (arXiv:1804.10851, section 3.2), as places in matrices of static shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .profile import Profile


def _bits(values: Tensor) -> Tensor:
    """Integers that order as these float32 do, none of them -0: their bits, those of negative ones reversed."""
    bits = values.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def hardest(values: Tensor, k: int, highest: bool, signed: bool = True) -> Tensor:
    """Indices (k, M) of the k lowest or highest of each column of (n, M), hardest first, ties by lower index."""
    if values.dtype == torch.float64:
        return values.sort(dim=0, descending=highest, stable=True).indices[:k]
    bits = _bits(values + 0.0) if signed else values.view(torch.int32)  # -0 + 0 = 0
    index = torch.arange(len(values), device=values.device)[:, None]
    return torch.add(index, bits, alpha=-(2**32) if highest else 2**32).topk(k, dim=0, largest=False).indices


def ordered_bits(scores: Tensor, signed: bool = True) -> tuple[Tensor, int]:
    """Integers (n, M) that order the scores of each column, ties by sample; they are from 0 to below 2^bits.

    Args:
        scores: (n, M) float32 or float64.
        signed: some may be below 0.

    Returns:
        The integers, all different in a column, and bits, which with a column's number before them fit into 63.
    """
    n, m = scores.shape
    sample_bits = n.bit_length()
    if scores.dtype == torch.float64 or 32 + sample_bits + m.bit_length() > 62:  # ranks in place of bits
        order = scores.flatten().argsort(stable=True)
        ranks = torch.empty_like(order).scatter_(0, order, torch.arange(n * m, device=scores.device))
        return ranks.view(n, m), (n * m).bit_length()
    lowest = 2**31 << sample_bits if signed else 0
    sample = torch.arange(lowest, lowest + n, device=scores.device)[:, None]
    bits = _bits(scores + 0.0) if signed else scores.view(torch.int32)
    return torch.add(sample, bits, alpha=1 << sample_bits), 32 + sample_bits


def _lowest(values: Tensor, k: int, dim: int) -> Tensor:
    """Indices of the k smallest along `dim`, smallest first, ties by lower index: `topk` leaves ties open.

    None may be -0, which 0 + x and 0 - x never are.
    """
    if values.dtype == torch.float64:
        return values.sort(dim=dim, stable=True).indices.narrow(dim, 0, k)
    index = torch.arange(values.shape[dim], device=values.device)
    key = torch.add(index if dim else index[:, None], _bits(values), alpha=2**32)  # orders as (value, index)
    return key.topk(k, dim=dim, largest=False).indices


def _by_row(row: Tensor, values: Tensor) -> Tensor:
    """The order that sorts (A,) by row, then value; ties as they come."""
    if values.dtype == torch.float64:
        order = values.argsort(stable=True)
        return order.take(row.take(order).argsort(stable=True))
    return torch.add(_bits(values + 0.0), row, alpha=2**32).argsort(stable=True)  # -0 + 0 = 0


def _first(sizes: Tensor, width: int) -> Tensor:
    """(R, width) bool: the first `sizes` of each row."""
    return torch.arange(width, device=sizes.device) < sizes[:, None]


def negatives(profile: Profile, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Hard negatives of each label by (n, M) score (paper, eq. 5): `far` and `is_far` of `HardSamples`."""
    n, m = scores.shape
    far = _lowest((0 - scores).masked_fill_(profile.excluded, torch.inf), min(k, n), 0).T
    return far * m + torch.arange(m, device=far.device)[:, None], _first(profile.n_majority, far.shape[1])


@dataclass
class HardSamples:
    """Hard samples in R lists: one per label at class level, where anchors of a label share them, else one per anchor.

    All are places in a flattened matrix, padded with any valid one: (n, M) scores, or (n, n) distances.
    """

    anchor: Tensor  # (A,) place in (n, M)
    row: Tensor  # (A,) which of the M labels
    near: Tensor  # (R, P) hard positives, hardest first; at class level with the anchor among them
    is_near: Tensor  # (A, P) bool: a pair of an anchor and a hard positive
    far: Tensor  # (R, N) hard negatives, hardest first
    is_far: Tensor  # (R, N) bool, False for padding
    shared: bool  # class level
    is_anchor: Tensor  # (A,) bool, False for padding

    def each(self, lists: Tensor) -> Tensor:
        """(R, ...) -> (A, ...): the list of each anchor."""
        return lists.index_select(0, self.row) if self.shared else lists

    @classmethod
    def by_score(cls, profile: Profile, scores: Tensor, k: int, memory: Tensor | None = None) -> HardSamples:
        """Class level, from the (n, M) scores of the labels to mine (paper, eqs. 4 and 5).

        Places of the (M, R) scores in `memory` follow those of the batch.
        """
        (n, m), device = scores.shape, scores.device
        place, row = profile.anchors()
        place = place.clamp_max(n * m - 1)
        order = _by_row(row, scores.take(place))
        place, row = place.take(order), row.take(order)
        # The k + 1 lowest of a label serve all its anchors: without the anchor itself, or the last if it is not there.
        column = torch.arange(max(1, min(k, profile.most - 1)) + 1, device=device)
        count = torch.constant_pad_nd(profile.n_minority, (0, 1))
        first = count.cumsum(0) - count
        near = place.take((first[:m, None] + column).clamp_max(profile.total - 1))
        rank = torch.arange(profile.total, device=device) - first.take(row)
        is_near = _first(count, len(column)).index_select(0, row)
        is_near.scatter_(1, rank.clamp(0, len(column) - 1)[:, None], False)
        if memory is not None:
            near, is_near = cls._remember(profile, scores, memory, near, place, row, k)
        return cls(place, row.clamp_max(m - 1), near, is_near, *negatives(profile, scores, k), True, row < m)

    @staticmethod
    def _remember(
        profile: Profile,
        scores: Tensor,
        memory: Tensor,
        near: Tensor,
        place: Tensor,
        row: Tensor,
        k: int,
    ) -> tuple[Tensor, Tensor]:
        """The k + 1 lowest of each label among the batch's own (near) and the memory, and which are an anchor's."""
        (m, r), size = memory.shape, scores.numel()
        own = (scores.take(near) + 0.0).masked_fill_(~_first(profile.n_minority, near.shape[1]), torch.inf)
        assert profile.remembered is not None  # it comes with the memory
        values = torch.cat([own, (memory + 0.0).masked_fill_(~profile.remembered, torch.inf)], 1)
        places = torch.cat([near, torch.arange(size, size + m * r, device=near.device).view(m, r)], 1)
        near = places.gather(1, _lowest(values, min(k + 1, values.shape[1]), 1))
        is_near = _first(torch.constant_pad_nd(profile.partners() + 1, (0, 1)), near.shape[1]).index_select(0, row)
        itself = near.index_select(0, row.clamp_max(m - 1)) == place[:, None]
        last = (torch.arange(near.shape[1], device=near.device) == k) & ~itself.any(1, keepdim=True)
        return near, is_near & ~itself & ~last

    @classmethod
    def by_distance(cls, profile: Profile, distance: Tensor, k: int, memory: Tensor | None = None) -> HardSamples:
        """Instance level, from (n, n) distances (paper, eqs. 6 and 7).

        Places of the (A, R) distances in `memory`, of each anchor to its label's entries, follow those of the batch.
        """
        n, m = profile.minority_side.shape
        place, row = profile.anchors()
        count = torch.constant_pad_nd(profile.partners(), (0, 1)).take(row)
        is_anchor, place, row = row < m, place.clamp_max(n * m - 1), row.clamp_max(m - 1)
        sample = (place // m)[:, None]
        distance = distance.index_select(0, sample[:, 0])
        minority_side, excluded = (side.T.index_select(0, row) for side in (profile.minority_side, profile.excluded))
        others = minority_side.scatter_(1, sample, False)
        first = n * sample
        near = (0 - distance).masked_fill_(~others, torch.inf)
        if memory is not None and profile.remembered is not None:
            near = torch.cat([near, (0 - memory).masked_fill_(~profile.remembered.index_select(0, row), torch.inf)], 1)
        near = _lowest(near, max(1, min(k, profile.most - 1 + (0 if memory is None else memory.shape[1]))), 1)
        far = _lowest(distance.masked_fill_(excluded, torch.inf), min(k, n), 1)
        is_near, is_far = _first(count, near.shape[1]), _first(profile.n_majority, far.shape[1]).index_select(0, row)
        if memory is None:
            near = near + first
        else:
            after = n * n - n + memory.shape[1] * torch.arange(len(row), device=near.device)[:, None]
            near = near + torch.where(near < n, first, after)
        return cls(place, row, near, is_near, far + first, is_far, False, is_anchor)


def pairwise_distance(features: Tensor) -> Tensor:
    """Euclidean distances between all rows, (n, d) -> (n, n), in float32 or float64 (paper, eq. 11).

    One matrix product. ‖x‖² + ‖y‖² - 2·x·y cancels where rows are close, so it is done in double precision (where the
    device has it): equal distances stay equal and duplicates are at zero. The gradient at zero distance is zero.
    """
    out = torch.float64 if features.dtype == torch.float64 else torch.float32
    features = features.to(out if features.device.type == "mps" else torch.float64)
    square = features.square().sum(1)
    total = square[:, None] + square
    squared = torch.addmm(total, features, features.T, alpha=-2)
    apart = squared > 4 * torch.finfo(squared.dtype).eps * total.detach()
    return (torch.where(apart, squared, 1.0).sqrt() * apart).to(out)


def flat(matrices: tuple[Tensor | None, ...]) -> Tensor:
    """Matrices flattened, one after the other."""
    parts = [m.flatten() for m in matrices if m is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def take(matrices: tuple[Tensor | None, ...], *places: Tensor) -> list[Tensor]:
    """Entries of flattened matrices, all in one gather: its gradient is one scatter."""
    taken = flat(matrices).gather(0, torch.cat([p.flatten() for p in places]))
    parts = taken.split_with_sizes([p.numel() for p in places])
    return [t.view(p.shape) for t, p in zip(parts, places, strict=True)]
