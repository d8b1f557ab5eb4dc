"""How the files of multi-channel images are named: patterns, channels, and the ids that a folder's files make."""

import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from numbers import Integral
from pathlib import Path
from string import Formatter
from typing import Any

from fastai_crl._checks import offenders

from .readers import reader_of

# The names of channels where none are given, in the order of the tensor. A test holds them to those of the home case.
CHANNELS: tuple[str, ...] = ("red", "green", "blue", "yellow")
PATTERN: str = "{id}_{channel}.png"

_APPLE_DOUBLE = "._"  # macOS keeps what other disks cannot hold in a second file of that name


# ---------------------------------------------------------------- what a user passes


def check_channels(channels: Sequence[str | int] | str | int) -> tuple[str, ...]:
    """Return the names of channels: a lone one is one channel, and whole numbers become text, as in file names.

    Raises:
        ValueError: no channel, one given twice, a name that cannot be part of a file name, or a set, of no order.
    """
    if isinstance(channels, Set):
        raise ValueError(f"channels={channels} is a set, which has no order: give a list.")
    given = tuple(channels) if isinstance(channels, Iterable) and not isinstance(channels, str) else (channels,)
    if bad := [c for c in given if not _names_channel(c)]:
        fix = "They are part of the files' names: give text without a slash, or whole numbers."
        raise ValueError(offenders("channels= holds what names no channel", list(map(repr, bad)), fix))
    names = tuple(map(str, given))
    if not names or len(set(names)) < len(names):
        raise ValueError(f"channels={names} must name at least one channel, and none of them twice.")
    return names


def _names_channel(channel: Any) -> bool:
    if isinstance(channel, str):
        return bool(channel) and not set(channel) & set("/\0")
    return isinstance(channel, Integral) and not isinstance(channel, bool)


def check_pattern(channels: Sequence[str], pattern: str) -> None:
    """Raise ValueError unless `pattern` is a file name holding {id}, and {channel} where no file holds all channels.

    Without {channel} one file holds all channels: a PNG, JPEG or the like 1 or 3 (RGB), others any number.
    """
    try:
        parts = list(Formatter().parse(pattern))
    except (TypeError, ValueError):  # no text, or a brace alone
        parts = []
    fields = [field for _, field, _, _ in parts if field is not None]
    plain = all(not spec and not conversion for _, _, spec, conversion in parts)
    if "id" not in fields or not set(fields) <= {"id", "channel"} or not plain or "/" in pattern:
        raise ValueError(
            f"pattern={pattern!r} must be a file name with {{id}} and {{channel}}, and no other field, such as "
            f"{PATTERN!r}."
        )
    reader = reader_of(pattern)
    if "channel" not in fields and reader is not None and len(channels) not in (reader.channels or (len(channels),)):
        raise ValueError(
            f"pattern={pattern!r} is one file for {len(channels)} channels: only a TIFF holds so many. Use a name with "
            f"{{channel}} for one file per channel, such as {PATTERN!r}, or a TIFF, such as '{{id}}.tif'."
        )


# ---------------------------------------------------------------- names and ids


def listing(folder: Path, subfolders: bool = False) -> set[str]:
    """Return what lies in `folder`, as paths below it; with `subfolders` also what lies in those.

    Raises:
        FileNotFoundError: the folder is missing or empty.
    """
    names: set[str] = set()
    seen, todo = set(), [""]
    try:
        while todo:
            below = todo.pop()
            for entry in os.scandir(folder / below):
                if entry.name.startswith(_APPLE_DOUBLE):
                    continue
                names.add(below + entry.name)
                if subfolders and entry.is_dir():
                    found = entry.stat()  # links can lead round in a circle
                    if (found.st_dev, found.st_ino) not in seen:
                        seen.add((found.st_dev, found.st_ino))
                        todo.append(f"{below}{entry.name}/")
    except (FileNotFoundError, NotADirectoryError) as e:
        raise FileNotFoundError(f"Image folder {folder} does not exist: pass the folder of the image files.") from e
    if not names:
        raise FileNotFoundError(f"Image folder {folder} is empty: pass the folder of the image files.")
    return names


def _fields(pattern: str) -> list[tuple[str, str | None]]:
    """Return the parts of `pattern`: each a text, and the field that follows it, if any."""
    return [(text, field) for text, field, _, _ in Formatter().parse(pattern)]


def _rule(channels: Iterable[str], pattern: str) -> re.Pattern[str]:
    """Return what a file's name must match; the id is the shortest that fits, so that a longer channel wins."""
    groups = {"id": "(?P<id>.+?)", "channel": f"(?P<channel>{'|'.join(map(re.escape, channels))})"}
    rule = ""
    for text, field in _fields(pattern):
        rule += re.escape(text)
        if field is not None:
            rule += groups[field]
            groups[field] = f"(?P={field})"
    return re.compile(rule, re.DOTALL)


def match_ids(names: Iterable[str], channels: Sequence[str], pattern: str) -> list[str]:
    """Return the sorted ids of which `names` hold at least one file, all channels or not.

    A name can have two readings: w0_far_red.png is the channel "red" of the image w0_far, or the channel "far_red",
    which nobody asked for, of the image w0. The second holds where every image has such a file, and none with all
    channels of its own; the first elsewhere. A warning tells what was decided where files alone cannot tell.
    """
    found: dict[str, set[str]] = defaultdict(set)
    rule, channel = _rule(channels, pattern), "channel" if "{channel}" in pattern else "id"
    for path in names:
        folder, slash, name = path.rpartition("/")
        if match := rule.fullmatch(name):
            found[folder + slash + match["id"]].add(match[channel])
    doubtful = _doubtful(found, pattern)
    doubted = {i for pairs in doubtful.values() for i in pairs}
    channels_of_others = set()
    for pairs in doubtful.values():
        everywhere = len(set(pairs.values()) - doubted) == len(found) - len(doubted)
        if everywhere and (len(channels) == 1 or set().union(*(found[i] for i in pairs)) < set(channels)):
            channels_of_others |= pairs.keys()
    if channels_of_others:
        what = "Taken for further channels of other images, not for images"
        warnings.warn(offenders(what, sorted(channels_of_others), "If they are images, pass their ids."), stacklevel=3)
    elif doubted and len(channels) == 1:
        fix = "If they are further channels of other images, pass the ids of the images."
        warnings.warn(offenders("Taken for images", sorted(doubted), fix), stacklevel=3)
    return sorted(set(found) - channels_of_others)


def _doubtful(found: Iterable[str], pattern: str) -> dict[str, dict[str, str]]:
    """Return the ids that may be another id with the begin of a longer channel: by that begin, {id: the other id}."""
    fields = [(text, field) for text, field in _fields(pattern) if field is not None]
    if [field for _, field in fields] not in (["id", "channel"], ["channel", "id"]):
        return {}
    between, first = fields[1][0], fields[0][1] == "id"
    doubtful: dict[str, dict[str, str]] = defaultdict(dict)
    found = set(found)
    for i in found:
        folder, name = os.path.split(i)
        at = 0
        while 0 <= (at := name.find(between, at + 1)) < len(name) - len(between):
            left, right = name[:at], name[at + len(between) :]
            other, more = (left, right) if first else (right, left)
            if (other := os.path.join(folder, other)) in found:
                doubtful[more][i] = other
    return doubtful
