"""Large tensors on a CPU take over the memory of those before them.

Memory of a large size comes fresh from the system, which clears each page when it is touched first.
That takes longer than to write what the page is for. torch keeps the memory of a GPU for the same
reason; on a CPU it gives large blocks back at once.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LEAST = 4 << 20
"""Bytes of a tensor whose memory is kept."""
MOST = 4
"""Bytes of memory for each byte of a tensor that takes it over."""

_idle: dict[int, Any] = {}
"""Memory that no tensor has, as arrays of bytes, by their addresses."""


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a contiguous tensor with no values yet; when it dies, its memory stays with us."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LEAST:
        return torch.empty(shape, dtype=dtype, device=device)
    memory = _taken(size)
    if memory is None:
        _idle.clear()  # so that there is never more of it than was in use at one time
        memory = torch.empty(size, dtype=torch.uint8, device=device).numpy()
    lent = memory[:size]  # an array of its own, which lives as long as the tensor's storage
    weakref.finalize(lent, _idle.__setitem__, memory.ctypes.data, memory).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)


def _taken(size: int) -> Any:
    """Take the least idle memory that holds so many bytes, if not many more; None: there is none.

    Other threads, and tensors that die, may come in between any two steps.
    """
    for room, address in sorted((x.nbytes, address) for address, x in _idle.copy().items()):
        if size <= room <= MOST * size and (memory := _idle.pop(address, None)) is not None:
            return memory
    return None


def empty_cache() -> None:
    """Give the memory back to the system that is kept for the next call on a CPU.

    Temporaries and gradients of many megabytes leave it when they die.
    ``torch.cuda.empty_cache`` does the same for a GPU.

    Example:
        >>> import bgkernels as bg
        >>> bg.empty_cache()
    """
    _idle.clear()
