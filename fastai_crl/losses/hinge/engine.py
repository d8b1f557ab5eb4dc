"""The choice between the engines of the hinge criteria, and the gradient, which is the same for both.

Relative (arXiv:1804.10851, eqs. 9 and 10) is max(0, m + |p_a - p_+| - p_a + p_-), ranking the same without |p_a - p_+|.
While the active ones stay the same their sum is linear in the scores, Σ weight·p + constant: no pair needs a gradient.
An engine finds the weights and the constant. Past scores carry no gradient and are part of the constant.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastai_crl._checks import check_choice

from . import loops, tensors
from .tensors import HingeOptions

Engine = Literal["auto", "loops", "tensors"]


def check_engine(engine: str, served: bool) -> None:
    """Raise ValueError for an engine that is unknown, not installed, or does not serve the criterion."""
    check_choice("engine", engine, ("auto", "loops", "tensors"))
    if engine == "loops" and not served:
        raise ValueError(
            'engine="loops" serves the criteria "relative" and "ranking" at level="class" only: use engine="auto".'
        )
    if engine == "loops" and not loops.AVAILABLE:
        raise ValueError('engine="loops" needs numba: install it, or use engine="auto".')


def hinge_sum(
    scores: Tensor,
    y: Tensor,
    frequency: Tensor | None,
    memory: tuple[Tensor, Tensor] | None,
    options: HingeOptions,
    engine: Engine = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum the hinges of all triplets of a batch, differentiable in the scores.

    Args:
        scores: (n, C) float32 or float64.
        y: (n, C) memberships of the same dtype, see `membership`.
        frequency: (C,), see `minority_classes`, or None.
        memory: (C, R) past scores of positives, and (C, R) bool: which of them hold; or None.
        options: see `HingeOptions`.
        engine: `"loops"`, compiled by numba, for a CPU; `"tensors"`; `"auto"`: loops where they can be had.

    Returns:
        (C,) long triplets (pairs, with `lone_positive`) of each label, and the sum, a scalar.

    Raises:
        ValueError: `"loops"` for tensors that are not on a CPU.
    """
    on_cpu = scores.device.type == "cpu"
    if engine == "loops" and not on_cpu:
        raise ValueError(f'engine="loops" runs on a CPU, not on {scores.device}: use engine="auto".')
    hinge_weights = loops.hinge_weights if engine != "tensors" and on_cpu and loops.AVAILABLE else tensors.hinge_weights
    weights, constant, counts = hinge_weights(scores.detach(), y, frequency, memory, options)
    return counts, scores.flatten().dot(weights) + constant
