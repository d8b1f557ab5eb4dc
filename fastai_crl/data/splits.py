"""The split into training and validation: at random, by groups, stratified by label, into folds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from fastai.data.transforms import RandomSplitter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import GroupShuffleSplit
from sklearn.preprocessing import MultiLabelBinarizer

from fastai_crl._errors import offenders
from fastai_crl.hpa import HPA_CHANNELS
from fastai_crl.images.duplicates import duplicate_groups
from fastai_crl.images.layout import PATTERN, replace_file

from .annotations import filled, number_first, read_csv, split_labels

__all__ = ["add_folds", "label_counts", "valid_rows"]

# ---------------------------------------------------------------- training and validation


def valid_rows(
    df: pd.DataFrame,
    id_col: str,
    valid_pct: float,
    seed: int | None,
    group_col: str | None = None,
    valid_col: str | None = None,
    fold_col: str | None = None,
    fold: int | str = 0,
    labels: Sequence[list[str]] | None = None,
) -> list[int]:
    """Return the positions of the validation rows: the one place that decides on the split.

    Either the rows that the boolean `valid_col` marks; or those whose `fold_col` is `fold`; or a share `valid_pct` of
    the groups of `group_col`, or of the rows, as fastai's `RandomSplitter` draws them; with `labels`, the list of
    labels of each row, the share is one of every label's images. Empty for valid_pct=0.

    Raises ValueError for a missing column, values that are not boolean, an unknown fold, ids without a group or fold,
    a group on both sides of a split fixed by `valid_col` or `fold_col`, a share outside [0,1), and a split that leaves
    one side empty.
    """
    if valid_col is not None and fold_col is not None:
        raise ValueError("Pass valid_col or fold_col, not both: each of them fixes the split.")
    fixed = valid_col if valid_col is not None else fold_col
    if labels is not None and fixed is not None:
        raise ValueError(f"stratify=True draws a split, but column {fixed!r} fixes it: pass one of them.")
    for arg, col in (("group_col", group_col), ("valid_col", valid_col), ("fold_col", fold_col)):
        if col is not None and col not in df:
            raise ValueError(f"The csv has no column {col!r} for {arg}=, only {', '.join(map(str, df.columns))}.")
    groups = None if group_col is None else filled(df, id_col, group_col, "group")
    if valid_col is not None:
        text = df[valid_col].astype(str).str.strip().str.lower()
        if bad := list(df[valid_col][~text.isin(["true", "false", "1", "0", "1.0", "0.0"])].unique()):
            raise ValueError(offenders(f"Values of {valid_col} that are not boolean", bad, "Use True and False."))
        chosen = text.isin(["true", "1", "1.0"]).to_numpy()
    elif fold_col is not None:
        chosen = _in_fold(df, id_col, fold_col, fold)
    else:
        if not 0 <= valid_pct < 1:
            raise ValueError(f"valid_pct={valid_pct} must be a share of the images, at least 0 and below 1.")
        if valid_pct == 0:
            return []
        if groups is not None and groups.nunique() < 2:
            raise ValueError(f"Column {group_col!r} holds one group only: a split by group needs at least two.")
        if labels is None:
            return _checked(_random(df, valid_pct, seed, groups), df, f"valid_pct={valid_pct}")
        codes = np.arange(len(df)) if groups is None else pd.factorize(groups)[0]
        chosen = _stratify(labels, codes, [1 - valid_pct, valid_pct], seed) == 1
    if fixed is not None and groups is not None and (both := sorted(set(groups[~chosen]) & set(groups[chosen]))):
        fix = f"Move each to one side in {fixed!r}, or leave group_col out to use that split all the same."
        raise ValueError(offenders(f"Groups of {group_col!r} on both sides of the split by {fixed!r}", both, fix))
    by = f"valid_pct={valid_pct}" if fixed is None else f"column {fixed!r}"
    return _checked(np.flatnonzero(chosen).tolist(), df, by)


def _checked(rows: list[int], df: pd.DataFrame, by: str) -> list[int]:
    if not 0 < len(rows) < len(df):
        raise ValueError(f"{by} puts {len(rows)} of {len(df)} images into validation: both sides need at least one.")
    return rows


def _random(df: pd.DataFrame, valid_pct: float, seed: int | None, groups: pd.Series | None) -> list[int]:
    if groups is None:
        return [int(i) for i in RandomSplitter(valid_pct, seed=seed)(df)[1]]
    split = GroupShuffleSplit(n_splits=1, test_size=valid_pct, random_state=seed)
    return next(split.split(df, groups=groups))[1].tolist()


def _in_fold(df: pd.DataFrame, id_col: str, fold_col: str, fold: int | str) -> np.ndarray:
    folds = filled(df, id_col, fold_col, "fold")
    if not (chosen := (folds == str(fold)).to_numpy()).any():
        known = ", ".join(sorted(folds.unique(), key=number_first)[:20])
        raise ValueError(f"fold={fold!r} does not occur in column {fold_col!r}, which holds {known}.")
    return chosen


# ---------------------------------------------------------------- stratification


def _stratify(labels: Sequence[list[str]], groups: np.ndarray, shares: list[float], seed: int | None) -> np.ndarray:
    """Return the part (n,) of each image, so that part k holds `shares[k]` of each label's images and whole groups.

    One group after the other, those with the largest share of any label first, goes where it lessens most the squared
    distance to the shares asked for, of every label and of all images, each relative to the size of the part.
    """
    counts = np.column_stack([MultiLabelBinarizer().fit_transform(labels), np.ones(len(labels), int)])
    counts = pd.DataFrame(counts).groupby(groups).sum().to_numpy()
    share = counts / counts.sum(0)  # of each label's images, by group
    size, square = np.array(shares), (share**2).sum(1)
    wanted = np.repeat(size[:, None], share.shape[1], 1)
    parts = np.empty(len(share), int)
    for g in np.lexsort((np.random.default_rng(seed).random(len(share)), -share.max(1))):
        k = parts[g] = np.argmin((square[g] - 2 * wanted @ share[g]) / size)
        wanted[k] -= share[g]
    if len(shares) == 2:
        _fill_sides(counts, parts)
    return parts[groups]


def _fill_sides(counts: np.ndarray, parts: np.ndarray) -> None:
    """Move groups, in place, so that every label with two groups or more is in both parts, 0 and 1, where possible.

    One of the label's groups moves, the smallest that takes no other label away from where it was. (A label with two
    images would else be all in training: a fifth of two is nearer to none than to one.)
    """
    has, size = counts[:, :-1] > 0, counts[:, -1]
    for c in np.argsort(has.sum(0), kind="stable"):
        groups = np.flatnonzero(has[:, c])
        if len(groups) < 2 or len(set(parts[groups])) == 2:
            continue
        side = parts[groups[0]]
        left = has[parts == side].sum(0)
        movable = [g for g in groups if (left[has[g]] >= 2).all()]
        if movable:
            parts[min(movable, key=lambda g: size[g])] = 1 - side


def add_folds(
    csv: str | Path | pd.DataFrame,
    n_folds: int = 5,
    group_col: str | None = None,
    folder: str | Path | None = None,
    fname: str | Path | None = None,
    seed: int | None = 42,
    fold_col: str = "fold",
    id_col: str = "Id",
    label_col: str = "Target",
    label_delim: str | None = " ",
    channels: Sequence[str] = HPA_CHANNELS,
    pattern: str = PATTERN,
    max_distance: float = 0.03,
    bits: int | None = None,
) -> pd.DataFrame:
    """Return the rows of `csv`, a file or DataFrame, with a column `fold_col`: 0 to n_folds−1, stratified by label.

    Every fold holds about 1/n_folds of the images of each label, one or several per image, as near as whole groups
    allow; a label in fewer images than folds is missing from some. `HPADataLoaders.from_csv(path, fold_col="fold",
    fold=0)` trains on the others.

    group_col: column of groups that stay in one fold.
    folder: the images; with it duplicates and near-duplicates stay in one fold too, along with their groups. Every
        file is read (see `duplicate_groups`, also for `max_distance`, `bits`).
    fname: csv to write, at once or not at all; may be `csv` itself. Default: none.
    label_delim: between the labels of a row, any white space for " "; None for exactly one label per row.

    Raises ValueError for fewer than 2 or more folds than groups, a column `fold_col` that exists already, a missing
    column, an id without a group; FileNotFoundError for a missing csv or image.
    """
    df = csv.copy() if isinstance(csv, pd.DataFrame) else read_csv(Path(csv), id_col, label_col, label_delim)
    for arg, col in (("id_col", id_col), ("label_col", label_col), ("group_col", group_col)):
        if col is not None and col not in df:
            raise ValueError(f"The csv has no column {col!r} for {arg}=, only {', '.join(map(str, df.columns))}.")
    if fold_col in df:
        raise ValueError(f"The csv has a column {fold_col!r} already: drop it or pass another fold_col.")
    groups = np.arange(len(df)) if group_col is None else pd.factorize(filled(df, id_col, group_col, "group"))[0]
    if folder is not None:
        groups = _join(groups, duplicate_groups(folder, df[id_col], channels, pattern, max_distance, bits).to_numpy())
    if n_folds != int(n_folds) or not 2 <= n_folds <= len(set(groups)):
        n = f"{len(df)} images in {len(set(groups))} groups"
        raise ValueError(f"n_folds={n_folds} must be a whole number, at least 2 and at most the groups: there are {n}.")
    df[fold_col] = _stratify(_label_lists(df[label_col], label_delim), groups, [1 / n_folds] * n_folds, seed)
    if fname is not None:
        replace_file(Path(fname), lambda f: df.to_csv(f, index=False))
    return df


def _label_lists(column: pd.Series, delim: str | None) -> list[list[str]]:
    return [split_labels(text, delim) for text in column.fillna("").astype(str)]


def _join(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the groups (n,) of images that share a group of `a` or of `b`, or are linked by a chain of such."""
    link = coo_array((np.ones(len(a), bool), (a, b)), shape=(a.max() + 1, b.max() + 1))
    n = link.shape[0]
    graph = coo_array((link.data, (link.row, link.col + n)), shape=(n + link.shape[1],) * 2)
    return pd.factorize(connected_components(graph, directed=False)[1][a])[0]


def label_counts(
    df: pd.DataFrame, by: str = "fold", label_col: str = "Target", label_delim: str | None = " "
) -> pd.DataFrame:
    """Return the number of images of each label (rows, numbers in order) in each value of the column `by` (columns)."""
    rows = pd.DataFrame({"label": _label_lists(df[label_col], label_delim), by: df[by].to_numpy()}).explode("label")
    table = pd.crosstab(rows["label"], rows[by])
    return table.loc[sorted(table.index, key=number_first)]
