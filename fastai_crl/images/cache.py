"""A packed cache of images: decoded and resized once, in parallel, into one file; `store.Packed` reads it."""

import errno
import json
import math
import os
import shutil
import threading
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from fastprogress.fastprogress import progress_bar
from filelock import FileLock
from PIL import Image

from .image_set import ImageSet, Size
from .layout import CHANNELS, PATTERN
from .store import IMAGES, MARK, ROWS, WHAT, Packed, changed, content, load_marks, npy_header, reopen

_FORMAT = 2  # raised whenever the same files and settings would give other pixels
_MARK_EVERY = 256  # images between two waits for the disk


def pack(
    path: str | Path | ImageSet,
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
    verify: bool = False,
) -> Packed:
    """Decode and resize the images in path/folder once, in parallel, into one file, and return them as `Packed`.

    What is in the cache already is kept; an interrupted run goes on where it stopped, images whose files have changed
    are packed again. A process that finds another one packing the same waits for it. A finished cache of files that
    have not changed is only read.

    Args:
        path: folder of the data set; or an `ImageSet`, which says all that `size`, `folder`, `channels`, `pattern`,
            `resample`, `bits` and `stretch` do.
        size: as for `ImageSet`, like the next ones; with None all images must have one size.
        folder: of the images, below `path`.
        ids: by default all in the folder. Other ids, or another value of an argument that changes pixels, make a store
            of their own.
        channels: see `ImageSet`.
        pattern: see `ImageSet`.
        resample: see `ImageSet`.
        bits: see `ImageSet`.
        stretch: see `ImageSet`.
        cache: folder for the stores, by default .cache beside the folder of the images; may be deleted at any time. One
            image takes C*H*W bytes: 31,072 images of four channels at 256 pixels 8.1 GB.
        workers: threads that decode, by default one per core.
        progress: show a progress bar.
        check: check the files before decoding the first (see `ImageSet.check`).
        verify: read what is packed already, and pack again what does not fit its checksum (see `Packed.verify`).

    Raises:
        FileNotFoundError: what `ImageSet.check` and `ImageSet.open` raise.
        ValueError: the same, and for no ids.
        OSError: the disk is, or gets, full, or the cache cannot be written: what is packed by then is kept.
    """
    if isinstance(path, ImageSet):
        images, cache = path, path.folder.parent / ".cache" if cache is None else Path(cache)
    else:
        images = ImageSet(Path(path) / folder, channels, pattern, size, resample, bits, stretch)
        cache = Path(path) / ".cache" if cache is None else Path(cache)
    ids = sorted(images.ids() if ids is None else ids)
    if check:
        images.check(ids, same_size=images.size is None)
    if not ids:
        raise ValueError("ids is empty: pass the ids to pack, or None for all in the folder.")
    shape = (len(ids), *images.open(ids[0]).shape)
    what = {"format": _FORMAT, "folder": os.path.relpath(images.folder, cache), "shape": shape}
    what |= {k: getattr(images, k) for k in ("channels", "pattern", "resample", "bits", "stretch")} | {"ids": ids}
    text = json.dumps(what)
    digest = blake2b(text.encode(), digest_size=6).hexdigest()
    store = cache / f"{images.folder.name}-{shape[2]}x{shape[3]}-{digest}"
    if (packed := _finished(store, text, images, verify)) is not None:
        return packed
    try:
        store.mkdir(parents=True, exist_ok=True)
        with FileLock(store / "lock"):
            _fill(store, text, shape, images, ids, workers, progress, verify)
            return Packed(store, images.folder)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OSError(e.errno, f"The packed cache {store} is not finished, and cannot be written: {e}") from e
        if e.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise OSError(
            e.errno,
            f"No space for the packed cache {store} of {np.prod(shape) / 2**30:.3g} GiB ({e.strerror}): free some, or "
            "pass cache= on another disk or a smaller size=. What is packed is kept; the next call goes on",
        ) from e


def _finished(store: Path, text: str, images: ImageSet, verify: bool) -> Packed | None:
    """Return the store if nothing has to be written to it, as it may be read-only."""
    packed = reopen(store, images.folder)
    if packed is None or (store / WHAT).read_text() != text:  # of other images, put in its place
        return None
    if len(changed(packed.marks, images, packed.ids)[1]) or (verify and len(packed.damaged())):
        return None
    return packed


def _fill(
    store: Path,
    text: str,
    shape: tuple[int, ...],
    images: ImageSet,
    ids: list[str],
    workers: int | None,
    progress: bool,
    verify: bool,
) -> None:
    """Pack the images that `store` lacks, or has of other files."""
    each, header = math.prod(shape[1:]), npy_header(shape)
    if not _begun(store, text, header, len(ids)):
        (store / IMAGES).write_bytes(header)
        np.save(store / ROWS, np.zeros(len(ids), MARK))
        (store / WHAT).write_text(text)
    marks = np.lib.format.open_memmap(store / ROWS, mode="r+")
    held = os.path.getsize(store / IMAGES)
    marks["files"][(held - len(header)) // each :] = 0  # not yet written, or cut off
    os.truncate(store / IMAGES, min(held, len(header) + len(ids) * each))  # what lies behind is not ours
    if verify and (packed := reopen(store, images.folder)) is not None:
        marks["files"][packed.damaged()] = 0
    now, todo = changed(marks, images, ids)
    kept = np.setdiff1d(np.flatnonzero(marks["files"]), todo)
    marks["files"][kept] = now[kept]  # of which some only look different
    if stale := np.count_nonzero(marks["files"][todo]):
        print(f"{stale} of {len(ids)} images have changed since they were packed in {store}: packing them again.")
    if (need := each * (len(todo) - stale)) > shutil.disk_usage(store).free:
        raise OSError(errno.ENOSPC, f"{need / 2**30:.3g} GiB are missing")
    marks["files"][todo] = 0
    lock = threading.Lock()
    with open(store / IMAGES, "r+b") as out, ThreadPoolExecutor(workers or os.cpu_count()) as pool:

        def one(row: int) -> tuple[int, int, int, int]:
            digest = content(images.files(ids[row]))
            x = images.open(ids[row])
            if x.shape != shape[1:]:
                raise ValueError(
                    f"Image {images.folder / ids[row]} has {tuple(x.shape[1:])} pixels, the first {shape[2:]}: pass "
                    "size=, for instance size=256, to resize the images as they are read."
                )
            pixels = x.numpy().data
            with lock:
                out.seek(len(header) + row * each)
                out.write(pixels)
            return row, now[row], digest, zlib.crc32(pixels)

        done: list[tuple[int, int, int, int]] = []

        def mark() -> None:
            with lock:
                out.flush()
            os.fsync(out.fileno())
            for row, *values in done:
                marks[row] = tuple(values)
            done.clear()

        try:
            results: Any = pool.map(one, todo.tolist())
            for result in progress_bar(results, total=len(todo), leave=False) if progress else results:
                done.append(result)
                if len(done) == _MARK_EVERY:
                    mark()
            mark()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            with suppress(OSError):
                mark()
            raise
    marks.flush()


def _begun(store: Path, text: str, header: bytes, n: int) -> bool:
    """Whether a store has been begun, and not been damaged in a way that leaves nothing to go on from."""
    try:
        with open(store / IMAGES, "rb") as f:
            same = f.read(len(header)) == header
        return same and (store / WHAT).read_text() == text and len(load_marks(store, n)) == n
    except (OSError, ValueError, EOFError, TypeError):
        return False
