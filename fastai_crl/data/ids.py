"""Which ids name one file, and which a file outside of the folder of images."""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path


def same_files(ids: Sequence[str], folder: Path) -> list[list[str]]:
    """Return ids that differ but name one file in `folder`: x and ./x, Unicode forms, case where the disk folds it."""
    folds, base = _folds_case(folder), os.path.abspath(folder)
    found: dict[str, list[str]] = {}
    for i in dict.fromkeys(ids):
        if i.strip():
            key = unicodedata.normalize("NFC", os.path.normpath(os.path.join(base, i)) if "/" in i else f"{base}/{i}")
            found.setdefault(key.casefold() if folds else key, []).append(i)
    return [same for same in found.values() if len(same) > 1]


def leading_out(ids: Sequence[str], folder: Path) -> list[str]:
    """Return the ids of files that are not in `folder` or below it."""
    base = os.path.abspath(folder)
    below = os.path.join(base, "")
    return [i for i in ids if "/" in i and not os.path.normpath(os.path.join(base, i)).startswith(below)]


def _folds_case(folder: Path) -> bool:
    """Whether the disk takes names in other case for the same file."""
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    name = next((n for n in names if n.swapcase() != n), None)
    return name is not None and name.swapcase() not in names and (folder / name.swapcase()).exists()
