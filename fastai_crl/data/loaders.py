"""Multi-channel images with labels in fastai's data block API, and the Human Protein Atlas (HPA) in one call."""

import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from fastai.data.block import DataBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter, IntToFloatTensor, Normalize
from fastcore.foundation import L
from fastcore.meta import delegates

import fastai_crl.images.show  # noqa: F401  (registers how fastai shows such batches and results)
from fastai_crl.augment import microscopy_transforms
from fastai_crl.hpa import HPA_CHANNELS
from fastai_crl.images.cache import pack
from fastai_crl.images.image_set import ImageSet, check_images
from fastai_crl.images.levels import lost_levels
from fastai_crl.images.open import OpenMultiChannel
from fastai_crl.images.packed import Packed
from fastai_crl.samplers import Sampler, SamplerFactory, check_sampler, takes, with_sampler

from .annotations import Annotations
from .cached_loader import PackedDL
from .keywords import KEYWORDS, check_keywords
from .splits import Split, split_by, validation_rows
from .targets import RowLabels, RowPrefix, make_names, target_block
from .transforms import Stats, check_tfms, make_stats


def MultiChannelBlock(images: ImageSet, cache: Packed | None = None) -> TransformBlock:
    """Return a `TransformBlock` for multi-channel images, for use in a plain `DataBlock`.

    An item is a path prefix folder/id (str or Path), of any folder. Items become uint8 `TensorMultiChannel` (C,H,W),
    batches float 0..1.

    Args:
        images: how the files are named and read. Its `size` is that of the images: fastai's item transform `Resize`
            does nothing to a tensor.
        cache: what `pack` returned for the same images: they come from it, whole batches at a time.

    Raises:
        ValueError: what is no `ImageSet`.
    """
    loader = {} if cache is None else {"dl_type": PackedDL}
    return TransformBlock(type_tfms=OpenMultiChannel(images, cache), batch_tfms=IntToFloatTensor, **loader)


class MultiChannelDataLoaders(DataLoaders):
    """`DataLoaders` of multi-channel images, of any channels, with labels in a csv."""

    @classmethod
    @check_keywords
    def from_csv(
        cls,
        path: str | Path,
        csv_fname: str | Path = "train.csv",
        folder: str | Path = "train",
        size: int | tuple[int, int] | None = 256,
        bs: int = 32,
        *,
        images: ImageSet | None = None,
        annotations: Annotations | None = None,
        split: Split | Callable[[Any], Any] | None = None,
        folds: str | Path | None = None,
        vocab: str | Iterable[Any] | None = None,
        label_names: str | Mapping[Any, str] | Sequence[str] | None = None,
        stats: str | Stats | None = "data",
        item_tfms: Any = None,
        batch_tfms: Any = None,
        sampler: str | Sampler | SamplerFactory | None = None,
        cache: bool | str | Path = False,
        check: bool = True,
        seed: int | None = 42,
        **kwargs: Any,
    ) -> "MultiChannelDataLoaders":
        """Return training and validation loaders for path/csv_fname and the image files path/folder/{id}_{channel}.png.

        A batch is (images float (B,C,H,W), normalised; targets float (B,n_labels) of 0 and 1, or class indices (B,)
        with `label_delim=None`). `dls.vocab` and predictions hold the labels as written in the csv. `dls.test_dl` and
        `learn.predict` take path prefixes folder/id (`image_ids` lists them) or rows of a DataFrame; `dls.channels`
        are the channel names. Three values say what is loaded; each is given, or made of its keywords, not both:

        - `images`, an `ImageSet`: `folder`, `size`, `channels`, `pattern`, `bits`, `white`, `stretch`.
        - `annotations`, an `Annotations`: `csv_fname`, `id_col`, `label_col`, `label_delim`.
        - `split`, such as `StratifiedSplit()`: `valid_pct` (a share of each label's images, 0.2; 0 trains on all),
          `seed`, `group_col` (groups stay on one side), `stratify` (False: the share is one of all images, or of all
          groups), `valid_col` (a boolean column marks the validation rows), `fold` (the rows of one fold), with
          `folds` (a csv of its own, as `make_folds` writes it) or `fold_col` (a column).

        Args:
            path: folder of the data set.
            csv_fname: csv below it, one row per image.
            folder: folder of the images, below it.
            size: side, or (height, width), every image is resized to as it is read; None keeps the size of the files.
            bs: batch size. A training set smaller than one batch makes one smaller batch instead of none.
            images: in place of its keywords.
            annotations: in place of its keywords.
            split: in place of its keywords: an object with a method `rows(annotations)` that gives the positions of the
                validation rows, or a splitter of fastai.
            folds: csv below `path` with the fold of each id, joined to the annotations by id.
            vocab: all labels in their order; "hpa" for "0".."27", "hpa2021" for "0".."18"; by default those found in
                the csv, numbers in order.
            label_names: what pictures show instead of the labels: a mapping from label to name, a list in the order of
                the vocab, or "hpa" or "hpa2021", the names of the labels of that competition.
            stats: mean and standard deviation for `Normalize`, intensities in 0..1: "data" (measured on up to 512
                training images), "hpa", "imagenet", (mean, std) or None for no normalisation.
            item_tfms: as in fastai.
            batch_tfms: in place of the default augmentation, `microscopy_transforms()` (flips and quarter turns, up to
                10 degrees and 10 % of rotation and zoom, up to 10 % of intensity in each channel); [] for none.
                Normalisation is added after it. For crops see `RandomCropBatch`.
            sampler: how training batches are drawn, as `with_sampler` takes it: None (shuffled), "class_aware" (all
                labels equally often), "repeat_factor" (images of rare labels more often, in a longer epoch), an
                iterable of indices with a length, or a class or function that returns one, drawn with `seed` if it
                takes one.
            cache: True decodes and resizes all images once into path/.cache (or another folder, if given) and takes
                batches from there; later calls use what is there, as long as the files have not changed. No workers are
                then started unless num_workers= or item_tfms= asks for them. See `pack`.
            check: check the files before training (see `check_folder`), and warn where a sample of 32 images shows that
                16-bit files use a small part of their range.
            seed: of the split, the sampler, and the images measured for `stats`. Beside `split` it is the sampler's.
            **kwargs: the other keywords above, and those of fastai's loaders, with val_ before them of the validation
                loader alone.

        Raises:
            FileNotFoundError: a missing csv, folder or image file.
            TypeError: an unknown keyword; names the nearest.
            ValueError: a value of another type, or beside keywords of its own; all that `Annotations`, `ImageSet`, the
                split and `check_folder` find; a label outside `vocab`, statistics that do not fit the channels,
                transforms that fail on such images.
        """
        if sampler is not None:
            check_sampler(sampler)
        path = Path(path)
        given = {name: {k: kwargs.pop(k) for k in keys if k in kwargs} for name, keys in KEYWORDS.items()}
        if images is None:
            images = ImageSet(path / folder, size=size, **given["images"])
        channels = check_images(images).channels
        if split is None:
            split = split_by(seed=seed, folds=None if folds is None else path / folds, **given["split"])
        check_tfms(item_tfms, batch_tfms, len(channels))
        aug = microscopy_transforms() if batch_tfms is None else list(L(batch_tfms))
        if annotations is None:
            annotations = Annotations.from_csv(path / csv_fname, **given["annotations"])
        if not isinstance(annotations, Annotations):
            fix = "pass Annotations.from_csv(file) or Annotations.from_frame(table)"
            raise ValueError(f"annotations= takes an Annotations, not a {type(annotations).__name__}: {fix}.")
        annotations.require(images.folder)
        vocab = annotations.vocab(vocab)
        target = target_block(vocab, make_names(label_names, vocab), not annotations.single)
        splitter = IndexSplitter(validation_rows(split, annotations))
        if check:
            images.check(annotations.ids, same_size=images.size is None)
            for channel, lost in lost_levels(images, annotations.ids).items():
                warnings.warn(f"Channel {channel} in {images.folder}: {lost}.", stacklevel=3)
        packed = None
        if cache:
            packed = pack(images, annotations.ids, path / ".cache" if cache is True else cache, check=False)
            if item_tfms is None:
                kwargs.setdefault("num_workers", 0)  # starting workers takes longer than what they would do
        train = list(splitter(annotations.frame)[0])
        if stats is not None:
            prefixes = [images.folder / annotations.ids[i] for i in train]
            found = make_stats(stats, channels, prefixes, OpenMultiChannel(images, packed), seed)
            aug.append(Normalize.from_stats(*found))
        if len(train) < bs:
            kwargs.setdefault("drop_last", False)
        dblock = DataBlock(
            blocks=(MultiChannelBlock(images, packed), target),
            getters=[RowPrefix(images.folder, annotations.id_col), RowLabels(annotations.parser)],
            splitter=splitter,
            item_tfms=item_tfms,
            batch_tfms=aug,
        )
        dls = cls.from_dblock(dblock, annotations.frame, path=path, bs=bs, **kwargs)
        dls = cls(*dls.loaders, path=path, device=dls.device)
        if sampler is None:
            return dls
        options = {"seed": random.randrange(2**32) if seed is None else seed} if takes(sampler, "seed") else {}
        return with_sampler(dls, sampler, **options)

    @classmethod
    def from_df(
        cls,
        df: pd.DataFrame,
        path: str | Path = ".",
        id_col: str | int = "Id",
        label_col: str | int | Sequence[str | int] = "Target",
        label_delim: str | None = " ",
        **kwargs: Any,
    ) -> "MultiChannelDataLoaders":
        """Return loaders as `from_csv` does, of rows that are in a table already.

        Args:
            df: the rows, see `Annotations.from_frame`; also for what a plain `pd.read_csv` loses.
            path: folder of the data set.
            id_col: see there, like the next two.
            label_col: see there.
            label_delim: see there.
            **kwargs: as for `from_csv`.
        """
        return cls.from_csv(path, annotations=Annotations.from_frame(df, id_col, label_col, label_delim), **kwargs)


class HPADataLoaders(MultiChannelDataLoaders):
    """`MultiChannelDataLoaders` with channels, statistics and label names of the Human Protein Atlas competition."""

    @classmethod
    @delegates(MultiChannelDataLoaders.from_csv)
    def from_csv(
        cls,
        path: str | Path,
        *args: Any,
        stats: str | Stats | None = "hpa",
        label_names: str | Mapping[Any, str] | Sequence[str] | None = "auto",
        **kwargs: Any,
    ) -> "HPADataLoaders":
        """Return loaders as `MultiChannelDataLoaders.from_csv` does, by default of the four channels of the HPA.

        Args:
            path: folder of the data set.
            *args: as there.
            stats: as there, by default those of the HPA images. For a network pretrained on three channels pass
                channels=("red", "green", "blue"), stats="imagenet".
            label_names: as there. Default: those of the competition that `vocab` names, or of the labels "0".."27"
                where all of them occur; others, which may be anything, are shown as written.
            **kwargs: as there.
        """
        if kwargs.get("images") is None:
            kwargs.setdefault("channels", HPA_CHANNELS)
        vocab = kwargs.get("vocab")
        if isinstance(label_names, str) and label_names == "auto" and isinstance(vocab, str):
            label_names = vocab
        return super().from_csv(path, *args, stats=stats, label_names=label_names, **kwargs)
