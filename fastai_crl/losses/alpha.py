"""The weight α of the rectification: what it may be, and how it grows over training (arXiv:1804.10851, eq. 8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from fastai.callback.schedule import SchedCos

Schedule = Callable[[float], float] | Sequence[float]


def check_alpha(alpha: float | str) -> float | str:
    """`alpha`, or a ValueError if it is neither `auto` nor in [0, 1]."""
    if alpha != "auto" and (isinstance(alpha, str) or not 0 <= alpha <= 1):
        raise ValueError(f'alpha={alpha!r}: the weight of the rectification term must be in [0, 1], or "auto".')
    return alpha


def ramp(pct: float, over: float = 0.25) -> float:
    """Half a cosine from 0 to 1 over the first `over` of training, then 1: hard samples mean little at the start."""
    return SchedCos(0.0, 1.0)(min(pct / over, 1.0))


def scheduled(schedule: Schedule | None, pct: float) -> float:
    """Return the factor of α once `pct` of training is done, 0 to 1, of a function or an array; None is `ramp`."""
    if schedule is None:
        return ramp(pct)
    if callable(schedule):
        return float(schedule(pct))
    return float(np.interp(pct, np.linspace(0, 1, len(schedule)), schedule))
