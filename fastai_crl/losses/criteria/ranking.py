"""Ranking of anchors before negatives alone."""

from __future__ import annotations

from fastai_crl.mining.profile import Level, Scope

from .base import ScoreSpace
from .relative import Relative


class Ranking(Relative):
    """Mean over all pairs of max(0, m - d(a,-)), at class level; not in the paper.

    Without d(a,+) nothing draws a label's confident positives towards its worst, and a lone positive is an anchor too.
    Its defaults are those that did best: ρ = 1 (every label, rarest first, until their positives outnumber the batch),
    each label's mean counting the same, a margin of 1, beyond which no pair of probabilities is ever apart, so that its
    gradient never stops, and a weight α of at most ¼, where the paper's is Ω alone.
    """

    name = "ranking"
    rho = 1.0
    alpha_limit = 0.25
    average = "label"
    levels = ("class",)
    lone_positive = True
    uses_memory = False

    def margin(self, level: Level, score_space: ScoreSpace, scope: Scope, n_classes: int) -> float:
        return 2.0 if score_space == "logit" else 1.0
