"""The compiled kernels of NVIDIA GPUs: torch's current stream, and no waiting for the device."""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from bgkernels.backends.base import Composed
from bgkernels.backends.native.call import MISSING, Call, doubles, logits, strided
from bgkernels.rows.spec import CLOSED_WEIGHTS, Cap
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
        ranks: blocks that hold a row in shared memory in :meth:`compose`, instead of what its size
            asks for; 0 for none.
    """

    def __init__(
        self, device: torch.device, module: Any = None, splits: int | None = None,
        ranks: int | None = None,
    ) -> None:  # fmt: skip
        self.device, self.splits, self.ranks = device, splits, ranks
        self.module = _module() if module is None else module

    def absorb(self, call: Call, floats: Tensor, ints: Tensor, labels: Tensor) -> int:
        """Pass 1."""
        if call.mixtures > self.module.MAX_MIXTURES:
            raise NotImplementedError(
                f"the native backend takes at most {self.module.MAX_MIXTURES} mixtures in one "
                f"objective on a GPU, got {call.mixtures}: use backend='eager'"
            )
        splits = self._splits(call.student)
        made = [x.new_empty(splits if splits > 1 else 0, *x.shape) for x in (floats, ints)]
        parts = (splits, *(x.data_ptr() for x in made))
        columns = (*strided(floats), *strided(ints))
        with self._current():
            status = self.module.absorb(
                call.spec, call.tile, columns, labels.data_ptr(), parts, self._place()
            )
        return self._checked(status)

    def absorb_pairs(self, call: Call, sums: Tensor, lse_s: Tensor, lse_t: Tensor) -> int:
        """Pass 1, second read."""
        if call.teacher is None:
            return 0
        splits = self._splits(call.teacher)
        out = sums.new_empty(splits, *sums.shape) if splits > 1 else sums[None]
        to, lse = (out.data_ptr(), out.stride(1)), (lse_s.data_ptr(), lse_t.data_ptr())
        with self._current():
            status = self.module.absorb_pairs(call.spec, call.tile, to, lse, splits, self._place())
        if splits > 1 and not status:
            sums += out.sum(0)
        return self._checked(status)

    def vjp(self, call: Call, out: Tensor, *given: Tensor) -> int:
        """Pass 2; ``given`` are row, tilt and pair coefficients and labels."""
        row, tilts, pairs, labels = (x.data_ptr() for x in given)
        made, splits = logits(out, Cap()), self._splits(out)
        with self._current():
            status = self.module.vjp(
                call.spec, call.tile, made, (row, tilts, pairs), labels, splits, self._place()
            )
        return self._checked(status)

    def compose(
        self, call: Call, out: Tensor, state: RowState, sums: Tensor, labels: Tensor, loss: Composed
    ) -> Tensor | str:
        """Losses of the rows, from all passes in one launch, or the reason for separate ones."""
        if reason := self.module.separate(call.spec, call.tile):
            return str(reason)
        form, weights = loss.form, loss.form.weights
        objective = self.module.Objective(
            divergence=astuple(form.divergence),
            policy=CLOSED_WEIGHTS.index(weights.kind),
            hard=weights.hard,
            soft=weights.soft,
            tau=weights.tau,
            sharpness=weights.sharpness,
            reversed=weights.reversed,
            label_smoothing=form.label_smoothing,
            z_loss=form.z_loss,
        )
        scale = doubles(loss.scale)
        losses = torch.empty_like(scale)
        columns, made = (*strided(state.floats), *strided(state.ints)), logits(out, Cap())
        with self._current():
            ranks, _ = self.residence(call)
            status = self.module.compose(
                call.spec, call.tile, made, objective, columns, strided(sums), labels.data_ptr(),
                (scale.data_ptr(), losses.data_ptr()), ranks, self._place(),
            )  # fmt: skip
        if self._checked(status):
            raise RuntimeError(f"the compiled module refused its arguments, status {status}")
        return losses

    def residence(self, call: Call) -> tuple[int, str | None]:
        """Blocks whose shared memory holds a row in :meth:`compose`, or 0 and the reason why not.

        A row that is not held is read again by every pass.
        """
        if self.ranks is not None:
            return self.ranks, None
        blocks, reason = self.module.residence(call.tile, self._place())
        return blocks, reason

    def _splits(self, x: Tensor) -> int:
        rows, columns = x.shape
        wanted = BLOCKS * _processors(self.device) / max(rows, 1)
        return self.splits or max(1, math.ceil(min(wanted, columns / LEAST_COLUMNS)))

    def _current(self) -> AbstractContextManager[Any]:
        """Makes the device current, and afterwards the one that was."""
        return torch.cuda.device(self.device if self.device.type == "cuda" else -1)

    def _place(self) -> tuple[int, int]:
        if self.device.type != "cuda":  # emulated
            return 0, 0
        stream = torch.cuda.current_stream(self.device)
        return stream.device.index, stream.cuda_stream

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
