"""Image files of one grey file per channel: name them, list the ids of a folder, check them before training."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from struct import error as StructError
from typing import Any

from fastcore.foundation import L
from fastprogress.fastprogress import progress_bar
from PIL import Image

from fastai_crl.hpa import HPA_CHANNELS

__all__ = ["DAMAGED", "PATTERN", "channel_files", "check_folder", "check_pattern", "image_ids", "offenders"]

PATTERN: str = "{id}_{channel}.png"

# What Pillow raises, depending on the format and the place of the damage.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, StructError, Image.DecompressionBombError)

_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


def offenders(what: str, items: Sequence[Any], fix: str) -> str:
    """Return an error message that names up to five of `items`, says how many there are, and ends with the fix."""
    return f"{what} ({len(items)} in all): {', '.join(map(str, items[:5]))}{', …' if len(items) > 5 else ''}. {fix}"


def channel_files(prefix: str | Path, channels: Sequence[str] = HPA_CHANNELS, pattern: str = PATTERN) -> list[Path]:
    """Return the file of each channel of the image `prefix` = folder/id, in the order of `channels`."""
    prefix = Path(prefix)
    return [prefix.with_name(pattern.format(id=prefix.name, channel=c)) for c in channels]


def check_pattern(channels: Sequence[str], pattern: str) -> None:
    """Raise ValueError unless `pattern` is a file name holding {id} and {channel}, and the channels are distinct."""
    if "{id}" not in pattern or "{channel}" not in pattern or "/" in pattern:
        raise ValueError(f"pattern={pattern!r} must be a file name with {{id}} and {{channel}}, such as {PATTERN!r}.")
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


def image_ids(folder: str | Path, channels: Sequence[str] = HPA_CHANNELS, pattern: str = PATTERN) -> L:
    """Return the sorted ids (file names without channel and suffix) of the images in `folder`, an `L` of str.

    Files that do not fit `pattern` with one of `channels` are ignored.

    Raises FileNotFoundError if the folder is missing or empty, no file fits, or an id lacks a channel (names the file).
    """
    folder = Path(folder)
    check_pattern(channels, pattern)
    names = _listing(folder)
    # The shortest id that fits, so that of the channels "red" and "far_red" the longer name wins.
    rule = re.escape(pattern).replace(r"\{id\}", "(.+?)", 1)
    rule = re.compile(rule.replace(r"\{channel\}", f"(?:{'|'.join(map(re.escape, channels))})", 1))
    ids = sorted({m[1] for m in map(rule.fullmatch, names) if m})
    if not ids:
        raise FileNotFoundError(
            f"No file in {folder} fits pattern={pattern!r} with channels {', '.join(channels)}; it holds for instance "
            f"{min(names)}. Pass the right pattern and channels."
        )
    wanted = (pattern.format(id=i, channel=c) for i in ids for c in channels)
    if missing := [n for n in wanted if n not in names]:
        raise _missing(missing, folder, pattern)
    return L(ids)


def _header(file: str) -> tuple[int, int]:
    """Return (height, width) of an image file from its header; raise one of `DAMAGED` if it cannot be read."""
    with open(file, "rb", buffering=0) as f:
        head = f.read(24)
        # The common case by hand, ten times as fast as Pillow: an intact PNG starts with its size and has an end mark.
        if head.startswith(_PNG_START) and f.seek(0, os.SEEK_END) > 24:
            f.seek(-len(_PNG_END), os.SEEK_END)
            if f.read() == _PNG_END:
                return int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big")
    with Image.open(file) as im:
        if im.format == "PNG":  # without its end mark it is almost surely truncated: only then decode it
            im.load()
        return im.height, im.width


def _probe(files: list[str]) -> tuple[list[tuple[int, int]], list[str]]:
    """Return the (height, width) of the readable `files`, and the names of the others with the reason."""
    sizes, damaged = [], []
    for file in files:
        try:
            sizes.append(_header(file))
        except DAMAGED as e:
            reason = str(e).replace(f" '{file}'", "") or type(e).__name__
            damaged.append(f"{os.path.basename(file)} ({reason})")
    return sizes, damaged


def check_folder(
    folder: str | Path,
    ids: Iterable[str] | None = None,
    channels: Sequence[str] = HPA_CHANNELS,
    pattern: str = PATTERN,
    same_size: bool = False,
) -> Counter:
    """Check the image files of `ids` (default: all in the folder) without decoding them; return (height, width) counts.

    Existence is checked against one listing of the folder, sizes are read from the file headers, a PNG is also looked
    at for its end mark. More than 5,000 ids show a progress bar.

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
    wanted = [[os.path.join(d, pattern.format(id=n, channel=c)) for c in channels] for d, n in parts]
    missing = [f for w in wanted for f in w if f not in names]
    # An id such as "plate1/a" lies in a subfolder, out of reach of the listing.
    if missing := [f for f in missing if not (os.path.dirname(f) and (folder / f).exists())]:
        raise _missing(missing, folder, pattern)
    damaged, odd, sizes = [], [], []
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        probes = pool.map(_probe, [[os.path.join(folder, f) for f in w] for w in wanted])
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
