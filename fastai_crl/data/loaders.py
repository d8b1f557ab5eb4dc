"""Multi-channel images with labels in fastai's data block API, and the Human Protein Atlas (HPA) in one call."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastai.data.block import DataBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IndexSplitter, IntToFloatTensor, Normalize
from fastcore.meta import delegates
from PIL import Image

import fastai_crl.images.show  # noqa: F401  (registers how fastai shows such batches and results)
from fastai_crl.hpa import HPA_CHANNELS
from fastai_crl.images.cache import Packed, pack
from fastai_crl.images.image_set import ImageSet
from fastai_crl.images.layout import CHANNELS, PATTERN
from fastai_crl.images.open import OpenMultiChannel
from fastai_crl.samplers import Sampler, SamplerFactory, check_sampler, takes, with_sampler

from .annotations import Annotations, make_names
from .cached_loader import PackedDL
from .keywords import KEYWORDS, check_keywords
from .splits import Split, split_by, validation_rows
from .targets import RowLabels, RowPrefix, target_block
from .transforms import Stats, check_tfms, make_stats, make_tfms


def MultiChannelBlock(
    channels: Sequence[str] = CHANNELS,
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
    (C,H,W), batches float 0..1.

    Args:
        channels: see `ImageSet`, like all but `cache`.
        size: see there; fastai's item transform `Resize` does nothing to a tensor.
        pattern: see there.
        resample: see there.
        bits: see there.
        stretch: see there.
        cache: what `pack` returned for the same arguments: images come from it, whole batches at a time.

    Raises:
        ValueError: a value out of range.
    """
    return _block(OpenMultiChannel(channels, size, pattern, resample, bits, stretch, cache))


def _block(reader: OpenMultiChannel) -> TransformBlock:
    loader = {} if reader.cache is None else {"dl_type": PackedDL}
    return TransformBlock(type_tfms=reader, batch_tfms=IntToFloatTensor, **loader)


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
        vocab: str | Iterable[Any] | None = None,
        label_names: str | Mapping[Any, str] | Sequence[str] | None = None,
        stats: str | Stats | None = "data",
        crop: int | None = None,
        item_tfms: Any = None,
        batch_tfms: Any = None,
        sampler: str | Sampler | SamplerFactory | None = None,
        cache: bool | str | Path = False,
        check: bool = True,
        ids_outside: bool = False,
        seed: int | None = 42,
        **kwargs: Any,
    ) -> "MultiChannelDataLoaders":
        """Return training and validation loaders for path/csv_fname and the image files path/folder/{id}_{channel}.png.

        A batch is (images float (B,C,H,W), normalised; targets float (B,n_labels) of 0 and 1, or class indices (B,)
        with `label_delim=None`). `dls.vocab` and predictions hold the labels as written in the csv. `dls.test_dl` and
        `learn.predict` take path prefixes folder/id (`image_ids` lists them) or rows of a DataFrame; `dls.channels`
        are the channel names. Three values say what is loaded; each is given, or made of its keywords, not both:

        - `images`, an `ImageSet`: `folder`, `size`, `channels`, `pattern`, `bits`, `stretch`, `resample`.
        - `annotations`, an `Annotations`: `csv_fname`, `id_col`, `label_col`, `label_delim`.
        - `split`, such as `StratifiedSplit()`: `valid_pct` (a share of the images, 0.2; 0 trains on all), `seed`,
          `group_col` (groups stay on one side, and valid_pct is a share of them), `stratify` (the share is one of each
          label's images), `valid_col` (a boolean column marks the validation rows), `fold_col` and `fold`.

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
            vocab: all labels in their order; "hpa" for "0".."27"; by default those found in the csv, numbers in order.
            label_names: what pictures show instead of the labels: a mapping from label to name, a list in the order of
                the vocab, or "hpa" (the names of its labels "0".."27", where there are no others).
            stats: mean and standard deviation for `Normalize`, intensities in 0..1: "data" (measured on up to 512
                training images), "hpa", "imagenet", (mean, std) or None for no normalisation.
            crop: training on a random resized crop (a place of its own in each image, from 8 % of its area up) and the
                eight flips and quarter turns, validation on the central crop; for instance size=256, crop=224.
            item_tfms: as in fastai.
            batch_tfms: in place of the default augmentation, `microscopy_transforms()` (flips and quarter turns, up to
                10 degrees and 10 % of rotation and zoom, up to 10 % of intensity in each channel); [] for none.
                Normalisation is added after it.
            sampler: how training batches are drawn, as `with_sampler` takes it: None (shuffled), "class_aware" (all
                labels equally often), "repeat_factor" (images of rare labels more often, in a longer epoch), an
                iterable of indices with a length, or a class or function that returns one, drawn with `seed` if it
                takes one.
            cache: True decodes and resizes all images once into path/.cache (or another folder, if given) and takes
                batches from there; later calls use what is there, as long as the files have not changed. No workers are
                then started unless num_workers= or item_tfms= asks for them. See `pack`.
            check: check the files before training (see `check_folder`).
            ids_outside: take ids that lead out of the folder, such as "../other/a".
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
        split = split_by(seed=seed, **given["split"]) if split is None else split
        channels = images.channels
        check_tfms(item_tfms, batch_tfms, len(channels))
        aug = make_tfms(batch_tfms, crop, images.size)
        if annotations is None:
            annotations = Annotations.from_csv(path / csv_fname, **given["annotations"])
        annotations.require_files(images.folder, ids_outside)
        vocab = annotations.vocab(vocab)
        target = target_block(vocab, make_names(label_names, vocab), not annotations.single)
        splitter = IndexSplitter(validation_rows(split, annotations))
        if check:
            images.check(annotations.ids, same_size=images.size is None)
        reader = OpenMultiChannel.of(images)
        if cache:
            place = path / ".cache" if cache is True else cache
            reader.cache = pack(images, ids=annotations.ids, cache=place, check=False)
            if item_tfms is None:
                kwargs.setdefault("num_workers", 0)  # starting workers takes longer than what they would do
        train = list(splitter(annotations.frame)[0])
        if stats is not None:
            prefixes = [images.folder / annotations.ids[i] for i in train]
            aug.append(Normalize.from_stats(*make_stats(stats, channels, prefixes, reader, seed)))
        if len(train) < bs:
            kwargs.setdefault("drop_last", False)
        dblock = DataBlock(
            blocks=(_block(reader), target),
            getters=[RowPrefix(images.folder, annotations.id_col), RowLabels(annotations.reader)],
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


class HPADataLoaders(MultiChannelDataLoaders):
    """`MultiChannelDataLoaders` with channels, statistics and label names of the Human Protein Atlas competition."""

    @classmethod
    @delegates(MultiChannelDataLoaders.from_csv)
    def from_csv(
        cls,
        path: str | Path,
        *args: Any,
        stats: str | Stats | None = "hpa",
        label_names: str | Mapping[Any, str] | Sequence[str] | None = "hpa",
        **kwargs: Any,
    ) -> "HPADataLoaders":
        """Return loaders as `MultiChannelDataLoaders.from_csv` does, by default of the four channels of the HPA.

        Args:
            path: folder of the data set.
            *args: as there.
            stats: as there, by default those of the HPA images. For a network pretrained on three channels pass
                channels=("red", "green", "blue"), stats="imagenet".
            label_names: as there, by default those of the HPA; labels other than "0".."27" stay as written.
            **kwargs: as there.
        """
        if kwargs.get("images") is None:
            kwargs.setdefault("channels", HPA_CHANNELS)
        return super().from_csv(path, *args, stats=stats, label_names=label_names, **kwargs)
