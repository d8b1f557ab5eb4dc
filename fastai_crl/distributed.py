"""Batches over several processes: what each process mines when training is distributed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from fastai.torch_core import rank_distrib
from torch import Tensor


def n_processes() -> int:
    """Processes that train together; 1 where training is not distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """The number of this process among those that train together, from 0; 0 where training is not distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else rank_distrib()


def gather_rows(*tensors: Tensor) -> list[Tensor]:
    """The rows of each tensor over all processes, in the order of their ranks; each process may have its own number.

    This process's own rows keep their gradient, the others come without. Every process must call it, with tensors that
    agree in dtype and in all dimensions but the first.
    """
    own = torch.tensor([tensors[0].shape[0]], device=tensors[0].device)
    sizes = [torch.empty_like(own) for _ in range(n_processes())]
    dist.all_gather(sizes, own)
    rows = torch.cat(sizes).tolist()
    return [_gather(x, rows) for x in tensors]


def _gather(x: Tensor, rows: list[int]) -> Tensor:
    padded = x.new_zeros(max(rows), *x.shape[1:])
    padded[: x.shape[0]] = x.detach()
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded)
    parts = [part[:n] for part, n in zip(parts, rows, strict=True)]
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, its gradient times `factor`.

    DistributedDataParallel averages gradients over processes. For a loss of the gathered batch, of which each process
    holds the gradient of its own rows, the whole is their sum: factor = number of processes undoes the average.
    """
    return x.detach() + factor * (x - x.detach())
