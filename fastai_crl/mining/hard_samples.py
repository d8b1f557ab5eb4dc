"""Hard samples of a batch (arXiv:1804.10851, section 3.2), as places in matrices of static shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .profile import Profile, anchor_places


def _bits(values: Tensor, signed: bool) -> Tensor:
    """Integers that order as these float32 do: their bits, those of negative ones reversed.

    Args:
        values: of any shape.
        signed: some may be -0 or less.
    """
    if not signed:
        return values.view(torch.int32)
    bits = (values + 0.0).view(torch.int32)  # -0 + 0 = 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def hardest(values: Tensor, k: int, highest: bool, signed: bool = True) -> Tensor:
    """Indices (k, M) of the k lowest or highest of each column of (n, M), hardest first, ties by lower index."""
    if values.dtype == torch.float64:
        return values.sort(dim=0, descending=highest, stable=True).indices[:k]
    index = torch.arange(len(values), device=values.device)[:, None]
    key = torch.add(index, _bits(values, signed), alpha=-(2**32) if highest else 2**32)
    return key.topk(k, dim=0, largest=False).indices


def by_row(row: Tensor, values: Tensor, signed: bool = True) -> Tensor:
    """The order that sorts (A,) by row, then value; ties as they come."""
    if values.dtype == torch.float64:
        order = values.argsort(stable=True)
        return order.take(row.take(order).argsort(stable=True))
    return torch.add(_bits(values, signed), row, alpha=2**32).argsort(stable=True)


def _first(sizes: Tensor, width: int) -> Tensor:
    """(R, width) bool: the first `sizes` of each row."""
    return torch.arange(width, device=sizes.device) < sizes[:, None]


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
    def by_score(cls, profile: Profile, scores: Tensor, k: int) -> HardSamples:
        """Class level, from the (n, M) scores of the labels to mine (paper, eqs. 4 and 5)."""
        (n, m), device = scores.shape, scores.device
        place, row = anchor_places(profile.minority_side, profile.total)
        place = place.clamp_max(n * m - 1)
        order = by_row(row, scores.take(place))
        place, row = place.take(order), row.take(order)
        # The k + 1 lowest of a label serve all its anchors: without the anchor itself, or the last if it is not there.
        column = torch.arange(max(1, min(k, profile.most - 1)) + 1, device=device)
        count = torch.constant_pad_nd(profile.n_minority, (0, 1))
        first = count.cumsum(0) - count
        near = place.take((first[:m, None] + column).clamp_max(profile.total - 1))
        rank = torch.arange(profile.total, device=device) - first.take(row)
        is_near = _first(count, len(column)).index_select(0, row)
        is_near.scatter_(1, rank.clamp(0, len(column) - 1)[:, None], False)
        far = hardest(scores.masked_fill(profile.excluded, -torch.inf), min(k, n), highest=True).T
        is_far = _first(profile.n_majority, far.shape[1])
        far = far * m + torch.arange(m, device=device)[:, None]
        return cls(place, row.clamp_max(m - 1), near, is_near, far, is_far, True, row < m)

    @classmethod
    def by_distance(cls, profile: Profile, distance: Tensor, k: int) -> HardSamples:
        """Instance level, from (n, n) distances (paper, eqs. 6 and 7)."""
        n, m = profile.minority_side.shape
        place, row = anchor_places(profile.minority_side, profile.total)
        count = torch.constant_pad_nd(profile.n_minority - 1, (0, 1)).take(row)
        is_anchor, place, row = row < m, place.clamp_max(n * m - 1), row.clamp_max(m - 1)
        sample = place // m
        distance = distance.index_select(1, sample)  # (n, A)
        others, excluded = (x.index_select(1, row) for x in (profile.minority_side, profile.excluded))
        others.scatter_(0, sample[None], False)
        near = hardest(distance.masked_fill(~others, -torch.inf), max(1, min(k, profile.most - 1)), highest=True).T
        far = hardest(distance.masked_fill_(excluded, torch.inf), min(k, n), highest=False).T
        is_near, is_far = _first(count, near.shape[1]), _first(profile.n_majority, far.shape[1]).index_select(0, row)
        first = n * sample[:, None]
        return cls(place, row, near + first, is_near, far + first, is_far, False, is_anchor)


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


def take(matrix: Tensor, *places: Tensor) -> list[Tensor]:
    """Entries of a flattened matrix, all in one gather: its gradient is one scatter."""
    taken = matrix.flatten().gather(0, torch.cat([p.flatten() for p in places]))
    parts = taken.split_with_sizes([p.numel() for p in places])
    return [t.view(p.shape) for t, p in zip(parts, places, strict=True)]
