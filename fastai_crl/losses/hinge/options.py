"""What both engines of the hinge criteria are told."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["HingeOptions"]


class HingeOptions(NamedTuple):
    """Options of `hinge_weights`.

    Attributes:
        rho: ρ, largest share of the batch that the minority makes up.
        k: κ, hard positives and negatives per anchor.
        margin: m.
        attribute: attribute scope, else joint.
        lone_positive: max(0, m - d(a,-)) over pairs, else max(0, m + d(a,+) - d(a,-)) over triplets.
        by_label: each label's sum is divided by its number of triplets.
    """

    rho: float
    k: int
    margin: float
    attribute: bool
    lone_positive: bool
    by_label: bool
