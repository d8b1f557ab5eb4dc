"""Test-time augmentation over the eight flips and quarter turns of an image."""

from collections.abc import Callable
from typing import Any

from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.torch_core import to_float
from fastcore.basics import noop
from torch import Tensor

from fastai_crl._fastai import activation_of, alone, as_validation, inner_loader
from fastai_crl.augment import d4
from fastai_crl.evaluate.predictions import in_order
from fastai_crl.task import is_single_label


class _D4Predictions(Callback):
    """Replace the predictions that `get_preds` gathers by the mean activations over the flips and turns of the batch.

    The model runs while mixed precision (order 10) is still on; the loss, already computed, and fastai's recorder
    (order 50) see the predictions for the images as they are.
    """

    order = 1  # right after GatherPredsCallback

    act: Callable[[Tensor], Tensor] | None = None  # that of the loss, known with the first batch

    def before_batch(self) -> None:
        x = self.xb[0]
        if getattr(x, "ndim", 0) != 4:
            raise ValueError(
                f"d4_tta turns image batches (B,C,H,W), the first input is a {type(x).__name__} of shape "
                f"{tuple(getattr(x, 'shape', ()))}: use get_preds."
            )

    def after_loss(self) -> None:
        x, *others = self.xb
        n = 8 if x.shape[-2] == x.shape[-1] else 4
        if self.act is None:
            single_label = is_single_label(self.yb[0] if len(self.yb) else self.dls, self.pred.shape[-1])
            self.act = activation_of(self.loss_func, single_label)
        self.plain, total = self.pred, self.act(to_float(self.pred))
        for k in range(1, n):
            total = total + self.act(to_float(self.model(d4(x, k), *others)))
        self.learn.pred = total / n

    def after_batch(self) -> None:
        self.learn.pred, self.plain = self.plain, None


def d4_tta(learn: Learner, ds_idx: int = 1, dl: Any = None, **kwargs: Any) -> tuple[Tensor, ...]:
    """Predict with the mean over all flips and quarter turns of each image: `get_preds` with less variance.

    Eight exact variants (four, the flips and the half turn, of images that are not square), batch by batch, so the
    memory is that of `get_preds` and the time eight times its model's. No random augmentation takes part, not even on
    training data. The probabilities are averaged, see `activation_of`, not the logits. Of several processes each that
    calls it predicts all, alone.

    Args:
        learn: any learner whose first input is an image batch (B,C,H,W).
        ds_idx: the loader of `learn.dls`, as for `get_preds`.
        dl: a loader in its place.
        **kwargs: as for `get_preds` (`cbs`, `with_decoded`, `with_input`, `reorder` ...). With `with_loss` the losses
            are those of the images as they are.

    Returns:
        What `get_preds` does: probabilities (n,C) and targets, on the CPU, in the order of the data set.

    Raises:
        ValueError: inputs that are not image batches.
    """
    dl = in_order(learn, ds_idx) if dl is None else inner_loader(dl)
    with alone(learn), as_validation(dl), learn.added_cbs(_D4Predictions()):
        return learn.get_preds(dl=dl, act=noop, **kwargs)
