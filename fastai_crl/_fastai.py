"""What the package relies on of the insides of fastai and torch: one function per fact, each with a test."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from fastai.callback.mixup import MixHandler
from fastai.callback.tracker import TrackerCallback
from fastai.data.core import Datasets, TfmdLists
from fastai.learner import Learner, ValueMetric
from fastai.losses import BaseLoss
from fastai.tabular.core import Tabular
from fastai.torch_core import get_model, to_detach
from fastcore.basics import noop
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from fastai_crl._checks import as_plain_tensor

_SOFTMAX = partial(torch.softmax, dim=-1)
# Losses of torch that say by themselves what the network's outputs are; the others are losses of logits.
_TAKEN: tuple[tuple[tuple[type, ...], tuple[Any, ...], Callable[[Tensor], Tensor]], ...] = (
    ((nn.CrossEntropyLoss, nn.NLLLoss), (F.cross_entropy, F.nll_loss), _SOFTMAX),
    ((nn.BCELoss,), (F.binary_cross_entropy,), noop),
    ((nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss), (F.mse_loss, F.l1_loss, F.smooth_l1_loss), noop),
)


def activation_of(loss_func: Any, single_label: bool) -> Callable[[Tensor], Tensor]:
    """Return the function that makes probabilities of the outputs of a network trained with `loss_func`.

    That is the loss's own `activation`; for a loss around another one (`base_loss`), that of the inner one. Losses of
    torch have none: cross entropy takes a softmax over the last axis and binary cross entropy of probabilities nothing,
    whatever the task. Any other loss takes a softmax for class indices, a sigmoid for (n, C) targets.

    Args:
        loss_func: a loss of fastai, torch or this package, or any function of (outputs, targets).
        single_label: the targets are class indices, see `fastai_crl.task`.
    """
    while hasattr(loss_func, "base_loss"):
        loss_func = loss_func.base_loss
    if isinstance(loss_func, BaseLoss) and type(loss_func).activation is BaseLoss.activation:
        loss_func = loss_func.func  # fastai's wrapper around a loss of torch adds no activation to it
    elif hasattr(loss_func, "activation"):
        return loss_func.activation
    for classes, functions, activation in _TAKEN:
        if isinstance(loss_func, classes) or loss_func in functions:
            return activation
    return _SOFTMAX if single_label else torch.sigmoid


# ---- what data sets and loaders hold ----


def pipelines(source: Any) -> list[TfmdLists]:
    """Return the pipelines, of each input and target, of fastai's `Datasets` or of loaders of them; of others none."""
    return list(getattr(source, "tls", None) or ())


def transforms(pipeline: Any) -> list[Any]:
    """Return the transforms of a pipeline of a data set, or of a loader (`after_item`), in the order they run in."""
    return list((pipeline.tfms if isinstance(pipeline, TfmdLists) else pipeline).fs)


def transformed(item: Any, tfms: Iterable[Any], split_idx: int | None) -> Any:
    """Return what transforms make of an item; those of training leave it be unless `split_idx` is 0."""
    for f in tfms:
        item = f(item, split_idx=split_idx)
    return item


def as_validation(loader: Any) -> AbstractContextManager:
    """Return a context in which a loader's items are transformed as those of validation are: not at random."""
    as_split = getattr(getattr(loader, "dataset", None), "set_split_idx", None)
    return as_split(1) if as_split else nullcontext()


def keeps_workers(loader: Any) -> bool:
    """Return whether the workers of a loader live on after an epoch, which `new` does not pass on."""
    return loader.fake_l.persistent_workers


def loader_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of `new` under the names that loaders know: fastai's tta calls shuffle "shuffled"."""
    return {"shuffle" if name == "shuffled" else name: value for name, value in options.items()}


def shared_bytes(shape: tuple[int, ...]) -> Tensor:
    """Return a tensor, uint8, its values undefined, that a worker gives to the main process without a copy.

    PyTorch's own collating makes such.
    """
    empty = torch.empty(0, dtype=torch.uint8)
    return empty.new(empty._typed_storage()._new_shared(math.prod(shape))).resize_(shape)


def inner_loader(loader: Any) -> Any:
    """Return the loader that fastai's `DistributedDL` wraps for one process; any other loader as it is.

    The class is known by its name: importing `fastai.distributed` needs accelerate.
    """
    return loader.dl if any(c.__name__ == "DistributedDL" for c in type(loader).__mro__) else loader


@contextmanager
def alone(learn: Any) -> Iterator[None]:
    """Have a learner predict in this process alone, whatever the others do: nothing is gathered, nothing waited for.

    Without it fastai appends the predictions of all processes, batch by batch, and cuts its loaders in pieces.
    """
    if "to_detach" in vars(learn):  # it does already
        yield
        return
    model = learn.model
    with learn.removed_cbs([cb for cb in learn.cbs if type(cb).__name__ == "DistributedTrainer"]):
        learn.model, learn.to_detach = get_model(model), partial(to_detach, gather=False)
        try:
            yield
        finally:
            learn.model = model
            del learn.to_detach


# ---- what a callback that is there for a fit needs ----


def add_columns(learn: Any, values: dict[str, Callable[[], Any]]) -> Any:
    """Add columns to the epoch table, after the learner's metrics; return the recorder that has them, or None.

    The recorder looks its metrics up in itself before it asks the learner: `learn.metrics` stays as the user made it.
    """
    recorder = getattr(learn, "recorder", None)
    if recorder is not None:
        vars(recorder)["metrics"] = learn.metrics + [ValueMetric(value, name) for name, value in values.items()]
    return recorder


def drop_columns(recorder: Any) -> None:
    """Take away what `add_columns` added to `recorder`, which may be None."""
    if recorder is not None:
        vars(recorder).pop("metrics", None)


def guard_fit(learn: Any, fit: Callable[..., None]) -> None:
    """Let `fit` run in place of `learn.fit`, also where fastai's own schedules call it."""
    vars(learn)["fit"] = fit


def unguard_fit(learn: Any, fit: Callable[..., None]) -> None:
    """Undo `guard_fit`."""
    if vars(learn).get("fit") == fit:
        del vars(learn)["fit"]


def watchers(learn: Any, monitor: str) -> list[str]:
    """Return the names of callbacks that stop, save or change the rate by what the column `monitor` says."""
    all_of_them = (cb for cb in learn.cbs if isinstance(cb, TrackerCallback) and cb.monitor == monitor)
    return [type(cb).__name__ for cb in all_of_them if not getattr(cb, "every_epoch", False)]  # saves anyway


def is_lr_search(learn: Any) -> bool:
    """Whether `lr_find` runs: it adds a callback of that name for its time."""
    return hasattr(learn, "lr_finder")


def blended_targets(learn: Any) -> tuple[Tensor, Tensor] | None:
    """Return the other class indices that MixUp or CutMix blended into the batch, and the share of the batch's own.

    None where they blended the targets themselves, or not at all.
    """
    for mix in learn.cbs:
        if isinstance(mix, MixHandler) and getattr(mix, "stack_y", False) and hasattr(mix, "yb1"):
            return mix.yb1[0], mix.lam
    return None


def logits_and_targets(learn: Any) -> tuple[Tensor, Tensor]:
    """Return a learner's batch: its logits, (n, C) or (n,), and targets.

    Class indices of images that MixUp or CutMix blended come as fractions, (n, C).

    Raises:
        ValueError: other outputs or targets than one tensor of each.
    """
    pred, yb = learn.pred, learn.yb
    if not isinstance(pred, Tensor) or pred.ndim not in (1, 2):
        shape = tuple(pred.shape) if isinstance(pred, Tensor) else type(pred).__name__
        raise ValueError(
            f"The model's output is {shape}: CRLCallback needs one tensor of logits, (n, C). Of several outputs "
            "pick them in a callback of yours, in after_pred: self.learn.pred = self.learn.pred[0]."
        )
    if len(yb) != 1 or not isinstance(yb[0], Tensor):
        kinds = ", ".join(type(y).__name__ for y in yb) or "none"
        raise ValueError(
            f"The batch has targets {kinds}: CRLCallback needs exactly one tensor, (n, C) or (n,) class indices. "
            "Let the data set give (inputs, targets), or set dls.n_inp to the number of inputs."
        )
    logits, y, blended = as_plain_tensor(pred), as_plain_tensor(yb[0]), blended_targets(learn)
    if blended is None:
        return logits, y
    other, share = (as_plain_tensor(t).to(y.device) for t in blended)
    share = share.reshape(-1, 1)
    return logits, torch.lerp(*(F.one_hot(t.long(), pred.shape[1]).to(share.dtype) for t in (other, y)), share)


class CaughtEmbedding:
    """The embedding of a training batch, caught on its way through a model.

    An object of its own: compiled models trace its methods, and a `Callback` is too much for that.
    """

    def __init__(self) -> None:
        self.features: Tensor | None = None

    def __getstate__(self) -> dict[str, None]:  # a copy of the model made in training has no graph
        return {"features": None}

    def hook(self, model: nn.Module, module: nn.Module | None) -> Any:
        """Catch the output of `module`, or the input of the model's last `nn.Linear`; return the hook's handle.

        None where the model has no such layer.
        """
        if module is not None:
            return module.register_forward_hook(self._output)
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        return linear[-1].register_forward_pre_hook(self._input) if linear else None

    def refuse(self, model: nn.Module) -> NoReturn:
        """Raise ValueError: there is nothing to catch."""
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear whose input could be the embedding: pass "
            "CRLCallback(embedding=module), the module whose output is to be compared, or use level='class'."
        )

    def _output(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.features = as_plain_tensor(output).flatten(1) if module.training else None

    def _input(self, module: nn.Module, args: tuple) -> None:
        self._output(module, args, args[0])


def rebuild(learn: Any, kind: type[Learner], cbs: Any) -> Any:
    """Return a learner of class `kind` with all that `learn` was made with, frozen as it is, and callbacks `cbs`.

    fastai's `vision_learner` takes no learner class. What it notes down of its arguments is kept.
    """
    given = [name for name in inspect.signature(Learner).parameters if name not in ("dls", "model", "cbs")]
    made = kind(learn.dls, learn.model, cbs=cbs, **{name: getattr(learn, name) for name in given})
    for name, value in vars(learn).items():
        if name not in vars(made):
            setattr(made, name, value)
    if learn.opt is not None and learn.opt.frozen_idx:
        made.freeze_to(learn.opt.frozen_idx)
    return made


def renew_optimizer(learn: Learner) -> None:
    """Have a learner's optimizer, if it has one, made anew of the parameters that there are now, as frozen as before.

    `freeze` makes it, and so a pretrained network has one before its first fit.
    """
    if learn.opt is not None:
        frozen = learn.opt.frozen_idx
        learn.create_opt()
        learn.freeze_to(frozen)


class _Part(Subset):
    """Some items of a data set, with all else that it has."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


def part_of(dataset: Any, rows: Sequence[int], split_idx: int) -> Any:
    """Return a data set of some of another's items, transformed as those of training (0) or of validation (1) are."""
    rows = list(map(int, rows))
    if isinstance(dataset, Datasets):
        tls = [tl._new(tl._get(rows), split_idx=split_idx) for tl in pipelines(dataset)]
        return type(dataset)(tls=tls, n_inp=dataset.n_inp)
    return dataset.new(dataset.items.iloc[rows]) if isinstance(dataset, Tabular) else _Part(dataset, rows)


@contextmanager
def labels_beside_weights(model: nn.Module, labels: list[str] | None) -> Iterator[dict[str, Any]]:
    """Have `labels` saved with a model's weights, in the metadata of their dict; yield those of weights it then loads.

    Other learners read such a file as any other.
    """
    model, found = get_model(model), {}
    hooks = [
        model.register_state_dict_post_hook(lambda _, state, prefix, metadata: metadata.update(labels=labels)),
        model.register_load_state_dict_pre_hook(lambda _, state, prefix, metadata, *rest: found.update(metadata)),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
