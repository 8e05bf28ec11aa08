"""The compiled kernels of NVIDIA GPUs run on torch's current stream, and wait for nothing."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from bgkernels.backends.native.call import DTYPES, MISSING, Kernels, Multiplied, check_status

BLOCKS = 16
"""Blocks a multiprocessor should get, so that the last ones leave few of them idle."""
LEAST_COLUMNS = 8192
"""Of a block that shares a row: it has a fixed cost, and its state has to be merged."""
MOST_SPLITS = 31
"""Blocks that may share a row: ``csrc/cuda/launch.h``."""
CUDA_FAILED = 1000
"""What ``csrc/row_args.h`` adds to an error of CUDA."""


class Cuda(Kernels):
    """These primitives run on an NVIDIA GPU, on torch's current stream.

    Args:
        device: of the tensors; it need not be the current one.
        module: instead of ``bgkernels.backends.native._C.cuda``.
        splits: blocks that share a row, instead of what the number of rows asks for.
    """

    def __init__(self, device: torch.device, module: Any = None, splits: int | None = None) -> None:
        self.device, self.splits = device, splits
        self.module = _module() if module is None else module

    def run(
        self,
        primitive: str,
        *args: Any,
        factors: Multiplied | None = None,
        columns_of: Tensor | None = None,
        written: tuple[Tensor, ...] = (),
    ) -> None:
        assert factors is None
        splits = 1 if columns_of is None else self._splits(columns_of)
        shape = args[1:2] if columns_of is None else tuple(columns_of.shape)
        self._start(primitive, args, shape, splits, written)

    def scale_(self, x: Tensor, factor: Tensor) -> bool:
        if x.dtype not in DTYPES or not x.is_contiguous() or x.data_ptr() % 16:
            return False
        what = x.data_ptr(), DTYPES[x.dtype], x.numel()
        number = factor.data_ptr(), factor.dtype == torch.float64
        blocks = BLOCKS * _processors(self.device)
        self._start("scale", (what, number), tuple(x.shape), blocks)
        return True

    def _start(
        self,
        primitive: str,
        args: tuple[Any, ...],
        shape: tuple[int, ...],
        splits: int,
        written: tuple[Tensor, ...] = (),
    ) -> None:
        parts = [x.new_empty(splits, *x.shape) for x in written] if splits > 1 else []
        floats, ints = ([x.data_ptr() for x in parts] + [0, 0])[:2]
        index, stream, device = 0, 0, self.device
        if device.type == "cuda":  # else emulated
            current = torch.cuda.current_stream(device)
            index, stream = current.device.index, current.cuda_stream
        with torch.cuda.device(device if device.type == "cuda" else -1):
            where = index, stream, splits, floats, ints
            status = getattr(self.module, primitive)(*args, where)
        if status >= CUDA_FAILED:
            raise RuntimeError(
                f"CUDA refused the kernel of `{primitive}` for {shape} on {device}, {splits} "
                f"blocks a row: {self.module.error(status)}"
            )
        check_status(status)

    def _splits(self, x: Tensor) -> int:
        rows, columns = x.shape
        wanted = BLOCKS * _processors(self.device) / max(rows, 1)
        return self.splits or max(1, math.ceil(min(wanted, columns / LEAST_COLUMNS, MOST_SPLITS)))


def unusable(device: torch.device) -> str | None:
    """Return None, or the reason why the kernels cannot run on a CUDA device."""
    module = _module()
    if module is None:
        return "the compiled module was built without CUDA: install again where `nvcc` is found"
    if torch.version.hip is not None or not torch.cuda.is_available():
        status = module.probe(0)
        return f"torch sees no NVIDIA device (CUDA says: {module.error(status)})"
    return _unusable(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _unusable(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"it needs compute capability 8.0 or newer, got {major}.{minor}"
    with torch.cuda.device(index):
        status = _module().probe(index)
    return f"CUDA says: {_module().error(status)}" if status else None


def _module() -> Any:
    if MISSING is not None:
        return None
    from bgkernels.backends.native import _C

    return getattr(_C, "cuda", None)


@functools.cache
def _processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
