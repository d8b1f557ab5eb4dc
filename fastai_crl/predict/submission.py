"""Predictions for a folder of images without labels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.learner import Learner
from fastai.torch_core import get_model
from fastprogress.fastprogress import progress_bar
from numpy.typing import ArrayLike
from torch import Tensor

from fastai_crl._checks import offenders
from fastai_crl._fastai import activation_of, pipelines, transforms
from fastai_crl._files import replace_file
from fastai_crl.data.targets import RowLabels
from fastai_crl.distributed import process_rank
from fastai_crl.evaluate.decider import threshold_in_use
from fastai_crl.evaluate.decisions import check_thresholds, decide
from fastai_crl.evaluate.predictions import predict_probabilities
from fastai_crl.images.image_set import ImageSet, check_once
from fastai_crl.task import is_single_label

from .parts import Parts

PART = 1024  # images of a part, rounded up to whole batches


def write_submission(
    learn: Learner,
    folder: str | Path,
    fname: str | Path = "submission.csv",
    thresh: float | ArrayLike | Mapping[Any, float] | None = None,
    tta: Callable[..., tuple[Tensor, ...]] | None = None,
    resume: bool = True,
    progress: bool = True,
    ids: Iterable[str] | None = None,
    subfolders: bool = False,
    delim: str | None = None,
    at_least_one: bool = True,
    bs: int | None = None,
    num_workers: int | None = None,
    skip_unreadable: bool = False,
) -> pd.DataFrame | None:
    """Predict every image of a folder and write a csv in Kaggle's form: `Id,Predicted`, labels separated by spaces.

    The probabilities come beside it: for submission.csv in submission_probs.csv, `Id` and a column per label, in full
    float32 precision. Each file is written at once or not at all. On the way the probabilities of each thousand images
    are kept in a folder beside the csv, named by the digest of all that they depend on: a run that was killed loses at
    most the thousand under way and continues there, with the same result to the last bit. In the end the folder goes,
    and so do those of other runs for the same csv, which a warning names.

    Of several processes the first predicts, alone: the others may call it too, and return None at once.

    Args:
        learn: a learner on `HPADataLoaders`, or one loaded from its export. Multi-label or single-label (one
            class is then the decision, see `decide`).
        folder: holds the images, their files named as those of the training.
        fname: csv to write; its folder is made if need be. A file that is there keeps its mode, a link stays one.
        thresh: labels of a probability above it are predicted, 0 to 1: one for all labels, C in the order of the vocab,
            or a mapping from every label to its own. Default: what the learner itself decides by: what `set_thresholds`
            gave it, else 0.5.
        tta: test-time augmentation, a function in place of `Learner.get_preds`, called as `tta(learn, dl=dl)`, that
            returns the probabilities (n,C) first; for instance `d4_tta`.
        resume: continue a run that was killed; False starts afresh.
        progress: show a progress bar.
        ids: of the images, in the order of the rows; they may lie in sub-folders, "plate1/a". Default: all in the
            folder.
        subfolders: without `ids`, look for images in the folders inside, too.
        delim: between two labels of an image. Default: that of the csv which the learner was trained on, or a space.
        at_least_one: an image that reaches no threshold gets its likeliest label; False leaves it without.
        bs: images of a batch. Default, of the next too: as for validation.
        num_workers: processes that load images.
        skip_unreadable: leave out images that lack a file or hold a damaged one, with a warning, and list them with the
            reason: for submission.csv in submission_skipped.csv, `Id,Why`. Default: such an image is an error.

    Returns:
        DataFrame of `Id`, `Predicted`, in the order of the ids; None in other processes than the first.

    Raises:
        FileNotFoundError: no such folder, no image in it, or a channel missing.
        ValueError: loaders other than multi-channel ones, an unreadable image, or none that is readable, thresholds
            that do not fit, labels that hold the delimiter, values that are no probabilities.
        PermissionError: what lies at the folder's name is a link, or may be written to by others.
        OSError: the disk is full.
        RuntimeError: another process writes the same file.
    """
    if process_rank() > 0:
        return None
    if not isinstance(getattr(learn.dls, "images", None), ImageSet):
        raise ValueError(
            "These loaders do not say how their images are named, as HPADataLoaders do: predict files with "
            "predict_probabilities(learn, dl=learn.dls.test_dl(files)), and decide(probs, ...)."
        )
    vocab = [str(v) for v in learn.dls.vocab]
    single_label, delim = is_single_label(learn.dls, len(vocab)), delim or _delim_of(learn.dls)
    if single_label and thresh is not None:
        raise ValueError(f"thresh={thresh!r}: a single-label task takes the likeliest class, leave it out.")
    if not single_label and (bad := [v for v in vocab if delim in v or not v]):
        fix = f"They would be read back as others: pass another delim= than {delim!r}, such as '|', or rename them."
        raise ValueError(offenders("Labels that hold the delimiter", list(map(repr, bad)), fix))
    cuts = check_thresholds(threshold_in_use(learn) if thresh is None else thresh, len(vocab), vocab)
    images = learn.dls.images.with_(folder=folder)
    if ids is None:
        ids = images.found_ids(subfolders) if skip_unreadable else images.ids(subfolders)
    ids = [ids] if isinstance(ids, str) else list(map(str, ids))
    if not ids:
        fix = "give ids=, or look into sub-folders, subfolders=True"
        raise ValueError(f"There is nothing to predict: ids= holds no id, or {images.folder} no image; {fix}.")
    if skip_unreadable:
        check_once(ids)
    else:
        images.check(ids)
    fname = Path(fname)
    fname.parent.mkdir(parents=True, exist_ok=True)
    if fname.is_dir():
        raise ValueError(f"fname={str(fname)!r} is a folder: give the name of a file in it, such as submission.csv.")
    bs = learn.dls.valid.bs if bs is None else bs
    loading = {"bs": bs} | ({} if num_workers is None else {"num_workers": num_workers})
    with learn.no_bar():
        # Of images that may be skipped, any readable one shows what the transforms do.
        readable = (i for i in ids if not (skip_unreadable and images.unreadable([i])))
        if (one := next(readable, None)) is None:
            raise ValueError(offenders(f"Images in {images.folder} that cannot be read", ids, "No other is there."))
        first = learn.dls.test_dl([images.folder / one], bs=1, num_workers=0).one_batch()[0]
        depends_on = (ids, _files(images, ids), vocab, first, bs, tta, *_network(learn, len(vocab), single_label))
        parts = Parts(fname, depends_on)
        # Whole batches, the same as in a run that was never interrupted: their results agree to the last bit.
        step = -(-PART // bs) * bs
        rows = [slice(start, min(start + step, len(ids))) for start in range(0, len(ids), step)]
        with parts.open(resume):
            todo = [k for k, part in enumerate(rows) if parts.read(k, len(ids[part]), len(vocab)) is None]
            for k in progress_bar(todo, leave=False) if progress else todo:
                parts.write(k, _predict(learn, images, ids[rows[k]], tta, loading, skip_unreadable))
            probs = np.concatenate([parts.read(k, len(ids[part]), len(vocab)) for k, part in enumerate(rows)])
            skipped = images.unreadable([i for i, row in zip(ids, probs, strict=True) if np.isnan(row).all()])
            kept = np.array([i not in skipped for i in ids])
            ids, probs = list(compress(ids, kept)), probs[kept]
            chosen = decide(probs, cuts, at_least_one, single_label)
            labels = np.array(vocab)
            table = pd.DataFrame({"Id": ids, "Predicted": [delim.join(labels[row]) for row in chosen]})
            every = pd.DataFrame(probs, columns=vocab)
            every.insert(0, "Id", ids, allow_duplicates=True)
            stem = fname.stem if fname.suffix == ".csv" else fname.name
            frames = {fname.with_name(f"{stem}_probs.csv"): every, fname: table}
            listed = fname.with_name(f"{stem}_skipped.csv")
            if skip_unreadable:
                frames[listed] = pd.DataFrame({"Id": list(skipped), "Why": list(skipped.values())})
            for file, frame in frames.items():
                replace_file(file, lambda f, frame=frame: frame.to_csv(f, mode="wb", index=False), aside=parts.folder)
            if not skip_unreadable:
                listed.unlink(missing_ok=True)  # of a run before
            parts.remove()
    if skipped:
        fix = f"They are not in {fname}; {listed} says why."
        warnings.warn(offenders("Images that cannot be read were left out", list(skipped), fix), stacklevel=2)
    return table


def _predict(
    learn: Learner, images: ImageSet, ids: list[str], tta: Callable[..., Any] | None, loading: dict, skip: bool
) -> np.ndarray:
    """Return probabilities (n, C); with `skip` rows of NaN for images that cannot be read."""

    def of(these: list[str]) -> np.ndarray:
        dl = learn.dls.test_dl([images.folder / i for i in these], **loading)
        return predict_probabilities(learn, dl=dl, predict=tta, rows=these)[0].numpy()

    try:
        return of(ids)
    except Exception:
        if not skip or not (bad := images.unreadable(ids)):
            raise
    readable = [i not in bad for i in ids]
    probs = np.full((len(ids), len(learn.dls.vocab)), np.nan, np.float32)
    if any(readable):
        probs[readable] = of(list(compress(ids, readable)))
    return probs


def _delim_of(dls: Any) -> str:
    """Return what lies between labels in the csv that loaders were made of; a space where there is none."""
    parsers = (t.parser for t in transforms(pipelines(dls)[-1]) if isinstance(t, RowLabels)) if pipelines(dls) else ()
    return next((parser.delim for parser in parsers if parser.delim), " ")


# ---- what predictions depend on ----
def _files(images: ImageSet, ids: list[str]) -> list[tuple[Any, ...]]:
    """Return which files hold the images, and what changes when one of them does; those that are missing do not."""
    files = [(str(f), f.stat()) for i in ids for f in images.files(i) if f.exists()]
    return [(name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in files]


def _network(learn: Learner, n_classes: int, single_label: bool) -> tuple[Any, ...]:
    """Return what makes probabilities of images: the model, the activation by some of its values, where and how."""
    grid = torch.linspace(-9, 9, 5 * n_classes).reshape(5, -1)
    precision = getattr(getattr(learn, "mixed_precision", None), "amp_mode", None)
    model = get_model(learn.model)
    model = getattr(model, "_orig_mod", model)  # of a compiled model the one that was compiled
    activation = activation_of(learn.loss_func, single_label)(grid)
    return model, activation, str(precision), str(learn.dls.device), version("torch")
