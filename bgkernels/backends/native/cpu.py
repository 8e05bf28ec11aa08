"""The compiled kernels of the CPU."""

from __future__ import annotations

from torch import Tensor, get_num_threads

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

if MISSING is None:
    from bgkernels.backends.native import _C


class Cpu:
    """See :class:`bgkernels.backends.native.call.Kernels`."""

    def absorb(self, state: RowState, tile: Tile, labels: Tensor, spec: RowSpec) -> int:
        """Pass 1, first read."""
        return _C.absorb(
            compiled(spec), rows_of(tile.student), rows_of(tile.teacher), corner_of(tile),
            numbers_of(state.floats), numbers_of(state.ints), labels.data_ptr(), get_num_threads(),
        )  # fmt: skip

    def absorb_pairs(
        self, state: RowState, tile: Tile, labels: Tensor, spec: RowSpec, normalisers: Normalisers
    ) -> int:
        """Pass 1, second read."""
        lse_s, lse_t = normalisers
        return _C.absorb_pairs(
            compiled(spec), rows_of(tile.student), rows_of(tile.teacher), corner_of(tile),
            numbers_of(state.floats), labels.data_ptr(), lse_s.data_ptr(), lse_t.data_ptr(),
            get_num_threads(),
        )  # fmt: skip

    def finalize(self, state: RowState, labels: Tensor, spec: RowSpec, out: Tensor) -> int:
        """State to statistics."""
        return _C.finalize(
            compiled(spec), out.size(1), numbers_of(state.floats), numbers_of(state.ints),
            labels.data_ptr(), numbers_of(out), get_num_threads(),
        )  # fmt: skip

    def fold(self, statistics: Tensor, grads: Tensor, spec: RowSpec, out: Tensor) -> int:
        """Derivatives to coefficients."""
        return _C.fold(
            compiled(spec), out.size(1), numbers_of(statistics), numbers_of(grads),
            numbers_of(out), get_num_threads(),
        )  # fmt: skip

    def vjp(
        self, out: Tensor, tile: Tile, coefficients: Tensor, labels: Tensor, spec: RowSpec
    ) -> int:
        """Pass 2."""
        return _C.vjp(
            compiled(spec), rows_of(tile.student), rows_of(tile.teacher), corner_of(tile),
            rows_of(out), numbers_of(coefficients), labels.data_ptr(), get_num_threads(),
        )  # fmt: skip
