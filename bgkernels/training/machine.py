"""Where a result is found: a machine, and how many of its threads."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import bgkernels as bg

PACKAGES = ("bgkernels", "torch", "transformers")


def machine() -> dict[str, Any]:
    """Processor, threads that torch uses, versions and backends, to be kept beside results.

    Example:
        >>> machine()["torch"] == torch.__version__
        True
    """
    found: dict[str, Any] = {
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"torch": torch.__version__, "backends": bg.show_config().splitlines()}


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
