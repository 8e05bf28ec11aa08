"""The CUDA backend without a GPU: its kernels run on the host, its host code on CPU tensors."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from bgkernels.backends.native import NativeBackend
from bgkernels.backends.native.cuda import Cuda

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FLAGS = "-std=c++17 -O1 -U_FORTIFY_SOURCE -fno-math-errno -w"


class Emulated(NativeBackend):
    """The native backend with emulated CUDA kernels on CPU tensors.

    Args:
        splits: blocks that share a row.
    """

    def __init__(self, splits: int = 1) -> None:
        self.module, self.splits = module(), splits

    def kernels(self, device: torch.device) -> Cuda:
        """Those of csrc/cuda."""
        return Cuda(device, self.module, self.splits)


def built(source: str, name: str, flags: list[str]) -> Path:
    """Compile a file of this folder, once for each state of the sources.

    The test is skipped without a compiler.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    sources = sorted(p for d in (HERE, ROOT / "csrc") for p in d.rglob("*.[chi]*"))
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    path = ROOT / "build" / "cuda_emulation" / digest / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(f".{os.getpid()}")
        command = [*compiler.split(), *FLAGS.split(), "-DBGK_TARGET=cuda", *flags]
        command += [f"-I{HERE}", f"-I{ROOT / 'csrc'}", str(HERE / source), "-o", str(made)]
        subprocess.run(command, check=True)
        made.replace(path)
    return path


@functools.cache
def module() -> Any:
    """The emulated kernels as a module beside ``bgkernels.backends.native._C``."""
    pybind11 = pytest.importorskip("pybind11")
    includes = pybind11.get_include(), sysconfig.get_path("include")
    flags = ["-fPIC", "-shared", "-fvisibility=hidden", *(f"-I{i}" for i in includes)]
    path = built("module.cpp", "cuda_emulated.so", flags)
    spec = importlib.util.spec_from_file_location("cuda_emulated", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def sanitized(sanitizer: str, warps: int = 2) -> Path:
    """A program that launches every kernel, with blocks of so many warps."""
    flags = ["-g", f"-fsanitize={sanitizer}", f"-DBGK_WARPS={warps}"]
    return built("launches.cpp", f"launches-{sanitizer}-{warps}", flags)
