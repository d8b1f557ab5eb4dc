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
from fastai_crl.images.image_set import ImageSet

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
        _fill_sides(counts, parts, shares[1])
    return parts[groups]


def _fill_sides(counts: np.ndarray, parts: np.ndarray, share: float) -> None:
    """Move groups, in place, so that every label with two groups or more is in both parts, 0 and 1, where possible.

    One of the label's groups moves, the smallest that takes no other label away from where it was, and with which part
    1 has at most half again the `share` asked for, or is the first that it gets. (A label with two images would else be
    all in training: a fifth of two is nearer to none than to one. A whole plate is too much for that.)
    """
    has, size = counts[:, :-1] > 0, counts[:, -1]
    for c in np.argsort(has.sum(0), kind="stable"):
        groups = np.flatnonzero(has[:, c])
        if len(groups) < 2 or len(set(parts[groups])) == 2:
            continue
        side = parts[groups[0]]
        left = has[parts == side].sum(0)
        room = 1.5 * share * size.sum() - size[parts == 1].sum() if side == 0 and parts.any() else np.inf
        movable = [g for g in groups if (left[has[g]] >= 2).all() and size[g] <= max(room, 1)]
        if movable:
            parts[min(movable, key=lambda g: size[g])] = 1 - side


def make_folds(
    annotations: Annotations,
    n_folds: int = 5,
    fname: str | Path | None = None,
    group_col: str | None = None,
    images: ImageSet | None = None,
    max_distance: float = 0.03,
    seed: int | None = 42,
) -> pd.DataFrame:
    """Return the fold of each image, 0 to n_folds-1, stratified by label: a table of two columns, the ids and "fold".

    Every fold holds about 1/n_folds of the images of each label, one or several per image, as near as whole groups
    allow; a label in fewer images than folds is missing from some. `from_csv(path, folds="folds.csv", fold=0)` trains
    on the others. `annotations.join(fname, "fold").table("fold")` shows the counts.

    Args:
        annotations: ids and labels, such as `Annotations.from_csv(path / "train.csv")`.
        n_folds: how many.
        fname: csv to write, at once or not at all. Default: none.
        group_col: column of groups that stay in one fold.
        images: with them duplicates and near-duplicates stay in one fold too, along with their groups. Every file is
            read.
        max_distance: of near-duplicates, see `duplicate_groups`.
        seed: of the draw.

    Raises:
        FileNotFoundError: a missing image.
        ValueError: fewer than 2 or more folds than groups, a missing column, an id without a group, what
            `duplicate_groups` finds; `fname` is a file of other columns, which would be lost.
        OSError: `fname` cannot be written.
    """
    ids, groups = annotations.ids, np.arange(len(annotations))
    if group_col is not None:
        groups = pd.factorize(annotations.filled(annotations.column(group_col, "group_col"), "group"))[0]
    if images is not None:
        groups = _join(groups, duplicate_groups(images, ids, max_distance).to_numpy())
    if isinstance(n_folds, bool) or n_folds != int(n_folds) or not 2 <= n_folds <= len(set(groups)):
        n = f"{len(ids)} images in {len(set(groups))} groups"
        raise ValueError(f"n_folds={n_folds} must be a whole number, at least 2 and at most the groups: there are {n}.")
    n_folds = int(n_folds)
    folds = stratify(annotations.labels, groups, [1 / n_folds] * n_folds, seed)
    table = pd.DataFrame({annotations.id_col: ids, "fold": folds})
    if fname is not None:
        if Path(fname).exists() and (there := list(read_file(Path(fname)).frame)) != list(table):
            what = f"fname={str(fname)!r} is a csv of {', '.join(there)}, which would be lost"
            raise ValueError(f"{what}: folds are a file of their own, give another name, such as folds.csv.")
        replace_file(Path(fname), lambda f: table.to_csv(f, mode="wb", index=False))
    return table


def _join(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the groups (n,) of images that share a group of `a` or of `b`, or are linked by a chain of such."""
    n = a.max() + 1
    graph = coo_array((np.ones(len(a), bool), (a, b + n)), shape=(n + b.max() + 1,) * 2)
    return pd.factorize(connected_components(graph, directed=False)[1][a])[0]
