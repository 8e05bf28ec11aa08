"""The compiled kernels of NVIDIA GPUs: torch's current stream, and no waiting for the device."""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from bgkernels.backends.base import Tile
from bgkernels.backends.native.call import (
    MISSING,
    Normalisers,
    compiled,
    corner_of,
    numbers_of,
    rows_of,
)
from bgkernels.rows.spec import RowSpec
from bgkernels.rows.state import RowState

BLOCKS = 16
"""Blocks a multiprocessor should get, so that the last ones leave few of them idle."""
LEAST_COLUMNS = 8192
"""Of a block that shares a row: it has a fixed cost, and its state has to be merged."""
CUDA_FAILED = 1000
"""What ``csrc/row_args.h`` adds to an error of CUDA."""


class Cuda:
    """See :class:`bgkernels.backends.native.call.Kernels`.

    Args:
        device: of the tensors; it need not be the current one.
        module: instead of ``bgkernels.backends.native._C.cuda``.
        splits: blocks that share a row, instead of what the number of rows asks for.
    """

    def __init__(self, device: torch.device, module: Any = None, splits: int | None = None) -> None:
        self.device, self.splits = device, splits
        self.module = _module() if module is None else module

    def absorb(self, state: RowState, tile: Tile, labels: Tensor, spec: RowSpec) -> int:
        """Pass 1, first read."""
        splits = self._splits(tile.student)
        parts = [x.new_empty(splits, *x.shape) for x in (state.floats, state.ints) if splits > 1]
        with self._current():
            status = self.module.absorb(
                compiled(spec), rows_of(tile.student), rows_of(tile.teacher), corner_of(tile),
                numbers_of(state.floats), numbers_of(state.ints), labels.data_ptr(),
                self._where(splits, *parts),
            )  # fmt: skip
        return self._checked(status)

    def absorb_pairs(
        self, state: RowState, tile: Tile, labels: Tensor, spec: RowSpec, normalisers: Normalisers
    ) -> int:
        """Pass 1, second read."""
        if tile.teacher is None:
            return 0
        lse_s, lse_t = normalisers
        splits, floats = self._splits(tile.teacher), state.floats
        parts = [floats.new_empty(splits, *floats.shape)] if splits > 1 else []
        with self._current():
            status = self.module.absorb_pairs(
                compiled(spec), rows_of(tile.student), rows_of(tile.teacher), corner_of(tile),
                numbers_of(floats), labels.data_ptr(), lse_s.data_ptr(), lse_t.data_ptr(),
                self._where(splits, *parts),
            )  # fmt: skip
        return self._checked(status)

    def finalize(self, state: RowState, labels: Tensor, spec: RowSpec, out: Tensor) -> int:
        """State to statistics."""
        with self._current():
            status = self.module.finalize(
                compiled(spec), out.size(1), numbers_of(state.floats), numbers_of(state.ints),
                labels.data_ptr(), numbers_of(out), self._where(),
            )  # fmt: skip
        return self._checked(status)

    def fold(self, statistics: Tensor, grads: Tensor, spec: RowSpec, out: Tensor) -> int:
        """Derivatives to coefficients."""
        with self._current():
            status = self.module.fold(
                compiled(spec), out.size(1), numbers_of(statistics), numbers_of(grads),
                numbers_of(out), self._where(),
            )  # fmt: skip
        return self._checked(status)

    def vjp(
        self, out: Tensor, tile: Tile, coefficients: Tensor, labels: Tensor, spec: RowSpec
    ) -> int:
        """Pass 2."""
        with self._current():
            status = self.module.vjp(
                compiled(spec), rows_of(tile.student), rows_of(tile.teacher), corner_of(tile),
                rows_of(out), numbers_of(coefficients), labels.data_ptr(),
                self._where(self._splits(out)),
            )  # fmt: skip
        return self._checked(status)

    def _splits(self, x: Tensor) -> int:
        rows, columns = x.shape
        wanted = BLOCKS * _processors(self.device) / max(rows, 1)
        return self.splits or max(1, math.ceil(min(wanted, columns / LEAST_COLUMNS)))

    def _current(self) -> AbstractContextManager[Any]:
        """Makes the device current, and afterwards the one that was."""
        return torch.cuda.device(self.device if self.device.type == "cuda" else -1)

    def _where(self, splits: int = 1, *parts: Tensor) -> tuple[int, int, int, int, int]:
        """Device, stream, blocks that share a row, and memory for the state of each."""
        floats, ints = ([x.data_ptr() for x in parts] + [0, 0])[:2]
        if self.device.type != "cuda":  # emulated
            return 0, 0, splits, floats, ints
        stream = torch.cuda.current_stream(self.device)
        return stream.device.index, stream.cuda_stream, splits, floats, ints

    def _checked(self, status: int) -> int:
        if status >= CUDA_FAILED:
            raise RuntimeError(
                f"CUDA refused a kernel on {self.device}: {self.module.error(status)}"
            )
        return status


def unusable(device: torch.device) -> str | None:
    """None, or the reason why the kernels cannot run on a CUDA device."""
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
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
