"""Parts of a data set that hold equal shares of every label: the stratified split, and folds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.preprocessing import MultiLabelBinarizer

from fastai_crl._files import replace_file
from fastai_crl.images.duplicates import duplicate_groups
from fastai_crl.images.layout import CHANNELS, PATTERN

from .annotations import Annotations
from .csv_file import read_file


def stratify(labels: Sequence[list[str]], groups: np.ndarray, shares: list[float], seed: int | None) -> np.ndarray:
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
    id_col: str | int = "Id",
    label_col: str | int | Sequence[str | int] = "Target",
    label_delim: str | None = " ",
    channels: Sequence[str] = CHANNELS,
    pattern: str = PATTERN,
    max_distance: float = 0.03,
    bits: int | None = None,
) -> pd.DataFrame:
    """Return the rows of `csv`, a file or DataFrame, with a column `fold_col`: 0 to n_folds-1, stratified by label.

    Every fold holds about 1/n_folds of the images of each label, one or several per image, as near as whole groups
    allow; a label in fewer images than folds is missing from some. `HPADataLoaders.from_csv(path, fold_col="fold",
    fold=0)` trains on the others. `Annotations.from_csv(fname).table(by="fold")` shows the counts.

    Args:
        csv: file or rows.
        n_folds: how many.
        group_col: column of groups that stay in one fold.
        folder: the images; with it duplicates and near-duplicates stay in one fold too, along with their groups. Every
            file is read.
        fname: csv to write, at once or not at all; may be `csv` itself. Of a file every line stays as it is, with its
            fold at the end; mode, BOM and line ends are kept. Default: none.
        seed: of the draw.
        fold_col: name of the new column.
        id_col: as for `Annotations.from_csv`, like the next two.
        label_col: see there.
        label_delim: see there.
        channels: of the images, as for `duplicate_groups`, like the next three.
        pattern: see there.
        max_distance: see there.
        bits: see there.

    Raises:
        FileNotFoundError: a missing csv or image.
        ValueError: fewer than 2 or more folds than groups, a column `fold_col` that exists already, a missing column,
            an id without a group, and all that `Annotations.from_csv` finds.
    """
    csv_file = None if isinstance(csv, pd.DataFrame) else read_file(Path(csv))
    if csv_file is None:
        rows, df = Annotations.from_frame(csv, id_col, label_col, label_delim), csv.copy()
    else:
        rows = Annotations.of_file(csv_file, id_col, label_col, label_delim)
        df = rows.frame.copy()
    if fold_col in df:
        raise ValueError(f"The csv has a column {fold_col!r} already: drop it or pass another fold_col.")
    groups = np.arange(len(df))
    if group_col is not None:
        groups = pd.factorize(rows.filled(rows.column(group_col, "group_col"), "group"))[0]
    if folder is not None:
        groups = _join(groups, duplicate_groups(folder, rows.ids, channels, pattern, max_distance, bits).to_numpy())
    if isinstance(n_folds, bool) or n_folds != int(n_folds) or not 2 <= n_folds <= len(set(groups)):
        n = f"{len(df)} images in {len(set(groups))} groups"
        raise ValueError(f"n_folds={n_folds} must be a whole number, at least 2 and at most the groups: there are {n}.")
    n_folds = int(n_folds)
    df[fold_col] = stratify(rows.labels, groups, [1 / n_folds] * n_folds, seed)
    if fname is not None and csv_file is not None:
        csv_file.write_with(Path(fname), fold_col, df[fold_col].tolist())
    elif fname is not None:
        replace_file(Path(fname), lambda f: df.to_csv(f, mode="wb", index=False))
    return df


def _join(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the groups (n,) of images that share a group of `a` or of `b`, or are linked by a chain of such."""
    link = coo_array((np.ones(len(a), bool), (a, b)), shape=(a.max() + 1, b.max() + 1))
    n = link.shape[0]
    graph = coo_array((link.data, (link.row, link.col + n)), shape=(n + link.shape[1],) * 2)
    return pd.factorize(connected_components(graph, directed=False)[1][a])[0]
