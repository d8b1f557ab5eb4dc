"""Predictions for a folder of images without labels."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastcore.basics import getcallable, noop
from fastprogress.fastprogress import progress_bar
from numpy.typing import ArrayLike
from torch import Tensor

from fastai_crl._errors import offenders
from fastai_crl.images.layout import replace_file

from .decisions import threshold_in_use

__all__ = ["write_submission"]


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
    **kwargs: Any,
) -> pd.DataFrame:
    """Predict every image of a folder and write a csv in Kaggle's form: `Id,Predicted`, labels separated by spaces.

    The probabilities come beside it: for submission.csv in submission_probs.csv, `Id` and a column per label, in full
    float32 precision. Both are written at once or not at all. On the way they are added, chunk by chunk, to
    submission.partial: a run that was killed continues there, with the same result, and the file goes in the end. No
    more than `chunk` images (and the probabilities) are held in memory.

    Args:
        learn: a multi-label learner on `HPADataLoaders`, or one loaded from its export.
        folder: holds the images.
        fname: csv to write.
        thresh: labels of a probability above it are predicted, 0 to 1: one for all labels, C in the order of the vocab,
            or a mapping from every label to its own. An image that reaches none gets its likeliest label. Default:
            what the learner itself decides by: what `set_thresholds` gave it, else 0.5.
        pattern: names of the files, see `MultiChannelBlock`. Default: as in training.
        tta: test-time augmentation, a function in place of `Learner.get_preds`, called as `tta(learn, dl=dl)`, that
            returns the probabilities (n,C) first; for instance `d4_tta`.
        chunk: images predicted between two writes, rounded up to whole batches.
        resume: continue a partial file; False starts afresh.
        progress: show a progress bar.
        **kwargs: of the data loader, such as bs and num_workers.

    Returns:
        DataFrame of `Id`, `Predicted`, in the order of the ids.

    Raises:
        FileNotFoundError: no such folder, no image in it, or a channel missing. ValueError: an unreadable image,
            thresholds that do not fit, probabilities that are not finite, or a partial file of other images, labels,
            weights, transforms or test-time augmentation.
    """
    vocab = [str(v) for v in learn.dls.vocab]
    cuts = _thresholds(threshold_in_use(learn) if thresh is None else thresh, vocab)
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 image.")
    images = learn.dls.images.with_(folder=folder, pattern=learn.dls.pattern if pattern is None else pattern)
    ids = list(images.ids())
    images.check(ids)
    fname = Path(fname)
    partial = fname.with_suffix(".partial")
    prefixes = [Path(folder) / i for i in ids]
    header = _header(learn, prefixes[0], ids, vocab, tta)
    done = 0
    if resume and partial.exists():
        done = _rows(partial, header, len(vocab))
    else:
        replace_file(partial, lambda f: f.write_bytes(header))
    # Whole batches, and the same ones as in a run that was never interrupted: their results agree to the last bit.
    bs = learn.dls.test_dl(prefixes[:1], **kwargs).bs
    starts = range(done if done == len(ids) else done // bs * bs, len(ids), -(-chunk // bs) * bs)
    with partial.open("r+b") as f, learn.no_bar() if hasattr(learn, "progress") else nullcontext():
        f.truncate(len(header) + 4 * len(vocab) * starts.start)
        f.seek(0, os.SEEK_END)
        for start in progress_bar(starts, total=len(starts), leave=False) if progress else starts:
            dl = learn.dls.test_dl(prefixes[start : start + starts.step], **kwargs)
            probs = (_predict(learn, dl) if tta is None else tta(learn, dl=dl)[0]).float().numpy()
            _check_finite(probs, ids[start : start + starts.step])
            f.write(np.ascontiguousarray(probs, "<f4").tobytes())
            f.flush()
    probs = np.fromfile(partial, "<f4", offset=len(header)).reshape(len(ids), len(vocab))
    chosen = probs > cuts
    alone = ~chosen.any(1)
    chosen[alone, probs[alone].argmax(1)] = True
    labels = np.array(vocab)
    table = pd.DataFrame({"Id": ids, "Predicted": [" ".join(labels[row]) for row in chosen]})
    every = pd.DataFrame(probs, columns=vocab)
    every.insert(0, "Id", ids, allow_duplicates=True)
    replace_file(fname.with_name(f"{fname.stem}_probs.csv"), lambda f: every.to_csv(f, index=False))
    replace_file(fname, lambda f: table.to_csv(f, index=False))
    partial.unlink()
    return table


def _predict(learn: Learner, dl: DataLoader) -> Tensor:
    """Probabilities, batch by batch, as an element's last bit can depend on its place in the tensor."""
    logits = learn.get_preds(dl=dl, act=noop)[0]
    return torch.cat([getcallable(learn.loss_func, "activation")(batch) for batch in logits.split(dl.bs)])


def _check_finite(probs: np.ndarray, ids: list[str]) -> None:
    if bad := [ids[i] for i in np.flatnonzero(~np.isfinite(probs).all(1))]:
        fix = "Has the training diverged? Load weights from before that."
        raise ValueError(offenders("Probabilities that are not finite for the ids", bad, fix))


def _thresholds(thresh: float | ArrayLike | Mapping[Any, float], vocab: list[str]) -> np.ndarray:
    """One threshold for all labels, (), or one for each, (C,)."""
    if isinstance(thresh, Mapping):
        given = {str(k): v for k, v in thresh.items()}
        if wrong := sorted(given.keys() ^ set(vocab)):
            fix = "Give each label of the vocab, and no other, its threshold."
            raise ValueError(offenders("Labels without threshold, or thresholds without label", wrong, fix))
        thresh = [given[v] for v in vocab]
    cuts = np.asarray(thresh.detach().cpu() if isinstance(thresh, Tensor) else thresh, dtype=np.float64)
    if cuts.shape not in ((), (len(vocab),)):
        raise ValueError(f"thresh has shape {cuts.shape}: give one number, or {len(vocab)} in the order of the vocab.")
    if bad := [float(c) for c in cuts.ravel() if not 0 <= c <= 1]:
        raise ValueError(offenders("Thresholds out of range", bad, "They cut probabilities: give 0 to 1."))
    return cuts


# ---------------------------------------------------------------- the partial file: a line of json, then float32 rows


def _header(learn: Learner, first: Path, ids: list[str], vocab: list[str], tta: Callable[..., Any] | None) -> bytes:
    """What the probabilities depend on, as digests; the transforms by what they make of the first image."""
    x = learn.dls.test_dl([first], bs=1, num_workers=0).one_batch()[0]
    weights = [f"{name} {value.dtype}".encode() + _content(value) for name, value in learn.model.state_dict().items()]
    content = {
        "ids": "\n".join(ids).encode(),
        "labels": "\n".join(vocab).encode(),
        "transforms": _content(x),
        "weights": b"".join(weights),
        "test-time augmentation": b"" if tta is None else getattr(tta, "__qualname__", type(tta).__qualname__).encode(),
    }
    return json.dumps({what: hashlib.sha256(data).hexdigest() for what, data in content.items()}).encode() + b"\n"


def _content(x: Tensor) -> bytes:
    """Digest of shape and values."""
    raw = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(f"{tuple(x.shape)}".encode() + raw.tobytes()).digest()


def _rows(partial: Path, header: bytes, n_labels: int) -> int:
    """Number of whole rows in the partial file; ValueError if it has another header."""
    with partial.open("rb") as f:
        found = f.readline()
        rows = (f.seek(0, os.SEEK_END) - len(found)) // (4 * n_labels)
    if found == header:
        return rows
    try:
        before, now = json.loads(found), json.loads(header)
        other = ", ".join(what for what in now if before.get(what) != now[what])
    except (ValueError, AttributeError):
        other = "content"
    raise ValueError(
        f"{partial} was begun with other {other} and cannot be continued: pass resume=False to start afresh, or "
        "another fname to keep it."
    )
