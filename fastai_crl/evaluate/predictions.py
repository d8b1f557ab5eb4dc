"""Predictions of a learner, shown."""

from typing import Any

import numpy as np
from fastai.learner import Learner
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from fastai_crl.images.show import draw_images, prediction_lines
from fastai_crl.labels import shown_names

from .metrics import decide

__all__ = ["show_predictions"]


def show_predictions(
    learn: Learner,
    ds_idx: int = 1,
    dl: Any = None,
    max_n: int = 9,
    shuffle: bool = True,
    thresh: float | ArrayLike | None = None,
    **kwargs: Any,
) -> list[Axes]:
    """Draw images of one batch with what the learner makes of them: labels found, missed, false, their probabilities.

    Args:
        learn: on `TensorMultiChannel` images, multi-label or single-label (the likeliest class is then the decision).
        ds_idx: the loader of `learn.dls`, as for fastai's `Learner.show_results`.
        dl: a loader in its place; without labels, as that of `test_dl`, the predicted ones are listed.
        max_n: images at the most.
        shuffle: another batch each time.
        thresh: multi-label: labels of a probability above it are predicted; one number, or one per label. Default: the
            decisions of the learner's loss, so its own thresholds where it has some; 0.5 if the loss makes none.
        kwargs: options of `draw_images`: channels, split, stretch, nrows, ncols, figsize, ctxs.

    Returns:
        The axes, one per panel, image after image.

    Raises:
        ValueError: thresholds that do not fit, a loss that gives no probabilities; what `draw_images` raises.
    """
    dl = learn.dls[ds_idx].new(shuffle=shuffle) if dl is None else dl
    batch = dl.one_batch()
    probs, targets, decided = (
        o if o is None else np.asarray(o) for o in learn.get_preds(dl=[batch], with_decoded=True)
    )
    if probs.min() < 0 or probs.max() > 1:
        raise ValueError(
            f"Predictions from {probs.min():.3g} to {probs.max():.3g} are no probabilities: use a loss with an "
            f"activation, such as fastai's BCEWithLogitsLossFlat, not {type(learn.loss_func).__name__}."
        )
    n_classes = probs.shape[1]
    if decided.ndim == 1:  # single-label
        chosen, targets = (o if o is None else np.eye(n_classes)[o] for o in (decided, targets))
    elif thresh is None and decided.dtype == bool:
        chosen = decided
    else:
        chosen = decide(probs, 0.5 if thresh is None else thresh)
    names = shown_names(learn.dls, n_classes)
    images = dl.show_batch(batch, max_n=max_n, show=False)[2].itemgot(0)
    captions = [
        prediction_lines(probs[i], chosen[i], None if targets is None else targets[i], names)
        for i in range(len(images))
    ]
    return draw_images(images, captions, **kwargs)
