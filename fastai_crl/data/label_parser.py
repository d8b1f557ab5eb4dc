"""How the labels of a row are read from its text, and which labels look as if they were meant otherwise."""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .csv_file import as_text

BOOLEAN = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


def split_labels(text: str, delim: str | None) -> list[str]:
    """Return the labels in `text`: split at `delim` (" " is any white space), or one label if `delim` is None."""
    parts = [text] if delim is None else text.split() if delim == " " else text.split(delim)
    return [s for s in map(str.strip, parts) if s]


def number_first(label: str) -> tuple[bool, int, str]:
    """Return a key that sorts numbers by value, before all other labels."""
    return (False, int(label), label) if label.isdecimal() else (True, 0, label)


@dataclass(frozen=True)
class LabelParser:
    """How a row's labels are read: from one column of text, or from one column of 0 and 1 per label.

    Args:
        columns: one name, or a tuple of names, which then are the labels.
        delim: between the labels of a text; None for exactly one label per row.

    Raises:
        ValueError: an empty `delim`.
    """

    columns: str | tuple[str, ...]
    delim: str | None = " "

    def __post_init__(self):
        if self.delim is not None and (not isinstance(self.delim, str) or not self.delim):
            fix = "give the text between two labels, or None for exactly one label per row."
            raise ValueError(f"label_delim={self.delim!r} separates nothing: {fix}")

    def __call__(self, row: Mapping[str, Any] | pd.Series) -> list[str]:
        if isinstance(self.columns, str):
            return split_labels(as_text(row[self.columns]), self.delim)
        return [c for c in self.columns if BOOLEAN[as_text(row[c]).strip().lower()]]

    def all(self, frame: pd.DataFrame) -> list[list[str]]:
        """Return the labels of each row."""
        if isinstance(self.columns, str):
            known = {text: split_labels(as_text(text), self.delim) for text in frame[self.columns].unique()}
            return [known.get(text, []) for text in frame[self.columns]]
        marks = np.column_stack([[BOOLEAN[as_text(v).strip().lower()] for v in frame[c]] for c in self.columns])
        return [[self.columns[c] for c in row.nonzero()[0]] for row in marks]


def doubtful_labels(labels: Sequence[list[str]]) -> Iterator[tuple[str, int, str]]:
    """Yield what may be meant otherwise: (problem, first row, detail) of labels that look like several, or like others.

    Labels that hold a separator and are made of other labels, labels in brackets or quotes, and labels such as 0 and
    0.0, or a and A.
    """
    first: dict[str, int] = {}
    for i, row in enumerate(labels):
        for o in row:
            first.setdefault(o, i)
    alike: dict[Any, str] = {}
    often = Counter(p for o in first for p in _parts(o)[1])
    for o, i in first.items():
        sep, parts = _parts(o)
        # Names of two words often share one of them.
        named = sep != " " or all(p in first or p.isdigit() for p in parts)
        if named and any(p in first or often[p] > 1 for p in parts):
            yield "label made of others", i, f"{o!r}: is label_delim={sep!r} meant?"
        if o[0] in "[({'\"" or o[-1] in "])}'\"":
            yield "label with brackets or quotes", i, f"{o!r}: is it a list?"
        other = alike.setdefault(_meaning(o), o)
        if other != o:
            yield "labels alike", i, f"{o!r} beside {other!r}: are they one label?"


def _parts(label: str) -> tuple[str, list[str]]:
    """Return the first separator in `label`, and the texts between such; none if there is no separator."""
    for sep in (";", ",", "|", "\t", "/", "+", " "):
        if sep in label.strip(sep):
            return sep, [p for p in (p.strip(" []()'\"") for p in label.split(sep)) if p]
    return "", []


def _meaning(label: str) -> Any:
    shown = unicodedata.normalize("NFKC", label).casefold()
    text = "".join(c for c in shown if unicodedata.category(c) != "Cf")  # those have no width
    try:
        return float(text)
    except ValueError:
        return text
