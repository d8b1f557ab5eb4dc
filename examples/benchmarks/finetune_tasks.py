"""The tasks of `finetune.py`: images, splits by seed, and what a pretrained network's lower part makes of them.

| task | images | channels | labels |
|---|---|---|---|
| `photos` | 2 x 2 mosaics of CIFAR-10 photographs | 3 | 10, one to four per mosaic, of 80 to 4 % |
| `mosaics` | 2 x 2 mosaics of real HPA cells, as in `compare_tasks.py` | 3 | 5, one to three per mosaic, 100:1 |
| `mosaics4` | the same | 4 | the same |
| `cells` | the cells alone | 3 | 5, one per cell, as a multi-label task |
| `digits` | MNIST digits strewn over four channels | 4 | 10, one to four per field, 100:1 |
| `drawn` | drawn by `fastai_crl.synthetic.make_hpa` | 4 | 28, one to four per field |
| `cifar` | CIFAR-10, long-tailed 100:1, a third of it | 3 | 10 classes, one per image |

Every seed splits all images anew into training, validation and test. What a mosaic is made of stays on one side: the
photograph, or the `Montage` that its cells were cut from. CIFAR-10's test images are balanced.

A fourth channel gets the mean of the stem's RGB filters, as `crl_learner(pretrained=True)` gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from compare_tasks import MEAN, STD, TASKS, _compose, _some_montages, _tile, pretrained
from compare_train import augment
from torch import Tensor, nn

from fastai_crl.augment import ChannelIntensity, Cutout, GaussianNoise, RandomAffine

__all__ = ["SPLITS", "Part", "Side", "activations", "images", "lower", "upper"]

VIEWS, SIZE, FIRST = 4, 96, 11  # views of each training image; side in pixels; the first block that is trained
SMALL = 64  # pixels, of images that grow while a network trains
SIZES = {"train": 800, "valid": 500, "test": 700}
Split = dict[str, tuple[np.ndarray, np.ndarray]]


class Side(NamedTuple):
    """Activations (n, views, channels, H, W) and targets of training, validation or test images."""

    x: np.ndarray
    y: Tensor


class Part(NamedTuple):
    """How a task's images are split, and the flips (of "h" and "v") that leave its labels as they are."""

    split: Callable[[Path, Path, np.random.Generator], Split]
    flips: str


# ---- images ----
def _parts(n: int, sizes: dict[str, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Disjoint rows of n for each side, in proportion where there are fewer."""
    order, whole = rng.permutation(n), sum(sizes.values())
    ends = np.cumsum([min(size, size * n // whole) for size in sizes.values()])
    return dict(zip(sizes, np.split(order, ends)[:-1], strict=True))


def _photographs(data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    bank = TASKS["cifar"].make(data, data, 32)
    return bank.x[~bank.test], bank.y[~bank.test], bank.x[bank.test], bank.y[bank.test]


def _photos(data: Path, cache: Path, rng: np.random.Generator) -> Split:
    first_x, first_y, more_x, more_y = _photographs(data)
    x, y = np.concatenate([first_x, more_x]), np.concatenate([first_y, more_y])
    p = 0.03 ** (np.arange(10) / 9)
    side = rng.choice(list(SIZES), len(y), p=[0.6, 0.15, 0.25])
    split = {}
    for name, n in SIZES.items():
        of_class = [np.flatnonzero((side == name) & (y == c)) for c in range(10)]
        classes = rng.choice(10, (n, 4), p=p / p.sum())
        tiles = np.array([[rng.choice(of_class[c]) for c in row] for row in classes])
        targets = np.zeros((n, 10), np.float32)
        targets[np.arange(n)[:, None], classes] = 1
        split[name] = _tile(x[tiles]), targets
    return split


def _sides_of_cells(data: Path, cache: Path, rng: np.random.Generator, size: int):
    bank = TASKS["cells"].make(data, cache, size)
    test = _some_montages(bank.y, bank.group, 0.3, rng)
    valid = np.zeros_like(test)
    valid[~test] = _some_montages(bank.y[~test], bank.group[~test], 0.3, rng)
    return bank, {"train": ~test & ~valid, "valid": valid, "test": test}


def _mosaics(data: Path, cache: Path, rng: np.random.Generator, channels: int = 3) -> Split:
    bank, sides = _sides_of_cells(data, cache, rng, SIZE // 2)
    split = {}
    for name, members in sides.items():
        cells, targets = _compose(bank.y, np.flatnonzero(members), SIZES[name], rng)
        split[name] = _tile(bank.x[cells][:, :, :channels]), targets
    return split


def _cells(data: Path, cache: Path, rng: np.random.Generator) -> Split:
    bank, sides = _sides_of_cells(data, cache, rng, SIZE)
    return {k: (bank.x[m][:, :3], np.eye(5, dtype=np.float32)[bank.y[m]]) for k, m in sides.items()}


def _fields(task: str) -> Callable[[Path, Path, np.random.Generator], Split]:
    def split(data: Path, cache: Path, rng: np.random.Generator) -> Split:
        bank = TASKS[task].make(data, cache, SIZE)
        return {k: (bank.x[i], bank.y[i]) for k, i in _parts(len(bank.x), SIZES, rng).items()}

    return split


def _cifar(data: Path, cache: Path, rng: np.random.Generator) -> Split:
    x, y, test_x, test_y = _photographs(data)
    split = {k: (x[i], y[i]) for k, i in _parts(len(y), {"train": 2400, "valid": 1000}, rng).items()}
    chosen = rng.permutation(len(test_y))[:1500]
    return split | {"test": (test_x[chosen], test_y[chosen])}


SPLITS = {
    "photos": Part(_photos, "h"),
    "mosaics": Part(_mosaics, "hv"),
    "mosaics4": Part(lambda *args: _mosaics(*args, channels=4), "hv"),
    "cells": Part(_cells, "hv"),
    "digits": Part(_fields("digits"), ""),
    "drawn": Part(_fields("drawn"), "hv"),
    "cifar": Part(_cifar, "h"),
}


def images(task: str, data: Path, cache: Path, seed: int) -> Split:
    """Images (n, channels, H, W) uint8 and targets, (n, C) 0/1 or (n,) class indices, of each side of a seed's split.

    Raises:
        FileNotFoundError: `data` lacks what the task is made of.
    """
    return SPLITS[task].split(data, cache, np.random.default_rng([seed, 3]))


# ---- the network ----
def lower(channels: int) -> nn.Sequential:
    """The pretrained network before the first block that is trained."""
    net = pretrained()
    stem = net._conv_stem
    if channels > 3:
        mean = stem.weight.mean(1, keepdim=True)
        stem.weight = nn.Parameter(torch.cat([stem.weight, *[mean] * (channels - 3)], 1) * 3 / channels)
    net = nn.Sequential(stem, net._bn0, nn.ReLU6(), *net._blocks[:FIRST])
    return net.eval().to(memory_format=torch.channels_last)


class SmallDepthwise(nn.Module):
    """A depthwise convolution of small maps as one product per channel, which halves the time of a run on a CPU."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.kernel, self.stride, self.padding = conv.kernel_size[0], conv.stride[0], conv.static_padding.padding[:2]
        self.weight = conv.weight
        self.taps: dict[int, Tensor] = {}

    def _taps(self, side: int, out: int) -> Tensor:
        """Where each weight goes, (kernel², side² out²)."""
        i, o, k = np.ogrid[:side, :out, : self.kernel]
        along = i == o * self.stride - self.padding[0] + k
        taps = np.einsum("iok,jpl->klijop", along, along).reshape(self.kernel**2, -1)
        return torch.from_numpy(taps.astype(np.float32))

    def forward(self, x: Tensor) -> Tensor:
        n, c, side = x.shape[:3]
        out = (side + sum(self.padding) - self.kernel) // self.stride + 1
        if side not in self.taps:
            self.taps[side] = self._taps(side, out)
        linear = (self.weight.flatten(1) @ self.taps[side]).view(c, -1, out**2)
        return (x.flatten(2).transpose(0, 1) @ linear).transpose(0, 1).reshape(n, c, out, out)


def upper(n_classes: int) -> nn.Sequential:
    """The blocks that are trained, and a new last layer."""
    net = pretrained()
    for block in net._blocks[FIRST:]:
        block._depthwise_conv = SmallDepthwise(block._depthwise_conv)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, n_classes)]
    return nn.Sequential(*net._blocks[FIRST:], net._conv_head, net._bn1, nn.ReLU6(), *pool)


@torch.no_grad()
def _through(net: nn.Module, x: np.ndarray, size: int = SIZE) -> np.ndarray:
    parts = []
    for batch in torch.from_numpy(x).split(64):
        batch = batch.float()
        if batch.shape[-1] != size:
            batch = nn.functional.interpolate(batch, size=size, mode="bilinear", antialias=True)
        batch = ((batch / 255 - MEAN) / STD).contiguous(memory_format=torch.channels_last)
        parts.append(net(batch).half().contiguous().numpy())
    return np.concatenate(parts)


def strongly(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Turn and zoom images (n, channels, H, W) of 0 to 255, change each channel's intensity, add noise, cut out."""
    x = x.float() / 255
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**31)))
        for change in (RandomAffine(20, 1.2, p=1), ChannelIntensity(0.3, 0.3, p=1), GaussianNoise(0.03), Cutout(0.2)):
            x = change.apply(x, change.draw(tuple(x.shape)))
    return x * 255


def activations(task: str, data: Path, cache: Path, seed: int, views: str = "") -> dict[str, Side]:
    """What the network's lower part makes of each side's images, computed once and kept in `cache`.

    Of a training image there are four views: as it is, and three times shifted, flipped, and brighter or darker;
    `views="strong"`: of these three each changed `strongly`, too; `"small"`: all four also of 64 pixels, as a side
    "small".
    """
    if views == "small":
        small = _kept(task, data, cache, seed, views)["train"]
        return activations(task, data, cache, seed) | {"small": small}
    return _kept(task, data, cache, seed, views)


def _kept(task: str, data: Path, cache: Path, seed: int, views: str) -> dict[str, Side]:
    folder, size = cache / "-".join(filter(None, (task, str(seed), views))), SMALL if views == "small" else SIZE
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        split, rng = images(task, data, cache, seed), np.random.default_rng([seed, 4])
        net = lower(split["train"][0].shape[1])
        for name, (x, y) in split.items():
            made = [_through(net, x, size)]
            for _ in range(VIEWS - 1 if name == "train" else 0):
                moved = augment(torch.from_numpy(x), SPLITS[task].flips, rng)
                moved = (strongly(moved, rng) if views == "strong" else moved).numpy()
                factor = rng.uniform(0.8, 1.25, (len(x), 1, 1, 1))
                made.append(_through(net, (moved * factor).clip(0, 255).astype(np.uint8), size))
            np.save(folder / f"{name}_x.npy", np.stack(made, 1))
            np.save(folder / f"{name}_y.npy", y)
        (folder / "done").touch()
    return {
        name: Side(
            np.load(folder / f"{name}_x.npy", mmap_mode="r"), torch.from_numpy(np.load(folder / f"{name}_y.npy"))
        )
        for name in ("train", "valid", "test")
    }
