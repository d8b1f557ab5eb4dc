"""The comparisons of an anchor with its hard positives and negatives, each a class (arXiv:1804.10851, section 3.3)."""

from .absolute import Absolute
from .base import Average, Criterion, Pairs, ScoreSpace
from .distribution import Distribution
from .ranking import Ranking
from .relative import Relative

__all__ = [
    "CRITERIA",
    "Absolute",
    "Average",
    "Criterion",
    "Distribution",
    "Pairs",
    "Ranking",
    "Relative",
    "ScoreSpace",
    "make_criterion",
]

CRITERIA: dict[str, type[Criterion]] = {c.name: c for c in (Relative, Absolute, Distribution, Ranking)}


def make_criterion(criterion: str | Criterion, bins: int | None = None) -> Criterion:
    """Return a criterion object for a name of `CRITERIA`, or the object itself.

    Args:
        criterion: a name, or an object of a class derived from `Criterion`.
        bins: τ of the criterion named `"distribution"`; None for its default.

    Raises:
        ValueError: an unknown name, something other than a name or an object, bins where there is no histogram.
    """
    if isinstance(criterion, Criterion):
        if bins is not None:
            raise ValueError(f"bins={bins!r} goes with a name: give the object its own, as in Distribution(bins).")
        return criterion
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        raise ValueError(
            f"criterion={criterion!r} is unknown: use one of {', '.join(map(repr, CRITERIA))}, or an object of a class "
            "derived from Criterion."
        )
    kind = CRITERIA[criterion]
    if bins is None:
        return kind()
    if not issubclass(kind, Distribution):
        raise ValueError(f'bins={bins!r} is for criterion="distribution": {criterion!r} has no histogram.')
    return kind(bins)
