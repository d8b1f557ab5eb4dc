"""Predictions of a learner: the probabilities, of whatever loss and loader, at the end or after each epoch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastai.callback.core import Callback
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastcore.basics import noop
from torch import Tensor
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import IterableDataset, SequentialSampler

from fastai_crl._fastai import activation_of, alone, inner_loader
from fastai_crl.task import is_single_label
from fastai_crl.unknown import hardened

from .decisions import as_probabilities


def predict_probabilities(
    learn: Learner,
    ds_idx: int = 1,
    dl: Any = None,
    need_targets: bool = False,
    inner: bool = False,
    predict: Callable[..., tuple[Tensor, ...]] | None = None,
    rows: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Predict a data set: probabilities as the learner's loss defines them, see `activation_of`.

    Of several processes each that calls it predicts all, alone, without waiting for the others.

    Args:
        learn: any learner whose network gives (n, C), or (n,) for one label.
        ds_idx: the loader of `learn.dls`, 1 for validation, 0 for training; all of it, in order, as in validation.
        dl: a loader in its place, of fastai or torch, or batches; those of a generator are held in memory.
        need_targets: raise where the loader gives none.
        inner: as for `Learner.get_preds`, for use within a fit.
        predict: test-time augmentation in place of `get_preds`, called as `predict(learn, dl=dl)`; its first result are
            probabilities.
        rows: names of the items, for errors.

    Returns:
        Probabilities (n, C), float32, and targets, None where the loader gives none; both on the CPU. Soft targets come
        as 0 and 1, see `hardened`.

    Raises:
        ValueError: nothing to predict, a network of several outputs, values that are no probabilities.
    """
    dl = in_order(learn, ds_idx) if dl is None else inner_loader(dl)
    try:
        len(dl)
    except TypeError:  # a generator, or a loader of an iterable data set
        dl = list(dl)
    if len(dl) == 0:
        raise ValueError("The loader given as dl= holds no batch: there is nothing to predict.")
    with alone(learn):
        if predict is not None:
            out, *others = predict(learn, dl=dl)
            targets = others[0] if others else None
        else:
            out, targets = learn.get_preds(dl=dl, act=noop, inner=inner)[:2]
    if not isinstance(out, Tensor) or out.ndim not in (1, 2):
        what = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"{len(out)} parts"
        raise ValueError(f"The network's output has {what}: give one output (n, C), a column per label.")
    if not isinstance(targets, Tensor):
        targets = None
    if need_targets and targets is None:
        raise ValueError(
            "The loader gives no targets: pass one with labels, such as dls.test_dl(items, with_labels=True)."
        )
    out = out.as_subclass(Tensor).float().reshape(len(out), -1)
    if predict is None:
        single_label = is_single_label(learn.dls if targets is None else targets, out.shape[1])
        activation = activation_of(learn.loss_func, single_label)
        # Batch by batch, as an element's last bit can depend on its place in the tensor.
        size = getattr(dl, "bs", None) or getattr(dl, "batch_size", None) or len(out)
        out = torch.cat([activation(batch) for batch in out.split(size)])
    name = f"Predictions ({type(learn.loss_func).__name__})"
    return torch.from_numpy(as_probabilities(out, name, rows)), None if targets is None else hardened(targets)


def in_order(learn: Learner, ds_idx: int = 1) -> Any:
    """Return a loader of one of the learner's data sets, all of it in order, with the transforms of validation."""
    loader = loader_of(learn, ds_idx)
    if not isinstance(loader, DataLoader):
        return _torch_in_order(loader)
    if ds_idx != 1 and hasattr(loader.dataset, "items"):
        return learn.dls.test_dl(loader.dataset.items, with_labels=True)
    return loader.new(shuffle=False, drop_last=False)


def loader_of(learn: Learner, ds_idx: int) -> Any:
    """Return the learner's loader of one of its data sets, which must not be empty.

    Raises:
        ValueError: it is empty or missing; names the way out.
    """
    loaders = learn.dls.loaders
    if ds_idx >= len(loaders) or _is_empty(loaders[ds_idx]):
        what = "There is no validation set (valid_pct=0?)" if ds_idx == 1 else f"dls[{ds_idx}] holds no item"
        raise ValueError(
            f"{what}: pass dl= of images that the network was not trained on, such as "
            "dl=learn.dls.test_dl(items, with_labels=True), or ds_idx=0 for the training set, which flatters."
        )
    return inner_loader(loaders[ds_idx])


def _is_empty(loader: Any) -> bool:
    dataset = getattr(loader, "dataset", loader)
    return hasattr(dataset, "__len__") and len(dataset) == 0


def _torch_in_order(loader: Any) -> Any:
    """Return a loader of torch without shuffling or a dropped rest; one that has its own order, or is a list, as is."""
    if not isinstance(loader, TorchLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    if isinstance(loader.sampler, SequentialSampler) and not loader.drop_last:
        return loader
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 64)
    options = {"num_workers": loader.num_workers, "collate_fn": loader.collate_fn, "pin_memory": loader.pin_memory}
    return TorchLoader(loader.dataset, size, shuffle=False, **options)


class EpochPreds(Callback):
    """Keeps the predictions on a data set after every epoch: `CRLInterpretation.hardest` shows what stayed hard.

    Args:
        ds_idx: 1 the validation set, 0 the training set, in its own order and with the transforms of validation. It
            costs one more pass through that data per epoch, and n·C numbers of memory.

    Attributes:
        epochs: (n, C) float16 probabilities after each epoch, of all fits.
    """

    remove_on_fetch = True

    def __init__(self, ds_idx: int = 1):
        super().__init__()
        self.ds_idx, self.epochs, self.fitting = ds_idx, [], False

    def before_fit(self) -> None:
        self.fitting = False  # this comes before a validation or prediction on its own, too

    def before_train(self) -> None:
        self.fitting = True

    def after_validate(self) -> None:
        if self.fitting:
            apart = [cb for cb in self.learn.cbs if getattr(cb, "remove_on_fetch", False)]
            with self.learn.removed_cbs(apart) as learn:
                self.epochs.append(predict_probabilities(learn, self.ds_idx, inner=True)[0].half())
