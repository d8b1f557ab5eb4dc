"""A file of predictions that grows chunk by chunk and outlives a kill: what is read back is what was computed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.learner import Learner
from torch import Tensor

from fastai_crl._fastai import activation_of
from fastai_crl.images.image_set import ImageSet
from fastai_crl.images.layout import replace_file

_RECORD = struct.Struct("<QII")  # of a chunk: its first row, its rows, and a checksum of these and of the values


class PartialFile:
    """Rows of float32, in order, below one line of json that says what they were computed from.

    A chunk counts once it is whole on the disk: cut off, zeroed, changed or surplus ones are never taken.

    Args:
        path: of the file.
        content: what the rows depend on, see `content_of`.
        n_rows: rows of the finished file.
        n_columns: numbers in a row.
    """

    def __init__(self, path: Path, content: dict[str, Any], n_rows: int, n_columns: int):
        self.path, self.content, self.n_rows, self.n_columns = path, content, n_rows, n_columns
        self.header = json.dumps(content).encode() + b"\n"

    def start(self, batch_size: int, resume: bool) -> int:
        """Open or make the file; return the number of rows that it holds, in whole batches, or all.

        Raises:
            ValueError: a file that was begun with other content.
        """
        if not (resume and self.path.exists()):
            replace_file(self.path, lambda f: f.write_bytes(self.header))
            return 0
        with self.path.open("rb") as f:
            self._check(f.readline())
            self.header = f.seek(0) or f.readline()  # as it stands: numbers in it may differ within rounding
        chunks = self._chunks()
        while chunks and (rows := sum(map(len, chunks))) % batch_size and rows < self.n_rows:
            chunks.pop()  # the batches of a run that was never interrupted
        with self.path.open("r+b") as f:
            f.truncate(len(self.header) + sum(_RECORD.size + chunk.nbytes for chunk in chunks))
        return sum(map(len, chunks))

    def append(self, first: int, rows: np.ndarray) -> None:
        """Add `rows`, of which `first` is the number of the first, and wait until they are on the disk."""
        values = np.ascontiguousarray(rows, "<f4").tobytes()
        with self.path.open("ab") as f:
            f.write(_RECORD.pack(first, len(rows), _checksum(first, len(rows), values)) + values)
            f.flush()
            os.fsync(f.fileno())

    def read(self) -> np.ndarray:
        """Return the rows, (n, C)."""
        return np.concatenate([np.empty((0, self.n_columns), np.float32), *self._chunks()])

    def _chunks(self) -> list[np.ndarray]:
        """Return the chunks that are whole, up to the first that is not."""
        chunks, first = [], 0
        with self.path.open("rb") as f:
            f.seek(len(self.header))
            while len(record := f.read(_RECORD.size)) == _RECORD.size:
                at, rows, checksum = _RECORD.unpack(record)
                if at != first or not 0 < rows <= self.n_rows - first:
                    break
                values = f.read(4 * rows * self.n_columns)
                if len(values) < 4 * rows * self.n_columns or checksum != _checksum(first, rows, values):
                    break
                chunks.append(np.frombuffer(values, "<f4").reshape(rows, self.n_columns))
                first += rows
        return chunks

    def _check(self, header: bytes) -> None:
        try:
            before = json.loads(header)
            other = ", ".join(what for what, now in self.content.items() if not _alike(before.get(what), now))
        except (ValueError, AttributeError):
            other = "content"
        if other:
            raise ValueError(
                f"{self.path} was begun with other {other} and cannot be continued: pass resume=False to start afresh, "
                "or another fname to keep it."
            )


def _checksum(first: int, rows: int, values: bytes) -> int:
    return zlib.crc32(values, zlib.crc32(struct.pack("<QI", first, rows)))


def _alike(before: Any, now: Any) -> bool:
    """Whether two digests are equal, or two lists of numbers are within rounding of other threads or devices."""
    if not isinstance(now, list):
        return before == now
    if not isinstance(before, list) or len(before) != len(now):
        return False
    return np.allclose(before, now, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(now).max(initial=0)), equal_nan=True)


# ---------------------------------------------------------------- what predictions depend on


def content_of(
    learn: Learner, images: ImageSet, ids: list[str], vocab: list[str], single_label: bool, x: Tensor, tta: Any
) -> dict[str, Any]:
    """Return what the probabilities of `ids` depend on, as digests; the network's output as numbers.

    The transforms are known by `x`, what they make of the first image; the network by its weights and, for what lies
    outside them (such as the eps of a normalisation), by what it makes of `x`; the activation by some values of it.
    """
    files = [(str(f), f.stat()) for i in ids for f in images.files(i)]
    activation = activation_of(learn.loss_func, single_label)
    learn.model.eval()
    with torch.no_grad():
        output = learn.model(x.to(next(learn.model.parameters(), x).device))
    output = output if isinstance(output, Tensor) else output[0]
    grid = torch.linspace(-9, 9, 5 * len(vocab)).reshape(5, -1)
    weights = [f"{name} {value.dtype} {_digest(value)}" for name, value in learn.model.state_dict().items()]
    return {
        "ids": _digest(json.dumps(ids)),
        "files": _digest(json.dumps([(name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in files])),
        "labels": _digest(json.dumps(vocab)),
        "transforms": _digest(x),
        "weights": _digest("\n".join(weights)),
        "network": output.detach().float().cpu().reshape(-1).tolist(),
        "activation": activation(grid).float().reshape(-1).tolist(),
        "test-time augmentation": _digest(_described(tta)),
    }


def _digest(x: Tensor | str) -> str:
    """Return a digest of text, or of a tensor's shape and values."""
    if isinstance(x, str):
        return hashlib.sha256(x.encode()).hexdigest()
    raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{tuple(x.shape)}".encode() + raw.tobytes()).hexdigest()


def _described(function: Any) -> str:
    """Return a text for what a callable does: its name, code, options and what it closes over, not where it lies."""
    if isinstance(function, partial):
        parts = [_described(function.func), function.args, sorted(function.keywords.items())]
    elif hasattr(function, "__func__"):
        parts = [_described(function.__func__), vars(function.__self__)]
    elif hasattr(function, "__code__"):
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        parts = [f"{function.__module__}.{function.__qualname__}", function.__code__.co_code]
        parts += [function.__code__.co_consts, function.__defaults__, function.__kwdefaults__, cells]
    else:
        parts = [type(function).__qualname__, vars(function) if hasattr(function, "__dict__") else function]
    return re.sub(r" at 0x[0-9a-f]+", "", repr(parts))
