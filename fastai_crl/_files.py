"""Files that are written at once or not at all, and folders of one owner, in places where others may write, too."""

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def replace_file(file: Path, write: Callable[[BinaryIO], Any], aside: Path | None = None) -> None:
    """Have `write` make `file` at once or not at all: whatever interrupts it, there is no half of a file.

    What is written is on the disk before it takes the name. A file that was there keeps its mode, a link stays one.

    Args:
        file: to make, or to replace.
        write: given a new file, open for bytes.
        aside: the folder to make it in. Default, and where that is on another disk: that of `file`.

    Raises:
        OSError: the disk is full, or the folder cannot be written to; names the file.
    """
    file = file.resolve()
    try:
        if aside is None or aside.stat().st_dev != file.parent.stat().st_dev:
            aside = file.parent
        part = aside / f".{secrets.token_hex(8)}.part"  # a name that nobody can foresee
        try:
            with part.open("xb") as f:  # x: a new file (O_EXCL), no link
                with contextlib.suppress(FileNotFoundError):
                    shutil.copymode(file, part)
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(part, file)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
    except OSError as e:
        raise type(e)(
            e.errno,
            f"{e.strerror}: {file} could not be written, and is as it was. Free space on its disk, or give a place "
            "that can be written to",
        ) from e


def own_folder(folder: Path) -> Path:
    """Make a folder of a name that others can foresee, for its owner alone; return it.

    Raises:
        PermissionError: it is there, and is a link, another's, or open to others.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700)
    if not is_own_folder(folder):
        raise PermissionError(
            f"{folder} is a link, no folder, or one that others may write to, so that its files cannot be trusted: "
            "remove it, or pass another fname."
        )
    return folder


def is_own_folder(folder: Path) -> bool:
    """Return whether a path is a folder, no link to one, that belongs to this user and that no one else may enter."""
    there = folder.lstat()
    mine = not hasattr(os, "getuid") or (there.st_uid == os.getuid() and not there.st_mode & 0o077)
    return stat.S_ISDIR(there.st_mode) and mine
