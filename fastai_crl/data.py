"""Multi-channel images with labels in fastai's data block API, and the Human Protein Atlas (HPA) in one call."""

import random
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import (
    Categorize,
    Category,
    IndexSplitter,
    IntToFloatTensor,
    MultiCategorize,
    MultiCategory,
    Normalize,
    OneHotEncode,
)
from fastai.vision.augment import (
    CropPad,
    DihedralItem,
    Flip,
    FlipItem,
    HSVTfm,
    RandomResizedCrop,
    RandomResizedCropGPU,
    RatioResize,
    Resize,
    Saturation,
    aug_transforms,
)
from fastai.vision.core import imagenet_stats
from fastcore.foundation import L
from fastcore.meta import delegates
from fasttransform import Transform
from PIL import Image
from sklearn.preprocessing import MultiLabelBinarizer

from fastai_crl._checks import choice
from fastai_crl.files import PATTERN, check_folder, image_ids, offenders
from fastai_crl.hpa import HPA_CHANNELS, HPA_MEAN, HPA_STD
from fastai_crl.image import OpenMultiChannel, TensorMultiChannel, open_channels
from fastai_crl.sampled import with_sampler
from fastai_crl.samplers import SAMPLERS
from fastai_crl.table import make_names, make_vocab, read_csv, split_labels, valid_rows

__all__ = ["HPADataLoaders", "MultiChannelBlock", "TensorMultiChannel", "check_folder", "image_ids"]

Stats = tuple[Sequence[float], Sequence[float]]


def MultiChannelBlock(
    channels: Sequence[str] = HPA_CHANNELS,
    size: int | tuple[int, int] | None = None,
    pattern: str = PATTERN,
    resample: int = Image.Resampling.BILINEAR,
) -> TransformBlock:
    """Return a `TransformBlock` for images stored as one grey file per channel, for use in a plain `DataBlock`.

    An item is a path prefix folder/id (str or Path); its files are folder/`pattern`, with {id} and {channel} filled
    in. Items become uint8 `TensorMultiChannel` (C,H,W), batches float 0..1. Each channel is resized on its own to
    `size` (an int, or (height, width)) as it is read: fastai's item transform `Resize` does nothing to a tensor.

    Raises ValueError for a pattern without {id} or {channel}, or for no or repeated channels.
    """
    return TransformBlock(type_tfms=OpenMultiChannel(channels, size, pattern, resample), batch_tfms=IntToFloatTensor)


# ---------------------------------------------------------------- labels


class _RowPrefix(Transform):
    """From a row of the csv to folder/id; a path (of an image without labels) passes as it is."""

    input_types = (pd.Series, str, Path)

    def __init__(self, folder: Path, id_col: str):
        super().__init__()
        self.folder, self.id_col = str(folder), id_col

    def encodes(self, o: pd.Series):
        return Path(self.folder) / str(o[self.id_col])


class _RowLabels(Transform):
    """From a row of the csv to its list of labels, or to its one label if `delim` is None."""

    def __init__(self, label_col: str, delim: str | None):
        super().__init__()
        self.label_col, self.delim = label_col, delim

    def encodes(self, o: pd.Series):
        labels = split_labels(o[self.label_col], self.delim)
        return labels[0] if self.delim is None else labels


class _NamedCategory(Category):
    def show(self, ctx: Any = None, **kwargs: Any) -> Any:
        return Category(self.names.get(self, self)).show(ctx=ctx, **kwargs)


class _NamedMultiCategory(MultiCategory):
    def show(self, ctx: Any = None, sep: str = ";\n", **kwargs: Any) -> Any:
        # Names are long: one to a line.
        return MultiCategory([self.names.get(o, o) for o in self]).show(ctx=ctx, sep=sep, **kwargs)


class _NamedCategorize(Categorize):
    """`Categorize` whose decoded label is the one in the vocab but shows its name."""

    def __init__(self, vocab: list[str], names: dict[str, str]):
        super().__init__(vocab=vocab, sort=False)
        self.names = names

    def decodes(self, o):
        res = _NamedCategory(self.vocab[o])
        res.names = self.names
        return res


class _NamedMultiCategorize(MultiCategorize):
    """`MultiCategorize` whose decoded labels are those in the vocab but show their names."""

    def __init__(self, vocab: list[str], names: dict[str, str]):
        super().__init__(vocab=vocab)
        self.names = names

    def decodes(self, o):
        res = _NamedMultiCategory([self.vocab[i] for i in o])
        res.names = self.names
        return res


# ---------------------------------------------------------------- statistics and transforms


def _make_stats(
    stats: Any, channels: tuple[str, ...], prefixes: list[Path], size: Any, pattern: str, seed: int | None
) -> Stats:
    """Return mean and standard deviation per channel, for intensities in 0..1."""
    if isinstance(stats, str):
        if stats == "hpa":
            if unknown := [c for c in channels if c not in HPA_CHANNELS]:
                fix = f"stats='hpa' knows {', '.join(HPA_CHANNELS)}: pass stats='data' or (mean, std)."
                raise ValueError(offenders("Channels without HPA statistics", unknown, fix))
            at = [HPA_CHANNELS.index(c) for c in channels]
            return [HPA_MEAN[i] for i in at], [HPA_STD[i] for i in at]
        if stats == "imagenet":
            stats = imagenet_stats
        elif stats == "data":
            return _measure(channels, prefixes, size, pattern, seed)
        else:
            raise ValueError(f"stats={stats!r} must be 'hpa', 'imagenet', 'data', (mean, std) or None.")
    mean, std = ([float(v) for v in s] for s in stats)
    if not len(mean) == len(std) == len(channels) or min(std) <= 0:
        raise ValueError(
            f"stats have mean {mean} and std {std}, but the {len(channels)} channels {', '.join(channels)} need one "
            "mean and one std above 0 each: pass channels or stats that fit, or stats='data'."
        )
    return mean, std


def _measure(
    channels: tuple[str, ...], prefixes: list[Path], size: Any, pattern: str, seed: int | None, n: int = 512
) -> Stats:
    """Return mean and standard deviation over all pixels of at most `n` images, drawn with `seed`."""
    picked = np.random.default_rng(0 if seed is None else seed).permutation(len(prefixes))[:n]

    def moments(i: int) -> np.ndarray:
        x = open_channels(prefixes[i], channels, size, pattern).numpy().reshape(len(channels), -1) / 255.0
        return np.stack([np.full(len(x), x.shape[1]), x.sum(1), (x * x).sum(1)])

    with ThreadPoolExecutor() as pool:
        count, total, square = sum(pool.map(moments, picked.tolist()))
    mean = total / count
    # A channel that is constant has no spread; 1e-3 (a quarter of a grey level) keeps it finite.
    return mean.tolist(), np.sqrt(np.maximum(square / count - mean**2, 1e-6)).tolist()


def _make_tfms(batch_tfms: Any, crop: int | None, size: int | tuple[int, int] | None) -> list[Transform]:
    """Return crop and augmentation; `batch_tfms`, if given, takes the place of the augmentation."""
    if crop is None:
        # A field has no up or down, hence all eight flips and turns; a microscope has no perspective, hence no warp.
        # Lighting works on the logit: 0.1 changes the intensity of a dark pixel by up to a quarter.
        default = aug_transforms(flip_vert=True, max_rotate=10.0, max_zoom=1.1, max_lighting=0.1, max_warp=0.0)
        return default if batch_tfms is None else list(L(batch_tfms))
    side = size if isinstance(size, int) else size[0] if size is not None and size[0] == size[1] else 0
    if not 0 < crop <= side:
        raise ValueError(f"crop={crop} needs a square size of at least {crop}, got size={size}.")
    # In validation this transform takes the central int(side*valid_scale) pixels; the half guards the rounding.
    cut = RandomResizedCropGPU(crop, valid_scale=(crop + 0.5) / side if crop < side else 1.0)
    return [cut, *([Flip()] if batch_tfms is None else L(batch_tfms))]


def _check_tfms(item_tfms: Any, batch_tfms: Any, n_channels: int) -> None:
    for t in L(item_tfms):
        kind = t if isinstance(t, type) else type(t)
        if issubclass(kind, (Resize, CropPad, RandomResizedCrop, RatioResize, FlipItem, DihedralItem)):
            raise ValueError(
                f"item_tfms: {kind.__name__} works on pictures and would do nothing to a tensor of {n_channels} "
                "channels: use size= and crop= for the size, batch_tfms= for augmentation."
            )
    for t in L(batch_tfms):
        if n_channels != 3 and isinstance(t, (HSVTfm, Saturation)):
            raise ValueError(f"batch_tfms: {type(t).__name__} needs 3 channels (RGB), the images have {n_channels}.")


class HPADataLoaders(DataLoaders):
    """`DataLoaders` of multi-channel images with labels in a csv, as the Human Protein Atlas competition has them."""

    @classmethod
    @delegates(DataLoaders.from_dblock)
    def from_csv(
        cls,
        path: str | Path,
        csv_fname: str | Path = "train.csv",
        folder: str | Path = "train",
        size: int | tuple[int, int] | None = 256,
        bs: int = 32,
        valid_pct: float = 0.2,
        seed: int | None = 42,
        channels: Sequence[str] = HPA_CHANNELS,
        crop: int | None = None,
        group_col: str | None = None,
        valid_col: str | None = None,
        id_col: str = "Id",
        label_col: str = "Target",
        label_delim: str | None = " ",
        vocab: str | Iterable[Any] | None = None,
        stats: str | Stats | None = "hpa",
        item_tfms: Any = None,
        batch_tfms: Any = None,
        check: bool = True,
        label_names: str | Mapping[Any, str] | Sequence[str] | None = None,
        pattern: str = PATTERN,
        sampler: str | None = None,
        **kwargs: Any,
    ) -> "HPADataLoaders":
        """Return training and validation loaders for path/csv_fname and the image files path/folder/{id}_{channel}.png.

        A batch is (images float (B,C,H,W), normalised; targets float (B,n_labels) of 0 and 1, or class indices (B,)
        with `label_delim=None`). `dls.vocab` and predictions hold the labels as written in the csv. `dls.test_dl` and
        `learn.predict` take path prefixes folder/id (`image_ids` lists them) or rows of a DataFrame; `dls.channels`
        are the channel names.

        size: side, or (height, width), every image is resized to as it is read; None keeps the size of the files.
        bs, kwargs: as in fastai. A training set smaller than one batch makes one smaller batch instead of none.
        valid_pct, seed: the random split of fastai's `RandomSplitter`.
        channels: their order is the order in the tensor. For a network pretrained on three channels pass
            channels=("red","green","blue"), stats="imagenet".
        crop: training on `RandomResizedCropGPU(crop)` (one place per batch) and a left-right flip, validation on the
            central cropxcrop pixels; for instance size=256, crop=224.
        group_col: column of groups, for instance of the source picture, that stay on one side of the split
            (`valid_pct` is then the share of groups). valid_col: boolean column that marks the validation rows.
        label_delim: between the labels of a row, any white space for " "; an empty row has no label. None: exactly one
            label per row.
        vocab: all labels in their order; "hpa" for "0".."27"; by default those found in the csv, numbers in numeric
            order.
        stats: mean and standard deviation for `Normalize`, intensities in 0..1: "hpa", "imagenet", (mean, std),
            "data" (measured on up to 512 training images) or None for no normalisation.
        batch_tfms: in place of the default augmentation (flips and quarter turns, up to 10° and 10 % of rotation and
            zoom, mild brightness and contrast); [] for none. Normalisation is added after it.
        check: check the files before training (see `check_folder`).
        label_names: what pictures show instead of the labels: "hpa", a mapping from label to name, or a list in the
            order of the vocab.
        sampler: how training batches are drawn, with `seed`: None (shuffled), "class_aware" (as many labels as fit
            have two positives in each batch) or "repeat_factor" (images of rare labels come more often). An epoch is
            then longer. See `fastai_crl.samplers`; for its options, and any sampler, use `with_sampler`.

        Raises FileNotFoundError for a missing csv, folder or image file; ValueError for an unreadable or empty csv, a
        missing column, empty or duplicate ids, a label outside `vocab`, an impossible split, statistics that do not
        fit the channels, transforms that fail on such images, and all that `check_folder` finds.
        """
        if sampler is not None:
            choice("sampler", sampler, tuple(SAMPLERS))
        path = Path(path)
        images = path / folder
        channels = (channels,) if isinstance(channels, str) else tuple(channels)
        _check_tfms(item_tfms, batch_tfms, len(channels))
        block = MultiChannelBlock(channels, size, pattern)
        aug = _make_tfms(batch_tfms, crop, size)
        df = read_csv(path / csv_fname, id_col, label_col, label_delim)
        labels = df.set_index(id_col)[label_col].map(lambda s: split_labels(s, label_delim))
        vocab = make_vocab(labels, vocab)
        names = make_names(label_names, vocab)
        valid = valid_rows(df, id_col, valid_pct, seed, group_col, valid_col)
        if check:
            check_folder(images, df[id_col], channels, pattern, same_size=size is None)
        splitter = IndexSplitter(valid)
        train = splitter(df)[0]
        if stats is not None:
            prefixes = [images / i for i in df[id_col].iloc[list(train)]]
            aug.append(Normalize.from_stats(*_make_stats(stats, channels, prefixes, size, pattern, seed)))
        if len(train) < bs:
            kwargs.setdefault("drop_last", False)
        target = _target_block(vocab, names, label_delim is not None)
        dblock = DataBlock(
            blocks=(block, target),
            getters=[_RowPrefix(images, id_col), _RowLabels(label_col, label_delim)],
            splitter=splitter,
            item_tfms=item_tfms,
            batch_tfms=aug,
        )
        dls = cls.from_dblock(dblock, df, path=path, bs=bs, **kwargs)
        dls = cls(*dls.loaders, path=path, device=dls.device)
        if sampler is None:
            return dls
        targets = MultiLabelBinarizer(classes=vocab).fit_transform(labels.iloc[list(train)])
        return with_sampler(dls, sampler, targets, seed=random.randrange(2**32) if seed is None else seed)


def _target_block(vocab: list[str], names: dict[str, str], multi: bool) -> TransformBlock:
    if not names:
        return MultiCategoryBlock(vocab=vocab) if multi else CategoryBlock(vocab=vocab, sort=False)
    if multi:
        return TransformBlock(type_tfms=[_NamedMultiCategorize(vocab, names), OneHotEncode])
    return TransformBlock(type_tfms=_NamedCategorize(vocab, names))
