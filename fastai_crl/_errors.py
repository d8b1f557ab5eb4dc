"""How errors are worded."""

from collections.abc import Sequence
from typing import Any


def offenders(what: str, items: Sequence[Any], fix: str) -> str:
    """Return an error message that names up to five of `items`, says how many there are, and ends with the fix."""
    return f"{what} ({len(items)} in all): {', '.join(map(str, items[:5]))}{', …' if len(items) > 5 else ''}. {fix}"
