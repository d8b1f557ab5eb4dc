"""A memory of past positives, so that a label's lone positive in a batch has partners to be compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from .profile import Level

__all__ = ["PositiveMemory"]


class PositiveMemory:
    """Ring buffer of the last `size` positives of each label: scores, or embeddings, detached and in float32 or more.

    Shapes are fixed at the first write, and no call synchronises with a GPU. Entries grow old: one written more than
    `max_age` writes ago is no longer given out, since the network that scored it has moved on.

    Args:
        size: R, entries per label, ≥ 1.
        max_age: in writes, that is training batches, ≥ 1.
        level: `"class"` keeps each positive's score of its label, `"instance"` its embedding.

    Raises:
        ValueError: size or max_age below 1.
    """

    def __init__(self, size: int, max_age: int, level: Level = "class"):
        for name, value in (("size", size), ("max_age", max_age)):
            if value < 1:
                raise ValueError(f"{name}={value!r}: the memory needs a whole number of at least 1.")
        self.size, self.max_age, self.level = size, max_age, level
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.values: Tensor | None = None  # (C, R) or (C, R, d)
        self.written: Tensor | None = None  # (C, R) long: the write that made the entry
        self.total: Tensor | None = None  # (C,) long: entries ever written
        self.clock: Tensor | None = None  # scalar long: writes so far

    def __getstate__(self) -> dict:
        return {
            "size": self.size,
            "max_age": self.max_age,
            "level": self.level,
        }  # nothing of a training run goes into an export

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def read(self) -> tuple[Tensor, Tensor] | None:
        """Values, (C, R) or (C, R, d), and which of them hold, (C, R) bool; None before the first write."""
        if self.values is None:
            return None
        return self.values, self.clock - self.written < self.max_age

    @torch.no_grad()
    def write(self, values: Tensor, positive: Tensor) -> None:
        """Append a batch's positives to the rings of their labels, in sample order; the oldest entries give way.

        Args:
            values: (n, C) scores, or (n, d) embeddings at instance level.
            positive: (n, C) bool.
        """
        (n, n_classes), r = positive.shape, self.size
        scores, values = self.level == "class", values.detach()
        if self.values is None:
            self.values = values.new_zeros(n_classes, r, *(() if scores else values.shape[1:]))
            self.written = torch.full((n_classes, r), -self.max_age, device=values.device)
            self.total = torch.zeros(n_classes, dtype=torch.long, device=values.device)
            self.clock = torch.zeros((), dtype=torch.long, device=values.device)
        self.clock = self.clock + 1
        if n == 0:
            return
        h = positive.sum(0)
        rank = positive.cumsum(0) - 1
        label = torch.arange(n_classes, device=values.device)
        place = label * r + (self.total + rank) % r
        last = positive & (rank >= h - r)  # more positives than entries: only the last of them stay
        place = torch.where(last, place, n_classes * r).flatten()  # all others go to one place past the end
        sample = torch.arange(n, device=values.device)[:, None].expand(n, n_classes).flatten()
        source = torch.full((n_classes * r + 1,), -1, device=values.device).scatter_(0, place, sample)
        source = source[:-1].view(n_classes, r)
        new, source = source >= 0, source.clamp_min(0)
        fresh = values[source, label[:, None]] if scores else values[source]
        self.values = torch.where(new if scores else new[..., None], fresh, self.values)
        self.written = torch.where(new, self.clock, self.written)
        self.total = self.total + h
