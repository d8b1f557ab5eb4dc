"""A packed cache of images: decoded and resized once, in parallel, into one file; `packed.Packed` reads it."""

import errno
import json
import math
import os
import shutil
import threading
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from fastprogress.fastprogress import progress_bar
from filelock import FileLock

from .image_set import ImageSet, check_images
from .packed import IMAGES, MARK, ROWS, WHAT, Packed, changed, content, load_marks, npy_header, reopen

_FORMAT = 2  # raised whenever the same files and settings would give other pixels
_MARK_EVERY = 256  # images between two waits for the disk


def pack(
    images: ImageSet,
    ids: Iterable[str] | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
    check: bool = True,
) -> Packed:
    """Decode and resize images once, in parallel, into one file, and return them as `Packed`.

    What is in the cache already is kept; an interrupted run goes on where it stopped, images whose files have changed
    are packed again. A process that finds another one packing the same waits for it. A finished cache of files that
    have not changed is only read.

    Args:
        images: what to pack, and its size; without one all images must have the same.
        ids: by default all in the folder. Other ids, or other images, make a cache of their own.
        cache: folder for the caches, by default .cache beside the folder of the images; may be deleted at any time. One
            image takes C*H*W bytes: 31,072 images of four channels at 256 pixels 8.1 GB.
        progress: show a progress bar.
        check: check the files before decoding the first (see `ImageSet.check`).

    Raises:
        FileNotFoundError: what `ImageSet.check` and `ImageSet.open` raise.
        ValueError: the same, for what is no `ImageSet`, and for no ids.
        OSError: the disk is, or gets, full, or the cache cannot be written: what is packed by then is kept.
    """
    cache = check_images(images).folder.parent / ".cache" if cache is None else Path(cache)
    ids = sorted(images.ids() if ids is None else ids)
    if check:
        images.check(ids, same_size=images.size is None)
    if not ids:
        raise ValueError("ids is empty: pass the ids to pack, or None for all in the folder.")
    shape = (len(ids), *images.open(ids[0]).shape)
    what = {"format": _FORMAT, "folder": os.path.relpath(images.folder, cache), "shape": shape}
    what |= {k: getattr(images, k) for k in ("channels", "pattern", "full", "stretch")} | {"ids": ids}
    text = json.dumps(what)
    digest = blake2b(text.encode(), digest_size=6).hexdigest()
    path = cache / f"{images.folder.name}-{shape[2]}x{shape[3]}-{digest}"
    packed = reopen(path, images.folder)
    # Of other images, if put in its place. To a finished one nothing is written, as it may be read-only.
    if packed is not None and (path / WHAT).read_text() == text and not len(packed.changed(np.arange(len(packed)))):
        return packed
    try:
        path.mkdir(parents=True, exist_ok=True)
        with FileLock(path / "lock"):
            _fill(path, text, shape, images, ids, progress)
            return Packed(path, images.folder)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OSError(e.errno, f"The packed cache {path} is not finished, and cannot be written: {e}") from e
        if e.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise OSError(
            e.errno,
            f"No space for the packed cache {path} of {np.prod(shape) / 2**30:.3g} GiB ({e.strerror}): free some, or "
            "pass cache= on another disk or a smaller size=. What is packed is kept; the next call goes on",
        ) from e


def _fill(path: Path, text: str, shape: tuple[int, ...], images: ImageSet, ids: list[str], progress: bool) -> None:
    """Pack the images that the cache lacks, or has of other files."""
    each, header = math.prod(shape[1:]), npy_header(shape)
    if not _begun(path, text, header, len(ids)):
        (path / IMAGES).write_bytes(header)
        np.save(path / ROWS, np.zeros(len(ids), MARK))
        (path / WHAT).write_text(text)
    marks = np.lib.format.open_memmap(path / ROWS, mode="r+")
    held = os.path.getsize(path / IMAGES)
    marks["files"][(held - len(header)) // each :] = 0  # not yet written, or cut off
    os.truncate(path / IMAGES, min(held, len(header) + len(ids) * each))  # what lies behind is not ours
    now, todo = changed(marks, images, ids)
    kept = np.setdiff1d(np.flatnonzero(marks["files"]), todo)
    marks["files"][kept] = now[kept]  # of which some only look different
    if stale := np.count_nonzero(marks["files"][todo]):
        print(f"{stale} of {len(ids)} images have changed since they were packed in {path}: packing them again.")
    if (need := each * (len(todo) - stale)) > shutil.disk_usage(path).free:
        raise OSError(errno.ENOSPC, f"{need / 2**30:.3g} GiB are missing")
    marks["files"][todo] = 0
    lock = threading.Lock()
    with open(path / IMAGES, "r+b") as out, ThreadPoolExecutor(os.cpu_count()) as pool:

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


def _begun(path: Path, text: str, header: bytes, n: int) -> bool:
    """Whether a cache has been begun, and not been damaged in a way that leaves nothing to go on from."""
    try:
        with open(path / IMAGES, "rb") as f:
            same = f.read(len(header)) == header
        return same and (path / WHAT).read_text() == text and len(load_marks(path, n)) == n
    except (OSError, ValueError, EOFError, TypeError):
        return False
