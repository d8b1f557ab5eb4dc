"""A packed cache of images, read: whole batches out of one file. `cache.pack` makes it.

A store is a folder of three files: `images.npy` (N,C,H,W) uint8, in the order of the sorted ids; `rows.npy`, for each
image what its files were like, a digest of their bytes, and a checksum of its pixels; and `store.json`, what was
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
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from fastai_crl._checks import offenders
from fastai_crl._fastai import shared_bytes

from .image_set import ImageSet
from .tensor import TensorMultiChannel

IMAGES, ROWS, WHAT = "images.npy", "rows.npy", "store.json"
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


def _looks(files: Sequence[Path]) -> int:
    """Return a digest that changes when one of `files` is written to, or another takes its place.

    Raises:
        FileNotFoundError: a missing file.
    """
    seen = []
    for file in files:
        stats = os.stat(file)
        inside = [os.stat(f) for f in _members(file)] if stat.S_ISDIR(stats.st_mode) else []
        seen += [(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in (stats, *inside)]
    return _digest([repr(seen).encode()])


def content(files: Sequence[Path]) -> int:
    """Return a digest of the bytes of `files`, 0 for what is no file: a copy of a file looks different and is not."""
    if not all(f.is_file() or f.is_dir() for f in files):  # a named pipe would wait for ever
        return 0
    every = [(f.relative_to(file), f) for file in files for f in (_members(file) if file.is_dir() else [file])]
    return _digest(part for name, f in every for part in (f"{name} {f.stat().st_size} ".encode(), f.read_bytes()))


def changed(marks: np.ndarray, images: ImageSet, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return what the files look like now, (n,), and the positions of the images that were made from other files."""
    now = np.array([_looks(images.files(i)) for i in ids], np.uint64)
    rows = np.flatnonzero(marks["files"] != now)
    if len(rows):
        with ThreadPoolExecutor() as pool:
            same = pool.map(lambda r: marks[r]["files"] and marks[r]["bytes"] == content(images.files(ids[r])), rows)
            rows = rows[~np.fromiter(same, bool, len(rows))]
    return now, rows


# ---------------------------------------------------------------- reading


class Packed:
    """The images of a store that `pack` has finished, read-only; pickles as a reference to its folder.

    `ids` are the N ids in the order of the images, `channels` the C names, `shape` is (N,C,H,W). `images`, a memory
    map, is for looking at: batches are read from the file, as a map of a file that is cut off ends the process.

    Args:
        store: folder of the store.
        folder: folder of the image files it was made from.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: a store that is unfinished, damaged, or shorter than it should be.
    """

    def __init__(self, store: str | Path, folder: str | Path):
        self.store, self.folder = Path(store), Path(folder)
        if not (self.store / WHAT).exists():
            raise FileNotFoundError(f"There is no packed cache in {self.store}: call pack to make it.")
        try:
            what = json.loads((self.store / WHAT).read_text())
            self.ids, self.channels, self.shape = tuple(what["ids"]), tuple(what["channels"]), tuple(what["shape"])
            self._set = ImageSet(self.folder, self.channels, what["pattern"])
            self.marks = load_marks(self.store, len(self.ids))
            if missing := [self.ids[i] for i in np.flatnonzero(self.marks["files"] == 0)]:
                raise ValueError(offenders("images are missing", missing, "Was packing interrupted?"))
            self._file = open(self.store / IMAGES, "rb", buffering=0)  # noqa: SIM115
            header = npy_header(self.shape)
            self._start, self._each = len(header), math.prod(self.shape[1:])
            if self._file.read(len(header)) != header:
                raise ValueError("its pixels have another header")
            if (held := os.fstat(self._file.fileno()).st_size) != self._start + len(self) * self._each:
                raise ValueError(f"its pixels take {held:,} bytes, not {self._start + len(self) * self._each:,}")
        except (ValueError, OSError, EOFError, KeyError, TypeError) as e:
            raise ValueError(
                f"The packed cache {self.store} is unfinished, damaged or truncated ({e}). {self._fix}"
            ) from e
        self._at = {str(self.folder / i): n for n, i in enumerate(self.ids)}

    @property
    def _fix(self) -> str:
        return f"Call pack again with the same arguments to mend it, or delete {self.store}."

    @cached_property
    def images(self) -> np.ndarray:
        """The images as a memory map (N,C,H,W) uint8."""
        return np.load(self.store / IMAGES, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Packed({str(self.store)!r}): {len(self)} images of {self.shape[1:]}"

    def __reduce__(self):
        return reopen, (self.store, self.folder)

    def rows(self, prefixes: Iterable[str | Path]) -> np.ndarray | None:
        """Return the positions of the images folder/id, or None if one of them is not in the store."""
        rows = [self._at.get(str(p)) for p in prefixes]
        return None if None in rows else np.array(rows, dtype=np.int64)

    def get(self, prefix: str | Path) -> TensorMultiChannel | None:
        """Return a copy of the image folder/id, uint8 (C,H,W); None if it is not in the store as its files are now."""
        row = self._at.get(str(prefix))
        if row is None or len(changed(self.marks[row : row + 1], self._set, self.ids[row : row + 1])[1]):
            return None
        return self.batch(np.array([row]))[0]

    def batch(self, rows: np.ndarray) -> TensorMultiChannel:
        """Return a copy of the images at `rows`, uint8 (B,C,H,W).

        Raises:
            ValueError: the store has been cut off, or cannot be read any more; names it.
        """
        shape = (len(rows), *self.shape[1:])
        if torch.utils.data.get_worker_info() is None:
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
            raise ValueError(f"The packed cache {self.store} has been cut off or damaged ({e}). {self._fix}") from e

    def verify(self) -> None:
        """Read every image and compare it with its checksum.

        Raises:
            ValueError: some have other pixels than were packed, as with flipped bits on the disk; names their ids.
        """
        if len(bad := self.damaged()):
            fix = f"Call pack again with the same arguments and verify=True to mend it, or delete {self.store}."
            raise ValueError(offenders(f"Damaged images in {self.store}", [self.ids[r] for r in bad], fix))

    def damaged(self) -> np.ndarray:
        """Return the positions of the images whose pixels do not fit their checksums."""

        def fits(row: int) -> bool:
            pixels = np.empty((1, self._each), np.uint8)
            self._read([row], pixels)
            return zlib.crc32(pixels) == self.marks[row]["pixels"]

        with ThreadPoolExecutor() as pool:
            return np.flatnonzero(~np.fromiter(pool.map(fits, range(len(self))), bool, len(self)))


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


def load_marks(store: Path, n: int) -> np.ndarray:
    """Return the marks of the `n` rows of a store."""
    marks = np.load(store / ROWS)
    if marks.dtype != MARK or marks.shape != (n,):
        raise ValueError(f"{len(marks)} rows of {marks.dtype} for {n} ids")
    return marks


def reopen(store: Path, folder: Path) -> Packed | None:
    """What a pickle becomes: nothing where the store is out of reach, so that an exported learner reads the files."""
    try:
        return Packed(store, folder)
    except (FileNotFoundError, ValueError):
        return None
