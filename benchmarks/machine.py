"""What a result depends on beside the code: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import bgkernels as bg

ROOT = Path(__file__).parent.parent
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "neon", "asimd", "sve")
PACKAGES = ("torch", "numpy", "triton", "liger-kernel", "pytest-benchmark")


def stamp(threads: int) -> dict[str, Any]:
    """Everything above, and how busy the machine was before the run."""
    processor, flags = _processor()
    return {
        "processor": processor,
        "instructions": [x for x in INSTRUCTIONS if x in flags],
        "cores": os.cpu_count(),
        "threads": threads,
        "memory": _meminfo("MemTotal"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "bgkernels": bg.__version__,
        "commit": commit(),
        "config": bg.show_config().splitlines(),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "load": os.getloadavg()[0],
    }


def slug(machine: dict[str, Any]) -> str:
    """The machine's folder under ``benchmarks/results``."""
    return re.sub(r"[^a-z0-9]+", "-", f"{machine['processor']} {machine['cores']} cores".lower())


def free_memory() -> float:
    """Bytes that processes may still take."""
    return _meminfo("MemAvailable")


def commit() -> str:
    """The commit, with a ``+`` if files differ from it."""
    made = _git("rev-parse", "--short", "HEAD")
    return made + "+" * bool(made and _git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str:
    with suppress(OSError):
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=ROOT, capture_output=True, text=True
        )
        return done.stdout.strip()
    return ""


def _processor() -> tuple[str, set[str]]:
    """Name and instruction sets."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        pairs = dict(re.split(r"\s*:\s*", x, maxsplit=1) for x in lines if ":" in x)
        flags = set((pairs.get("flags") or pairs.get("Features", "")).split())
        name = pairs.get("model name", platform.machine())
        family = f" family {pairs['cpu family']} model {pairs['model']}"
        return name + (family if name.count(" ") < 2 else ""), flags
    return platform.processor() or platform.machine(), set()


def _meminfo(name: str) -> float:
    with suppress(OSError):
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return 1024.0 * int(found[1]) if found else float("inf")
    return float("inf")


def _version(name: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return "absent"
