"""The compiled backend: C++ with SIMD on the CPU.

The instruction set is chosen at import by what the processor has; ``BGKERNELS_CPU_TARGET``
(``baseline``, ``avx2``, ``avx512``) forces one. Rows are shared out among
``torch.get_num_threads()`` threads, and results do not depend on their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.backends.base import Tile
from bgkernels.sampling import key_of
from bgkernels.spec import Cap, RowSpec
from bgkernels.state import RowState
from bgkernels.vjp import Coefficients

try:
    from bgkernels import _C

    _missing = None
except ImportError as error:
    _missing = str(error)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RULES = {"index": 0, "argmax": 1, "sample": 2}


class NativeBackend:
    """See :class:`bgkernels.backends.base.Backend`.

    Logits whose inner stride is not 1 are copied first; rows may have any stride. Normalisers and
    coefficients may be fp64: the kernels read them so, and lose no digit of a large one.
    """

    name = "native"
    scratch_bytes = 0

    def supports(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        """None, or the reason why not."""
        if _missing is not None:
            return f"the compiled module cannot be imported: {_missing}"
        if device.type != "cpu":
            return f"the compiled module was built for the CPU alone, got {device}"
        wrong = [d for d in dtypes if d not in DTYPES]
        return f"logits must be float32, bfloat16 or float16, got {wrong[0]}" if wrong else None

    def absorb_(self, state: RowState, tile: Tile, labels: Tensor, spec: RowSpec) -> None:
        """Pass 1."""
        floats, ints = _columns("state.floats", state.floats), state.ints
        call, labels = _Call(tile, spec), labels.contiguous()
        status = _C.absorb(
            call.spec,
            call.tile,
            floats.data_ptr(),
            floats.stride(0),
            ints.data_ptr(),
            ints.stride(0),
            labels.data_ptr(),
            torch.get_num_threads(),
        )
        _check(status)

    def absorb_pairs_(
        self, sums: Tensor, tile: Tile, lse_s: Tensor, lse_t: Tensor, spec: RowSpec
    ) -> None:
        """Pass 1, second read."""
        call, sums = _Call(tile, spec), _columns("sums", sums)
        lse_s, lse_t = _doubles(lse_s), _doubles(lse_t)
        status = _C.absorb_pairs(
            call.spec,
            call.tile,
            sums.data_ptr(),
            sums.stride(0),
            lse_s.data_ptr(),
            lse_t.data_ptr(),
            torch.get_num_threads(),
        )
        _check(status)

    def vjp(self, out: Tensor, tile: Tile, coefficients: Coefficients, spec: RowSpec) -> None:
        """Pass 2."""
        dense = out if _is_dense(out) else torch.empty(out.shape, dtype=out.dtype)
        call, labels = _Call(tile, spec), coefficients.labels.contiguous()
        row, tilts = _doubles(coefficients.row), _doubles(coefficients.tilts)
        pairs = _doubles(coefficients.pairs)
        status = _C.vjp(
            call.spec,
            call.tile,
            _logits(dense, Cap()),
            row.data_ptr(),
            tilts.data_ptr(),
            pairs.data_ptr(),
            labels.data_ptr(),
            torch.get_num_threads(),
        )
        _check(status)
        if dense is not out:
            out.copy_(dense)


class _Call:
    """The arguments that all primitives share; keeps alive what they point to."""

    def __init__(self, tile: Tile, spec: RowSpec) -> None:
        if len(spec.tilts) > _C.MAX_TILTS:
            raise NotImplementedError(
                f"the native backend takes at most {_C.MAX_TILTS} tilts in one objective, got "
                f"{len(spec.tilts)}: use backend='eager'"
            )
        self.student = _rows(tile.student)
        self.teacher = None if tile.teacher is None else _rows(tile.teacher)
        self.spec = _C.Spec(
            compared=spec.compared,
            temperature=spec.temperature,
            shared_softmax=spec.shared_softmax,
            logit_sum=spec.logit_sum,
            rule=RULES[spec.label_rule],
            key=key_of(spec.seed),
            tilts=[(t.a, t.b, t.moments) for t in spec.tilts],
            omegas=[m.omega for m in spec.mixtures],
            total_variation=spec.total_variation,
        )
        self.tile = _C.Tile(
            student=_logits(self.student, spec.student),
            teacher=None if self.teacher is None else _logits(self.teacher, spec.teacher),
            rows=self.student.shape[0],
            first_row=tile.first_row,
            first_column=tile.first_column,
        )


def _logits(x: Tensor, cap: Cap) -> _C.Logits:
    return _C.Logits(x.data_ptr(), x.stride(0), x.shape[1], DTYPES[x.dtype], cap.scale, cap.cap)


def _is_dense(x: Tensor) -> bool:
    return x.stride(1) == 1 or x.shape[1] <= 1


def _rows(x: Tensor) -> Tensor:
    return x if _is_dense(x) else x.contiguous()


def _doubles(x: Tensor) -> Tensor:
    return x.to(torch.float64).contiguous()


def _columns(name: str, x: Tensor) -> Tensor:
    if x.dtype == torch.float32 and _is_dense(x):
        return x
    raise ValueError(
        f"`{name}` must be float32 with an inner stride of 1; got {x.dtype}, strides {x.stride()}"
    )


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"bgkernels._C refused its arguments, status {status}: please report it")
