"""Large tensors on a CPU: in huge pages where the system has them, or in memory that was used before.

Memory of a large size comes fresh from the system, which clears a page when it is first touched.
That takes longer than to write what the page is for.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import threading
from collections.abc import Callable

import torch
from torch import Tensor

PAGE = 2 << 20
"""Bytes of a huge page on x86-64 and on most ARM systems."""
LEAST = 4 * PAGE
"""Bytes of a tensor for which the system is asked."""


def in_huge_pages(x: Tensor) -> Tensor:
    """Return a tensor that nobody has written to, its memory in huge pages if it is large."""
    advise = _advise() if x.device.type == "cpu" and x.nbytes >= LEAST else None
    if advise is not None:
        start = -(-x.data_ptr() // PAGE) * PAGE
        stop = (x.data_ptr() + x.nbytes) // PAGE * PAGE
        advise(start, stop - start, mmap.MADV_HUGEPAGE)  # advice: a refusal changes nothing
    return x


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise


_lock = threading.Lock()
_idle: list[Tensor] = []
"""Memory of the last walk on a CPU, flat, uint8."""


class Workspace:
    """Large temporaries of a walk, whose memory the next walk on a CPU takes over.

    torch keeps the memory of a GPU in the same way, so that elsewhere this does nothing. What the
    last walk took stays with the process until :func:`empty_cache`, or until a walk takes other
    sizes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._taken: list[Tensor] = []

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor, unwritten. Nobody may read it after :meth:`close`."""
        size = math.prod(shape) * dtype.itemsize
        if self.device.type != "cpu" or size < LEAST:
            return torch.empty(shape, dtype=dtype, device=self.device)
        memory = _found(size)
        if memory is None:
            memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        self._taken.append(memory)
        return memory[:size].view(dtype).view(shape)

    def close(self) -> None:
        """Leave the memory to the next walk, and what no tensor of this one took to the system."""
        if self._taken:
            with _lock:
                _idle[:] = self._taken


def _found(size: int) -> Tensor | None:
    """The smallest idle memory that holds so many bytes, if not many more."""
    with _lock:
        fitting = [i for i, x in enumerate(_idle) if size <= x.numel() <= 2 * size]
        return _idle.pop(min(fitting, key=lambda i: _idle[i].numel())) if fitting else None


def empty_cache() -> None:
    """Give the memory back to the system that CPU calls keep for the next one.

    A call whose temporaries take many megabytes leaves them to the next call, up to its
    ``memory_budget``. ``torch.cuda.empty_cache`` does the same for a GPU.

    Example:
        >>> import bgkernels as bg
        >>> bg.empty_cache()
    """
    with _lock:
        _idle.clear()
