"""Triton on CUDA and HIP devices, and in Triton's interpreter on CPU tensors.

The kernels are in :mod:`.triton_kernels`, their arithmetic in :mod:`.triton_math`. Nothing of
Triton is imported before a call needs it.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bgkernels.backends.base import Tile
from bgkernels.backends.triton.launch import Launch, launch_of, tuned, tuning
from bgkernels.rows.sampling import key_of
from bgkernels.rows.spec import Cap, RowSpec, Tilt
from bgkernels.rows.state import RowState
from bgkernels.rows.vjp import Coefficients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES = {"index": 0, "argmax": 1, "sample": 2}
MERGE_ROWS = 128
"""Rows a program of the merge kernel: one a thread."""


class TritonBackend:
    """See :class:`bgkernels.backends.base.Backend`.

    Logits whose inner stride is not 1 are copied first; rows may have any stride.

    Args:
        launch: instead of :func:`launch_of`, for every kernel.
        splits: programs that share a row, instead of what the number of rows asks for.
    """

    name = "triton"
    scratch_bytes = 0

    def __init__(self, launch: Launch | None = None, splits: int | None = None) -> None:
        self.launch, self.splits = launch, splits

    def supports(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        """None, or the reason why not."""
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
        if reason is None and device.type == "cpu" and not hasattr(kernels().exp, "rewrite"):
            return "TRITON_INTERPRET=1 was set after triton had been imported"
        return reason

    def absorb_(self, state: RowState, tile: Tile, labels: Tensor, spec: RowSpec) -> None:
        """Pass 1."""
        if not tile.student.numel():
            return
        labels = labels.contiguous()

        def trial(launch: Launch) -> None:
            scratch = RowState(state.floats.clone(), state.ints.clone())
            self._absorb(scratch, tile, labels, spec, launch)

        self._absorb(state, tile, labels, spec, self._launch("absorb", spec, tile, trial))

    def _absorb(
        self, state: RowState, tile: Tile, labels: Tensor, spec: RowSpec, launch: Launch
    ) -> None:
        rows, width = tile.student.shape
        floats, ints = _columns("state", state.floats), _columns("state", state.ints)
        plan = self._plan(launch, tile, width)
        if plan.splits > 1:
            floats = floats.new_empty(plan.splits, *floats.shape)
            ints = ints.new_empty(plan.splits, *ints.shape)
        key = key_of(spec.seed)
        inv_t, *caps = _numbers(spec)
        with _on(labels.device):
            kernels().absorb_kernel[rows, plan.splits](
                *_logits(tile), labels, floats, ints, rows, width, tile.compared, plan.blocks,
                tile.first_row, tile.first_column, key - (key >> 31 << 32),
                inv_t, *caps, _tilts(spec),
                **constants("absorb", spec, tile.teacher is not None, plan.splits == 1),
                **plan.how,
            )  # fmt: skip
            if plan.splits > 1:
                kernels().merge_kernel[math.ceil(rows / MERGE_ROWS),](
                    state.floats, state.ints, floats, ints, labels, rows, plan.splits,
                    inv_t, _tilts(spec), **constants("merge", spec), BLOCK=MERGE_ROWS,
                    num_warps=MERGE_ROWS // 32,
                )  # fmt: skip

    def absorb_pairs_(
        self, sums: Tensor, tile: Tile, lse_s: Tensor, lse_t: Tensor, spec: RowSpec
    ) -> None:
        """Pass 1, second read."""
        if tile.teacher is None or not tile.teacher.numel():
            return
        lse = (_two_floats(lse_s), _two_floats(lse_t))

        def trial(launch: Launch) -> None:
            self._absorb_pairs(sums.clone(), tile, lse, spec, launch)

        self._absorb_pairs(sums, tile, lse, spec, self._launch("pairs", spec, tile, trial))

    def _absorb_pairs(
        self, sums: Tensor, tile: Tile, lse: tuple[Tensor, Tensor], spec: RowSpec, launch: Launch
    ) -> None:
        rows, width, out = len(tile.student), tile.compared, _columns("sums", sums)
        plan = self._plan(launch, tile, width)
        if plan.splits > 1:
            out = sums.new_empty(plan.splits, *sums.shape)
        with _on(sums.device):
            kernels().pairs_kernel[rows, plan.splits](
                *_logits(tile), *lse, out, rows, width, plan.blocks,
                *_numbers(spec), _omegas(spec),
                **constants("pairs", spec, resume=plan.splits == 1), **plan.how,
            )  # fmt: skip
        if plan.splits > 1:
            sums += out.sum(0)

    def vjp(self, out: Tensor, tile: Tile, coefficients: Coefficients, spec: RowSpec) -> None:
        """Pass 2."""
        if not out.numel():
            return
        dense, c = _rows(out), coefficients
        given = [_floats(c.row), c.labels.contiguous(), _floats(c.tilts), _floats(c.pairs)]

        def trial(launch: Launch) -> None:
            self._vjp(torch.empty_like(dense), tile, given, spec, launch)

        self._vjp(dense, tile, given, spec, self._launch("vjp", spec, tile, trial))
        if dense is not out:
            out.copy_(dense)

    def _vjp(
        self, out: Tensor, tile: Tile, given: list[Tensor], spec: RowSpec, launch: Launch
    ) -> None:
        rows, width = out.shape
        plan = self._plan(launch, tile, width)
        with _on(out.device):
            kernels().vjp_kernel[rows, plan.splits](
                out, out.stride(0), *_logits(tile), *given,
                rows, width, tile.compared, plan.blocks, tile.first_column,
                *_numbers(spec), _tilts(spec), _omegas(spec),
                **constants("vjp", spec, tile.teacher is not None), **plan.how,
            )  # fmt: skip

    def _launch(
        self, kernel: str, spec: RowSpec, tile: Tile, trial: Callable[[Launch], None]
    ) -> Launch:
        device, default = tile.student.device, self.launch or launch_of(kernel, spec)
        path = None if self.launch else tuning(device)
        if path is None:
            return default
        dtypes = [x.dtype for x in (tile.student, tile.teacher) if x is not None]
        kind = f"{dtypes} {constants(kernel, spec, tile.teacher is not None)}"
        return tuned(path, kernel, kind, default, device, trial)

    def _plan(self, launch: Launch, tile: Tile, width: int) -> _Plan:
        blocks = math.ceil(width / launch.block)
        warps = launch.fill * _processors(tile.student.device)
        splits = self.splits or math.ceil(warps / (len(tile.student) * launch.warps))
        each = math.ceil(blocks / min(splits, blocks))
        return _Plan(math.ceil(blocks / each), each, launch)


@dataclass(frozen=True)
class _Plan:
    """A launch over the columns of a tile.

    Args:
        splits: programs that share a row.
        blocks: that each of them walks.
        launch: of the kernel.
    """

    splits: int
    blocks: int
    launch: Launch

    @property
    def how(self) -> dict[str, int]:
        cuda = torch.version.hip is None
        return {"BLOCK": self.launch.block, **self.launch.options(cuda)}


def interpreted() -> bool:
    """Whether Triton is told to interpret kernels."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def kernels() -> ModuleType:
    """The module of the kernels, which imports Triton."""
    from bgkernels.backends import triton_kernels

    return triton_kernels


@functools.cache
def _import_error() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install triton`"
    try:
        kernels()
    except Exception as error:  # whatever a broken installation raises is the reason
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    return None


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


CONSTANTS = {
    "absorb": "HAS_TEACHER SHARED RULE LOGIT_SUM S_MAP T_MAP KINDS MOMENTS TILTS RESUME",
    "merge": "SHARED RULE KINDS MOMENTS TILTS",
    "pairs": "SHARED S_MAP T_MAP MIXTURES TOTAL_VARIATION RESUME",
    "vjp": "HAS_TEACHER SHARED S_MAP T_MAP KINDS MOMENTS TILTS MIXTURES TOTAL_VARIATION",
}
"""What is compiled into each kernel."""


def constants(
    kernel: str, spec: RowSpec, teacher: bool = True, resume: bool = True
) -> dict[str, Any]:
    """The values that are compiled into a kernel: all but what changes from call to call."""
    values = {
        "HAS_TEACHER": teacher,
        "SHARED": spec.shared_softmax,
        "RULE": RULES[spec.label_rule],
        "LOGIT_SUM": spec.logit_sum,
        "S_MAP": _map(spec.student),
        "T_MAP": _map(spec.teacher),
        "KINDS": tuple(map(_kind, spec.tilts)),
        "MOMENTS": tuple(t.moments for t in spec.tilts),
        "TILTS": len(spec.tilts),
        "MIXTURES": len(spec.mixtures),
        "TOTAL_VARIATION": spec.total_variation,
        "RESUME": resume,
    }
    return {name: values[name] for name in CONSTANTS[kernel].split()}


def _map(cap: Cap) -> int:
    """``triton_math.RAW``, ``SCALED`` or ``CAPPED``."""
    return 2 if cap.cap else int(cap.scale != 1)


def _kind(tilt: Tilt) -> int:
    """``triton_math.ANY``, ``BOTH``, ``TEACHER`` or ``STUDENT``."""
    if min(tilt.a, tilt.b) < 0 or tilt.a == tilt.b == 0:
        return 0
    return 2 if tilt.a == 0 else 3 if tilt.b == 0 else 1


def _on(device: torch.device) -> torch.cuda.device:
    """Makes a device current: Triton launches on the current device and its current stream."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _two_floats(x: Tensor) -> Tensor:
    """``(2, rows)`` whose sum is ``x``: differences of large logits keep their digits."""
    high = x.to(torch.float32)
    return torch.stack([high, (x - high).to(torch.float32)])


def _floats(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _columns(name: str, x: Tensor) -> Tensor:
    if x.dtype == torch.float64 or not x.is_contiguous():
        raise ValueError(f"`{name}` must be contiguous fp32, got {x.dtype}, strides {x.stride()}")
    return x


def _logits(tile: Tile) -> tuple[Tensor, int, Tensor, int]:
    """Pointers and row strides; the student's stand in for those of a missing teacher, unread."""
    s = _rows(tile.student)
    t = s if tile.teacher is None else _rows(tile.teacher)
    return s, s.stride(0), t, t.stride(0)


# Run-time numbers are floats, always: an int would compile another variant.


def _numbers(spec: RowSpec) -> tuple[float, tuple[float, float], tuple[float, float]]:
    """``1/T``, and ``(scale, cap)`` of student and teacher."""
    s, t = ((float(c.scale), float(c.cap)) for c in (spec.student, spec.teacher))
    return 1.0 / spec.temperature, s, t


def _tilts(spec: RowSpec) -> tuple[tuple[float, float], ...]:
    return tuple((float(t.a), float(t.b)) for t in spec.tilts)


def _omegas(spec: RowSpec) -> tuple[float, ...]:
    return tuple(float(m.omega) for m in spec.mixtures)
