"""The image files of a data set as one value: where they lie, how they are named, and how their pixels are read."""

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastcore.foundation import L
from fastprogress.fastprogress import progress_bar

from fastai_crl._checks import check_size, offenders

from .layout import CHANNELS, PATTERN, check_channels, check_pattern, listing, match_ids
from .readers import check_intensity, check_white, header, read_planes
from .tensor import TensorMultiChannel

Size = int | tuple[int, int]


@dataclass(frozen=True)
class ImageSet:
    """The images of a folder: where their files lie, how they are named, and how their pixels are read.

    Its files are folder/`pattern` with the id and the name of a channel filled in: one per channel, or, for a pattern
    without {channel}, one that holds all channels in the order of `channels`. An id such as "plate1/a" lies in a
    sub-folder. The values are checked when it is made; `with_` makes another with some of them changed.

    Args:
        folder: of the image files.
        channels: names, in the order of the tensor; whole numbers become text, a lone name is one channel.
        pattern: name of the files, with {id} and {channel}.
        size: (height, width), or one number for a square, to which each channel is resized on its own as it is read;
            None keeps the size of the files.
        bits: depth of the data in 16-bit files, 9 to 16; None: the files' own.
        white: in place of `bits`, the value of full intensity, such as 10000; greater ones are an error.
        stretch: percentiles (lo, hi), or one number p for (100-p, p), that become 0 and 255 in each channel of each
            image; None: true brightness.

    Raises:
        ValueError: a value out of range; names the value, the rule and the fix.
    """

    folder: str | Path
    channels: Sequence[str] = CHANNELS
    pattern: str = PATTERN
    size: Size | None = None
    bits: int | None = None
    white: int | None = None
    stretch: float | tuple[float, float] | None = None

    def __post_init__(self):
        channels = check_channels(self.channels)
        check_pattern(channels, self.pattern)
        bits, stretch = check_intensity(self.bits, self.stretch)
        check_white(self.white, bits)
        checked = {"folder": Path(self.folder), "channels": channels, "size": check_size(self.size)}
        for name, value in (checked | {"bits": bits, "stretch": stretch}).items():
            object.__setattr__(self, name, value)

    def with_(self, **changes: Any) -> "ImageSet":
        """Return the same with other values for some of its arguments."""
        return replace(self, **changes)

    @property
    def per_file(self) -> int:
        """The number of channels that one file holds."""
        return 1 if "{channel}" in self.pattern else len(self.channels)

    @property
    def full(self) -> int | None:
        """The value of full intensity that `white` or `bits` says; None: the files' own."""
        return check_white(self.white, self.bits)

    def found_ids(self, subfolders: bool = False) -> list[str]:
        """Return the sorted ids of which the folder holds at least one file, all channels or not; perhaps none.

        Args:
            subfolders: those in the folders inside, too, as folder/id.

        Raises:
            FileNotFoundError: the folder is missing or empty.
        """
        return match_ids(listing(self.folder, subfolders), self.channels, self.pattern)

    def ids(self, subfolders: bool = False) -> L:
        """Return the sorted ids of the images in the folder, an `L` of str.

        Files that do not fit the pattern with one of the channels are ignored, as are the files ._NAME that macOS
        leaves on other disks. Of the channel "red", w0_far_red.png is no image w0_far beside an image w0 (see
        `layout.match_ids`).

        Args:
            subfolders: look into sub-folders too; such an id is "plate1/a".

        Raises:
            FileNotFoundError: the folder is missing or empty, no file fits, or an id lacks a channel (names the file).
        """
        names = listing(self.folder, subfolders)
        ids = match_ids(names, self.channels, self.pattern)
        if not ids:
            raise FileNotFoundError(
                f"No file in {self.folder} fits pattern={self.pattern!r} with channels {', '.join(self.channels)}; it "
                f"holds for instance {min(names)}. Name the files so, or look into sub-folders, subfolders=True; "
                "an ImageSet, and from_csv, take other names by pattern= and channels=."
            )
        self._require([f for i in ids for f in self.names(i)], names)
        return L(ids)

    def names(self, id_: str | Path) -> list[str]:
        """Return the files of one image as paths below the folder: text, as this runs a hundred thousand times."""
        folder, name = os.path.split(id_)
        channels = self.channels if "{channel}" in self.pattern else self.channels[:1]  # one file for all
        return [os.path.join(folder, self.pattern.format(id=name, channel=c)) for c in channels]

    def files(self, id_: str | Path) -> list[Path]:
        """Return the files of one image: one per channel, in the order of `channels`, or one for all."""
        return [self.folder / name for name in self.names(id_)]

    def id_of(self, path: str | Path) -> str | Path:
        """Return the id, with its folder, of the image that a file is of; what is no such file, as it is."""
        folder, name = os.path.split(path)
        if os.path.splitext(name)[1] == os.path.splitext(self.pattern)[1] and os.path.isfile(path):
            return next((os.path.join(folder, i) for i in match_ids([name], self.channels, self.pattern)), path)
        return path

    def open(self, id_: str | Path) -> TensorMultiChannel:
        """Read one image as uint8 (C,H,W), intensities 0..255.

        8-bit files keep their values, 16-bit files are scaled by their bit depth, one channel saved in colour is
        reduced by the maximum of its bands (see `readers.read_planes`).

        Raises:
            FileNotFoundError: a missing file.
            ValueError: a file that is damaged, truncated, of floating point pixels, of other channels, or of another
                size than the first channel. Each names the file.
        """
        files = self.files(id_)
        options = {"size": self.size, "full": self.full, "stretch": self.stretch}
        planes = [read_planes(f, self.per_file, **options) for f in files]
        for f, p in zip(files, planes, strict=True):
            if p.shape != planes[0].shape:
                raise ValueError(
                    f"Image file {f} is {p.shape[1]}x{p.shape[2]} but {files[0].name} is "
                    f"{planes[0].shape[1]}x{planes[0].shape[2]}: the channels of one image must have the same size."
                )
        return TensorMultiChannel(torch.from_numpy(np.concatenate(planes)), channels=self.channels)

    def check(self, ids: Iterable[str] | None = None, same_size: bool = False) -> Counter:
        """Check the files of `ids` (default: all in the folder) without decoding them; return (height, width) counts.

        Existence is checked against one listing of the folder, sizes and numbers of channels are read from the headers,
        a PNG or JPEG is also looked at for its end mark, a gzipped file is unzipped. More than 5,000 ids show a
        progress bar.

        Raises:
            FileNotFoundError: a missing or empty folder, or missing channel files.
            ValueError: duplicate ids, files that cannot be read, without `size` channels of one id that differ in size,
                and, with `same_size`, ids that differ in size. Each names up to five offenders, their number, and the
                fix.
        """
        ids = list(self.ids() if ids is None else ids)
        names = listing(self.folder)
        check_once(ids)
        wanted = [self.names(i) for i in ids]
        self._require([f for w in wanted for f in w], names)
        damaged, odd, sizes = [], [], []
        for i, (hw, bad) in zip(ids, in_threads(self._probe, wanted, len(ids) > 5000), strict=True):
            damaged += bad
            sizes += hw[:1]
            if len(set(hw)) > 1:
                each = zip(self.channels, hw, strict=False)
                odd.append(f"{i} ({', '.join(f'{c} {h}x{w}' for c, (h, w) in each)})")
        if damaged:
            fix = "Replace the files or leave their ids out."
            raise ValueError(offenders(f"Image files in {self.folder} that cannot be read", damaged, fix))
        if odd and self.size is None:
            fix = "A tensor needs one size: pass size=, for instance size=256, or replace the odd files."
            raise ValueError(offenders(f"Channels of different size in {self.folder}", odd, fix))
        if same_size and len(set(sizes)) > 1:
            first: dict[tuple[int, int], str] = {}
            for i, s in zip(ids, sizes, strict=True):
                first.setdefault(s, i)
            fix = "A batch needs one size: pass size=, for instance size=256, to resize the images as they are read."
            raise ValueError(
                offenders("Images of different size", [f"{i} {h}x{w}" for (h, w), i in first.items()], fix)
            )
        return Counter(sizes)

    def unreadable(self, ids: Iterable[str]) -> dict[str, str]:
        """Return those of `ids` whose image `open` cannot read, each with the reason; every file is decoded."""

        def why(id_: str) -> str | None:
            try:
                self.open(id_)
            except (ValueError, OSError) as e:
                return str(e)

        ids = list(ids)
        return {i: reason for i, reason in zip(ids, in_threads(why, ids), strict=True) if reason is not None}

    def _probe(self, files: list[str]) -> tuple[list[tuple[int, int]], list[str]]:
        """Return (height, width) of the readable files of an image, and the names of the others with the reason."""
        sizes, damaged = [], []
        for file in files:
            try:
                sizes.append(header(self.folder / file, self.per_file, self.full))
            except (ValueError, OSError) as e:
                damaged.append(f"{file} ({e})")
        return sizes, damaged

    def _require(self, files: list[str], names: set[str]) -> None:
        """Raise FileNotFoundError for `files` that are neither among `names` nor in a sub-folder."""
        missing = [f for f in files if f not in names]
        if missing := [f for f in missing if not (os.path.dirname(f) and (self.folder / f).exists())]:
            fix = f"Add the files, leave the ids out, or pass the right channels and pattern (now {self.pattern!r})."
            if "\\" in missing[0] and (self.folder / missing[0].replace("\\", "/")).exists():
                fix = "They are there: the ids are of Windows, pass id.replace('\\\\', '/')."
            if there := [form for form in ("NFC", "NFD") if unicodedata.normalize(form, missing[0]) in names]:
                fix = f"They are there in another Unicode form: unicodedata.normalize({there[0]!r}, id)."
            raise FileNotFoundError(offenders(f"Missing channel files in {self.folder}", missing, fix))


def in_threads(make: Callable[[Any], Any], items: Collection[Any], progress: bool = False) -> Iterator[Any]:
    """Yield `make` of each of `items`, in order, made in more threads than there are cores: they wait for a disk.

    Args:
        make: of one item.
        items: of which each is made.
        progress: show a progress bar.
    """
    with ThreadPoolExecutor() as pool:
        made = pool.map(make, items)
        yield from progress_bar(made, len(items), leave=False) if progress else made


def check_once(ids: Iterable[str]) -> None:
    """Raise ValueError for ids that occur more than once."""
    if twice := [i for i, n in Counter(ids).items() if n > 1]:
        raise ValueError(offenders("Duplicate ids", twice, "Every id must occur once: merge or drop the extra rows."))


def check_images(images: Any) -> ImageSet:
    """Return `images`; raise ValueError, with the way out, for what is no `ImageSet`."""
    if not isinstance(images, ImageSet):
        raise ValueError(f"images= takes an ImageSet, not a {type(images).__name__}: pass ImageSet(folder).")
    return images


# ---------------------------------------------------------------- the same, as functions


def image_ids(
    folder: str | Path, channels: Sequence[str] = CHANNELS, pattern: str = PATTERN, subfolders: bool = False
) -> L:
    """Return the sorted ids of the images in `folder`, an `L` of str; see `ImageSet.ids`."""
    return ImageSet(folder, channels, pattern).ids(subfolders)


def check_folder(
    folder: str | Path,
    ids: Iterable[str] | None = None,
    channels: Sequence[str] = CHANNELS,
    pattern: str = PATTERN,
    same_size: bool = False,
    subfolders: bool = False,
) -> Counter:
    """Check the files of `ids` without decoding them; see `ImageSet.check`.

    Default: all in the folder; with `subfolders=True` in those inside, too.
    """
    images = ImageSet(folder, channels, pattern)
    return images.check(images.ids(subfolders) if ids is None else ids, same_size)
