"""What the package relies on of the insides of fastai and torch: one function per fact, each with a test."""

from __future__ import annotations

from typing import Any

__all__ = ["inner_loader"]


def inner_loader(loader: Any) -> Any:
    """Return the loader that fastai's `DistributedDL` wraps for one process; any other loader as it is.

    The class is known by its name: importing `fastai.distributed` needs accelerate.
    """
    return loader.dl if any(c.__name__ == "DistributedDL" for c in type(loader).__mro__) else loader
