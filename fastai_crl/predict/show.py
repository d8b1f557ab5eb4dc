"""Pictures of predictions."""

from typing import Any

from fastai.learner import Learner
from matplotlib.axes import Axes

from fastai_crl.evaluate.decider import threshold_in_use
from fastai_crl.evaluate.decisions import as_targets, decide
from fastai_crl.evaluate.predictions import loader_of, predict_probabilities
from fastai_crl.images.show import draw_images, prediction_lines
from fastai_crl.images.tensor import TensorMultiChannel
from fastai_crl.labels import shown_names
from fastai_crl.task import is_single_label


def show_predictions(
    learn: Learner,
    ds_idx: int = 1,
    dl: Any = None,
    max_n: int = 9,
    shuffle: bool = True,
    **kwargs: Any,
) -> list[Axes]:
    """Draw images of one batch with what the learner makes of them: labels found, missed, false, their probabilities.

    The learner decides by its own thresholds where it has some, else at 0.5. Labels of unknown targets are left out.

    Args:
        learn: on `TensorMultiChannel` images, multi-label or single-label (one class is decided for, see `decide`).
        ds_idx: the loader of `learn.dls`, as for fastai's `Learner.show_results`.
        dl: a loader in its place; without labels, as that of `test_dl`, the predicted ones are listed.
        max_n: images at the most.
        shuffle: another batch each time.
        kwargs: options of `draw_images`: channels, split, stretch, nrows, ncols, figsize, ctxs.

    Returns:
        The axes, one per panel, image after image.

    Raises:
        ValueError: no image, no probabilities; what `draw_images` raises.
    """
    dl = loader_of(learn, ds_idx).new(shuffle=shuffle) if dl is None else dl
    batch = dl.one_batch()
    if not isinstance(batch[0], TensorMultiChannel):
        raise ValueError(
            "show_predictions draws TensorMultiChannel images, as MultiChannelDataLoaders give them, and these are "
            f"{type(batch[0]).__name__}: learn.show_results() draws those."
        )
    probs, targets = predict_probabilities(learn, dl=[batch])
    probs, n_classes = probs.numpy(), probs.shape[1]
    single_label = is_single_label(learn.dls if targets is None else targets, n_classes)
    chosen = decide(probs, threshold_in_use(learn), single_label=single_label)
    if targets is not None:
        targets, known, _ = as_targets(targets, probs.shape)
        chosen &= known  # neither right nor wrong
    names = shown_names(learn.dls, n_classes)
    images = dl.show_batch(batch, max_n=max_n, show=False)[2].itemgot(0)
    captions = [
        prediction_lines(probs[i], chosen[i], None if targets is None else targets[i], names)
        for i in range(len(images))
    ]
    return draw_images(images, captions, **kwargs)
