"""The compiled backend: C++ with SIMD on the CPU.

The instruction set is chosen at import by what the processor has; ``BGKERNELS_CPU_TARGET`` (``baseline``, ``avx2``, ``avx512``)
forces one. Rows are shared out among ``torch.get_num_threads()`` threads, and results do not depend on their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.backends.base import Tile
from bgkernels.sampling import key_of
from bgkernels.spec import Cap, RowSpec
from bgkernels.state import RowState
from bgkernels.stats import Coefficients

try:
    from bgkernels import _C

    _missing = None
except ImportError as error:
    _missing = str(error)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RULES = {"index": 0, "argmax": 1, "sample": 2}


class NativeBackend:
    """See :class:`bgkernels.backends.base.Backend`.

    Logits whose inner stride is not 1 are copied first; rows may have any stride.
    """

    name = "native"
    scratch_bytes = 0

    def supports(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        if _missing is not None:
            return f"the compiled module cannot be imported: {_missing}"
        if device.type != "cpu":
            return f"the compiled module was built for the CPU, got {device}"
        wrong = [d for d in dtypes if d not in DTYPES]
        return f"logits must be float32, bfloat16 or float16, got {wrong[0]}" if wrong else None

    def absorb_(self, state: RowState, tile: Tile, labels: Tensor, spec: RowSpec) -> None:
        floats, ints = state.floats, state.ints
        if floats.dtype != torch.float32 or floats.stride(1) != 1 or ints.stride(1) != 1:
            raise ValueError(f"state must be float32 with contiguous columns, got {floats.dtype}, {floats.stride()}")
        native, labels = _Call(tile, spec), labels.contiguous()
        columns = floats.data_ptr(), floats.stride(0), ints.data_ptr(), ints.stride(0)
        _check(_C.absorb(native.spec, native.tile, *columns, labels.data_ptr(), torch.get_num_threads()))

    def absorb_pairs_(self, sums: Tensor, tile: Tile, lse_s: Tensor, lse_t: Tensor, spec: RowSpec) -> None:
        if sums.dtype != torch.float32 or sums.stride(1) != 1:
            raise ValueError(f"sums must be float32 with contiguous columns, got {sums.dtype}, {sums.stride()}")
        native, lse_s, lse_t = _Call(tile, spec), _floats(lse_s), _floats(lse_t)
        normalisers = lse_s.data_ptr(), lse_t.data_ptr()
        threads = torch.get_num_threads()
        _check(_C.absorb_pairs(native.spec, native.tile, sums.data_ptr(), sums.stride(0), *normalisers, threads))

    def vjp(self, out: Tensor, tile: Tile, coefficients: Coefficients, spec: RowSpec) -> None:
        dense = out if out.stride(1) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
        c = coefficients
        native, labels = _Call(tile, spec), c.labels.contiguous()
        tables = [_floats(x) for x in (c.row, c.tilts, c.pairs)]
        pointers = [x.data_ptr() for x in (*tables, labels)]
        _check(_C.vjp(native.spec, native.tile, _logits(dense, Cap()), *pointers, torch.get_num_threads()))
        if dense is not out:
            out.copy_(dense)


class _Call:
    """The arguments that all primitives share; keeps alive what they point to."""

    def __init__(self, tile: Tile, spec: RowSpec) -> None:
        if len(spec.tilts) > _C.MAX_TILTS:
            raise NotImplementedError(
                f"the native backend takes at most {_C.MAX_TILTS} tilts in one objective, got {len(spec.tilts)}: "
                'use backend="eager"'
            )
        self.student, self.teacher = _rows(tile.student), None if tile.teacher is None else _rows(tile.teacher)
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
        teacher = None if self.teacher is None else _logits(self.teacher, spec.teacher)
        student = _logits(self.student, spec.student)
        self.tile = _C.Tile(student, teacher, self.student.shape[0], tile.first_row, tile.first_column)


def _logits(x: Tensor, cap: Cap) -> _C.Logits:
    return _C.Logits(x.data_ptr(), x.stride(0), x.shape[1], DTYPES[x.dtype], cap.scale, cap.cap)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _floats(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the compiled module rejected its arguments with status {status}: please report this")
