"""What this installation can do, and why not the rest."""

from __future__ import annotations

import torch

from bgkernels.backends import BACKENDS
from bgkernels.streaming import products


def show_config() -> str:
    """A table of backends by device, each usable or with the reason why not; CPU products.

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
            details = getattr(backend, "details", lambda: "")()
            state = f"not usable: {reason}" if reason else f"usable {details}".rstrip()
            lines.append(f"  {device:5} {name:7} {state}")
    for dtype in products.HALVES:
        name, reason = products.chosen(dtype), products.reasons(dtype)
        lines.append(f"  cpu   {_short(dtype)} products: {name}{f' ({reason})' if reason else ''}")
    if not torch.cuda.is_available():
        reason = BACKENDS["native"].supports(torch.device("cuda"), (torch.float32,))
        lines.append(f"  cuda  native  not usable: {reason}")
    return "\n".join(lines)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
