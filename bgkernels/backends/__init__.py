"""Backends by name, and the choice between them."""

from __future__ import annotations

import torch

from bgkernels.backends.base import Backend
from bgkernels.backends.eager import EagerBackend
from bgkernels.backends.native import NativeBackend
from bgkernels.backends.triton import TritonBackend

_IN_ORDER: tuple[Backend, ...] = (NativeBackend(), TritonBackend(), EagerBackend())
BACKENDS = {b.name: b for b in _IN_ORDER}
"""In the order that ``"auto"`` tries them on a CPU."""
AUTO = {"cuda": ("triton", "native", "eager")}
"""That order elsewhere: native CUDA kernels come second until a GPU has measured both."""


def select(name: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Backend:
    """The backend for logits of these dtypes on this device.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: the named backend cannot serve; the message gives its reason.
    """
    if name == "auto":
        order = (BACKENDS[n] for n in AUTO.get(device.type, tuple(BACKENDS)))
        return next(b for b in order if b.supports(device, dtypes) is None)
    if name not in BACKENDS:
        raise ValueError(
            f"`backend` must be 'auto' or one of {', '.join(map(repr, BACKENDS))}; got {name!r}"
        )
    reason = BACKENDS[name].supports(device, dtypes)
    if reason is not None:
        raise NotImplementedError(
            f"backend {name!r} cannot serve this call: {reason}. Use backend='auto'"
        )
    return BACKENDS[name]
