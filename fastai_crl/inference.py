"""Predictions for a folder of images without labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from fastai.learner import Learner

from .files import PATTERN, image_ids

__all__ = ["write_submission"]


def write_submission(
    learn: Learner,
    folder: str | Path,
    fname: str | Path = "submission.csv",
    thresh: float = 0.5,
    pattern: str = PATTERN,
) -> pd.DataFrame:
    """Predict every image of a folder and write a csv in Kaggle's form: `Id,Predicted`, labels separated by spaces.

    Args:
        learn: a multi-label learner on `HPADataLoaders`, or one loaded from its export.
        folder: holds one file per id and channel.
        fname: csv to write.
        thresh: labels of a probability above it are predicted; an image that reaches it with none gets its likeliest.
        pattern: names of the files, see `MultiChannelBlock`.

    Returns:
        DataFrame of `Id`, `Predicted`, in the order of the ids.

    Raises:
        FileNotFoundError: no such folder, no image in it, or a channel missing. ValueError: a damaged image.
    """
    ids = image_ids(folder, learn.dls.channels, pattern)
    dl = learn.dls.test_dl([Path(folder) / i for i in ids])
    probs = learn.get_preds(dl=dl)[0].numpy()
    chosen = probs > thresh
    chosen[np.arange(len(ids)), probs.argmax(1)] = True
    vocab = np.array([str(v) for v in learn.dls.vocab])
    table = pd.DataFrame({"Id": list(ids), "Predicted": [" ".join(vocab[row]) for row in chosen]})
    table.to_csv(fname, index=False)
    return table
