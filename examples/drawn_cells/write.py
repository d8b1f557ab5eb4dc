"""The files of a drawn data set, and the labels of its fields; `patterns` draws the pictures."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Literal

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
_PARAMETERS, _NOTE = "synthetic.json", "SYNTHETIC.txt"
_TEXT = """SYNTHETIC DATA: not photographs, not from the Human Protein Atlas.

Every picture in this folder was drawn by make_hpa of the examples of fastai_crl, and every label was sampled. The
layout, the channel names, the label numbers and, as far as asked for, the label frequencies are those of the Kaggle
competition "Human Protein Atlas Image Classification" (2018). Use it to try code out; scores on it say nothing about
real cells. `synthetic.json` holds the parameters.
"""


def make_hpa(
    path: str | os.PathLike[str],
    n: int = 600,
    size: int = 128,
    seed: int = 0,
    imbalance: Literal["real", "mild"] = "real",
    n_test: int = 0,
    min_count: int | None = None,
    progress: bool = True,
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

    Each file is written aside and renamed, so a file that exists is whole. A second call with the same parameters makes
    what is missing, after an interruption too. Several processes may call it at once.

    Args:
        path: folder of the data set, made if need be.
        n: fields to train on, at least 1.
        size: side in pixels, at least 32; below about 96 the finest patterns merge.
        seed: 0 or above. Equal arguments give byte-identical files with the same library versions.
        imbalance: `"real"`, label frequencies of the real set (1171:1); `"mild"`, the real counts raised to the power
            that leaves 20:1.
        n_test: fields to test on, 0 for none.
        min_count: each label occurs at least so often in train, and in proportion (rounded down) in test. This lifts
            the rarest labels above the frequency asked for and lowers the others by as much; 0 leaves them as they
            fall, perhaps absent. Default: one per 100 fields up to 4, so 4 where `n` is 400 or more.
        progress: show a progress bar.

    Raises:
        ValueError: a value out of range.
        FileExistsError: `path` holds a synthetic set with other parameters, or a data set that is not synthetic.
    """
    floor = min(4, n // 100) if min_count is None else min_count
    wanted = {"drawing": _DRAWING, "n": n, "size": size, "seed": seed, "imbalance": imbalance}
    wanted |= {"n_test": n_test, "min_count": floor}
    for name, low in (("n", 1), ("size", 32), ("seed", 0), ("n_test", 0), ("min_count", 0)):
        if wanted[name] != int(wanted[name]) or wanted[name] < low:
            raise ValueError(f"{name}={wanted[name]} must be a whole number of at least {low}.")
    weights = _weights(imbalance)
    sets = {"train": _deal(n, weights, floor, np.random.default_rng([seed, 0, 1]))}
    if n_test:
        held = min(floor * n_test // n, n_test // len(HPA_LABELS))
        sets["test"] = _deal(n_test, weights, held, np.random.default_rng([seed, 0, 2]))

    path = Path(path)
    _claim(path, wanted)
    fields = [(name, labels) for name, part in sets.items() for labels in part]
    ids = [f"synthetic-{i:06d}" for i in range(n + n_test)]
    for i in progress_bar(range(len(fields))) if progress else range(len(fields)):
        folder, labels = fields[i]
        files = {c: path / folder / f"{ids[i]}_{c}.png" for c in HPA_CHANNELS}
        if not all(file.exists() for file in files.values()):
            for channel, pixels in draw_field(size, labels, np.random.default_rng((seed, i))).items():
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, "PNG", compress_level=1)
                _write(files[channel], png.getvalue())
    targets = [" ".join(map(str, labels)) for _, labels in fields]
    tables = {"train.csv": {"Id": ids[:n], "Target": targets[:n]}}
    if n_test:
        tables["sample_submission.csv"] = {"Id": ids[n:], "Predicted": "0"}
        tables["test_labels.csv"] = {"Id": ids[n:], "Target": targets[n:]}
    for name, columns in tables.items():  # after the pictures: where there is a train.csv there is all that it names
        if not (path / name).exists():
            _write(path / name, pd.DataFrame(columns).to_csv(index=False, lineterminator="\n").encode())
    return path


# ---- files ----
def _write(file: Path, content: bytes) -> None:
    """Write `file` in one step: whoever finds it finds all of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_bytes(content)
    aside.replace(file)


def _claim(path: Path, wanted: dict[str, object]) -> None:
    """Put the parameters into `path`, or compare them with those that it has."""
    # In this order: another process that makes the set at the same time writes the parameters first.
    taken = [name for name in ("train", "test", "train.csv", "sample_submission.csv") if (path / name).exists()]
    if not (path / _PARAMETERS).exists():
        if taken:
            raise FileExistsError(
                f"{path} holds {', '.join(taken)}, not made by make_hpa, which never overwrites other data; "
                "choose another folder."
            )
        _write(path / _NOTE, _TEXT.encode())
        _write(path / _PARAMETERS, (json.dumps(wanted, indent=1) + "\n").encode())
    found = json.loads((path / _PARAMETERS).read_text())
    if found != wanted:
        changed = ", ".join(f"{k}={found.get(k)!r} (asked for: {v!r})" for k, v in wanted.items() if found.get(k) != v)
        raise FileExistsError(
            f"{path} holds a synthetic data set with other parameters: {changed}; choose another folder."
        )


# ---- labels ----
def _weights(imbalance: str) -> npt.NDArray[np.float64]:
    counts = np.array(HPA_COUNTS, float)
    powers = {"real": 1.0, "mild": math.log(_MILD_RATIO) / math.log(counts.max() / counts.min())}
    if imbalance not in powers:
        raise ValueError(f'imbalance={imbalance!r} is not known; pass "real" or "mild".')
    return counts ** powers[imbalance]


def _round(values: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.int64]:
    """Whole numbers next to `values` that sum to `total`, by largest remainder."""
    whole = np.floor(values + 1e-9).astype(np.int64)
    rest = np.argsort(whole - values, kind="stable")[: total - whole.sum()]
    whole[rest] += 1
    return whole


def _deal(n: int, weights: npt.NDArray[np.float64], floor: int, rng: np.random.Generator) -> list[list[int]]:
    """Sorted label numbers of each of `n` fields; see `make_hpa` for the rule."""
    sizes = np.repeat(np.arange(1, 5), _round(np.array(_LABELS_PER_ID) * n, n))
    rng.shuffle(sizes)
    slots = int(sizes.sum())
    if floor > n or floor * len(weights) > slots:
        raise ValueError(
            f"min_count={floor} for {len(weights)} labels needs {floor * len(weights)} labels, but n={n} fields carry "
            f"{slots} in all; pass min_count={min(n, slots // len(weights))} or less, or a larger n."
        )
    small, large = 0.0, 2 * n / weights.min()
    for _ in range(200):  # the scale at which the clipped counts fill the slots
        scale = (small + large) / 2
        counts = (scale * weights).clip(floor, n)
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
