"""One arm of a comparison: how its learner is made, what tells it from others, and one run of it from a seed."""

from __future__ import annotations

import hashlib
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner, defaults
from fastai.torch_core import no_random, set_seed
from torch import Tensor, nn

from fastai_crl._fastai import guard_fit
from fastai_crl.evaluate import predict_probabilities

from .rows import digest

Fit = Callable[[Any], Any]  # of a learner


def as_text(x: Any, depth: int = 4) -> str:
    """Return a text that is the same for equal objects, in another process too. A lambda is only `<lambda>`."""
    if isinstance(x, (Tensor, np.ndarray)):
        values = x.detach().cpu().float().numpy() if isinstance(x, Tensor) else x
        if values.dtype == object:
            return as_text(values.tolist(), depth)
        return f"{tuple(values.shape)} {hashlib.sha256(np.ascontiguousarray(values)).hexdigest()[:8]}"
    if x is None or isinstance(x, (bool, int, float, str)):
        return repr(x)
    if isinstance(x, partial):
        return f"{as_text(x.func)}{as_text([*x.args, x.keywords], depth - 1)}"
    if isinstance(x, Mapping):
        return "{" + ", ".join(f"{k}: {as_text(v, depth - 1)}" for k, v in x.items()) + "}"
    if isinstance(x, (Sequence, Set)):
        parts = [as_text(v, depth - 1) for v in x]
        return "[" + ", ".join(sorted(parts) if isinstance(x, Set) else parts) + "]"
    if hasattr(x, "__qualname__"):
        return x.__qualname__.rsplit(".", 1)[-1]
    held = {k: v for k, v in getattr(x, "__dict__", {}).items() if k[0] != "_" and k not in ("learn", "training")}
    held |= dict(x.named_buffers(recurse=False)) if isinstance(x, nn.Module) else {}
    held |= dict(x.named_children()) if isinstance(x, nn.Module) else {}
    inside = ", ".join(f"{k}={as_text(v, depth - 1)}" for k, v in held.items()) if depth else "..."
    return f"{type(x).__name__}({inside})"


@dataclass
class Arm:
    """A name, and a function of data loaders that makes a learner.

    Attributes:
        name: as in the table.
        make: a new learner at each call.
        facts: what tells it from another arm of that name; set by `look`.
        epochs: that its fit trains; set by `look`.
    """

    name: str
    make: Callable[[DataLoaders], Learner]
    facts: dict[str, str] = field(default_factory=dict)
    epochs: int = 0
    _drawn: dict[str, tuple[tuple[int, ...], str, float]] = field(default_factory=dict)  # shape, text, spread

    @property
    def code(self) -> str:
        """The lines that make its learner."""
        return getattr(self.make, "code", f"learn = arms[{self.name!r}](dls)")

    @contextmanager
    def learner(self, dls: DataLoaders, seed: int) -> Iterator[Learner]:
        """Make a learner from a seed, and let go of it; random numbers of others are left as they were."""
        with no_random(seed, reproducible=False):
            learn = self.make(dls)
            if not isinstance(learn, Learner):
                raise ValueError(
                    f"The arm {self.name!r} made a {type(learn).__name__}: let it return a fastai Learner."
                )
            try:
                with learn.no_bar(), learn.no_logging():
                    yield learn
            finally:
                vars(learn).clear()  # its callbacks refer to it: nothing would be freed before the next collection
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def look(self, dls: DataLoaders, fit: Fit) -> None:
        """Make the learner twice, without training: which weights are drawn at random, and what describes the arm.

        Raises:
            ValueError: no learner, the same network each time, a fit that trains nothing.
        """
        n_epochs: list[int] = []
        with self.learner(dls, 0) as learn:
            first = {name: (tuple(x.shape), as_text(x), _spread(x)) for name, x in learn.model.state_dict().items()}
            own = [cb for cb in learn.cbs if type(cb) not in defaults.callbacks]
            parts = {"loss": learn.loss_func, "callbacks": own}
            parts |= {"optimizer": [learn.opt_func, learn.lr, learn.wd, learn.moms]}
            self.facts = {name: as_text(part) for name, part in parts.items()}
            self.facts["parameters"] = digest(*(f"{name} {shape}" for name, (shape, *_) in first.items()))
            guard_fit(learn, lambda n_epoch, *args, **kwargs: n_epochs.append(n_epoch))
            fit(learn)
            seen = weakref.ref(learn.model)
            del learn
        self.epochs = sum(n_epochs)
        if not self.epochs:
            raise ValueError(
                f"fit trains no epoch of the arm {self.name!r}: let it call fit, fit_one_cycle or fine_tune of the "
                "learner it gets."
            )
        with self.learner(dls, 1) as learn:
            if seen() is learn.model:
                raise ValueError(
                    f"The arm {self.name!r} made the same network twice, which would go on from its training before: "
                    "let its function make the network too."
                )
            second = {name: as_text(x) for name, x in learn.model.state_dict().items()}
        self._drawn = {name: drawn for name, drawn in first.items() if second[name] != drawn[1]}

    def shares_weights_of(self, other: Arm) -> bool:
        """Whether all weights that are drawn at random are drawn alike: of the same names, shapes and spread."""
        if self._drawn.keys() != other._drawn.keys():
            return False
        pairs = ((mine, other._drawn[name]) for name, mine in self._drawn.items())
        return all(a[0] == b[0] and 0.8 < (a[2] + 1e-12) / (b[2] + 1e-12) < 1.25 for a, b in pairs)

    def drawn(self, dls: DataLoaders, seed: int) -> dict[str, Tensor]:
        """Return the weights that a seed draws, on the CPU."""
        with self.learner(dls, seed) as learn:
            return {k: v.cpu().clone() for k, v in learn.model.state_dict().items() if k in self._drawn}

    def run(
        self, dls: DataLoaders, seed: int, fit: Fit, dl: Any = None, like: Arm | None = None, lr: float | None = None
    ) -> tuple[np.ndarray | None, np.ndarray | None, str]:
        """Train from a seed, and predict.

        Args:
            dls: to train with.
            seed: of the weights; and, set anew before training, of order and augmentation.
            fit: of the learner.
            dl: loader to predict; None: that of validation.
            like: the arm whose weights it starts from, where they are drawn alike.
            lr: learning rate, `learn.lr`; None: the learner's own.

        Returns:
            Probabilities (n, C) and targets, None where it diverged; whose first weights it had.
        """
        weights, start = "shared", {}
        if like is not None and not self.shares_weights_of(like):
            weights = "own: drawn otherwise than those of " + like.name
        elif like is not None and self._drawn != like._drawn:  # the same network, made after other random numbers
            start = like.drawn(dls, seed)
        with self.learner(dls, seed) as learn:
            with torch.no_grad():
                state = learn.model.state_dict()
                for name, value in start.items():
                    state[name].copy_(value)
            if lr is not None:
                learn.lr = lr
            set_seed(seed)
            for loader in learn.dls.loaders:
                loader.rng = random.Random(seed)
                if hasattr(sampler := getattr(loader, "sampler", None), "set_epoch"):
                    sampler.set_epoch(0)
            fit(learn)
            values = [x for x in learn.model.state_dict().values() if x.is_floating_point()]
            probs = targets = None
            if all(bool(x.isfinite().all()) for x in values):
                probs, targets = (x.numpy() for x in predict_probabilities(learn, dl=dl, need_targets=True))
            return probs, targets, weights


def _spread(x: Tensor) -> float:
    """Standard deviation of weights that are enough to tell it; 0 of others, which are drawn alike in any case."""
    return float(x.float().std()) if x.numel() >= 100 else 0.0
