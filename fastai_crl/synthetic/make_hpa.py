"""Synthetic HPA-like data: drawn fields of cells in the Kaggle layout, for trying things out where real data is absent.

Nothing here is a photograph. The pictures are drawn (`patterns`), the labels sampled; results on them say that code
works and how methods compare on *this* data, never how well a network reads real cells.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import operator
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from fastprogress import progress_bar
from PIL import Image

from fastai_crl.hpa import HPA_CHANNELS, HPA_COUNTS, HPA_LABELS

from .patterns import draw_field

# Share of the real ids with 1, 2, 3 and 4 labels (the two ids with 5 are counted as 4).
_LABELS_PER_ID = (0.48681, 0.40181, 0.10170, 0.00968)
_MILD_RATIO = 20.0
_DRAWING = 1  # raised whenever the same parameters would give other pictures or labels
_MANIFEST, _UNFINISHED, _NOTE = "synthetic.json", "synthetic.unfinished.json", "SYNTHETIC.txt"
_TABLES = ("train.csv", "sample_submission.csv", "test_labels.csv")
_TEXT = """SYNTHETIC DATA: not photographs, not from the Human Protein Atlas.

Every picture in this folder was drawn by fastai_crl.synthetic.make_hpa and every label was sampled. The layout, the
channel names, the label numbers and, as far as asked for, the label frequencies are those of the Kaggle competition
"Human Protein Atlas Image Classification" (2018). Use it to try code out; scores on it say nothing about real cells.
`synthetic.json` holds the parameters.
"""


def make_hpa(
    path: str | os.PathLike[str],
    n: int = 600,
    size: int = 128,
    seed: int = 0,
    imbalance: str | Sequence[float] = "real",
    n_test: int = 0,
    min_count: int | None = None,
    force: bool = False,
    progress: bool = True,
    workers: int | None = None,
) -> Path:
    """Write a SYNTHETIC four-channel, 28-label data set in the Kaggle layout to `path` and return `path`.

    Writes `train/{id}_{red,green,blue,yellow}.png` (8-bit grey, `size` pixels square), `train.csv` (`Id,Target`, label
    numbers separated by spaces), `SYNTHETIC.txt` and `synthetic.json`; with `n_test` also `test/`,
    `sample_submission.csv` (`Id,Predicted`, all "0") and the truth in `test_labels.csv`. Ids are `synthetic-000000` on;
    test ids follow the train ids. About 20 ms a field on one core, 0.5 s at 512 pixels.

    Labels are dealt, not drawn one by one: the numbers of fields with 1, 2, 3 and 4 labels follow the real set (49, 40,
    10 and 1 %), each label's number of occurrences is fixed by `imbalance` and `min_count` (rounded by largest
    remainder), and they are then dealt at random, commonest first, never twice to a field. So the marginals are right
    to within a rounding at any `n`; which labels go together is left to chance and does not follow the real set.

    A finished data set with the same parameters in `path` is kept (missing files are made again), an interrupted one is
    redone.

    Args:
        path: folder of the data set, made if need be.
        n: fields to train on, at least 1.
        size: side in pixels, at least 32; below about 96 the finest patterns merge.
        seed: 0 or above. Equal arguments give byte-identical files with the same library versions, whatever `workers`.
        imbalance: `"real"`, label frequencies of the real set (1171:1); `"mild"`, the real counts raised to the power
            that leaves 20:1; or 28 counts or weights of 0 or above, of which only the proportions matter (0: never
            used).
        n_test: fields to test on, 0 for none.
        min_count: each label (of weight above 0) occurs at least so often in train, and in proportion (rounded down) in
            test. This lifts the rarest labels above the frequency asked for and lowers the others by as much; 0 leaves
            them as they fall, perhaps absent. Default: one per 100 fields up to 4, so 4 where `n` is 400 or more.
        force: replace the synthetic data set in `path` by this one. Files that this function did not make stay.
        progress: show a progress bar.
        workers: processes, by default one per core up to 8; only Linux, whose forked workers need no main guard in the
            calling script, uses more than one.

    Raises:
        ValueError: a value out of range.
        FileExistsError: `path` holds a synthetic set with other parameters (and not `force`), or a data set that is not
            synthetic.
    """
    n, n_test = _whole("n", n, 1), _whole("n_test", n_test, 0)
    size, seed = _whole("size", size, 32), _whole("seed", seed, 0)
    floor = min(4, n // 100) if min_count is None else _whole("min_count", min_count, 0)
    processes = min(8, _cores()) if workers is None else _whole("workers", workers, 1)
    weights = _weights(imbalance)
    spread = imbalance if isinstance(imbalance, str) else weights.tolist()
    wanted: dict[str, Any] = {"drawing": _DRAWING, "n": n, "size": size, "seed": seed, "imbalance": spread}
    wanted |= {"n_test": n_test, "min_count": floor}
    sets = {"train": _deal(n, weights, floor, np.random.default_rng([seed, 0, 1]))}
    if n_test:
        held = min(floor * n_test // n, n_test // len(HPA_LABELS))
        sets["test"] = _deal(n_test, weights, held, np.random.default_rng([seed, 0, 2]))

    path = Path(path)
    finished = _claim(path, wanted, force)
    jobs, tables = [], {}
    for i, (name, labels) in enumerate((name, labels) for name, part in sets.items() for labels in part):
        stem = str(path / name / _id(i))
        if not finished or not all(os.path.exists(f"{stem}_{c}.png") for c in HPA_CHANNELS):
            jobs.append((stem, size, labels, (seed, i)))
    ids, targets = [_id(i) for i in range(n + n_test)], {k: [" ".join(map(str, t)) for t in v] for k, v in sets.items()}
    tables["train.csv"] = pd.DataFrame({"Id": ids[:n], "Target": targets["train"]})
    if n_test:
        tables["sample_submission.csv"] = pd.DataFrame({"Id": ids[n:], "Predicted": "0"})
        tables["test_labels.csv"] = pd.DataFrame({"Id": ids[n:], "Target": targets["test"]})
    for name in sets:
        (path / name).mkdir(exist_ok=True)
    _draw_all(jobs, processes, progress)
    for name, table in tables.items():
        if not finished or not (path / name).exists():
            table.to_csv(path / name, index=False, lineterminator="\n")
    if not finished:
        os.replace(path / _UNFINISHED, path / _MANIFEST)  # last: only a complete data set has it
    return path


# ---- arguments ----
def _whole(name: str, value: int, low: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be a whole number; pass an int of {low} or more.") from None
    if number < low:
        raise ValueError(f"{name}={value} must be at least {low}; pass {name}={low} or more.")
    return number


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _weights(imbalance: str | Sequence[float]) -> npt.NDArray[np.float64]:
    counts = np.array(HPA_COUNTS, float)
    if isinstance(imbalance, str):
        if imbalance not in ("real", "mild"):
            raise ValueError(
                f'imbalance={imbalance!r} is not known; pass "real", "mild" or {len(counts)} counts or weights.'
            )
        power = 1.0 if imbalance == "real" else math.log(_MILD_RATIO) / math.log(counts.max() / counts.min())
        return counts**power
    weights = np.asarray(imbalance, float)
    if weights.shape != counts.shape:
        raise ValueError(
            f"imbalance has shape {weights.shape}, but there are {len(counts)} labels; pass one weight for each."
        )
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
        raise ValueError(
            f"imbalance={weights.tolist()} must be finite, not negative and not all 0; "
            "pass counts such as [100, 50, ...] with 0 for a label that is never used."
        )
    return weights


# ---- labels ----
def _round(values: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.int64]:
    """Whole numbers next to `values` that sum to `total`, by largest remainder."""
    whole = np.floor(values + 1e-9).astype(np.int64)
    rest = np.argsort(whole - values, kind="stable")[: total - whole.sum()]
    whole[rest] += 1
    return whole


def _deal(n: int, weights: npt.NDArray[np.float64], floor: int, rng: np.random.Generator) -> list[list[int]]:
    """Sorted label numbers of each of `n` fields; see `make_hpa` for the rule."""
    used = int((weights > 0).sum())
    sizes = np.repeat(np.arange(1, 5), _round(np.array(_LABELS_PER_ID) * n, n)).clip(max=used)
    rng.shuffle(sizes)
    slots = int(sizes.sum())
    if floor > n or floor * used > slots:
        raise ValueError(
            f"min_count={floor} for {used} labels needs {floor * used} labels, but n={n} fields carry {slots} in all; "
            f"pass min_count={min(n, slots // used)} or less, or a larger n."
        )
    low, high = floor * (weights > 0), n * (weights > 0)
    small, large = 0.0, 2 * n / weights[weights > 0].min()
    for _ in range(200):  # the scale at which the clipped counts fill the slots
        scale = (small + large) / 2
        counts = (scale * weights).clip(low, high)
        small, large = (scale, large) if counts.sum() < slots else (small, scale)
    counts = _round(counts * (slots / counts.sum()), slots)
    room, fields = sizes.copy(), [[] for _ in range(n)]
    for label in np.argsort(-counts, kind="stable"):
        count, free = counts[label], np.flatnonzero(room)
        key = rng.random(len(free)) ** (1 / room[free])  # a draw without replacement, by room left
        chosen = free[np.argsort(-key, kind="stable")[:count]]
        if len(chosen) < count:  # too few fields have room: others take one label more than planned
            chosen = np.append(chosen, rng.choice(np.flatnonzero(room == 0), count - len(chosen), replace=False))
        for i in chosen:
            fields[i].append(int(label))
        room[chosen] = (room[chosen] - 1).clip(0)
    return [sorted(labels) for labels in fields]


# ---- files ----
def _id(i: int) -> str:
    return f"synthetic-{i:06d}"


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict) and isinstance(found.get("n"), int) and isinstance(found.get("n_test"), int):
            return found
    except ValueError:
        pass
    raise FileExistsError(f"{path} is damaged; choose another folder, or delete {path.parent} yourself.")


def _claim(path: Path, wanted: dict[str, Any], force: bool) -> bool:
    """Make `path` ready to be written; true if it already holds this very data set, finished."""
    path.mkdir(parents=True, exist_ok=True)
    done = _read(path / _MANIFEST)
    old = done or _read(path / _UNFINISHED)
    if old is None:
        taken = [name for name in _TABLES if (path / name).exists()]
        taken += [name for name in ("train", "test") if (path / name).is_dir() and any((path / name).iterdir())]
        if taken:
            raise FileExistsError(
                f"{path} holds {', '.join(taken)}, not made by make_hpa, which never overwrites other data; "
                "choose another folder."
            )
    elif old != wanted and not force:
        changed = ", ".join(
            f"{k}={old.get(k)!r} (asked for: {wanted.get(k)!r})" for k in wanted if old.get(k) != wanted[k]
        )
        raise FileExistsError(
            f"{path} holds a synthetic data set with other parameters: {changed}; "
            "pass force=True to replace it, or choose another folder."
        )
    elif done == wanted and not force:
        return True
    else:
        if done:
            os.replace(path / _MANIFEST, path / _UNFINISHED)  # from here on the folder is incomplete
        _remove(path, old)
    (path / _UNFINISHED).write_text(json.dumps(wanted, indent=1) + "\n")
    (path / _NOTE).write_text(_TEXT)
    return False


def _remove(path: Path, old: dict[str, Any]) -> None:
    """Delete the files of the synthetic data set `old`, and no others."""
    for i in range(old["n"] + old["n_test"]):
        for channel in HPA_CHANNELS:
            (path / ("train" if i < old["n"] else "test") / f"{_id(i)}_{channel}.png").unlink(missing_ok=True)
    for name in _TABLES if old["n_test"] else _TABLES[:1]:
        (path / name).unlink(missing_ok=True)
    if (path / "test").is_dir() and not any((path / "test").iterdir()):
        (path / "test").rmdir()


def _draw(job: tuple[str, int, list[int], tuple[int, int]]) -> None:
    stem, size, labels, entropy = job
    for channel, pixels in draw_field(size, labels, np.random.default_rng(entropy)).items():
        Image.fromarray(pixels).save(f"{stem}_{channel}.png", compress_level=1)


def _draw_all(jobs: list[tuple[str, int, list[int], tuple[int, int]]], workers: int, progress: bool) -> None:
    """Draw and save every job.

    A field is many short array operations, so threads gain nothing. Forked workers nearly halve the time on two cores,
    and draw with numpy and scipy alone, whatever the parent has loaded; elsewhere one process does it all.
    """

    def follow(steps: Iterable[None]) -> None:
        for _ in progress_bar(steps, total=len(jobs)) if progress and jobs else steps:
            pass

    alone = workers == 1 or len(jobs) < 32 or not sys.platform.startswith("linux")
    if alone or multiprocessing.current_process().daemon:  # a daemon may not have children
        follow(map(_draw, jobs))
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            follow(pool.map(_draw, jobs, chunksize=8))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
