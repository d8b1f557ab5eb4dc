"""Predictions for a folder of images without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch.distributed as dist
from fastai.learner import Learner
from fastprogress.fastprogress import progress_bar
from filelock import FileLock, Timeout
from numpy.typing import ArrayLike
from torch import Tensor

from fastai_crl._checks import offenders, whole_number
from fastai_crl._fastai import is_single_label, pipelines, transforms
from fastai_crl.distributed import n_processes
from fastai_crl.images.image_set import ImageSet
from fastai_crl.images.layout import replace_file
from fastai_crl.images.open import OpenMultiChannel

from .decisions import check_thresholds, decide, threshold_in_use
from .partial_file import PartialFile, content_of
from .predictions import predict_probabilities


def write_submission(
    learn: Learner,
    folder: str | Path,
    fname: str | Path = "submission.csv",
    thresh: float | ArrayLike | Mapping[Any, float] | None = None,
    pattern: str | None = None,
    tta: Callable[..., tuple[Tensor, ...]] | None = None,
    chunk: int = 1024,
    resume: bool = True,
    progress: bool = True,
    ids: Iterable[str] | None = None,
    subfolders: bool = False,
    delim: str = " ",
    at_least_one: bool = True,
    **kwargs: Any,
) -> pd.DataFrame:
    """Predict every image of a folder and write a csv in Kaggle's form: `Id,Predicted`, labels separated by spaces.

    The probabilities come beside it: for submission.csv in submission_probs.csv, `Id` and a column per label, in full
    float32 precision. Both are written at once or not at all. On the way they are added, chunk by chunk, to
    submission.csv.partial: a run that was killed continues there, with the same result, and the file goes in the end.
    Chunks that a crash damaged are predicted anew. No more than `chunk` images (and the probabilities) are held in
    memory. Of the processes of a distributed run, each of which must call it, the first writes.

    Args:
        learn: a learner on `HPADataLoaders`, or one loaded from its export. Multi-label or single-label (one
            class is then the decision, see `decide`).
        folder: holds the images.
        fname: csv to write; its folder is made if need be.
        thresh: labels of a probability above it are predicted, 0 to 1: one for all labels, C in the order of the vocab,
            or a mapping from every label to its own. Default: what the learner itself decides by: what `set_thresholds`
            gave it, else 0.5.
        pattern: names of the files, see `MultiChannelBlock`. Default: as in training.
        tta: test-time augmentation, a function in place of `Learner.get_preds`, called as `tta(learn, dl=dl)`, that
            returns the probabilities (n,C) first; for instance `d4_tta`.
        chunk: images predicted between two writes, rounded up to whole batches.
        resume: continue a partial file; False starts afresh.
        progress: show a progress bar.
        ids: of the images, in the order of the rows; they may lie in sub-folders, "plate1/a". Default: all in the
            folder.
        subfolders: without `ids`, look for images in the folders inside, too.
        delim: between two labels of an image.
        at_least_one: an image that reaches no threshold gets its likeliest label; False leaves it without.
        **kwargs: of the data loader, such as bs and num_workers.

    Returns:
        DataFrame of `Id`, `Predicted`, in the order of the ids.

    Raises:
        FileNotFoundError: no such folder, no image in it, or a channel missing.
        ValueError: an unreadable image, thresholds that do not fit, labels that hold the delimiter, values that are no
            probabilities, a partial file of other images, labels, weights, transforms or test-time augmentation.
        RuntimeError: another process writes the same file.
    """
    vocab = [str(v) for v in learn.dls.vocab]
    single_label = is_single_label(learn.dls, len(vocab))
    if single_label and thresh is not None:
        raise ValueError(f"thresh={thresh!r}: a single-label task takes the likeliest class, leave it out.")
    if not single_label and (bad := [v for v in vocab if delim in v or not v]):
        fix = f"They would be read back as others: pass another delim= than {delim!r}, such as '|', or rename them."
        raise ValueError(offenders("Labels that hold the delimiter", list(map(repr, bad)), fix))
    cuts = check_thresholds(threshold_in_use(learn) if thresh is None else thresh, len(vocab), vocab)
    chunk = int(chunk) if isinstance(chunk, float) and chunk.is_integer() else chunk
    chunk = whole_number("chunk", chunk, 1, "give a whole number of images, at least 1")
    images = learn.dls.images.with_(folder=folder, pattern=learn.dls.images.pattern if pattern is None else pattern)
    ids = [ids] if isinstance(ids, str) else list(images.ids(subfolders) if ids is None else map(str, ids))
    if not ids:
        raise ValueError("ids= holds no id: there is nothing to predict.")
    images.check(ids)
    fname = Path(fname)
    fname.parent.mkdir(parents=True, exist_ok=True)
    if fname.is_dir():
        raise ValueError(f"fname={str(fname)!r} is a folder: give the name of a file in it, such as submission.csv.")
    prefixes = [images.folder / i for i in ids]
    quiet = learn.no_bar() if hasattr(learn, "progress") else nullcontext()
    with _only_writer(fname), _opening_as(learn, images), quiet:
        x = learn.dls.test_dl(prefixes[:1], **kwargs | {"bs": 1, "num_workers": 0}).one_batch()[0]
        content = content_of(learn, images, ids, vocab, single_label, x, tta)
        partial = PartialFile(fname.with_name(f"{fname.name}.partial"), content, len(ids), len(vocab))
        # Whole batches, and the same ones as in a run that was never interrupted: their results agree to the last bit.
        bs = learn.dls.test_dl(prefixes[:1], **kwargs).bs
        done = _by_the_first(lambda: partial.start(bs, resume))
        starts = range(done, len(ids), -(-chunk // bs) * bs)
        for start in progress_bar(starts, total=len(starts), leave=False) if progress else starts:
            rows = slice(start, start + starts.step)
            dl = learn.dls.test_dl(prefixes[rows], **kwargs)
            probs = predict_probabilities(learn, dl=dl, predict=tta, rows=ids[rows])[0].numpy()
            _by_the_first(lambda start=start, probs=probs: partial.append(start, probs))

        def finish() -> pd.DataFrame:
            probs = partial.read()
            chosen = decide(probs, cuts, at_least_one, single_label)
            labels = np.array(vocab)
            table = pd.DataFrame({"Id": ids, "Predicted": [delim.join(labels[row]) for row in chosen]})
            every = pd.DataFrame(probs, columns=vocab)
            every.insert(0, "Id", ids, allow_duplicates=True)
            stem = fname.stem if fname.suffix == ".csv" else fname.name
            replace_file(fname.with_name(f"{stem}_probs.csv"), lambda f: every.to_csv(f, index=False))
            replace_file(fname, lambda f: table.to_csv(f, index=False))
            partial.path.unlink()
            return table

        return _by_the_first(finish)


# ---------------------------------------------------------------- processes


@contextmanager
def _only_writer(fname: Path) -> Iterator[None]:
    """Keep other processes from writing `fname`; those of one distributed run go together."""
    if n_processes() > 1 and dist.get_rank() > 0:
        yield
        return
    lock = FileLock(fname.with_name(f"{fname.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RuntimeError(
            f"{fname} is being written by another process: wait for it, or pass another fname."
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps a file that is open
            Path(lock.lock_file).unlink()
        lock.release()


def _by_the_first(make: Callable[[], Any]) -> Any:
    """Return to every process of a distributed run what `make` gives the first; its errors are raised in all."""
    if n_processes() == 1:
        return make()
    found = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = make()
        except Exception as e:
            found[1] = e
    dist.broadcast_object_list(found, 0)
    if found[1] is not None:
        raise found[1]
    return found[0]


# ---------------------------------------------------------------- images


@contextmanager
def _opening_as(learn: Learner, images: ImageSet) -> Iterator[None]:
    """Have the learner's loaders open files named as `images` says, which may differ from those of the training."""
    openers = [f for p in pipelines(learn.dls) for f in transforms(p) if isinstance(f, OpenMultiChannel)]
    openers = [f for f in openers if f.images.pattern != images.pattern]
    before = [(f.images, f.cache) for f in openers]
    for f in openers:  # a cache holds the files of the training's names
        f.images, f.cache = f.images.with_(pattern=images.pattern), None
    try:
        yield
    finally:
        for f, kept in zip(openers, before, strict=True):
            f.images, f.cache = kept
