"""A packed cache of images, read: whole batches out of one file. `cache.pack` makes it.

A cache is a folder of three files: `images.npy` (N,C,H,W) uint8, in the order of the sorted ids; `rows.npy`, for each
image what its files were like, a digest of their bytes, and a checksum of its pixels; and `cache.json`, what was
packed. An image is marked in `rows.npy` only when its pixels are on the disk, so a run that is killed loses only its
last images, and an image whose files change is packed again.
"""

import io
import json
import math
import os
import stat
import threading
import zlib
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from fastai_crl._checks import offenders
from fastai_crl._fastai import shared_bytes

from .image_set import ImageSet, in_threads
from .tensor import TensorMultiChannel

IMAGES, ROWS, WHAT = "images.npy", "rows.npy", "cache.json"
# Of an image: what its files were like, 0 as long as it is missing; a digest of their bytes; a checksum of its pixels.
MARK = np.dtype([("files", "<u8"), ("bytes", "<u8"), ("pixels", "<u4")])


# ---------------------------------------------------------------- what an image was made from


def _members(file: Path) -> list[Path]:
    """Return the files of a folder that stands for one image."""
    return sorted(f for f in file.rglob("*") if f.is_file())


def _digest(data: Iterable[bytes]) -> int:
    """Return 64 bits, never 0."""
    digest = blake2b(digest_size=8)
    for part in data:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") or 1


def _looks(folder: str, names: Sequence[str]) -> int:
    """Return a digest that changes when a file is written to, or another takes its place; 0 where one is gone."""
    seen = []
    try:
        for name in names:
            stats = os.stat(os.path.join(folder, name))
            inside = _members(Path(folder, name)) if stat.S_ISDIR(stats.st_mode) else ()
            seen += [(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in (stats, *map(os.stat, inside))]
    except OSError:
        return 0
    return _digest([repr(seen).encode()])


def content(files: Sequence[Path]) -> int:
    """Return a digest of the bytes of `files`, 0 for what is no file: a copy of a file looks different and is not."""
    if not all(f.is_file() or f.is_dir() for f in files):  # a named pipe would wait for ever
        return 0
    every = [(f.relative_to(file), f) for file in files for f in (_members(file) if file.is_dir() else [file])]
    return _digest(part for name, f in every for part in (f"{name} {f.stat().st_size} ".encode(), f.read_bytes()))


def changed(marks: np.ndarray, images: ImageSet, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return what the files look like now, (n,), and the positions of the images that were made from other files.

    Files that are gone are no other files: they count as they were.
    """
    folder = str(images.folder)
    now = np.array([_looks(folder, images.names(i)) for i in ids], np.uint64)
    now = np.where(now == 0, marks["files"], now)
    rows = np.flatnonzero((marks["files"] != now) | (now == 0))
    if len(rows):
        same = in_threads(lambda r: marks[r]["files"] and marks[r]["bytes"] == content(images.files(ids[r])), rows)
        rows = rows[~np.fromiter(same, bool, len(rows))]
    return now, rows


# ---------------------------------------------------------------- reading


class Packed:
    """The images of a cache that `pack` has finished, read-only; pickles as a reference to its folder.

    `ids` are the N ids in the order of the images, `channels` the C names, `shape` is (N,C,H,W). Batches are read from
    the file, not from a memory map of it: a map of a file that is cut off ends the process.

    Args:
        path: folder of the cache.
        folder: folder of the image files it was made from.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: a cache that is unfinished, damaged, or shorter than it should be.
    """

    def __init__(self, path: str | Path, folder: str | Path):
        self.path, self.folder = Path(path), Path(folder)
        if not (self.path / WHAT).exists():
            raise FileNotFoundError(f"There is no packed cache in {self.path}: call pack to make it.")
        try:
            what = json.loads((self.path / WHAT).read_text())
            self.ids, self.channels, self.shape = tuple(what["ids"]), tuple(what["channels"]), tuple(what["shape"])
            self._set = ImageSet(self.folder, self.channels, what["pattern"])
            self.marks = load_marks(self.path, len(self.ids))
            if missing := [self.ids[i] for i in np.flatnonzero(self.marks["files"] == 0)]:
                raise ValueError(offenders("images are missing", missing, "Was packing interrupted?"))
            self._file = open(self.path / IMAGES, "rb", buffering=0)  # noqa: SIM115
            header = npy_header(self.shape)
            self._start, self._each = len(header), math.prod(self.shape[1:])
            if self._file.read(len(header)) != header:
                raise ValueError("its pixels have another header")
            if (held := os.fstat(self._file.fileno()).st_size) != self._start + len(self) * self._each:
                raise ValueError(f"its pixels take {held:,} bytes, not {self._start + len(self) * self._each:,}")
        except (ValueError, OSError, EOFError, KeyError, TypeError) as e:
            raise ValueError(
                f"The packed cache {self.path} is unfinished, damaged or truncated ({e}). {self._fix}"
            ) from e
        self._at = {str(self.folder / i): n for n, i in enumerate(self.ids)}

    @property
    def _fix(self) -> str:
        return f"Call pack again with the same arguments to mend it, or delete {self.path}."

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Packed({str(self.path)!r}): {len(self)} images of {self.shape[1:]}"

    def __reduce__(self):
        return reopen, (self.path, self.folder)

    def rows(self, prefixes: Iterable[str | Path]) -> np.ndarray | None:
        """Return the positions of the images folder/id, or None if one of them is not in the cache."""
        rows = [self._at.get(str(p)) for p in prefixes]
        return None if None in rows else np.array(rows, dtype=np.int64)

    def get(self, prefix: str | Path) -> TensorMultiChannel | None:
        """Return a copy of the image folder/id, uint8 (C,H,W); None if it is not in the cache as its files are now."""
        row = self._at.get(str(prefix))
        return None if row is None or len(self.changed(np.array([row]))) else self.batch(np.array([row]))[0]

    def changed(self, rows: np.ndarray) -> np.ndarray:
        """Return those of `rows` whose files are others than were packed; files that are gone are no others.

        It takes some 10 microseconds an image, more only for files that look different but are not.
        """
        marks = self.marks[rows]
        now, other = changed(marks, self._set, [self.ids[r] for r in rows])
        marks["files"] = np.where(np.isin(np.arange(len(rows)), other), marks["files"], now)
        self.marks[rows] = marks  # of the same bytes: not to be read again the next time
        return rows[other]

    def batch(self, rows: np.ndarray, pinned: bool = False) -> TensorMultiChannel:
        """Return a copy of the images at `rows`, uint8 (B,C,H,W).

        Args:
            rows: positions.
            pinned: into memory from which a CUDA device copies while the program goes on.

        Raises:
            ValueError: the cache has been cut off, or cannot be read any more; names it.
        """
        shape = (len(rows), *self.shape[1:])
        if pinned:
            out = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        elif torch.utils.data.get_worker_info() is None:
            # In large pages where the system has them, unlike torch.empty.
            out = torch.from_numpy(np.empty(shape, np.uint8))
        else:  # straight into the memory that the main process will see
            out = shared_bytes(shape)
        self._read(rows.tolist(), out.numpy().reshape(len(rows), self._each))
        return TensorMultiChannel(out, channels=self.channels)

    def _read(self, rows: Sequence[int], out: np.ndarray) -> None:
        """Fill `out` (len(rows), bytes of an image) with the images at `rows`."""
        file, start, each = self._file, self._start, self._each
        try:
            for to, row in zip(out, rows, strict=True):
                if _read_into(file, to, start + row * each) != each:
                    raise ValueError(f"it ends within the image {self.ids[row]}")
        except (OSError, ValueError) as e:
            raise ValueError(f"The packed cache {self.path} has been cut off or damaged ({e}). {self._fix}") from e

    def verify(self) -> None:
        """Read every image and compare it with its checksum.

        Raises:
            ValueError: some have other pixels than were packed, as with flipped bits on the disk; names their ids.
        """

        def fits(row: int) -> bool:
            pixels = np.empty((1, self._each), np.uint8)
            self._read([row], pixels)
            return zlib.crc32(pixels) == self.marks[row]["pixels"]

        rows = range(len(self))
        if bad := [i for i, good in zip(self.ids, in_threads(fits, rows), strict=True) if not good]:
            fix = f"Delete {self.path}: the next call packs them again."
            raise ValueError(offenders(f"Damaged images in {self.path}", bad, fix))


if hasattr(os, "preadv"):

    def _read_into(file: io.FileIO, out: np.ndarray, at: int) -> int:
        """Fill `out` from a place in a file, and return how many bytes there were; processes share the file."""
        return os.preadv(file.fileno(), (out,), at)

else:  # Windows, where processes do not

    def _read_into(file: io.FileIO, out: np.ndarray, at: int) -> int:
        with _LOCK:
            file.seek(at)
            return file.readinto(out)

    _LOCK = threading.Lock()


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Return the header of an .npy file of bytes of that shape."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def load_marks(path: Path, n: int) -> np.ndarray:
    """Return the marks of the `n` rows of a cache."""
    marks = np.load(path / ROWS)
    if marks.dtype != MARK or marks.shape != (n,):
        raise ValueError(f"{len(marks)} rows of {marks.dtype} for {n} ids")
    return marks


def reopen(path: Path, folder: Path) -> Packed | None:
    """What a pickle becomes: nothing where the cache is out of reach, so that an exported learner reads the files."""
    try:
        return Packed(path, folder)
    except (FileNotFoundError, ValueError):
        return None
