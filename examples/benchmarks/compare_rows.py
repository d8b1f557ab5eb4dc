"""The rows of `compare.py`: one for each finished run, kept in a folder that one process at a time writes to."""

from __future__ import annotations

import csv
import fcntl
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["BY_LABEL", "KEY", "VALUES", "Runs", "alone", "keep_options"]

KEY = ("regime", "task", "base", "sampler", "crl", "lr", "stage", "seed")
VALUES = ("map", "map_head", "map_medium", "map_tail", "f1", "f1_shift", "f1_tuned", "tail_recall", "balanced", "probe")
VALUES += ("knn", "shift", "valid_map", "valid_f1_shift", "seconds")
BY_LABEL = ("label_count", "label_ap", "label_recall")


class Runs:
    """The rows of `runs.csv`, one for each finished run."""

    def __init__(self, file: Path):
        text = file.read_bytes() if file.exists() else b""
        self.file, self.size = file, text.rfind(b"\n") + 1  # what follows was being written at a kill
        whole = csv.DictReader(io.StringIO(text[: self.size].decode(), newline=""))
        self.rows = {tuple(row[k] for k in KEY): row for row in whole}

    def frame(self) -> pd.DataFrame:
        """All rows, with numbers as numbers."""
        frame = pd.DataFrame(list(self.rows.values()), columns=[*KEY, *VALUES, *BY_LABEL])
        numbers = list(VALUES)
        frame[numbers] = frame[numbers].replace("", np.nan).astype(float)
        return frame

    def get(self, key: tuple) -> dict[str, Any] | None:
        return self.rows.get(tuple(map(str, key)))

    def add(self, key: tuple, values: dict[str, Any]) -> dict[str, Any]:
        values = {k: round(float(v), 5) if k in VALUES else v for k, v in values.items()}
        row = {k: str(v) for k, v in (dict(zip(KEY, key, strict=True)) | values).items()}
        with open(self.file, "a", newline="") as f:
            f.truncate(self.size)
            writer = csv.DictWriter(f, KEY + VALUES + BY_LABEL)
            if not self.size:
                writer.writeheader()
            writer.writerow(row)
            f.flush()
            self.size = f.tell()
        self.rows[tuple(row[k] for k in KEY)] = row
        return row


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; a BlockingIOError where another one holds it. A killed process holds nothing."""
    with open(folder / "lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise BlockingIOError(
                f"Another process runs a comparison into {folder}: wait for it, or give --out."
            ) from e
        yield


def keep_options(file: Path, options: dict[str, Any]) -> None:
    """Write down what all rows of a folder have in common; a ValueError if its rows were run with other options."""
    if file.exists() and (found := json.loads(file.read_text())) != options:
        raise ValueError(f"{file.parent} holds runs with {found}, now asked for: {options}; choose another --out.")
    file.write_text(json.dumps(options) + "\n")
