"""Image files of multi-channel images: name them, list the ids of a folder, check them before training."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

from fastcore.foundation import L
from fastprogress.fastprogress import progress_bar

from fastai_crl._errors import offenders
from fastai_crl.hpa import HPA_CHANNELS

from .readers import header

__all__ = [
    "PATTERN",
    "channel_files",
    "check_folder",
    "check_pattern",
    "found_ids",
    "image_ids",
    "replace_file",
]

PATTERN: str = "{id}_{channel}.png"

# Files that can hold any number of channels; PNG and JPEG hold grey or RGB.
_TIFF = (".tif", ".tiff", ".tif.gz", ".tiff.gz")


def replace_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` make `file` at once or not at all: whatever interrupts it, there is no half of a file."""
    part = file.with_name(f"{file.name}.part")
    write(part)
    os.replace(part, file)


def channel_files(prefix: str | Path, channels: Sequence[str] = HPA_CHANNELS, pattern: str = PATTERN) -> list[Path]:
    """Return the files of image `prefix` = folder/id: one per channel, in the order of `channels`, or one for all."""
    prefix = Path(prefix)
    return [prefix.with_name(name) for name in _file_names(prefix.name, channels, pattern)]


def _file_names(id_: str, channels: Sequence[str], pattern: str) -> list[str]:
    return [pattern.format(id=id_, channel=c) for c in (channels if "{channel}" in pattern else channels[:1])]


def check_pattern(channels: Sequence[str], pattern: str) -> None:
    """Raise ValueError unless `pattern` is a file name holding {id}, and {channel} where no file holds all channels.

    Without {channel} one file holds all channels: a TIFF (.tif, .tiff, also .gz) any number, others 1 or 3 (RGB).
    """
    if "{id}" not in pattern or "/" in pattern:
        raise ValueError(f"pattern={pattern!r} must be a file name with {{id}} and {{channel}}, such as {PATTERN!r}.")
    if "{channel}" not in pattern and not pattern.lower().endswith(_TIFF) and len(channels) not in (1, 3):
        raise ValueError(
            f"pattern={pattern!r} is one file for {len(channels)} channels: only a TIFF holds so many. Use a name with "
            f"{{channel}} for one file per channel, such as {PATTERN!r}, or a TIFF, such as '{{id}}.tif'."
        )
    if not channels or len(set(channels)) < len(channels):
        raise ValueError(f"channels={tuple(channels)} must name at least one channel, and none of them twice.")


def _listing(folder: Path) -> set[str]:
    try:
        names = {e.name for e in os.scandir(folder)}
    except (FileNotFoundError, NotADirectoryError) as e:
        raise FileNotFoundError(f"Image folder {folder} does not exist: pass the folder of the image files.") from e
    if not names:
        raise FileNotFoundError(f"Image folder {folder} is empty: pass the folder of the image files.")
    return names


def _missing(names: list[str], folder: Path, pattern: str) -> FileNotFoundError:
    fix = f"Add the files, leave the ids out, or pass the right channels and pattern (now {pattern!r})."
    return FileNotFoundError(offenders(f"Missing channel files in {folder}", names, fix))


def found_ids(folder: str | Path, channels: Sequence[str] = HPA_CHANNELS, pattern: str = PATTERN) -> list[str]:
    """Return the sorted ids of which `folder` holds at least one file, all channels or not; perhaps none.

    Raises FileNotFoundError if the folder is missing or empty.
    """
    check_pattern(channels, pattern)
    # The shortest id that fits, so that of the channels "red" and "far_red" the longer name wins.
    rule = re.escape(pattern).replace(r"\{id\}", "(.+?)", 1)
    rule = re.compile(rule.replace(r"\{channel\}", f"(?:{'|'.join(map(re.escape, channels))})", 1))
    return sorted({m[1] for m in map(rule.fullmatch, _listing(Path(folder))) if m})


def image_ids(folder: str | Path, channels: Sequence[str] = HPA_CHANNELS, pattern: str = PATTERN) -> L:
    """Return the sorted ids (file names without channel and suffix) of the images in `folder`, an `L` of str.

    Files that do not fit `pattern` with one of `channels` are ignored.

    Raises FileNotFoundError if the folder is missing or empty, no file fits, or an id lacks a channel (names the file).
    """
    folder = Path(folder)
    ids, names = found_ids(folder, channels, pattern), _listing(folder)
    if not ids:
        raise FileNotFoundError(
            f"No file in {folder} fits pattern={pattern!r} with channels {', '.join(channels)}; it holds for instance "
            f"{min(names)}. Pass the right pattern and channels."
        )
    wanted = (name for i in ids for name in _file_names(i, channels, pattern))
    if missing := [n for n in wanted if n not in names]:
        raise _missing(missing, folder, pattern)
    return L(ids)


def _probe(files: list[str], n: int) -> tuple[list[tuple[int, int]], list[str]]:
    """Return (height, width) of the readable `files` of `n` channels, and the names of the others with the reason."""
    sizes, damaged = [], []
    for file in files:
        try:
            sizes.append(header(file, n))
        except (ValueError, OSError) as e:
            damaged.append(f"{os.path.basename(file)} ({e})")
    return sizes, damaged


def check_folder(
    folder: str | Path,
    ids: Iterable[str] | None = None,
    channels: Sequence[str] = HPA_CHANNELS,
    pattern: str = PATTERN,
    same_size: bool = False,
) -> Counter:
    """Check the image files of `ids` (default: all in the folder) without decoding them; return (height, width) counts.

    Existence is checked against one listing of the folder, sizes and numbers of channels are read from the headers, a
    PNG or JPEG is also looked at for its end mark, a gzipped file is unzipped. More than 5,000 ids show a progress bar.

    Raises FileNotFoundError for a missing or empty folder or missing channel files; ValueError for duplicate ids,
    unreadable or truncated files, channels of one id that differ in size, and, with `same_size=True`, ids that differ
    in size. Each message names up to five offenders, their number, and the fix.
    """
    folder = Path(folder)
    ids = list(image_ids(folder, channels, pattern) if ids is None else ids)
    check_pattern(channels, pattern)
    names = _listing(folder)
    if twice := [i for i, n in Counter(ids).items() if n > 1]:
        raise ValueError(offenders("Duplicate ids", twice, "Every id must occur once: merge or drop the extra rows."))
    parts = [os.path.split(i) for i in ids]  # strings, not Path: this runs a hundred thousand times
    wanted = [[os.path.join(d, name) for name in _file_names(n, channels, pattern)] for d, n in parts]
    missing = [f for w in wanted for f in w if f not in names]
    # An id such as "plate1/a" lies in a subfolder, out of reach of the listing.
    if missing := [f for f in missing if not (os.path.dirname(f) and (folder / f).exists())]:
        raise _missing(missing, folder, pattern)
    damaged, odd, sizes = [], [], []
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        each = len(channels) if "{channel}" not in pattern else 1
        probes = pool.map(_probe, [[os.path.join(folder, f) for f in w] for w in wanted], repeat(each))
        if len(ids) > 5000:
            probes = progress_bar(probes, len(ids), leave=False)
        for i, (hw, bad) in zip(ids, probes, strict=True):
            damaged += bad
            sizes += hw[:1]
            if len(set(hw)) > 1:
                odd.append(f"{i} ({', '.join(f'{c} {h}x{w}' for c, (h, w) in zip(channels, hw, strict=False))})")
    if damaged:
        fix = "Replace the files or leave their ids out."
        raise ValueError(offenders(f"Unreadable or truncated image files in {folder}", damaged, fix))
    if odd:
        fix = "The channels of one image must have the same size: replace the odd file or leave the id out."
        raise ValueError(offenders(f"Channels of different size in {folder}", odd, fix))
    if same_size and len(set(sizes)) > 1:
        first: dict[tuple[int, int], str] = {}
        for i, s in zip(ids, sizes, strict=True):
            first.setdefault(s, i)
        fix = "A batch needs one size: pass size=, for instance size=256, to resize the images as they are read."
        raise ValueError(offenders("Images of different size", [f"{i} {h}x{w}" for (h, w), i in first.items()], fix))
    return Counter(sizes)
