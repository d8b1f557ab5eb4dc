"""The split into training and validation, as objects: random, by a column, by folds, by groups, stratified by label."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from fastai.data.transforms import RandomSplitter
from sklearn.model_selection import GroupShuffleSplit

from fastai_crl._checks import offenders

from .annotations import Annotations
from .label_parser import BOOLEAN, number_first
from .stratify import stratify


@runtime_checkable
class Split(Protocol):
    """What decides on the split: an object with this method."""

    def rows(self, annotations: Annotations) -> Iterable[int]:
        """Return the positions of the validation rows."""


class _Drawn:
    """A split that is drawn: its share is checked."""

    valid_pct: float

    def __post_init__(self):
        if isinstance(self.valid_pct, (bool, str)) or not 0 <= self.valid_pct < 1:
            raise ValueError(f"valid_pct={self.valid_pct!r} must be a share of the images, at least 0 and below 1.")


@dataclass(frozen=True)
class RandomSplit(_Drawn):
    """A share of the rows, drawn as fastai's `RandomSplitter` draws them; 0 trains on all.

    Args:
        valid_pct: share of the images in validation, at least 0 and below 1.
        seed: of the draw; None draws anew each time.

    Example:
        >>> annotations = Annotations.from_frame(pd.DataFrame({"Id": list("abcdef"), "Target": list("000111")}))
        >>> len(RandomSplit(valid_pct=0.5).rows(annotations))
        3
    """

    valid_pct: float = 0.2
    seed: int | None = 42

    def rows(self, annotations: Annotations) -> list[int]:
        """Return the positions of the validation rows."""
        if self.valid_pct == 0:
            return []
        return [int(i) for i in RandomSplitter(self.valid_pct, seed=self.seed)(annotations.frame)[1]]


@dataclass(frozen=True)
class GroupSplit(_Drawn):
    """A share of the groups of a column, for instance of patients or source pictures: none is on both sides.

    Args:
        group_col: column of groups.
        valid_pct: share of the groups in validation.
        seed: of the draw.

    Example:
        >>> rows = pd.DataFrame({"Id": list("abcdef"), "Target": list("000111"), "patient": list("xxyyzz")})
        >>> valid = GroupSplit("patient", valid_pct=0.3).rows(Annotations.from_frame(rows))
        >>> len(set(rows.patient[valid]))
        1
    """

    group_col: str
    valid_pct: float = 0.2
    seed: int | None = 42

    def rows(self, annotations: Annotations) -> list[int]:
        """Return the positions of the validation rows.

        Raises:
            ValueError: a missing column, an id without a group, fewer than two groups.
        """
        groups = _groups(annotations, self.group_col)
        if self.valid_pct == 0:
            return []
        split = GroupShuffleSplit(n_splits=1, test_size=self.valid_pct, random_state=self.seed)
        return next(split.split(groups, groups=groups))[1].tolist()


@dataclass(frozen=True)
class StratifiedSplit(_Drawn):
    """A share of each label's images, of whole groups with `group_col`; each label on both sides, where possible.

    Groups move for the sake of a label as long as validation has at most half again its share. Labels of which no
    group fits are named in a warning.

    Args:
        valid_pct: share of each label's images in validation.
        seed: of the draw.
        group_col: column of groups that stay on one side.

    Example:
        >>> rows = pd.DataFrame({"Id": list("abcdef"), "Target": list("000011")})
        >>> sorted(rows.Target[StratifiedSplit(valid_pct=0.5).rows(Annotations.from_frame(rows))])
        ['0', '0', '1']
    """

    valid_pct: float = 0.2
    seed: int | None = 42
    group_col: str | None = None

    def rows(self, annotations: Annotations) -> list[int]:
        """Return the positions of the validation rows.

        Raises:
            ValueError: a missing column, an id without a group, fewer than two groups.
        """
        groups = np.arange(len(annotations))
        if self.group_col is not None:
            groups = pd.factorize(_groups(annotations, self.group_col))[0]
        if self.valid_pct == 0:
            return []
        parts = stratify(annotations.labels, groups, [1 - self.valid_pct, self.valid_pct], self.seed)
        if self.group_col is not None and (missing := _missing(annotations.labels, groups, set(groups[parts == 1]))):
            fix = "Whole groups leave no other way near the share asked for: give another valid_pct=, or folds."
            warnings.warn(offenders("Labels that no validation image has", missing, fix), stacklevel=2)
        return np.flatnonzero(parts == 1).tolist()


@dataclass(frozen=True)
class ColumnSplit:
    """The rows that a boolean column marks.

    Args:
        valid_col: column of True and False, or 1 and 0.
        group_col: column of groups; one on both sides is an error.

    Example:
        >>> rows = pd.DataFrame({"Id": list("abc"), "Target": list("010"), "is_valid": [False, True, False]})
        >>> ColumnSplit("is_valid").rows(Annotations.from_frame(rows))
        [1]
    """

    valid_col: str
    group_col: str | None = None

    def rows(self, annotations: Annotations) -> list[int]:
        """Return the positions of the validation rows.

        Raises:
            ValueError: a missing column, values that are not boolean, an id without a group, a group on both sides.
        """
        column = annotations.frame[annotations.column(self.valid_col, "valid_col")]
        text = column.astype(str).str.strip().str.lower()
        if bad := list(column[~text.isin(BOOLEAN)].unique()):
            raise ValueError(offenders(f"Values of {self.valid_col} that are not boolean", bad, "Use True and False."))
        return _fixed(annotations, text.map(BOOLEAN).to_numpy(bool), self.valid_col, self.group_col)


@dataclass(frozen=True)
class FoldSplit:
    """One fold for validation, the others for training.

    Args:
        fold_col: column of folds.
        fold: the one to validate on.
        group_col: column of groups; one on both sides is an error.
        folds: csv that holds the column, with the fold of each id, as `make_folds` writes it. Default: the annotations
            hold it.

    Example:
        >>> rows = pd.DataFrame({"Id": list("abc"), "Target": list("010"), "fold": [0, 1, 2]})
        >>> FoldSplit("fold", 2).rows(Annotations.from_frame(rows))
        [2]
    """

    fold_col: str = "fold"
    fold: int | str = 0
    group_col: str | None = None
    folds: str | Path | None = None

    def rows(self, annotations: Annotations) -> list[int]:
        """Return the positions of the validation rows.

        Raises:
            FileNotFoundError: no such csv of folds.
            ValueError: a missing column, an id without a fold or group, a fold that does not occur, a group on both
                sides.
        """
        if self.folds is not None:
            annotations = annotations.join(self.folds, self.fold_col)
        folds = annotations.filled(annotations.column(self.fold_col, "fold_col"), "fold")
        if not (chosen := (folds == str(self.fold)).to_numpy()).any():
            known = ", ".join(sorted(folds.unique(), key=number_first)[:20])
            raise ValueError(f"fold={self.fold!r} does not occur in column {self.fold_col!r}, which holds {known}.")
        return _fixed(annotations, chosen, self.fold_col, self.group_col)


def split_by(
    valid_pct: float | None = None,
    seed: int | None = 42,
    group_col: str | None = None,
    valid_col: str | None = None,
    stratify: bool | None = None,
    fold_col: str | None = None,
    fold: int | str | None = None,
    folds: str | Path | None = None,
) -> Split:
    """Return the split that the keywords of `from_csv` describe; see the classes for their meaning.

    Without a column that fixes the split a fifth of each label's images validates, with folds the first fold, unless
    told otherwise; with `stratify=False` a fifth of all images, or of all groups.

    Raises:
        ValueError: keywords that exclude each other, or a share out of range.
    """
    if folds is not None and fold_col is None:
        fold_col = "fold"
    if valid_col is not None and fold_col is not None:
        raise ValueError("Pass valid_col or folds (fold_col), not both: each of them fixes the split.")
    if stratify and (fixed := valid_col or fold_col):
        raise ValueError(f"stratify=True draws a split, but column {fixed!r} fixes it: pass one of them.")
    if valid_pct is not None and (fixed := valid_col or fold_col):
        raise ValueError(f"valid_pct={valid_pct!r} is of a drawn split, but column {fixed!r} fixes it: leave it out.")
    if fold is not None and fold_col is None:
        raise ValueError(f"fold={fold!r} needs folds=, the csv of the folds, or fold_col=, a column of them.")
    if valid_col is not None:
        return ColumnSplit(valid_col, group_col)
    if fold_col is not None:
        return FoldSplit(fold_col, 0 if fold is None else fold, group_col, folds)
    valid_pct = 0.2 if valid_pct is None else valid_pct
    if stratify is None or stratify:
        return StratifiedSplit(valid_pct, seed, group_col)
    return RandomSplit(valid_pct, seed) if group_col is None else GroupSplit(group_col, valid_pct, seed)


def validation_rows(split: Split | Callable[[Any], Any], annotations: Annotations) -> list[int]:
    """Return the positions of the validation rows: the one place that decides on the split.

    Args:
        split: one of the classes here, any object with their method `rows`, or a splitter of fastai, which gets the
            rows and returns the positions for training and for validation, and has to take every row.
        annotations: the rows.

    Raises:
        ValueError: what is no split, or one that puts all rows into validation, or none though a share was asked for.
    """
    n = len(annotations)
    if isinstance(split, Split):
        rows = [int(i) for i in split.rows(annotations)]
    elif callable(split):
        train, rows = ([int(i) for i in part] for part in split(annotations.frame))
        if sorted(train + rows) != list(range(n)):
            raise ValueError(f"split={split!r} must put each of the {n} rows on one side, training or validation.")
    else:
        raise ValueError(f"split={split!r} is no split: pass one such as RandomSplit(0.2), or a splitter of fastai.")
    if len(set(rows)) < len(rows) or not all(0 <= i < n for i in rows):
        raise ValueError(f"split={split!r} must give positions of rows from 0 to {n - 1}, each once.")
    if len(rows) == n or (not rows and getattr(split, "valid_pct", None) != 0):
        by = f"valid_pct={split.valid_pct}" if hasattr(split, "valid_pct") else f"split={split!r}"
        if isinstance(split, (ColumnSplit, FoldSplit)):
            by = f"column {split.valid_col if isinstance(split, ColumnSplit) else split.fold_col!r}"
        raise ValueError(f"{by} puts {len(rows)} of {n} images into validation: both sides need at least one.")
    return rows


def _groups(annotations: Annotations, group_col: str) -> pd.Series:
    groups = annotations.filled(annotations.column(group_col, "group_col"), "group")
    if groups.nunique() < 2:
        raise ValueError(f"Column {group_col!r} holds one group only: a split by group needs at least two.")
    return groups


def _missing(labels: list[list[str]], groups: np.ndarray, valid: set[int]) -> list[str]:
    """Return the labels of several groups that none of the groups `valid` has."""
    own: dict[str, set[int]] = {}
    for row, group in zip(labels, groups, strict=True):
        for o in row:
            own.setdefault(o, set()).add(group)
    return sorted((o for o, those in own.items() if len(those) > 1 and not those & valid), key=number_first)


def _fixed(annotations: Annotations, chosen: np.ndarray, fixed: str, group_col: str | None) -> list[int]:
    """Return the chosen rows; raise ValueError for a group on both sides."""
    if group_col is not None:
        groups = annotations.filled(annotations.column(group_col, "group_col"), "group")
        if both := sorted(set(groups[~chosen]) & set(groups[chosen])):
            fix = f"Move each to one side in {fixed!r}, or leave group_col out to use that split all the same."
            raise ValueError(offenders(f"Groups of {group_col!r} on both sides of the split by {fixed!r}", both, fix))
    return np.flatnonzero(chosen).tolist()
