"""This layer finds backends by name, chooses between them, and says why some cannot serve."""

from __future__ import annotations

import torch

from bgkernels.backends.base import Backend
from bgkernels.backends.eager import EagerBackend
from bgkernels.backends.native import NativeBackend, products
from bgkernels.backends.triton import TritonBackend

_IN_ORDER: tuple[Backend, ...] = (NativeBackend(), TritonBackend(), EagerBackend())
BACKENDS = {b.name: b for b in _IN_ORDER}
"""In the order that ``"auto"`` tries them on a CPU."""
AUTO = {"cuda": ("triton", "native", "eager")}
"""That order elsewhere: native CUDA kernels come second until a GPU has measured both."""


def select(name: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Backend:
    """Return the backend for logits of these dtypes on this device.

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


def show_config() -> str:
    """Return a table of backends by device, with reasons, and of the matrix products of a CPU.

    Example:
        >>> import bgkernels as bg
        >>> print(bg.show_config())  # doctest: +ELLIPSIS
        bgkernels ...
    """
    import bgkernels

    threads = torch.get_num_threads()
    lines = [f"bgkernels {bgkernels.__version__}, torch {torch.__version__}, {threads} threads"]
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        for name, backend in BACKENDS.items():
            reason = backend.supports(torch.device(device), (torch.float32,))
            state = f"not usable: {reason}" if reason else "usable"
            lines.append(f"  {device:5} {name:7} {state}")
    for dtype in products.HALVES:
        name, reason = products.chosen(dtype), products.reasons(dtype)
        why = f" ({reason})" if reason else ""
        lines.append(f"  cpu   {str(dtype).removeprefix('torch.')} products: {name}{why}")
    if not torch.cuda.is_available():
        reason = BACKENDS["native"].supports(torch.device("cuda"), (torch.float32,))
        lines.append(f"  cuda  native  not usable: {reason}")
    return "\n".join(lines)
