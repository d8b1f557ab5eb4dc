"""What a sampler is, the names of samplers, and what those of the package share.

A sampler is any iterable of indices with a length: that of an epoch. A *factory* makes one. It says by the names of its
parameters what it needs: `targets` ((n, C) bool, scipy.sparse), `bs` (samples in a batch, of all processes together),
`world_size` (processes) and `dataset`; its other parameters are options of the user.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fastai_crl._checks import check_choice
from fastai_crl.labels import as_labels


@runtime_checkable
class Sampler(Protocol):
    """An epoch of indices into a data set, with a length.

    Example:
        >>> isinstance(range(3), Sampler), isinstance(iter([0, 1]), Sampler)
        (True, False)
    """

    def __iter__(self) -> Iterator[int]: ...

    def __len__(self) -> int: ...


SamplerFactory = Callable[..., Sampler]

OFFERED = ("targets", "bs", "world_size", "dataset")  # what a factory may ask for

SAMPLERS: dict[str, SamplerFactory] = {}


def register_sampler(name: str, factory: SamplerFactory) -> None:
    """Make `factory` known by `name` wherever a sampler is taken.

    Args:
        name: in place of a sampler of that name, if there is one.
        factory: a class or function that returns a sampler; what it needs it says by the names of its parameters:
            `targets`, `bs`, `world_size`, `dataset`.

    Raises:
        ValueError: a name that is no text or empty, or a factory that cannot be called.

    Example:
        >>> factory: SamplerFactory = lambda dataset, first=0: range(first, len(dataset))
        >>> register_sampler("in_order", factory)
        >>> check_sampler("in_order") is factory, takes("in_order", "targets")
        (True, False)
        >>> del SAMPLERS["in_order"]
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name={name!r}: a sampler's name is a text that is not empty.")
    if not callable(factory):
        raise ValueError(f"factory={factory!r}: give a class or function that returns a sampler.")
    SAMPLERS[name] = factory


def check_sampler(sampler: str | Sampler | SamplerFactory) -> SamplerFactory | None:
    """Return the factory that `sampler` is or names; None for an object that is a sampler itself.

    Raises:
        ValueError: an unknown name, or neither a name, a sampler nor a factory.
    """
    if isinstance(sampler, str):
        check_choice("sampler", sampler, tuple(SAMPLERS))
        return SAMPLERS[sampler]
    if not isinstance(sampler, type) and isinstance(sampler, Sampler):
        return None
    if callable(sampler):
        return sampler
    raise ValueError(
        f"sampler={sampler!r} is a {type(sampler).__name__}: give a name ({', '.join(SAMPLERS)}), an iterable of "
        "indices with a length, or a class or function that returns one."
    )


def takes(sampler: str | Sampler | SamplerFactory, parameter: str) -> bool:
    """Whether the factory that `sampler` is or names has a parameter of that name."""
    factory = check_sampler(sampler)
    return factory is not None and parameter in _parameters(factory)


def _parameters(factory: SamplerFactory) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except ValueError:
        raise ValueError(
            f"{factory!r} does not tell its parameters: wrap it in a function that has those it needs."
        ) from None


def _name(sampler: Any) -> str:
    return sampler if isinstance(sampler, str) else getattr(sampler, "__name__", repr(sampler))


def check_options(sampler: str | Sampler | SamplerFactory, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown name, options of a sampler that is made already, or that its factory lacks."""
    factory = check_sampler(sampler)
    if factory is None and options:
        raise ValueError(f"{', '.join(options)}: the sampler is an object, made with its arguments already.")
    parameters = {} if factory is None else _parameters(factory)
    unknown = [o for o in options if o not in parameters]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        own = ", ".join(p for p in parameters if p not in OFFERED)
        raise ValueError(f"Sampler {_name(sampler)} has no option {', '.join(unknown)}: it has {own or 'none'}.")


def make_sampler(
    sampler: str | Sampler | SamplerFactory,
    offered: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Sampler:
    """Return a sampler of its name, of itself or of its factory.

    Args:
        sampler: name, sampler or factory.
        offered: what a factory may ask for, by parameter.
        options: the user's arguments of the factory, see `check_options`; they go before what is offered.

    Raises:
        ValueError: a factory that does not return a sampler.
    """
    factory = check_sampler(sampler)
    if factory is None:
        return sampler  # type: ignore[return-value]  # no factory: it is the sampler
    parameters = _parameters(factory)
    asked = {k: value for k, value in offered.items() if k in parameters}
    made = factory(**{**asked, **options})
    if not isinstance(made, Sampler):
        raise ValueError(
            f"Sampler {_name(sampler)} made a {type(made).__name__}, which is no sampler: return an iterable "
            "of indices with a length."
        )
    return made


class EpochSampler:
    """An epoch of indices that the targets decide, another each time it is iterated.

    Args:
        targets: (n, C) of 0 and 1, of any dtype, NumPy, PyTorch or scipy.sparse; or (n,) class indices.
        seed: of all epochs, at least 0.

    Raises:
        ValueError: a seed below 0 or not whole, targets of no known shape, outside [0, 1] or empty.

    Example:
        >>> class Rare(EpochSampler):
        ...     def indices(self, epoch=0):
        ...         return np.flatnonzero(self.labels[:, 1].toarray())
        >>> list(Rare([0, 1, 0, 1], seed=0))
        [1, 3]
    """

    def __init__(self, targets: Any, seed: int):
        if isinstance(seed, bool) or seed != int(seed) or seed < 0:
            raise ValueError(f"seed={seed!r}: give a whole number of at least 0.")
        self.labels, self.seed, self.epoch = as_labels(targets), int(seed), 0
        if 0 in self.labels.shape:
            raise ValueError(f"targets of shape {self.labels.shape} are empty: give at least one sample and one label.")

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, that the next iteration draws; each iteration moves on by one."""
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[int]:
        order = self.indices(self.epoch)
        self.epoch += 1
        return iter(order.tolist())

    def indices(self, epoch: int = 0) -> np.ndarray:
        """Return the epoch's indices, (len(self),) long: the same for the same arguments."""
        raise NotImplementedError
