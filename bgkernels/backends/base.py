"""A backend gives the driver four primitives, none of which knows a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bgkernels.backends.code import Code
from bgkernels.rows.spec import INTS, RowSpec
from bgkernels.rows.state import RowState, empty
from bgkernels.rows.stats import Statistics

Normalisers = tuple[Tensor, Tensor]
"""``lse_s, lse_t``, ``(rows,)`` fp64."""
WIDENED = 1 << 24
"""Elements of a 16-bit tensor that are widened at a time."""


class Factors(NamedTuple):
    """Logits that are ``hidden @ weight.T + bias``, and have no memory.

    Args:
        hidden: ``(rows, n)``, bf16 or fp16.
        weight: ``(width, n)``, of the same dtype.
        bias: ``(width,)`` fp32, contiguous, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Tile:
    """A tile is a block of logits: some rows by some consecutive columns.

    Args:
        student: ``(rows, width)`` raw head outputs, fp32, bf16, fp16 (eager: also fp64); rows may
            be strided.
        teacher: ``(rows, compared)`` raw head outputs of the leading columns of the tile, or None
            where none is compared.
        first_row: index of row 0 in the whole input (the counter of the sampler).
        first_column: index of column 0 in the vocabulary.
        code: where the first read of pass 1 writes the tile besides. Whatever comes later reads it
            there, and nothing of ``student`` and ``teacher`` but their shapes.
        factors: of both models' logits where they are multiplied as they are read, by a backend
            that :meth:`Backend.multiplies`; then ``student`` and ``teacher`` are shapes alone.
    """

    student: Tensor
    teacher: Tensor | None
    first_row: int
    first_column: int
    code: Code | None = None
    factors: tuple[Factors, Factors | None] | None = None

    @property
    def compared(self) -> int:
        """Number of leading columns that have a teacher."""
        return 0 if self.teacher is None else self.teacher.shape[1]


class Backend(Protocol):
    """A backend has all that the driver calls; nothing else differs between backends."""

    name: str
    scratch_bytes: int
    """Temporary bytes per tile element that the backend allocates; the planner counts them."""

    def supports(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        """Return None, or the reason why it cannot serve these dtypes on this device."""

    def code_block(self, device: torch.device) -> int:
        """Return how many columns share centres in its codes; 0: it has none on this device."""

    def multiplies(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Tell whether it takes tiles as factors of this dtype."""
        return False

    def absorb_(
        self,
        state: RowState,
        tile: Tile,
        labels: Tensor,
        spec: RowSpec,
        normalisers: Normalisers | None = None,
    ) -> None:
        """Merge a tile into the state, in place: pass 1.

        Args:
            state: of the rows of the tile.
            tile: some columns, not seen before.
            labels: ``(rows,)`` int64: a column, ``NONE`` (chosen by ``spec.label_rule``) or
                ``SKIP``.
            spec: of the rows.
            normalisers: None in the first read. In a second one, the log-sum-exps of student and
                teacher: it adds to the sums of statistics with ``second_read`` alone.
        """

    def finalize(self, state: RowState, labels: Tensor, spec: RowSpec, out: Tensor) -> None:
        """Turn a state that has seen every column into statistics.

        Args:
            state: of the rows. Its argmaxes become those of all columns, the label's too, and its
                label ``SKIP`` in rows that take no part.
            labels: as in pass 1; where they are ``SKIP``, every field is 0.
            spec: of the rows.
            out: ``(fields, rows)`` fp64, inner stride 1; written.
        """

    def fold(self, statistics: Tensor, grads: Tensor, labels: Tensor, spec: RowSpec) -> Tensor:
        """Turn the derivatives of a loss by the statistics into the coefficients of pass 2.

        Args:
            statistics, grads: ``(fields, rows)`` fp64, inner stride 1.
            labels: ``(rows,)`` int64: the label's column, or ``SKIP``.
            spec: of the rows.

        Returns:
            ``(spec.factor_count, rows)`` fp64, contiguous.
        """

    def vjp(
        self, out: Tensor, tile: Tile, coefficients: Tensor, labels: Tensor, spec: RowSpec
    ) -> None:
        """Write the gradient in the raw student outputs to ``out``, which may be they: pass 2.

        Args:
            out: ``(rows, width)``, any dtype of logits.
            tile: the logits.
            coefficients: of :meth:`fold`.
            labels: ``(rows,)`` int64: the label's column, or ``SKIP`` for a gradient of zero.
            spec: of the rows.
        """

    def scale_(self, x: Tensor, factor: Tensor) -> None:
        """Multiply a gradient in place by a number that may lie on its device.

        Nothing waits for the number, and where it is 1 nothing is written. ATen would first round
        it to the dtype of ``x``: a third, in bf16, to 1.00195 thirds.

        Args:
            x: any shape and dtype.
            factor: ``()``, fp32 or fp64.
        """


def close(backend: Backend, state: RowState, labels: Tensor, out: Statistics) -> None:
    """Write the statistics of a state that has seen every column, its label and both argmaxes."""
    (spec, *_) = out.specs
    backend.finalize(state, labels, spec, out.values[: spec.field_count])
    out.ints[: len(INTS)] = state.ints


def statistics_of_tile(
    backend: Backend, tile: Tile, labels: Tensor, spec: RowSpec, out: Statistics
) -> None:
    """Run pass 1, with its second read, on rows that are a single tile."""
    x = tile.student
    dtype = torch.promote_types(x.dtype, torch.float32)
    state = empty(len(x), spec, dtype=dtype, device=x.device)
    backend.absorb_(state, tile, labels, spec)
    close(backend, state, labels, out)
    if spec.second_read:
        backend.absorb_(state, tile, labels, spec, (out["lse_s"], out["lse_t"]))
        backend.finalize(state, labels, spec, out.values[: spec.field_count])


def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiply a tensor in place by a number ``()``, in the wider dtype of both."""
    if factor.device.type == "cpu" and factor.item() == 1:  # elsewhere, looking would wait
        return
    wide = torch.promote_types(x.dtype, torch.float32)
    for part in x.split(max(1, WIDENED // max(1, x[:1].numel()))):
        part.copy_(part.to(wide) * factor.to(x.device))
