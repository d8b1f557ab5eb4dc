"""A csv file, every value as its text: what does not fit is named by line; and which of its ids name the same file."""

import csv
import io
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fastai_crl._checks import offenders


@dataclass(frozen=True)
class Fault:
    """What is wrong with a data set: a kind of problem, where or what, and the id and channel, if it is of such."""

    problem: str
    detail: str = ""
    id: str = ""
    channel: str = ""

    def __str__(self) -> str:
        shown = self.id if self.id.isprintable() else repr(self.id)
        return f"{shown} ({self.detail})" if shown and self.detail else shown or self.detail


# The problems that loading stops at, in the order in which they are reported; of each what is wrong, and the fix.
STOPS = {
    "fields do not fit": (
        "Rows of {source} that do not have the {n} fields of the header",
        'Correct them; a comma in a value needs quotes ("a, b").',
    ),
    "stray quote": (
        "Rows of {source} with a stray quote",
        'Remove it, or write "" for a quote within a quoted value.',
    ),
    "line break in id or label": (
        "Ids or labels with a line break in {source}",
        "Is there a stray quote? Correct it, or pass the line break as label_delim=.",
    ),
    "row without id": ("Empty {id_col} in {source}", "Every row needs an id: fill it in or drop it."),
    "id in several rows": (
        "Duplicate {id_col} in {source}",
        "Every id must occur once: merge or drop the extra rows.",
    ),
    "row without label": (
        "Empty {label_col} in {source} for the ids",
        "With label_delim=None every image has exactly one label: fill it in or drop the row.",
    ),
    "row with several labels": (
        "Several labels in {source} for the ids",
        "With label_delim=None every image has exactly one label: pass label_delim=' '.",
    ),
    "ids of one file": (
        "Ids of {source} that name one file",
        "Every image must occur once: merge or drop the extra rows.",
    ),
    "id outside the folder": (
        "Ids of {source} that lead out of {folder}",
        "Correct them, or pass as folder= the one that holds all images.",
    ),
}


def refuse(faults: Sequence[Fault], **names: Any) -> None:
    """Raise ValueError for the first kind of problem among `faults`; `names` are those in its text."""
    for problem, (what, fix) in STOPS.items():
        if found := [fault for fault in faults if fault.problem == problem]:
            raise ValueError(offenders(what.format(**names), found, fix))


@dataclass(frozen=True)
class CsvFile:
    """The rows of a csv as text, by the line where each begins, and what is wrong with others."""

    file: Path
    frame: pd.DataFrame
    lines: list[int]
    faults: list[Fault]


def as_text(value: Any) -> str:
    """Return a value of a DataFrame as a csv has it: nothing for NaN and None, a whole number without its ".0"."""
    if isinstance(value, str):
        return value
    if value is None or value is pd.NA or value != value:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def read_file(file: Path) -> CsvFile:
    """Return the rows of `file`; those that do not fit are left out and among the faults.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without a header, not in UTF-8, or with a column twice.
    """
    if not file.is_file():
        raise FileNotFoundError(f"Csv file {file} does not exist: pass the right path and csv_fname.")
    text = _decoded(file)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    faults: list[Fault] = []
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as e:
            faults.append(Fault("stray quote", f"{_span(start, reader.line_num)} ({e})"))
            continue
        if not row:
            continue
        if header is None:
            header = row
        elif len(row) != len(header):
            faults.append(Fault("fields do not fit", f"{_span(start, reader.line_num)} has {len(row)}"))
        elif any('"' in value and re.match(r'\s+"', value) for value in row):
            faults.append(Fault("stray quote", f"{_span(start, reader.line_num)} has it after a space"))
        elif reader.line_num > start and _swallows(row, len(header)):
            faults.append(Fault("stray quote", f"{_span(start, reader.line_num)} are one row"))
        else:
            rows.append(row)
            lines.append(start)
    if header is None:
        raise ValueError(f"Csv file {file} cannot be read: it needs a header and comma separated rows.")
    if twice := sorted({c for c in header if header.count(c) > 1}):
        fix = "Rename or drop one: which of them is meant?"
        raise ValueError(offenders(f"Columns that csv file {file} has twice", list(map(repr, twice)), fix))
    return CsvFile(file, pd.DataFrame(rows, columns=header, dtype=object).astype(str), lines, faults)


def _span(first: int, last: int) -> str:
    return f"line {first}" if last <= first else f"lines {first} to {last}"


def _swallows(row: list[str], n: int) -> bool:
    """Whether a value over several lines holds what looks like rows of its own."""
    inner = [line for value in row for line in value.splitlines()[1:]]
    return n == 1 or any(line.count(",") == n - 1 for line in inner)


def _decoded(file: Path) -> str:
    raw = file.read_bytes()
    top = raw[:4096]
    found = "UTF-16" if top[:2] in (b"\xff\xfe", b"\xfe\xff") or top.count(0) > len(top) / 4 else None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        found = found or "cp1252"
        where = f"line {raw.count(bytes([10]), 0, e.start) + 1} holds the byte 0x{raw[e.start]:02x}"
    else:
        where = "it holds zero bytes"
        if b"\0" in raw and not found:
            line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
            raise ValueError(f"Csv file {file} is damaged: it holds zero bytes in line {line}. Restore it from a copy.")
    if found:
        raise ValueError(
            f"Csv file {file} cannot be read: it is not in UTF-8 ({where}), but in {found}, as it seems. Save it as "
            f"UTF-8, for instance file.write_text(file.read_text({found!r}), 'utf-8')."
        )
    return text


# ---------------------------------------------------------------- ids as names of files


def same_files(ids: Sequence[str], folder: Path) -> list[list[str]]:
    """Return ids that differ but name one file in `folder`: x and ./x, Unicode forms, case where the disk folds it."""
    folds, base = _folds_case(folder), os.path.abspath(folder)
    found: dict[str, list[str]] = {}
    for i in dict.fromkeys(ids):
        if i.strip():
            key = unicodedata.normalize("NFC", os.path.normpath(os.path.join(base, i)) if "/" in i else f"{base}/{i}")
            found.setdefault(key.casefold() if folds else key, []).append(i)
    return [same for same in found.values() if len(same) > 1]


def leading_out(ids: Sequence[str], folder: Path) -> list[str]:
    """Return the ids of files that are not in `folder` or below it."""
    base = os.path.abspath(folder)
    below = os.path.join(base, "")
    return [i for i in ids if "/" in i and not os.path.normpath(os.path.join(base, i)).startswith(below)]


def _folds_case(folder: Path) -> bool:
    """Whether the disk takes names in other case for the same file."""
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    name = next((n for n in names if n.swapcase() != n), None)
    return name is not None and name.swapcase() not in names and (folder / name.swapcase()).exists()
