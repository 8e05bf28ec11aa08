"""The processes that train one model together: those that ``torchrun`` started, or this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes of ``torchrun`` inside the block; without it, nothing happens."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group()  # gloo for tensors of the CPU, NCCL for those of a GPU
    try:
        yield
    finally:
        dist.destroy_process_group()


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """The number of this one."""
    return dist.get_rank() if _together() else 0


def first() -> bool:
    """Whether this process writes files and speaks to the user.

    Example:
        >>> first()
        True
    """
    return rank() == 0


def mean(value: float) -> float:
    """Of the values of all processes."""
    if not _together():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / size()


def meet() -> None:
    """Wait for the others."""
    if _together():
        dist.barrier()


def averaging(module: nn.Module) -> nn.Module:
    """The module, whose gradients are means over the processes (DDP)."""
    return DistributedDataParallel(module) if _together() else module


def apart(module: nn.Module) -> AbstractContextManager[Any]:
    """Keep gradients to this process inside the block: more are to be added to them."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
