"""Large tensors on a CPU lie in huge pages, where the system has them."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

PAGE = 2 << 20
"""Bytes of a huge page on x86-64 and on most ARM systems."""
LEAST = 4 * PAGE
"""Bytes of a tensor for which the system is asked."""


def in_huge_pages(x: Tensor) -> Tensor:
    """Return a tensor that nobody has written to, its memory in huge pages if it is large.

    Memory of a large size comes fresh from the system, which clears a page when it is first
    touched. With pages of 4 KiB that takes longer than to write the tensor.
    """
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
