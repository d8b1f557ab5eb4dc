"""What `crl_learner` is given to build a network and its loss: checked before anything is made of it, and its start."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from fastai.callback.core import Callback
from torch import Tensor, nn

from fastai_crl.losses import start_at_frequency

NO_COUNTS = (
    "The labels of dls cannot be counted, so that crl_learner trains with plain cross entropy, from one half for every "
    "label, which learns rare labels less well. {} Or, for several labels, start_at_frequency(learn, counts, n); for "
    'one per image, loss_func=make_loss("logit_adjusted", counts). loss_func="bce" or "ce" goes without.'
)
_OF_ONE = (nn.CrossEntropyLoss, nn.NLLLoss)  # one class per image
_OF_SEVERAL = (nn.BCEWithLogitsLoss, nn.BCELoss, nn.MultiLabelSoftMarginLoss, nn.MultiLabelMarginLoss)


def check_arch(arch: Any) -> None:
    """Raise TypeError or ValueError for what names or makes no network; a string is a name of timm's."""
    if isinstance(arch, nn.Module):
        raise TypeError(
            f"arch is a {type(arch).__name__} that has been made: give the function that makes one, such as resnet34, "
            'or train it with Learner(dls, model, loss_func=loss, cbs=CRLCallback(criterion="ranking")).'
        )
    if not isinstance(arch, str):
        if not callable(arch):
            raise TypeError(f"arch={arch!r}: give a function that makes a network, such as resnet34, or timm's name.")
        return
    import fastai.vision.all as fastai_vision  # only here: it imports all of fastai

    try:
        import timm
    except ImportError as e:
        raise ImportError(f'arch="{arch}" is a name of timm\'s: pip install timm, or give a function.') from e
    if timm.is_model(arch.partition(".")[0]) or ":" in arch:  # of a hub
        return
    if callable(getattr(fastai_vision, arch, None)):
        raise ValueError(f"arch=\"{arch}\" is a name of fastai's, and no name of timm's: give it without quotes.")
    near = get_close_matches(arch, timm.list_models(), n=1)
    hint = f' (did you mean "{near[0]}"?)' if near else ""
    raise ValueError(f'arch="{arch}" is no name of a timm model{hint}: timm.list_models() has them all.')


def check_loss(loss_func: Any, single_label: bool) -> None:
    """Raise ValueError for a loss of the other kind of task."""
    inner = getattr(loss_func, "func", loss_func)
    if isinstance(inner, _OF_SEVERAL if single_label else _OF_ONE):
        here, name = ("one class index", '"ce"') if single_label else ("several labels", '"bce"')
        there = "several labels" if single_label else "one class"
        raise ValueError(
            f"loss_func={type(inner).__name__} is for {there} per image, and the targets of dls are {here} per image: "
            f"give a loss of that kind, such as {name}, or other targets."
        )


@contextmanager
def downloading(arch: Any, pretrained: bool) -> Iterator[None]:
    """Raise an OSError that says what to do where the weights of a pretrained network cannot be had."""
    try:
        yield
    except OSError as e:
        if not pretrained:
            raise
        name = arch if isinstance(arch, str) else getattr(arch, "__name__", type(arch).__name__)
        raise OSError(
            f"pretrained=True needs the weights of {name}, and they could not be downloaded ({e}): try again where "
            f"there is a network, which keeps them ({torch.hub.get_dir()}; timm's elsewhere), or train "
            "with pretrained=False."
        ) from e


class ByteImages(Callback):
    """Makes images of bytes, 0 to 255, those of floats, 0 to 1, where no transform of the loaders does."""

    order = -20  # before whatever sees the images

    def before_batch(self) -> None:
        images, *rest = self.learn.xb
        if images.dtype == torch.uint8:
            self.learn.xb = (images.float() / 255, *rest)


def start_or_warn(model: nn.Module, counts: Tensor, n: int | Tensor) -> None:
    """Start a model at the frequencies of its labels, or with a warning as it is."""
    try:
        start_at_frequency(model, counts, n)
    except ValueError as error:
        warnings.warn(f'{error} It starts as it is; loss_func="bce" says so without this warning.', stacklevel=3)
