"""Multi-channel images with labels in fastai's data block API, and the Human Protein Atlas (HPA) in one call."""

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastai.data.block import DataBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter, IntToFloatTensor, Normalize
from fastcore.meta import delegates
from PIL import Image
from sklearn.preprocessing import MultiLabelBinarizer

import fastai_crl.images.show  # noqa: F401  (registers how fastai shows such batches and results)
from fastai_crl.hpa import HPA_CHANNELS
from fastai_crl.images.cache import Packed, pack
from fastai_crl.images.image_set import ImageSet, check_folder, image_ids
from fastai_crl.images.layout import PATTERN
from fastai_crl.images.open import OpenMultiChannel
from fastai_crl.images.tensor import TensorMultiChannel
from fastai_crl.samplers import Sampler, SamplerFactory, check_sampler, takes, with_sampler

from .annotations import make_names, make_vocab, read_csv, split_labels
from .cached_loader import PackedDL
from .splits import valid_rows
from .targets import RowLabels, RowPrefix, target_block
from .transforms import Stats, check_tfms, make_stats, make_tfms

__all__ = ["HPADataLoaders", "MultiChannelBlock", "TensorMultiChannel", "check_folder", "image_ids"]


def MultiChannelBlock(
    channels: Sequence[str] = HPA_CHANNELS,
    size: int | tuple[int, int] | None = None,
    pattern: str = PATTERN,
    resample: int = Image.Resampling.BILINEAR,
    bits: int | None = None,
    stretch: float | tuple[float, float] | None = None,
    cache: Packed | None = None,
) -> TransformBlock:
    """Return a `TransformBlock` for multi-channel images in 8- or 16-bit files, for use in a plain `DataBlock`.

    An item is a path prefix folder/id (str or Path); its files are folder/`pattern`, with {id} and {channel} filled
    in: one per channel or, for a pattern such as "{id}.tif", one for all. Items become uint8 `TensorMultiChannel`
    (C,H,W), batches float 0..1. Each channel is resized on its own to `size` (an int, or (height, width)) as it is
    read: fastai's item transform `Resize` does nothing to a tensor.

    bits, stretch: depth of 16-bit files and percentile stretch, see `open_channels`.
    cache: what `pack` returned for the same arguments: images come from it, whole batches at a time.

    Raises ValueError for a pattern without {id} or {channel}, for no or repeated channels, or bits or stretch out of
    range.
    """
    return _block(OpenMultiChannel(channels, size, pattern, resample, bits, stretch, cache))


def _block(reader: OpenMultiChannel) -> TransformBlock:
    dl_type = None if reader.cache is None else PackedDL
    return TransformBlock(type_tfms=reader, batch_tfms=IntToFloatTensor, dl_type=dl_type)


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
        bits: int | None = None,
        stretch: float | tuple[float, float] | None = None,
        cache: bool | str | Path = False,
        sampler: str | Sampler | SamplerFactory | None = None,
        stratify: bool = False,
        fold_col: str | None = None,
        fold: int | str = 0,
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
        crop: training on a random resized crop (a place of its own in each image, from 8 % of its area up) and the
            eight flips and quarter turns, validation on the central cropxcrop pixels; for instance size=256, crop=224.
        group_col: column of groups, for instance of the source picture, that stay on one side of the split
            (`valid_pct` is then the share of groups). With a split fixed by valid_col or fold_col, a group on both
            sides is an error.
        valid_col: boolean column that marks the validation rows.
        fold_col, fold: column of folds (see `add_folds`), and the one to validate on.
        stratify: validation gets the share `valid_pct` of each label's images, of whole groups with `group_col`, and
            at least one of every label that occurs in two images (groups), where possible.
        label_delim: between the labels of a row, any white space for " "; an empty row has no label. None: exactly one
            label per row.
        vocab: all labels in their order; "hpa" for "0".."27"; by default those found in the csv, numbers in numeric
            order.
        stats: mean and standard deviation for `Normalize`, intensities in 0..1: "hpa", "imagenet", (mean, std),
            "data" (measured on up to 512 training images) or None for no normalisation.
        batch_tfms: in place of the default augmentation, `microscopy_transforms()` (flips and quarter turns, up to 10°
            and 10 % of rotation and zoom, up to 10 % of intensity in each channel); [] for none. Normalisation is
            added after it.
        check: check the files before training (see `check_folder`).
        label_names: what pictures show instead of the labels: "hpa", a mapping from label to name, or a list in the
            order of the vocab.
        pattern, bits, stretch: name of the image files, depth of the data in 16-bit files, percentile stretch: see
            `open_channels`.
        cache: True decodes and resizes all images once into path/.cache (or another folder, if given) and takes batches
            from there; later calls use what is there, as long as the files have not changed. No workers are then
            started unless num_workers= or item_tfms= asks for them. See `pack`.
        sampler: how training batches are drawn, with `seed`: None (shuffled), "class_aware" (as many labels as fit
            have two positives in each batch), "repeat_factor" (images of rare labels come more often), an iterable of
            indices with a length, or a class or function that returns one (see `register_sampler`). An epoch is then
            longer. See `fastai_crl.samplers`; for a sampler's options use `with_sampler`.

        Raises FileNotFoundError for a missing csv, folder or image file; ValueError for an unreadable or empty csv, a
        missing column, empty or duplicate ids, a label outside `vocab`, an impossible split, statistics that do not
        fit the channels, transforms that fail on such images, and all that `check_folder` finds.
        """
        if sampler is not None:
            check_sampler(sampler)
        path = Path(path)
        images = ImageSet(path / folder, channels, pattern, size, bits=bits, stretch=stretch)
        channels = images.channels
        check_tfms(item_tfms, batch_tfms, len(channels))
        reader = OpenMultiChannel.of(images)
        aug = make_tfms(batch_tfms, crop, size)
        df = read_csv(path / csv_fname, id_col, label_col, label_delim)
        labels = df.set_index(id_col)[label_col].map(lambda s: split_labels(s, label_delim))
        vocab = make_vocab(labels, vocab)
        names = make_names(label_names, vocab)
        strata = list(labels) if stratify else None
        valid = valid_rows(df, id_col, valid_pct, seed, group_col, valid_col, fold_col, fold, strata)
        if check:
            images.check(df[id_col], same_size=size is None)
        if cache:
            place = None if cache is True else cache
            reader.cache = pack(
                path, size, folder, df[id_col], channels, pattern, bits=bits, stretch=stretch, cache=place, check=False
            )
            if item_tfms is None:
                kwargs.setdefault("num_workers", 0)  # starting workers takes longer than what they would do
        splitter = IndexSplitter(valid)
        train = splitter(df)[0]
        if stats is not None:
            prefixes = [images.folder / i for i in df[id_col].iloc[list(train)]]
            aug.append(Normalize.from_stats(*make_stats(stats, channels, prefixes, reader, seed)))
        if len(train) < bs:
            kwargs.setdefault("drop_last", False)
        target = target_block(vocab, names, label_delim is not None)
        dblock = DataBlock(
            blocks=(_block(reader), target),
            getters=[RowPrefix(images.folder, id_col), RowLabels(label_col, label_delim)],
            splitter=splitter,
            item_tfms=item_tfms,
            batch_tfms=aug,
        )
        dls = cls.from_dblock(dblock, df, path=path, bs=bs, **kwargs)
        dls = cls(*dls.loaders, path=path, device=dls.device)
        if sampler is None:
            return dls
        targets = MultiLabelBinarizer(classes=vocab).fit_transform(labels.iloc[list(train)])
        own = {"seed": random.randrange(2**32) if seed is None else seed} if takes(sampler, "seed") else {}
        return with_sampler(dls, sampler, targets, **own)
