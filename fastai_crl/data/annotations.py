"""The annotations of an image set: ids, labels, other columns. Read and checked once; every other module asks it."""

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.preprocessing import MultiLabelBinarizer

from fastai_crl._checks import offenders
from fastai_crl.hpa import LABEL_SETS

from .csv_file import CsvFile, Fault, as_text, leading_out, read_file, refuse, same_files
from .label_parser import BOOLEAN, LabelParser, number_first, split_labels


class Annotations:
    """The rows of an annotated image set, one per image: ids, labels, vocabulary, and other columns.

    Made by `from_csv` or `from_frame`.

    Attributes:
        frame: the rows; ids and labels are text.
        id_col: the column of ids.
        ids: the id of each row.
        labels: the labels of each row, a list of lists.
        parser: the `LabelParser` that reads them.
        source: the file, or "the table of rows", for errors.

    Example:
        >>> rows = pd.DataFrame({"Id": ["a", "b", "c"], "Target": ["25 0", "0", "0"]})
        >>> annotations = Annotations.from_frame(rows)
        >>> annotations.vocab(), annotations.labels
        (['0', '25'], [['25', '0'], ['0'], ['0']])
    """

    def __init__(self, frame: pd.DataFrame, id_col: Any, label_col: Any, delim: Any, source: str, lines: list[int]):
        id_col = column(frame, id_col, "id_col", source)
        if isinstance(label_col, (str, int, np.integer)):
            columns: Any = column(frame, label_col, "label_col", source)
        else:
            columns = tuple(column(frame, c, "label_col", source) for c in label_col)
            if not columns or len(set(columns)) < len(columns):
                raise ValueError(f"label_col={list(label_col)} must name at least one column, and none twice.")
        self.parser = LabelParser(columns, delim)
        if frame.empty:
            raise ValueError(f"{source.capitalize()} has a header but no rows: it needs one row per image.")
        text = [id_col, columns] if isinstance(columns, str) else [id_col]
        frame = frame.assign(**{c: frame[c].map(as_text).astype(str) for c in text})
        if not isinstance(columns, str):
            for c in columns:
                values = {v: as_text(v).strip().lower() for v in frame[c].unique()}
                if bad := [repr(as_text(v)) for v, t in values.items() if t not in BOOLEAN]:
                    fix = "A column of a label holds 0 and 1, or False and True."
                    raise ValueError(offenders(f"Values of column {c!r} in {source}", bad, fix))
        self.frame, self.id_col, self.source, self.lines = frame, id_col, source, lines
        self.ids, self.labels = list(frame[id_col]), self.parser.all(frame)

    @classmethod
    def from_csv(
        cls,
        file: str | Path,
        id_col: str | int = "Id",
        label_col: str | int | Sequence[str | int] = "Target",
        label_delim: str | None = " ",
    ) -> "Annotations":
        """Return the annotations in a comma separated file in UTF-8; every column stays text ("007", "NA", "1e3").

        Args:
            file: with a header.
            id_col: column of the ids, by name or place.
            label_col: column of the labels, by name or place; or a list, one column of 0 and 1 for each label.
            label_delim: between the labels of a row, any white space for " "; None for exactly one label per row.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file in another encoding or with another separator, rows that do not fit the header, a missing
                or doubled column, an empty or doubled id, an empty label where one is needed. Each names lines or ids.
        """
        csv_file = read_file(Path(file))
        # Before the rows: another separator leaves rows, too, that do not fit.
        column(csv_file.frame, id_col, "id_col", f"csv file {csv_file.file}")
        refuse(csv_file.faults, source=csv_file.file, n=csv_file.frame.shape[1])
        found = cls.unchecked(csv_file, id_col, label_col, label_delim)
        found.require()
        return found

    @classmethod
    def unchecked(cls, csv_file: CsvFile, id_col: Any, label_col: Any, label_delim: Any) -> "Annotations":
        """Return the same without a check of single rows, for a report on all that is wrong with them."""
        return cls(csv_file.frame, id_col, label_col, label_delim, f"csv file {csv_file.file}", csv_file.lines)

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        id_col: str | int = "Id",
        label_col: str | int | Sequence[str | int] = "Target",
        label_delim: str | None = " ",
    ) -> "Annotations":
        """Return the annotations in the rows of a DataFrame; NaN is an empty label, 7 and 7.0 are "7".

        Arguments and errors are those of `from_csv`. A plain `pd.read_csv` loses the zeros of "007" and takes labels
        such as "NA" for missing; `from_csv` does not.
        """
        found = cls(frame, id_col, label_col, label_delim, "the table of rows", list(range(2, len(frame) + 2)))
        found.require()
        return found

    # ---------------------------------------------------------------- what it holds

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def single(self) -> bool:
        """Whether each row has exactly one label."""
        return self.parser.delim is None

    def column(self, name: str | int, arg: str) -> str:
        """Return the name of a column given as argument `arg`; raise ValueError if there is none."""
        return column(self.frame, name, arg, self.source)

    def filled(self, name: str, what: str) -> pd.Series:
        """Return a column, each image's `what`, as text; raise ValueError naming the ids where it is empty."""
        return filled(self.frame, self.id_col, name, what)

    def join(self, file: str | Path, name: str) -> "Annotations":
        """Return the same rows with one more column, of another csv, found by id: such as the folds of `make_folds`.

        Args:
            file: csv with the same column of ids. It may hold other ids, too.
            name: of the column.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a column that is missing, or there already; an id twice in the file, or missing from it.
        """
        csv_file = read_file(Path(file))
        refuse(csv_file.faults, source=csv_file.file, n=csv_file.frame.shape[1])
        source = f"csv file {file}"
        by, name = (column(csv_file.frame, c, arg, source) for c, arg in ((self.id_col, "id_col"), (name, "fold_col")))
        values = csv_file.frame.set_index(by)[name]
        if name in self.frame:
            raise ValueError(f"Column {name!r} is in {self.source} and in {source}: drop one, which is meant?")
        if twice := list(values.index[values.index.duplicated()].unique()):
            raise ValueError(offenders(f"Ids that {source} has twice", twice, "Which row is meant? Drop the other."))
        if lacking := [i for i in self.ids if i not in values.index]:
            fix = "Every image needs a row there: add them, or write the file anew."
            raise ValueError(offenders(f"Ids of {self.source} that {source} lacks", lacking, fix))
        joined = copy(self)
        joined.frame = self.frame.assign(**{name: values[self.ids].to_numpy()})
        return joined

    def vocab(self, vocab: str | Iterable[Any] | None = None) -> list[str]:
        """Return the vocabulary: `vocab` as text, by default the labels found, numbers in order.

        "hpa" stands for "0".."27", "hpa2021" for "0".."18".

        Raises:
            ValueError: no label at all, a repeated one, one that holds the delimiter, or labels that `vocab` lacks.
        """
        found = dict.fromkeys(o for labels in self.labels for o in labels)
        if vocab is None:
            if not isinstance(self.parser.columns, str):
                return list(self.parser.columns)
            if not found:
                raise ValueError("No row of the csv has a label, so there is no vocabulary: pass vocab=.")
            return sorted(found, key=number_first)
        if isinstance(vocab, str):
            if vocab not in LABEL_SETS:
                raise ValueError(
                    f"vocab={vocab!r} is neither {' nor '.join(map(repr, LABEL_SETS))} nor a list of labels."
                )
            vocab = LABEL_SETS[vocab]
        if isinstance(vocab, Set):
            raise ValueError(f"vocab={vocab} is a set, which has no order: give a list.")
        vocab = [as_text(o) for o in vocab]
        if len(set(vocab)) < len(vocab):
            raise ValueError(f"vocab={vocab} holds a label twice.")
        if unknown := sorted(set(found) - set(vocab), key=number_first):
            where = [f"{o!r} (id {self.ids[next(i for i, r in enumerate(self.labels) if o in r)]})" for o in unknown]
            raise ValueError(offenders("Labels that are not in the vocab", where, "Correct the csv or extend vocab=."))
        if isinstance(self.parser.columns, str) and (
            never := [repr(o) for o in vocab if split_labels(o, self.parser.delim) != [o]]
        ):
            fix = f"No row can hold them with label_delim={self.parser.delim!r}: pass another."
            raise ValueError(offenders("Labels of the vocab that hold the delimiter", never, fix))
        return vocab

    def targets(self, vocab: Sequence[str] | None = None) -> sparse.csr_matrix:
        """Return the labels as (n, C) bool, C the labels of `vocab`."""
        binarizer = MultiLabelBinarizer(classes=self.vocab(vocab), sparse_output=True)
        return sparse.csr_matrix(binarizer.fit_transform(self.labels), dtype=bool).sorted_indices()

    def counts(self) -> Counter[str]:
        """Return the number of images of each label."""
        return Counter(o for labels in self.labels for o in dict.fromkeys(labels))

    def table(self, by: str = "fold") -> pd.DataFrame:
        """Return the number of images of each label (rows, numbers in order) in each value of a column (columns)."""
        by = self.column(by, "by")
        rows = pd.DataFrame({"label": self.labels, by: self.frame[by].to_numpy()}).explode("label")
        table = pd.crosstab(rows["label"], rows[by])
        return table.loc[sorted(table.index, key=number_first)]

    # ---------------------------------------------------------------- what is wrong with it

    def faults(self, folder: Path | None = None) -> list[Fault]:
        """Return what is wrong with single rows; with `folder` also with the files in it that they name."""
        rows, at = list(zip(self.ids, self.labels, self.lines, strict=True)), {}
        for i, _, line in rows:
            at.setdefault(i, []).append(str(line))
        found = [Fault("line break in id or label", f"row {self.lines[k]}", self.ids[k]) for k in self._broken()]
        found += [Fault("row without id", f"row {line}") for i, _, line in rows if not i.strip()]
        twice = {i: lines for i, lines in at.items() if len(lines) > 1 and i.strip()}
        found += [Fault("id in several rows", f"rows {', '.join(lines)}", i) for i, lines in twice.items()]
        if self.single:
            found += [Fault("row without label", id=i) for i, labels, _ in rows if not labels]
            several = [(i, labels) for i, labels, _ in rows if len(labels) > 1]
            found += [Fault("row with several labels", ", ".join(labels), i) for i, labels in several]
        if folder is not None:
            same = same_files(self.ids, folder)
            found += [Fault("ids of one file", " and ".join(map(repr, ids)), ids[0]) for ids in same]
            found += [Fault("id outside the folder", id=i) for i in leading_out(self.ids, folder)]
        return found

    def _broken(self) -> np.ndarray:
        """Return the rows whose id or labels hold a line break, as where a stray quote makes one row of two."""
        columns = [self.id_col]
        if isinstance(self.parser.columns, str) and not set("\r\n") & set(self.parser.delim or ""):
            columns.append(self.parser.columns)
        return np.flatnonzero(np.any([self.frame[c].str.contains(r"[\r\n]") for c in columns], axis=0))

    def require(self, folder: Path | None = None) -> None:
        """Raise ValueError for the first kind of `faults`."""
        names = {"source": self.source, "id_col": self.id_col, "label_col": self.parser.columns, "folder": folder}
        refuse(self.faults(folder), **names)


def filled(frame: pd.DataFrame, id_col: str, name: str, what: str) -> pd.Series:
    """Return a column of `frame` as text; raise ValueError naming the ids where it is empty."""
    text = frame[name].map(as_text).astype(str).str.strip()
    if blank := list(frame[id_col][text == ""]):
        raise ValueError(offenders(f"Ids without a {name}", blank, f"Every image needs its {what}."))
    return text


def column(frame: pd.DataFrame, name: Any, arg: str, source: str) -> str:
    """Return the name of a column given by name or place; raise ValueError that says why there is none."""
    names = list(map(str, frame.columns))
    if isinstance(name, (int, np.integer)) and not isinstance(name, bool) and name not in frame.columns:
        if -len(names) <= name < len(names):
            return frame.columns[name]
    elif name in list(frame.columns):
        return name
    raise ValueError(
        f"{source[0].upper()}{source[1:]} has no column {name!r}, only {', '.join(names)}: {_why(names, name, arg)}"
    )


def _why(names: list[str], name: Any, arg: str) -> str:
    """Return the likely cause of a missing column, with its fix."""
    for sep, called in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(names) == 1 and sep in names[0]:
            return (
                f"its columns are separated by {called}, not commas. Save it with commas, for instance "
                f"pd.read_csv(file, sep={sep!r}, dtype=str, keep_default_na=False).to_csv(file, index=False)."
            )
    if names[0].lstrip().startswith("#"):
        return "its first line is a comment, not a header. Remove it."
    if like := [n for n in names if n.strip().casefold() == str(name).strip().casefold()]:
        return f"{like[0]!r} differs in spaces or case. Rename it or pass {arg}={like[0]!r}."
    several = ", or a list with one column of 0 and 1 for each label" if arg == "label_col" else ""
    return f"rename it or pass {arg}={several}."
