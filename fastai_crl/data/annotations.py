"""The csv of a labelled image set: read and check it, its labels and their vocabulary."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fastai_crl._errors import offenders
from fastai_crl.hpa import HPA_LABELS

__all__ = ["filled", "make_names", "make_vocab", "number_first", "parse_csv", "read_csv", "split_labels"]


def parse_csv(file: Path, id_col: str = "Id", label_col: str = "Target") -> pd.DataFrame:
    """Return the rows of `file` as they are, ids and labels as text.

    Raises FileNotFoundError for a missing file; ValueError for an unreadable or empty one, or a missing column.
    """
    if not file.is_file():
        raise FileNotFoundError(f"Csv file {file} does not exist: pass the right path and csv_fname.")
    try:
        # Ids and labels stay text ("007", "NA"); an empty label column means no label, not a missing value.
        text = {id_col: str, label_col: str}
        df = pd.read_csv(file, dtype=text, keep_default_na=False, encoding="utf-8-sig")
    except ValueError as e:
        raise ValueError(f"Csv file {file} cannot be read ({e}): it needs a header and comma separated rows.") from e
    for arg, col in (("id_col", id_col), ("label_col", label_col)):
        if col not in df:
            has = ", ".join(map(str, df.columns))
            raise ValueError(f"Csv file {file} has no column {col!r}, only {has}: rename it or pass {arg}=.")
    if df.empty:
        raise ValueError(f"Csv file {file} has a header but no rows: it needs one row per image.")
    return df


def read_csv(file: Path, id_col: str = "Id", label_col: str = "Target", delim: str | None = " ") -> pd.DataFrame:
    """Return the rows of `file`, ids and labels as text, one row per image.

    Raises what `parse_csv` does, and ValueError for an empty or duplicate id, and, with delim=None (exactly one label
    per row), an empty label.
    """
    df = parse_csv(file, id_col, label_col)
    if rows := [f"row {i + 2}" for i in np.flatnonzero(df[id_col].str.strip() == "")]:
        raise ValueError(offenders(f"Empty {id_col} in {file}", rows, "Every row needs an id: fill it in or drop it."))
    if twice := list(df[id_col][df[id_col].duplicated()].unique()):
        fix = "Every id must occur once: merge or drop the extra rows."
        raise ValueError(offenders(f"Duplicate {id_col} in {file}", twice, fix))
    if delim is None and (blank := list(df[id_col][df[label_col].str.strip() == ""])):
        fix = "With label_delim=None every image has exactly one label: fill it in or drop the row."
        raise ValueError(offenders(f"Empty {label_col} in {file} for the ids", blank, fix))
    return df


def filled(df: pd.DataFrame, id_col: str, col: str, what: str) -> pd.Series:
    """Return column `col`, each image's `what`, as text; raise ValueError naming the ids where it is empty."""
    text = df[col].astype(str).str.strip()
    if blank := list(df[id_col][df[col].isna() | (text == "")]):
        raise ValueError(offenders(f"Ids without a {col}", blank, f"Every image needs its {what}."))
    return text


def split_labels(text: str, delim: str | None) -> list[str]:
    """Return the labels in `text`: split at `delim` (" " is any white space), or one label if `delim` is None."""
    parts = [text] if delim is None else text.split() if delim == " " else text.split(delim)
    return [s for s in map(str.strip, parts) if s]


def number_first(label: str) -> tuple[bool, int, str]:
    """Return a key that sorts numbers by value, before all other labels."""
    return (False, int(label), label) if label.isdecimal() else (True, 0, label)


def make_vocab(rows: pd.Series, vocab: str | Iterable[Any] | None) -> list[str]:
    """Return the vocabulary for `rows`, the list of labels by id; by default the labels found, numbers in order.

    Raises ValueError for no label at all, a repeated one, or labels of the csv that `vocab` lacks.
    """
    found = {o for labels in rows for o in labels}
    if vocab is None:
        if not found:
            raise ValueError("No row of the csv has a label, so there is no vocabulary: pass vocab=.")
        return sorted(found, key=number_first)
    if isinstance(vocab, str):
        if vocab != "hpa":
            raise ValueError(f"vocab={vocab!r} is neither 'hpa' nor a list of labels.")
        vocab = range(len(HPA_LABELS))
    vocab = [str(o) for o in vocab]
    if len(set(vocab)) < len(vocab):
        raise ValueError(f"vocab={vocab} holds a label twice.")
    if unknown := sorted(found - set(vocab), key=number_first):
        where = [f"{o!r} (id {next(i for i, labels in rows.items() if o in labels)})" for o in unknown]
        raise ValueError(offenders("Labels that are not in the vocab", where, "Correct the csv or extend vocab=."))
    return vocab


def make_names(label_names: Any, vocab: list[str]) -> dict[str, str]:
    """Return the name to show by label: "hpa", a mapping, a list in the order of `vocab`, or nothing for None."""
    if label_names is None:
        return {}
    if isinstance(label_names, str):
        if label_names != "hpa":
            raise ValueError(f"label_names={label_names!r} is neither 'hpa' nor a mapping or list of names.")
        return {str(i): n for i, n in enumerate(HPA_LABELS)}
    if isinstance(label_names, Mapping):
        return {str(k): str(v) for k, v in label_names.items()}
    if len(label_names) != len(vocab):
        raise ValueError(f"label_names has {len(label_names)} names for the {len(vocab)} labels of the vocab.")
    return dict(zip(vocab, map(str, label_names), strict=True))
