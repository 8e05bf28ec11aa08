"""The Triton backend serves CUDA and HIP devices, and CPU tensors in Triton's interpreter.

Kernels are in :mod:`.absorb`, :mod:`.reread`, :mod:`.statistics` and :mod:`.vjp`, what they know of
each statistic in :mod:`.extras`. Nothing of Triton is imported before a call needs it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bgkernels.backends.base import Backend, Normalisers, Tile, scale_
from bgkernels.backends.triton.launch import Launch, launch_of, tuned, tuning
from bgkernels.rows.sampling import key_of
from bgkernels.rows.spec import Cap, RowSpec
from bgkernels.rows.state import RowState

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES = {"index": 0, "argmax": 1, "sample": 2}
ROWS = {"BLOCK": 32, "num_warps": 1}
"""Of kernels that have a thread for each row: small programs, since fp64 units are few."""


class TritonBackend(Backend):
    """This backend compiles its kernels when they are first called.

    Logits whose inner stride is not 1 are copied first; rows may have any stride.

    Args:
        launch: instead of :func:`launch_of`, for every kernel.
        splits: programs that share a row, instead of what the number of rows asks for.
    """

    name = "triton"
    scratch_bytes = 0

    def __init__(self, launch: Launch | None = None, splits: int | None = None) -> None:
        self.launch, self.splits = launch, splits

    def code_block(self, device: torch.device) -> int:
        return 1024

    def supports(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        wrong = [d for d in dtypes if d not in DTYPES]
        if wrong:
            return f"logits must be float32, bfloat16 or float16, got {wrong[0]}"
        if device.type == "cpu" and not interpreted():
            return "on CPU tensors Triton runs in its interpreter only: set TRITON_INTERPRET=1"
        if device.type not in ("cpu", "cuda"):
            return f"it runs on CUDA and HIP devices, got {device.type!r}"
        if device.type == "cuda" and torch.version.cuda is not None:
            major, minor = torch.cuda.get_device_capability(device)
            if major < 8:
                return f"it needs compute capability 8.0 or newer, got {major}.{minor}"
        reason = _import_error()
        if reason is None and device.type == "cpu" and not hasattr(kernel_module().exp, "rewrite"):
            return "TRITON_INTERPRET=1 was set after triton had been imported"
        return reason

    def absorb_(
        self,
        state: RowState,
        tile: Tile,
        labels: Tensor,
        spec: RowSpec,
        normalisers: Normalisers | None = None,
    ) -> None:
        _contiguous("state", state.floats, state.ints)
        labels = labels.contiguous()
        if normalisers is not None:
            if tile.teacher is not None and tile.teacher.numel():
                self._reread(state.floats, tile, labels, spec, normalisers)
        elif tile.student.numel():
            self._absorb(state, tile, labels, spec)

    def _absorb(self, state: RowState, tile: Tile, labels: Tensor, spec: RowSpec) -> None:
        def run(launch: Launch, floats: Tensor, ints: Tensor) -> None:
            (rows, width), plan = tile.student.shape, self._plan(launch, tile, tile.student)
            targets = _targets(plan.splits, floats), _targets(plan.splits, ints)
            inv_t, *caps = _numbers(spec)
            key = key_of(spec.seed)
            kernel_module().absorb_kernel[rows, plan.splits](
                *_logits(tile), *_code(tile), labels, *targets,
                rows, width, tile.compared, plan.blocks,
                tile.first_row, tile.first_column, key - (key >> 31 << 32),
                inv_t, *caps, _parameters(spec),
                **constants("absorb", spec, plan.splits == 1, **_kind(tile)), **plan.options,
                LANES=launch.lanes,
            )  # fmt: skip
            if plan.splits > 1:
                kernel_module().merge_kernel[blocks_of(rows)](
                    floats, ints, *targets, labels, rows, plan.splits, inv_t, _parameters(spec),
                    **constants("merge", spec), **ROWS,
                )  # fmt: skip

        def trial(launch: Launch) -> None:
            run(launch, state.floats.clone(), state.ints.clone())

        with _launching("absorb", tile.student):
            run(self._launch("absorb", spec, tile, trial), state.floats, state.ints)

    def _reread(
        self, sums: Tensor, tile: Tile, labels: Tensor, spec: RowSpec, normalisers: Normalisers
    ) -> None:
        assert tile.teacher is not None
        columns = tile.teacher

        def run(launch: Launch, sums: Tensor) -> None:
            (rows, width), plan = columns.shape, self._plan(launch, tile, columns)
            target = _targets(plan.splits, sums)
            kernel_module().reread_kernel[rows, plan.splits](
                *_logits(tile), *_code(tile), labels, *normalisers, target,
                rows, width, plan.blocks, *_numbers(spec), _parameters(spec),
                **constants("reread", spec, plan.splits == 1, **_kind(tile)), **plan.options,
                LANES=launch.lanes,
            )  # fmt: skip
            if plan.splits > 1:
                kernel_module().add_kernel[blocks_of(rows)](
                    sums, target, labels, rows, plan.splits, **constants("add", spec), **ROWS
                )

        def trial(launch: Launch) -> None:
            run(launch, sums.clone())

        with _launching("absorb, second read", columns):
            run(self._launch("reread", spec, tile, trial), sums)

    def finalize(self, state: RowState, labels: Tensor, spec: RowSpec, out: Tensor) -> None:
        _contiguous("state", state.floats, state.ints)
        rows = len(labels)
        if not rows:
            return
        with _launching("finalize", out):
            kernel_module().finalize_kernel[blocks_of(rows)](
                state.floats, state.ints, labels.contiguous(), out, out.stride(0), rows,
                spec.columns, spec.compared, _numbers(spec)[0], _parameters(spec),
                **constants("finalize", spec, teacher=spec.compared > 0), **ROWS,
            )  # fmt: skip

    def fold(self, statistics: Tensor, grads: Tensor, labels: Tensor, spec: RowSpec) -> Tensor:
        rows = statistics.shape[1]
        out = statistics.new_empty(spec.factor_count, rows)
        if not rows:
            return out
        with _launching("fold", out):
            kernel_module().fold_kernel[blocks_of(rows)](
                statistics, statistics.stride(0), grads, grads.stride(0), out, rows,
                spec.columns, _numbers(spec)[0], _parameters(spec),
                **constants("fold", spec), **ROWS,
            )  # fmt: skip
        return out

    def vjp(
        self, out: Tensor, tile: Tile, coefficients: Tensor, labels: Tensor, spec: RowSpec
    ) -> None:
        if not out.numel():
            return
        _contiguous("coefficients", coefficients)
        dense, labels = _rows(out), labels.contiguous()

        def run(launch: Launch, out: Tensor) -> None:
            (rows, width), plan = out.shape, self._plan(launch, tile, out)
            kernel_module().vjp_kernel[rows, plan.splits](
                out, out.stride(0), *_logits(tile), *_code(tile), coefficients, labels,
                rows, width, tile.compared, plan.blocks, tile.first_column,
                *_numbers(spec), _parameters(spec),
                **constants("vjp", spec, **_kind(tile)), **plan.options,
            )  # fmt: skip

        def trial(launch: Launch) -> None:
            run(launch, torch.empty_like(dense))

        with _launching("vjp", out):
            run(self._launch("vjp", spec, tile, trial), dense)
        if dense is not out:
            out.copy_(dense)

    def scale_(self, x: Tensor, factor: Tensor) -> None:
        if not x.is_contiguous():
            return scale_(x, factor)
        count, block = x.numel(), 4096
        programs = max(1, min(ceil(count / block), 16 * _processors(x.device)))
        with _launching("scale", x):
            kernel_module().scale_kernel[(programs,)](
                x, factor.to(x.device), count, ceil(count / (programs * block)), BLOCK=block
            )

    def _launch(
        self, kernel: str, spec: RowSpec, tile: Tile, trial: Callable[[Launch], None]
    ) -> Launch:
        device, coded = tile.student.device, tile.code is not None
        default = self.launch or launch_of(kernel, spec, coded)
        path = None if self.launch else tuning(device)
        if path is None:
            return default
        dtypes = [x.dtype for x in (tile.student, tile.teacher) if x is not None]
        kind = f"{dtypes} {constants(kernel, spec, **_kind(tile))}"
        return tuned(path, kernel, kind, default, device, trial)

    def _plan(self, launch: Launch, tile: Tile, columns: Tensor) -> _Plan:
        rows, width = columns.shape
        blocks = ceil(width / launch.block)
        warps = launch.fill * _processors(tile.student.device)
        splits = self.splits or ceil(warps / (rows * launch.warps))
        each = ceil(blocks / min(splits, blocks))
        return _Plan(ceil(blocks / each), each, launch)


@dataclass(frozen=True)
class _Plan:
    """A plan says how the columns of a tile are shared out among programs.

    Args:
        splits: programs that share a row.
        blocks: that each of them walks.
        launch: of the kernel.
    """

    splits: int
    blocks: int
    launch: Launch

    @property
    def options(self) -> dict[str, int]:
        return {"BLOCK": self.launch.block, **self.launch.options(torch.version.hip is None)}


def interpreted() -> bool:
    """Tell whether Triton is to interpret kernels."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def kernel_module() -> ModuleType:
    """Import the module of the kernels, and with it Triton."""
    from bgkernels.backends.triton import kernels

    return kernels


@functools.cache
def _import_error() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install triton`"
    try:
        kernel_module()
    except Exception as error:  # whatever a broken installation raises is the reason
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    return None


@functools.cache
def _processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


CONSTANTS = {
    "absorb": "HAS_TEACHER SHARED RULE LOGIT_SUM MAPS EXTRAS COLUMNS RESUME CODED",
    "merge": "SHARED RULE EXTRAS COLUMNS",
    "reread": "SHARED MAPS EXTRAS COLUMNS RESUME CODED",
    "add": "EXTRAS COLUMNS",
    "finalize": "HAS_TEACHER SHARED EXTRAS",
    "fold": "SHARED EXTRAS",
    "vjp": "HAS_TEACHER SHARED MAPS EXTRAS CODED",
}
"""What is compiled into each kernel."""


def constants(
    kernel: str, spec: RowSpec, resume: bool = True, *, teacher: bool = True, code: int = 0
) -> dict[str, Any]:
    """Return the values that are compiled into a kernel, since they decide over its code."""
    values = {
        "HAS_TEACHER": teacher,
        "SHARED": spec.shared_softmax,
        "RULE": RULES[spec.label_rule],
        "LOGIT_SUM": spec.logit_sum,
        "MAPS": (_map(spec.student), _map(spec.teacher)),
        "EXTRAS": _extras(kernel, spec),
        "COLUMNS": spec.sum_count,
        "RESUME": resume,
        "CODED": code,
    }
    return {name: values[name] for name in CONSTANTS[kernel].split()}


def _extras(kernel: str, spec: RowSpec) -> tuple[tuple[int, int, int, int], ...]:
    """Describe each extra statistic by kind, variant, first matrix row and number of them.

    Rows are those of the state in pass 1, where a read has none for statistics of the other read;
    elsewhere they are those of the statistics or coefficients.
    """
    places = {"fold": spec.fields, "vjp": spec.factors}.get(kernel, spec.sums)
    read = {"absorb": False, "merge": False, "reread": True, "add": True}.get(kernel)
    descriptions = []
    for extra, place in zip(spec.extras, places, strict=True):
        count = place.stop - place.start if read in (None, extra.second_read) else 0
        descriptions.append((extra.kind, kernel_module().variant(extra), place.start, count))
    return tuple(descriptions)


def _map(cap: Cap) -> int:
    """Return ``math.RAW``, ``SCALED`` or ``CAPPED``."""
    return 2 if cap.cap else int(cap.scale != 1)


@contextmanager
def _launching(kernel: str, x: Tensor) -> Iterator[None]:
    """Make a device current: Triton launches on the current device and its current stream.

    Raises:
        RuntimeError: a kernel could not be compiled or started, with its name and shape.
    """
    try:
        with torch.cuda.device(x.device if x.device.type == "cuda" else -1):
            yield
    except (ValueError, torch.OutOfMemoryError):  # of a file of launches; and not ours
        raise
    except Exception as error:
        raise RuntimeError(
            f"Triton could not run the kernel of `{kernel}` for {tuple(x.shape)} in {x.dtype} on "
            f"{x.device}: {type(error).__name__}: {error}"
        ) from error


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _contiguous(name: str, *tensors: Tensor) -> None:
    for x in tensors:
        if not x.is_contiguous():
            raise ValueError(f"`{name}` must be contiguous, got strides {x.stride()}")


def _targets(splits: int, x: Tensor) -> Tensor:
    """Return where programs write: ``x`` itself, or a matrix for each of those that share a row."""
    return x if splits == 1 else x.new_empty(splits, *x.shape)


def blocks_of(rows: int) -> tuple[int]:
    """Return the grid of a kernel that has a thread for each row."""
    return (ceil(rows / ROWS["BLOCK"]),)


def _logits(tile: Tile) -> tuple[Tensor, int, Tensor, int]:
    """Return pointers and row strides; the student's stand in for a teacher's that is None."""
    s = _rows(tile.student)
    t = s if tile.teacher is None else _rows(tile.teacher)
    return s, s.stride(0), t, t.stride(0)


def _kind(tile: Tile) -> dict[str, Any]:
    """Return what :func:`constants` asks of a tile."""
    block = 0 if tile.code is None else tile.code.block
    return {"teacher": tile.teacher is not None, "code": block}


def _code(tile: Tile) -> tuple[Tensor, int, Tensor, int]:
    """Return pointers and row strides of a code; the student's stand in where there is none."""
    if tile.code is None:
        s = _rows(tile.student)
        return s, s.stride(0), s, s.stride(0)
    words, centres = tile.code.words, tile.code.centres
    return words, words.stride(0), centres, centres.stride(0)


# Run-time numbers are floats, always: an int would compile another variant.

Number = tuple[float, float]
"""What fp32 holds of a number, and the rest."""


def _numbers(spec: RowSpec) -> tuple[Number, Number, Number]:
    """Return ``1/T``, and ``(scale, cap)`` of student and teacher."""
    s, t = ((float(c.scale), float(c.cap)) for c in (spec.student, spec.teacher))
    return _number(1.0 / spec.temperature), s, t


def _parameters(spec: RowSpec) -> tuple[tuple[Number, ...], ...]:
    return tuple(tuple(map(_number, extra.parameters)) for extra in spec.extras)


def _number(x: float) -> Number:
    (high,) = struct.unpack("f", struct.pack("f", x))
    return high, x - high
