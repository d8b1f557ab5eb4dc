"""The audit of a data set before training: every file is read, every problem is listed, nothing is raised."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
from skimage.exposure import is_low_contrast

from fastai_crl.images.duplicates import cluster, fingerprint
from fastai_crl.images.image_set import ImageSet, check_images, in_threads
from fastai_crl.images.levels import lost_levels

from .annotations import Annotations
from .csv_file import STOPS, Fault, read_file
from .label_parser import doubtful_labels, number_first

# Those that loading or training would stop at; the others cost quality at most.
_ERRORS = {"unreadable csv", "unreadable folder", "row without image", "missing file", "unreadable file", *STOPS}
_ERRORS.add("channels of different size")
_SATURATED = 0.05  # share of the pixels at full intensity from which a channel is reported
_SAMPLED = 128  # pixels of a side by which the contrast is judged: percentiles of all take longer than decoding
_COLUMNS = ["level", "problem", "id", "channel", "detail"]


@dataclass
class FolderReport:
    """What `check` found; prints as text, shows as tables in a notebook.

    Attributes:
        folder: the image folder.
        n_rows: rows of the csv; None without one.
        n_images: ids in the folder.
        sizes: (height, width) of the readable images, counted.
        problems: one row per problem, errors first: level ("error": loading or training would stop at it; "warning"),
            problem, id, channel ("" if it is about the whole image), detail.
        labels: images and share of the rows by label; None without a csv.
        channels: by channel mean, std, min and max of all pixels (0..1; mean and std are what `stats=` takes), and the
            shares of pixels that are 0 (`black`) and full intensity (`saturated`). NaN for a channel without a pixel.
    """

    folder: Path
    n_rows: int | None
    n_images: int
    sizes: Counter
    problems: pd.DataFrame
    labels: pd.DataFrame | None
    channels: pd.DataFrame

    @property
    def ok(self) -> bool:
        """Whether there is no error (there may be warnings)."""
        return not (self.problems["level"] == "error").any()

    def summary(self) -> pd.DataFrame:
        """Return one row per kind of problem: level, problem, how many, and the first five ids, or lines."""
        where = self.problems["id"].where(self.problems["id"] != "", self.problems["detail"])
        kinds = self.problems.assign(id=where).groupby(["level", "problem"], sort=False)["id"]
        table = kinds.agg(n="size", ids=lambda s: ", ".join(s.unique()[:5]) + (", …" if s.nunique() > 5 else ""))
        return table.reset_index().sort_values("level", kind="stable", ignore_index=True)

    def _parts(self) -> Iterable[tuple[str, pd.DataFrame | None]]:
        """Yield the headings and tables of the report."""
        rows = "" if self.n_rows is None else f", {self.n_rows} rows in the csv"
        sizes = ", ".join(f"{n} of {h}x{w}" for (h, w), n in self.sizes.most_common(5))
        more = f", and {len(self.sizes) - 5} other sizes" if len(self.sizes) > 5 else ""
        yield f"{self.folder}: {self.n_images} images{rows}; readable: {sizes or 'none'}{more}", None
        n = (self.problems["level"] == "error").sum()
        yield f"Problems: {n} errors, {len(self.problems) - n} warnings", self.summary() if len(self.problems) else None
        yield "Channels", self.channels.round(4)
        if self.labels is not None:
            yield "Labels", self.labels.round(5)

    def __str__(self) -> str:
        parts = (title if t is None else f"{title}\n{t.to_string()}" for title, t in self._parts())
        return "\n\n".join(parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(f"<p>{escape(title)}</p>{'' if t is None else t.to_html()}" for title, t in self._parts())


@dataclass
class _Image:
    """What reading one image gave."""

    histogram: np.ndarray  # (C,256) pixels by intensity, of the channels that could be read
    problems: list[Fault] = field(default_factory=list)
    size: tuple[int, int] | None = None
    fingerprint: tuple[bytes, np.ndarray] | None = None


def _inspect(images: ImageSet, id_: str) -> _Image:
    files, channels = images.files(id_), images.channels
    image = _Image(np.zeros((len(channels), 256), np.int64))

    def report(problem: str, detail: str = "", channel: str = "") -> None:
        image.problems.append(Fault(problem, detail, id_, channel))

    if not any(f.exists() for f in files):
        report("row without image")
        return image
    planes: list[np.ndarray] = []
    for file, names in zip(files, [channels] if len(files) == 1 else [(c,) for c in channels], strict=True):
        channel = names[0] if len(names) == 1 else ""
        try:
            opened = images.with_(channels=names, size=None).open(id_).numpy()
        except FileNotFoundError:
            report("missing file", file.name, channel)
            continue
        except ValueError as e:
            report("unreadable file", str(e.__cause__ or e), channel)
            continue
        planes.extend(opened)
        for c, plane in zip(names, opened, strict=True):
            counts = np.bincount(plane.ravel(), minlength=256)
            image.histogram[channels.index(c)] = counts
            if counts[255] > _SATURATED * plane.size:
                report("saturated", f"{counts[255] / plane.size:.1%} of the pixels", c)
            elif is_low_contrast(plane[:: len(plane) // _SAMPLED + 1, :: plane.shape[1] // _SAMPLED + 1]):
                low, high = np.searchsorted(counts.cumsum(), (0.01 * plane.size, 0.99 * plane.size))
                report("low contrast", f"98 % of the pixels are {low} to {high} of 255", c)
    shapes = [f"{p.shape[0]}x{p.shape[1]}" for p in planes]
    if len(set(shapes)) > 1:
        if images.size is None:
            report("channels of different size", ", ".join(shapes))
    elif len(planes) == len(channels):
        image.size = planes[0].shape
        image.fingerprint = fingerprint(np.stack(planes))
    return image


def check(
    images: ImageSet,
    csv: str | Path | None = None,
    id_col: str | int = "Id",
    label_col: str | int | Sequence[str | int] = "Target",
    label_delim: str | None = " ",
    subfolders: bool = False,
    progress: bool = True,
) -> FolderReport:
    """Read every image and row of a data set and report all that is wrong with it, as tables.

    Errors: a csv or folder that cannot be read; a row that does not fit the header, or that a stray quote makes of
    several; a line break in an id or label; a row without id, with an id of another row, or with one that names the
    same file or a file outside the folder; a row without any image, or without a label where it needs one; a missing or
    unreadable file; channels of different size. Warnings: an image without row, a row without label; a label that looks
    like several, or like another; an image of another size than most; a saturated channel (full intensity in more than
    5 % of its pixels), or one of low contrast (98 % of its pixels within 5 % of the range, as in a black one); 16-bit
    files that use a small part of their range (a sample of 32 images tells); an image with the pixels of an earlier one
    ("duplicate") or nearly so ("near-duplicate", by perceptual hash, see `duplicate_groups`); all that is wrong with
    the files of an image without row.

    The quick check of headers that `HPADataLoaders.from_csv` runs, and that raises, is `check_folder`.

    Args:
        images: where they lie and how they are read, at the size of their files.
        csv: file of the rows, one per image; None for images without labels.
        id_col: see `Annotations.from_csv`, like the next two.
        label_col: see there.
        label_delim: see there.
        subfolders: look for images in the folders inside, too; so does a csv with an id in one, such as plate1/a.
        progress: show a progress bar.

    Returns:
        `FolderReport`: all problems, those of a csv or folder that cannot be read too.

    Raises:
        ValueError: what is no `ImageSet`; nothing else raises.
    """
    channels = check_images(images).channels
    problems: list[Fault] = []
    rows = labels = None
    in_folder: list[str] = []
    if csv is not None:
        try:
            csv_file = read_file(Path(csv))
            problems += csv_file.faults
            rows = Annotations.unchecked(csv_file, id_col, label_col, label_delim)
        except (OSError, ValueError) as e:
            problems.append(Fault("unreadable csv", str(e)))
    try:
        in_folder = images.found_ids(subfolders or (rows is not None and any("/" in i for i in rows.ids)))
    except OSError as e:
        problems.append(Fault("unreadable folder", str(e)))
    if rows is not None:
        found, labels = _rows(rows, images.folder)
        problems += found
    in_csv = [] if rows is None else list(dict.fromkeys(i for i in rows.ids if i.strip()))
    ids = list(dict.fromkeys([*in_csv, *in_folder]))
    unnamed = set() if rows is None else set(in_folder) - set(in_csv)
    problems += [Fault("image without row", id=i) for i in sorted(unnamed)]

    histogram, sizes, prints = np.zeros((len(channels), 256), np.int64), {}, {}
    inspected = in_threads(lambda i: _inspect(images, i), ids, progress)
    for i, image in zip(ids, inspected, strict=True):
        problems += image.problems
        histogram += image.histogram
        if image.fingerprint is not None:
            sizes[i], prints[i] = image.size, image.fingerprint
    problems += _odd_sizes(sizes) + _duplicates(prints)
    problems += [Fault("grey levels lost", lost, channel=c) for c, lost in lost_levels(images, list(prints)).items()]
    # Files that no row names are never loaded.
    levels = ["error" if p.problem in _ERRORS and p.id not in unnamed else "warning" for p in problems]
    table = pd.DataFrame(map(vars, problems), columns=_COLUMNS, dtype=object).assign(level=levels)
    table = table.sort_values("level", kind="stable", ignore_index=True)  # errors first
    n_rows = None if rows is None else len(rows)
    found_sizes, statistics = Counter(sizes.values()), _statistics(histogram, channels)
    return FolderReport(images.folder, n_rows, len(in_folder), found_sizes, table, labels, statistics)


def _rows(rows: Annotations, folder: Path) -> tuple[list[Fault], pd.DataFrame]:
    """Return the problems of the rows of the csv, and the images by label."""
    problems = rows.faults(folder)
    if not rows.single:
        problems += [Fault("no label", id=i) for i, row in zip(rows.ids, rows.labels, strict=True) if not row]
    problems += [Fault(kind, detail, rows.ids[at]) for kind, at, detail in doubtful_labels(rows.labels)]
    counts = rows.counts()
    found = sorted(counts, key=number_first)
    table = pd.DataFrame({"images": [counts[o] for o in found]}, index=pd.Index(found, name="label"))
    return problems, table.assign(share=table["images"] / len(rows))


def _odd_sizes(sizes: dict[str, tuple[int, int]]) -> list[Fault]:
    if not sizes:
        return []
    (usual, _), *_ = Counter(sizes.values()).most_common(1)
    most = f"most are {usual[0]}x{usual[1]}"
    return [Fault("other size", f"{s[0]}x{s[1]}, {most}", i) for i, s in sizes.items() if s != usual]


def _duplicates(prints: dict[str, tuple[bytes, np.ndarray]]) -> list[Fault]:
    """Return each image that has an earlier one like it, with the earliest of its pixels, or else of its group."""
    groups = cluster(([d for d, _ in prints.values()], np.array([b for _, b in prints.values()])))
    exact, near, found = {}, {}, []
    for (i, (digest, _)), group in zip(prints.items(), groups, strict=True):
        if digest in exact:
            found.append(Fault("duplicate", f"of {exact[digest]}", i))
        elif group in near:
            found.append(Fault("near-duplicate", f"of {near[group]}", i))
        exact.setdefault(digest, i)
        near.setdefault(group, i)
    return found


def _statistics(histogram: np.ndarray, channels: tuple[str, ...]) -> pd.DataFrame:
    """Return the statistics of pixels counted by channel and intensity, (C,256)."""
    levels, n = np.arange(256) / 255, histogram.sum(1)
    share = histogram / np.where(n, n, np.nan)[:, None]
    mean = share @ levels
    spread = ((levels - mean[:, None]) ** 2 * share).sum(1) ** 0.5
    seen = [levels[h > 0] if h.any() else np.array([np.nan]) for h in histogram]
    columns = {"mean": mean, "std": spread, "min": [s[0] for s in seen], "max": [s[-1] for s in seen]}
    columns |= {"black": share[:, 0], "saturated": share[:, 255]}
    return pd.DataFrame(columns, index=pd.Index(channels, name="channel"))
