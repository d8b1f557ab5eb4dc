"""A packed cache of images: decoded and resized once, then whole batches from one memory-mapped file.

A store is a folder of three files: `images.npy` (N,C,H,W) uint8, in the order of the sorted ids; `rows.npy`, for each
image a fingerprint (sizes and modification times) of the files it was made from, 0 as long as it is missing; and
`store.json`, what was packed. An image is marked in `rows.npy` only when its pixels are on the disk, so a run that is
killed loses only its last images, and an image whose files change is packed again.
"""

import errno
import io
import json
import math
import os
import shutil
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastprogress.fastprogress import progress_bar
from filelock import FileLock
from PIL import Image

from fastai_crl._errors import offenders

from .image_set import ImageSet, Size
from .layout import CHANNELS, PATTERN
from .tensor import TensorMultiChannel

__all__ = ["Packed", "pack"]

_IMAGES, _ROWS, _WHAT = "images.npy", "rows.npy", "store.json"
_FORMAT = 1  # raised whenever the same files and settings would give other pixels
_MARK_EVERY = 256  # images between two waits for the disk


def _fingerprint(files: Sequence[Path]) -> int:
    """Return 64 bits, never 0, that change when one of `files` is written to.

    Raises FileNotFoundError for a missing file.
    """
    stats = [os.stat(f) for f in files]
    digest = blake2b(repr([(s.st_size, s.st_mtime_ns) for s in stats]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


class Packed:
    """The images of a store that `pack` has finished, read-only; pickles as a reference to its folder.

    `images` is the memory map (N,C,H,W) uint8, `ids` the N ids in its order, `channels` the C names.

    Args:
        store: folder of the store.
        folder: folder of the image files it was made from.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: a store that is unfinished, damaged, or shorter than it should be.
    """

    def __init__(self, store: str | Path, folder: str | Path):
        self.store, self.folder = Path(store), Path(folder)
        fix = f"Call pack again with the same arguments to mend it, or delete {self.store}."
        if not (self.store / _WHAT).exists():
            raise FileNotFoundError(f"There is no packed cache in {self.store}: call pack to make it.")
        try:
            what = json.loads((self.store / _WHAT).read_text())
            rows = np.load(self.store / _ROWS)
            ids, channels, pattern = what["ids"], what["channels"], what["pattern"]
            if len(rows) != len(ids):
                raise ValueError(f"{len(rows)} rows for {len(ids)} ids")
            if missing := [ids[i] for i in np.flatnonzero(rows == 0)]:
                raise ValueError(offenders("images are missing", missing, "Was packing interrupted?"))
            self.images = np.load(self.store / _IMAGES, mmap_mode="r")
        except (ValueError, OSError, EOFError, KeyError) as e:
            raise ValueError(f"The packed cache {self.store} is unfinished, damaged or truncated ({e}). {fix}") from e
        self.ids, self.channels, self._marks = tuple(ids), tuple(channels), rows
        self._files = ImageSet(".", channels, pattern).files
        self._at = {str(self.folder / i): n for n, i in enumerate(ids)}

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Packed({str(self.store)!r}): {len(self)} images of {self.images.shape[1:]}"

    def __reduce__(self):
        return _reopen, (self.store, self.folder)

    def rows(self, prefixes: Iterable[str | Path]) -> np.ndarray | None:
        """Return the positions of the images folder/id, or None if one of them is not in the store."""
        rows = [self._at.get(str(p)) for p in prefixes]
        return None if None in rows else np.array(rows, dtype=np.int64)

    def get(self, prefix: str | Path) -> TensorMultiChannel | None:
        """Return a copy of the image folder/id, uint8 (C,H,W); None if it is not in the store as its files are now."""
        row = self._at.get(str(prefix))
        if row is None or _fingerprint(self._files(prefix)) != self._marks[row]:
            return None
        return TensorMultiChannel(torch.from_numpy(np.array(self.images[row])), channels=self.channels)

    def batch(self, rows: np.ndarray) -> TensorMultiChannel:
        """Return a copy of the images at `rows`, uint8 (B,C,H,W), in one operation."""
        shape = (len(rows), *self.images.shape[1:])
        if torch.utils.data.get_worker_info() is None:
            out = torch.from_numpy(
                np.empty(shape, np.uint8)
            )  # in large pages where the system has them, unlike torch.empty
        else:  # straight into the memory that the main process will see, as PyTorch's own collating does
            empty = torch.empty(0, dtype=torch.uint8)
            out = empty.new(empty._typed_storage()._new_shared(math.prod(shape))).resize_(shape)
        np.take(self.images, rows, axis=0, out=out.numpy(), mode="clip")  # the other modes copy twice
        return TensorMultiChannel(out, channels=self.channels)


def _reopen(store: Path, folder: Path) -> Packed | None:
    """What a pickle becomes: nothing where the store is out of reach, so that an exported learner reads the files."""
    try:
        return Packed(store, folder)
    except (FileNotFoundError, ValueError):
        return None


# ---------------------------------------------------------------- packing


def pack(
    path: str | Path,
    size: Size | None = 256,
    folder: str | Path = "train",
    ids: Iterable[str] | None = None,
    channels: Sequence[str] = CHANNELS,
    pattern: str = PATTERN,
    resample: int = Image.Resampling.BILINEAR,
    bits: int | None = None,
    stretch: float | tuple[float, float] | None = None,
    cache: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
    check: bool = True,
) -> Packed:
    """Decode and resize the images in path/folder once, in parallel, into one file, and return them as `Packed`.

    What is in the cache already is kept; an interrupted run goes on where it stopped, images whose files have changed
    (size or modification time) are packed again. A process that finds another one packing the same waits for it.

    ids: by default all in the folder. Other ids, or another value of an argument that changes pixels, make a store of
        their own.
    size, channels, pattern, resample, bits, stretch: as for `open_channels`; with size=None all images must have one
        size.
    cache: folder for the stores, by default path/.cache; may be deleted at any time. One image takes C·H·W bytes:
        31,072 images of four channels at 256 pixels 8.1 GB.
    workers: threads that decode, by default one per core. progress: show a progress bar.
    check: check the files before decoding the first (see `check_folder`).

    Raises what `check_folder` and `open_channels` raise, and OSError if the disk is, or gets, full: what is packed by
    then is kept.
    """
    path, source = Path(path), Path(path) / folder
    images = ImageSet(source, channels, pattern, size, resample, bits, stretch)
    cache = path / ".cache" if cache is None else Path(cache)
    ids = sorted(images.ids() if ids is None else ids)
    if check:
        images.check(ids, same_size=size is None)
    if not ids:
        raise ValueError("ids is empty: pass the ids to pack, or None for all in the folder.")
    shape = (len(ids), *images.open(ids[0]).shape)
    what = {"format": _FORMAT, "folder": os.path.relpath(source, cache), "shape": shape, "channels": images.channels}
    what |= {
        "pattern": pattern,
        "resample": images.resample,
        "bits": images.bits,
        "stretch": images.stretch,
        "ids": ids,
    }
    text = json.dumps(what)
    name = f"{Path(folder).name}-{shape[2]}x{shape[3]}-{blake2b(text.encode(), digest_size=6).hexdigest()}"
    store = cache / name
    store.mkdir(parents=True, exist_ok=True)
    with FileLock(store / "lock"):
        try:
            _fill(store, text, shape, images, ids, workers, progress)
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            raise OSError(
                e.errno,
                f"No space for the packed cache {store} of {np.prod(shape) / 2**30:.3g} GiB ({e.strerror}): free some, "
                "or pass cache= on another disk or a smaller size=. What is packed is kept; the next call goes on",
            ) from e
        return Packed(store, source)


def _fill(
    store: Path,
    text: str,
    shape: tuple[int, ...],
    images: ImageSet,
    ids: list[str],
    workers: int | None,
    progress: bool,
) -> None:
    """Pack the images that `store` lacks, or has of other files."""
    each, header = int(np.prod(shape[1:])), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    start = header.tell()
    if not _intact(store, text, header.getvalue(), len(ids)):
        (store / _IMAGES).write_bytes(header.getvalue())
        np.save(store / _ROWS, np.zeros(len(ids), np.uint64))
        (store / _WHAT).write_text(text)
    marks = np.lib.format.open_memmap(store / _ROWS, mode="r+")
    marks[(os.path.getsize(store / _IMAGES) - start) // each :] = 0  # not yet written, or cut off
    now = np.array([_fingerprint(images.files(i)) for i in ids], np.uint64)
    todo = np.flatnonzero(marks != now)
    if not len(todo):
        return
    if stale := np.count_nonzero(marks[todo]):
        print(f"{stale} of {len(ids)} images have changed since they were packed in {store}: packing them again.")
    if (need := each * (len(todo) - stale)) > shutil.disk_usage(store).free:
        raise OSError(errno.ENOSPC, f"{need / 2**30:.3g} GiB are missing")
    marks[todo] = 0
    lock = threading.Lock()
    with open(store / _IMAGES, "r+b") as out, ThreadPoolExecutor(workers or os.cpu_count()) as pool:

        def one(row: int) -> int:
            x = images.open(ids[row])
            if x.shape != shape[1:]:
                raise ValueError(
                    f"Image {images.folder / ids[row]} has {tuple(x.shape[1:])} pixels, the first {shape[2:]}: pass "
                    "size=, for instance size=256, to resize the images as they are read."
                )
            with lock:
                out.seek(start + row * each)
                out.write(x.numpy().data)
            return row

        done: list[int] = []

        def mark() -> None:
            with lock:
                out.flush()
            os.fsync(out.fileno())
            marks[done] = now[done]
            done.clear()

        try:
            results: Any = pool.map(one, todo.tolist())
            for row in progress_bar(results, total=len(todo), leave=False) if progress else results:
                done.append(row)
                if len(done) == _MARK_EVERY:
                    mark()
            mark()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    marks.flush()


def _intact(store: Path, text: str, header: bytes, n: int) -> bool:
    """Whether a store has been begun, and not been damaged in a way that leaves nothing to go on from."""
    try:
        with open(store / _IMAGES, "rb") as f:
            same = f.read(len(header)) == header
        return same and (store / _WHAT).read_text() == text and np.load(store / _ROWS).shape == (n,)
    except (OSError, ValueError, EOFError):
        return False
