"""What leaks between training and validation: images on both sides, or nearly, and groups."""

import numpy as np
import pandas as pd

from fastai_crl.images.duplicates import check_distance, fingerprints, nearest
from fastai_crl.images.image_set import ImageSet, check_images

from .annotations import column, filled
from .csv_file import as_text


def find_leaks(
    train: pd.DataFrame,
    valid: pd.DataFrame,
    images: ImageSet | None = None,
    group_col: str | None = None,
    id_col: str = "Id",
    max_distance: float = 0.03,
    progress: bool = True,
) -> pd.DataFrame:
    """Return what training and validation share: `find_leaks(dls.train_ds.items, dls.valid_ds.items, images)`.

    Args:
        train: rows of the training images.
        valid: rows of the validation images.
        images: where they lie, which are all read; None: only groups are compared.
        group_col: column of groups; None: only pixels are compared.
        id_col: column of the ids.
        max_distance: see `duplicate_groups`.
        progress: see there.

    Returns:
        Columns `leak`, `valid` and `train` (ids), `detail`. A row per validation image whose pixels equal those of a
        training image (leak "exact") or whose perceptual hash is close to that of one ("near", detail: the share of
        bits that differ; the closest is named), and per group on both sides ("group", detail: its name; the first ids
        are named). No row: no leak found.

    Raises:
        FileNotFoundError: a missing image.
        ValueError: neither `images` nor `group_col`, a missing column, an id without a group, an unreadable image,
            max_distance out of range.
    """
    if images is None and group_col is None:
        raise ValueError("Pass images=, to compare the images, group_col=, to compare groups, or both.")
    check_distance(max_distance)
    if images is not None:
        check_images(images)
    for df in (train, valid):
        for arg, col in (("id_col", id_col), ("group_col", group_col)):
            if col is not None:
                column(df, col, arg, "the table of rows")
    train, valid = (df.assign(**{id_col: df[id_col].map(as_text).astype(str)}) for df in (train, valid))
    leaks = []
    if group_col is not None:
        a, b = (filled(df, id_col, group_col, "group") for df in (train, valid))
        firsts = [df[id_col].groupby(g).first() for df, g in ((train, a), (valid, b))]
        leaks += [("group", firsts[1][g], firsts[0][g], g) for g in sorted(set(a) & set(b))]
    if images is not None and len(train) and len(valid):
        a, b = (fingerprints(images, df[id_col], progress) for df in (train, valid))
        where, distance = nearest(b, a)
        for i in np.flatnonzero(distance <= max_distance):
            near = ("near", f"{distance[i]:.1%} of the hash differs")
            kind, detail = ("exact", "equal pixels") if distance[i] < 0 else near
            leaks.append((kind, valid[id_col].iloc[i], train[id_col].iloc[where[i]], detail))
    return pd.DataFrame(leaks, columns=["leak", "valid", "train", "detail"])
