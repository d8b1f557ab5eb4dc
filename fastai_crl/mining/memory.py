"""A memory of past positives, so that a label's lone positive in a batch has partners to be compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastai_crl._checks import whole_number

from .profile import Level

_RINGS = ("values", "written", "total", "clock")


class PositiveMemory(nn.Module):
    """Ring buffer of the last `size` positives of each label: scores, or embeddings, detached and in float32 or more.

    Shapes are fixed at the first write, and no call synchronises with a GPU. Entries grow old: one written more than
    `max_age` writes ago is no longer given out, since the network that scored it has moved on. The rings are buffers:
    `to` moves them and `state_dict` holds them. A pickle holds none, so that an export has nothing of a training run.

    Args:
        size: R, entries per label, ≥ 1.
        max_age: in writes, that is training batches, ≥ 1.
        level: `"class"` keeps each positive's score of its label, `"instance"` its embedding.

    Raises:
        ValueError: size or max_age other than a whole number of at least 1.

    Example:
        >>> memory = PositiveMemory(size=2, max_age=10)
        >>> memory.write(torch.tensor([[0.5, 0.1], [0.2, 0.75]]), torch.eye(2) == 1)
        >>> memory.read()[0].tolist()  # a ring for each label
        [[0.5, 0.0], [0.75, 0.0]]
    """

    values: Tensor | None  # (C, R) or (C, R, d)
    written: Tensor | None  # (C, R) long: the write that made the entry
    total: Tensor | None  # (C,) long: entries ever written
    clock: Tensor | None  # scalar long: writes so far

    def __init__(self, size: int, max_age: int, level: Level = "class"):
        super().__init__()
        self.size = whole_number("size", size, 1, "the memory needs a whole number of at least 1")
        self.max_age = whole_number("max_age", max_age, 1, "the memory needs a whole number of at least 1")
        self.level = level
        for name in _RINGS:
            self.register_buffer(name, None)

    def reset(self) -> None:
        """Forget everything."""
        for name in _RINGS:
            setattr(self, name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": dict.fromkeys(_RINGS)}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in _RINGS:  # their shape is that of the state's, which may hold none
            saved, ring = state_dict.get(prefix + name), getattr(self, name)
            if saved is None or ring is None or ring.shape != saved.shape:
                device = None if ring is None else ring.device
                setattr(self, name, None if saved is None else torch.empty_like(saved, device=device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def read(self) -> tuple[Tensor, Tensor] | None:
        """Values, (C, R) or (C, R, d), and which of them hold, (C, R) bool; None before the first write."""
        values, written, _, clock = self._rings()
        return None if values is None else (values, clock - written < self.max_age)

    def _rings(self) -> tuple[Any, ...]:
        """Return the buffers, in the order of `_RINGS`: a module looks each up in a while that is worth saving."""
        return tuple(getattr(self, name) for name in _RINGS)

    @torch.no_grad()
    def write(self, values: Tensor, positive: Tensor) -> None:
        """Append a batch's positives to the rings of their labels, in sample order; the oldest entries give way.

        Args:
            values: (n, C) scores, or (n, d) embeddings at instance level.
            positive: (n, C) bool.
        """
        (n, n_classes), r = positive.shape, self.size
        scores, values = self.level == "class", values.detach()
        kept, written, total, clock = self._rings()
        if kept is None:
            self.values = kept = values.new_zeros(n_classes, r, *(() if scores else values.shape[1:]))
            self.written = written = torch.full((n_classes, r), -self.max_age, device=values.device)
            self.total = total = torch.zeros(n_classes, dtype=torch.long, device=values.device)
            self.clock = clock = torch.zeros((), dtype=torch.long, device=values.device)
        clock.add_(1)
        if n == 0:
            return
        h = positive.sum(0)
        rank = positive.cumsum(0) - 1
        label = torch.arange(n_classes, device=values.device)
        place = label * r + (total + rank) % r
        last = positive & (rank >= h - r)  # more positives than entries: only the last of them stay
        place = torch.where(last, place, n_classes * r).flatten()  # all others go to one place past the end
        sample = torch.arange(n, device=values.device)[:, None].expand(n, n_classes).flatten()
        source = torch.full((n_classes * r + 1,), -1, device=values.device).scatter_(0, place, sample)
        source = source[:-1].view(n_classes, r)
        new, source = source >= 0, source.clamp_min(0)
        fresh = values[source, label[:, None]] if scores else values[source]
        self.values = torch.where(new if scores else new[..., None], fresh.to(kept.dtype), kept)
        self.written = torch.where(new, clock, written)
        total.add_(h)
