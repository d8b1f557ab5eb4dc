"""Which loss for my data? A folder of images as a task of `compare.py`, and advice from its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from compare_stats import MEASURES, PLAIN, difference, paired
from compare_tasks import Bank, Task
from fastprogress import progress_bar

from fastai_crl.data import Annotations, StratifiedSplit
from fastai_crl.images import ImageSet

__all__ = ["advise", "own_task"]

STEPS = 900  # of training, about
COMPARED = ("map", "f1_shift")


def own_task(path: Path, channels: Sequence[str], size: int) -> tuple[Bank, Task]:
    """The images of path/train and the labels of path/train.csv; a quarter of them, stratified by label, for the test.

    Single-label where every image has exactly one label. Images of one source, such as fields of a slide, fall on both
    sides of the split; that flatters all losses.

    Raises:
        FileNotFoundError, ValueError: what `Annotations` and `ImageSet` find wrong with them; fewer than two labels.
    """
    annotations, images = Annotations.from_csv(path / "train.csv"), ImageSet(path / "train", channels, size=size)
    annotations.require()
    annotations.require_files(images.folder)
    images.check(annotations.ids)
    y = annotations.targets().toarray()
    if y.shape[1] < 2:
        raise ValueError(f"{path / 'train.csv'} has the label {annotations.vocab()[0]!r} alone: nothing to compare.")
    x = np.stack([images.open(i).numpy() for i in progress_bar(annotations.ids)])
    test = np.zeros(len(x), bool)
    test[list(StratifiedSplit(0.25, seed=0).rows(annotations))] = True
    y = y.argmax(1) if (y.sum(1) == 1).all() else y.astype(np.float32)
    n = round(0.75 * (~test).sum())
    bs = int(min(64, max(2, n // 4)))
    task = Task(lambda *_: None, None, size, size, (), "hv", bs, {"pixels": max(1, round(STEPS * bs / n))})
    return Bank("own", x, y, test), task


def advise(runs: pd.DataFrame) -> str:
    """What to train with: the arm of the highest validation mAP, unless what it has over plain cross entropy is noise.

    It is noise where the 95 % intervals of its differences in test mAP and in macro-F1 with the fitted shift, paired by
    seed, include 0. Needs three seeds.
    """
    tested = runs[(runs["stage"] == "test") & (runs["sampler"] == "uniform")]
    worth = tested.groupby(["base", "crl"])["valid_map"].agg(["mean", "size"])
    if not len(worth):
        return "No run has finished: give more --minutes, or start again, it goes on where it was."
    plain = next((arm for arm in worth.index if arm[0] in PLAIN and arm[1] == "none"), None)
    best = worth["mean"].idxmax()
    lines = [f"Highest validation mAP, over {worth['size'][best]} seeds: {_name(best)}, {worth['mean'][best]:.3f}."]
    if plain in (None, best):
        return "\n".join([*lines, "Plain cross entropy is as good as any: keep it, and fit the decision."])
    arms = [dict(zip(("base", "crl"), arm, strict=True)) for arm in (plain, best)]
    found = {m: paired(tested, *arms, m) for m in COMPARED}
    if min(map(len, found.values())) < 3:
        return "\n".join([*lines, "Fewer than three seeds: too few to tell it from noise. Start again, it goes on."])
    intervals = {m: difference(values) for m, values in found.items()}
    lines.append(f"On test, over {_name(plain)}:")
    lines += [f"  {MEASURES[m]} {mean:+.3f} ({low:+.3f} to {high:+.3f})" for m, (mean, low, high) in intervals.items()]
    if any(high < 0 for *_, high in intervals.values()):
        lines.append("It costs where it does not help: keep plain cross entropy, and fit the decision.")
    elif any(low > 0 for _, low, _ in intervals.values()):
        lines.append(f"Take {_name(best)}.")
    else:
        lines.append("The difference is noise: keep plain cross entropy, and fit the decision.")
    return "\n".join(lines)


def _name(arm: tuple[str, str]) -> str:
    base, crl = arm
    return base if crl == "none" else f"{base} + {crl}"
