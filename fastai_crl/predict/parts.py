"""Predictions that outlive a kill: parts, each a file, in a folder named by the digest of all that they depend on."""

from __future__ import annotations

import hashlib
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from fastai_crl._files import is_own_folder, own_folder, replace_file

_DIGEST = hashlib.sha256


class Parts:
    """Rows of float32 in numbered parts, kept while they are computed and removed when all is done.

    A run that was killed finds its parts again by the name of their folder; any other run has a folder of another name.

    Args:
        fname: the file that is made of the rows; the folder lies beside it.
        depends_on: what the rows depend on, see `described`.
    """

    def __init__(self, fname: Path, depends_on: Any):
        digest = _DIGEST(described(depends_on).encode()).hexdigest()
        self.fname, self.folder = fname, fname.with_name(f"{fname.name}.{digest[:16]}.parts")

    @contextmanager
    def open(self, resume: bool) -> Iterator[None]:
        """Hold the folder, made if need be, against other processes; parts of other runs are named.

        Raises:
            RuntimeError: another process writes the same file.
            PermissionError: the folder's name is taken by a link, or by what others may write to.
        """
        busy = RuntimeError(f"{self.fname} is being written by another process: wait for it, or pass another fname.")
        with held(own_folder(self.folder), busy):
            for other in self._of_other_runs():
                with held(other, busy):
                    warnings.warn(
                        f"{other} holds predictions of {self.fname.name} by another run, of other images, weights, "
                        "transforms, batch size or test-time augmentation: they are not used, and removed at the end.",
                        stacklevel=4,
                    )
            if not resume:
                for part in self.folder.glob("*.part"):
                    part.unlink()
            yield

    def read(self, number: int, n: int, n_classes: int) -> np.ndarray | None:
        """Return the `n` rows of a part, (n, C), None where it is missing or damaged."""
        try:
            raw = self._file(number).read_bytes()
        except FileNotFoundError:
            return None
        seal, values = raw[:32], raw[32:]
        if len(values) != 4 * n * n_classes or seal != _DIGEST(values).digest():
            return None
        return np.frombuffer(values, "<f4").reshape(n, n_classes)

    def write(self, number: int, rows: np.ndarray) -> None:
        """Keep the rows of a part; they are on the disk, behind their digest, when this returns."""
        values = np.ascontiguousarray(rows, "<f4").tobytes()
        replace_file(self._file(number), lambda f: f.write(_DIGEST(values).digest() + values))

    def remove(self) -> None:
        """Remove these parts, and those of other runs."""
        for folder in (self.folder, *self._of_other_runs()):
            shutil.rmtree(folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06}.part"

    def _of_other_runs(self) -> list[Path]:
        name = re.compile(re.escape(self.fname.name) + r"\.[0-9a-f]{16}\.parts")
        found = (f for f in self.fname.parent.iterdir() if name.fullmatch(f.name) and f != self.folder)
        return sorted(f for f in found if is_own_folder(f))


@contextmanager
def held(folder: Path, busy: Exception) -> Iterator[None]:
    """Hold a folder for this process, a killed one holds nothing; raise `busy` where another process holds it."""
    try:
        lock = FileLock(folder / "lock").acquire(timeout=0)
    except Timeout:
        raise busy from None
    with lock:
        yield


def described(x: Any, within: tuple[int, ...] = ()) -> str:
    """Return a text that is the same for equal values in every process, and another for others.

    Tensors and arrays are described by a digest; functions by their name, code, defaults and what they close over;
    modules and other objects by their class and attributes, without hooks: not by where they lie in memory.
    """
    if id(x) in within:
        return "..."
    each = partial(described, within=(*within, id(x)))
    if isinstance(x, np.ndarray) and x.dtype.kind in "biuf":
        x = torch.from_numpy(x)
    if isinstance(x, Tensor):
        raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"{x.dtype} {tuple(x.shape)} {_DIGEST(raw.tobytes()).hexdigest()}"
    if isinstance(x, Mapping):
        return f"{{{', '.join(f'{each(key)}: {each(value)}' for key, value in x.items())}}}"
    if isinstance(x, Set):
        return f"{{{', '.join(sorted(map(each, x)))}}}"
    if isinstance(x, list | tuple):
        return f"[{', '.join(map(each, x))}]"
    if isinstance(x, type):
        return f"{x.__module__}.{x.__qualname__}"
    if isinstance(x, ModuleType):
        return x.__name__
    if isinstance(x, partial):
        return each((x.func, x.args, x.keywords))
    if isinstance(x, MethodType):
        return each((x.__func__, x.__self__))
    if isinstance(x, CodeType):
        return each((x.co_name, x.co_code.hex(), x.co_names, x.co_consts))
    if isinstance(x, FunctionType):
        cells = [cell.cell_contents for cell in x.__closure__ or ()]
        return each((x.__module__, x.__qualname__, x.__code__, x.__defaults__, x.__kwdefaults__, cells))
    if hasattr(x, "__dict__"):
        own = {name: value for name, value in vars(x).items() if not isinstance(x, nn.Module) or _matters(name)}
        return each((type(x), own))
    return re.sub(r" at 0x[0-9a-f]+", "", repr(x))


def _matters(attribute: str) -> bool:
    """Whether what a module does depends on an attribute of it: hooks look on, and predictions set `training`."""
    return "hook" not in attribute and attribute != "training"
