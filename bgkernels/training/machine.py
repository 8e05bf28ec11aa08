"""Where a result is found: a machine, and how many of its threads."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("bgkernels", "torch", "transformers")


def machine() -> dict[str, str | int]:
    """Processor, threads that torch uses, and versions, to be kept beside results.

    Example:
        >>> machine()["torch"] == torch.__version__
        True
    """
    found: dict[str, str | int] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"torch": torch.__version__}


def _processor() -> str:
    """Its name, where the system tells."""
    with suppress(OSError):
        named = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if named:
            return named[1]
    return platform.processor() or platform.machine()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: models and tensors this small are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
