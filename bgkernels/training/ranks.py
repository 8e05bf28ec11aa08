"""The processes that train one model together: those that ``torchrun`` started, or this one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from bgkernels.training.errors import OptionError


def device(name: str = "auto") -> torch.device:
    """Where this process computes: a GPU has the number of the process on its machine.

    Args:
        name: ``"cpu"``, ``"cuda"``, or ``"auto"``: a GPU if there is one.

    Raises:
        OptionError: there is no GPU, or none for this process.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not gpus):
        return torch.device("cpu")
    mine = int(os.environ.get("LOCAL_RANK", 0))
    if mine >= gpus:
        raise OptionError(
            f"--device {name} needs a GPU for each process, and torch sees {gpus} on this machine, "
            f"which has no. {mine}; start fewer processes, or choose --device cpu"
        )
    return torch.device("cuda", mine)


@contextmanager
def joined(place: torch.device) -> Iterator[None]:
    """Join the processes of ``torchrun`` inside the block; without it, nothing happens.

    Args:
        place: where this process computes. A GPU talks by NCCL, tensors of a CPU by gloo.
    """
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if together() else 1


def rank() -> int:
    """The number of this one."""
    return dist.get_rank() if together() else 0


def first() -> bool:
    """Whether this process writes files and speaks to the user.

    Example:
        >>> first()
        True
    """
    return rank() == 0


def mean(value: float) -> float:
    """Of the values of all processes."""
    if not together():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / size()


def meet() -> None:
    """Wait for the others."""
    if together():
        dist.barrier()


def averaging(module: nn.Module) -> nn.Module:
    """The module, whose gradients are means over the processes: FSDP's, or else DDP's work."""
    if not together() or next(_shards(module), None) is not None:
        return module
    return DistributedDataParallel(module)


@contextmanager
def apart(module: nn.Module) -> Iterator[None]:
    """Keep gradients to this process inside the block: more are to be added to them."""
    with module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext():
        for part in _shards(module):
            part.set_requires_gradient_sync(False, recurse=False)
        yield
        for part in _shards(module):
            part.set_requires_gradient_sync(True, recurse=False)


def _shards(module: nn.Module) -> Iterator[FSDPModule]:
    return (part for part in module.modules() if isinstance(part, FSDPModule))


def together() -> bool:
    """Whether this is one of the processes of ``torchrun``, be it the only one."""
    return dist.is_available() and dist.is_initialized()
