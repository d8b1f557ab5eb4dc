"""The finished runs of a comparison: rows and predictions in a folder that one process at a time writes to."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fastai_crl._files import replace_file
from fastai_crl.predict.parts import held


def digest(*texts: str) -> str:
    """Return 16 hexadecimal digits that stand for texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


class Runs:
    """The rows of `folder/runs.csv`, one for each finished run, and its arrays in `folder/outputs`.

    Whatever interrupts a run, what has finished before stays: a row that is cut off is left out, and arrays are in
    their place, whole, before the row is written.

    Args:
        folder: made where there is none, at the first row.
        key: columns that tell runs apart.
        numbers: columns that `frame` has as numbers.
        texts: further columns.
    """

    def __init__(self, folder: Path, key: Sequence[str], numbers: Sequence[str], texts: Sequence[str] = ()):
        self.folder, self.file, self.key, self.numbers = folder, folder / "runs.csv", tuple(key), list(numbers)
        self.columns = [*key, *numbers, *texts]
        text = self.file.read_bytes() if self.file.exists() else b""
        self._size = text.rfind(b"\n") + 1  # what follows was being written at a kill
        whole = csv.DictReader(io.StringIO(text[: self._size].decode(), newline=""))
        self.rows = {tuple(row[k] for k in self.key): row for row in whole}

    def frame(self) -> pd.DataFrame:
        """Return all rows, with numbers as numbers."""
        frame = pd.DataFrame(list(self.rows.values()), columns=self.columns)
        frame[self.numbers] = frame[self.numbers].replace("", np.nan).astype(float)
        return frame

    def get(self, key: Sequence[Any]) -> dict[str, str] | None:
        """Return the row of a run, None where it has not finished."""
        return self.rows.get(tuple(map(str, key)))

    def add(self, key: Sequence[Any], values: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> Any:
        """Keep the row of a run, and its arrays; return the row."""
        if arrays is not None:
            file = self._arrays_file(key)
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, lambda f: np.savez(f, **arrays))
        values = {k: round(float(v), 5) if k in self.numbers else v for k, v in values.items()}
        row = {k: str(v) for k, v in (dict(zip(self.key, key, strict=True)) | values).items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a", newline="", encoding="utf-8") as f:
            f.truncate(self._size)
            writer = csv.DictWriter(f, self.columns)
            if not self._size:
                writer.writeheader()
            writer.writerow(row)
            f.flush()
            self._size = f.tell()
        self.rows[tuple(row[k] for k in self.key)] = row
        return row

    def finished(self, key: Sequence[Any]) -> bool:
        """Whether the row and the arrays of a run are there."""
        return self.get(key) is not None and self._arrays_file(key).exists()

    def arrays(self, key: Sequence[Any]) -> dict[str, np.ndarray]:
        """Return the arrays of a run."""
        with np.load(self._arrays_file(key)) as kept:
            return dict(kept)

    def _arrays_file(self, key: Sequence[Any]) -> Path:
        name = re.sub(r"[^\w.=-]+", "_", "-".join(map(str, key)))[:100]
        return self.folder / "outputs" / f"{name}-{digest(*map(str, key))[:8]}.npz"

    def alone(self) -> AbstractContextManager[None]:
        """Hold the folder for this process, a killed one holds nothing.

        Raises:
            BlockingIOError: another process holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        busy = f"Another process runs a comparison into {self.folder}: wait for it, or give another out=."
        return held(self.folder, BlockingIOError(busy))

    def bind(self, recipe: Mapping[str, Mapping[str, Any]]) -> None:
        """Write down, in `options.json`, what the runs are run with.

        Args:
            recipe: facts by name and, before that, by whose they are: of all runs, or of an arm. What the folder knows
                of others stays; where it has no runs, nothing binds.

        Raises:
            ValueError: there are runs with other facts; the message names the first.
        """
        file = self.folder / "options.json"
        known = json.loads(file.read_text(encoding="utf-8")) if self.rows and file.exists() else {}
        recipe = json.loads(json.dumps(recipe))
        for name, facts in recipe.items():
            before = known.get(name, facts)
            for fact in {**facts, **before}:
                if (was := before.get(fact)) != (now := facts.get(fact)):
                    raise ValueError(
                        f"{self.folder} holds runs of another {name}: {fact} was {was}, and is {now}. Choose another "
                        "out=, or give what those were run with."
                    )
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(file, lambda f: f.write(json.dumps(known | recipe, indent=1).encode()))
