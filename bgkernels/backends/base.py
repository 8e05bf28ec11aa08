"""The contract between the driver and a backend: two primitives over a :class:`Tile`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bgkernels.rows.spec import ClosedForm, RowSpec
from bgkernels.rows.state import RowState, empty
from bgkernels.rows.stats import Final, add_pairs, finalize
from bgkernels.rows.vjp import Coefficients


@dataclass(frozen=True)
class Tile:
    """A block of logits: some rows by some consecutive columns.

    Args:
        student: ``(rows, width)`` raw head outputs, fp32, bf16, fp16 (eager: also fp64); rows may
            be strided.
        teacher: ``(rows, compared)`` raw head outputs of the leading columns of the tile, or None
            where none is compared.
        first_row: index of row 0 in the whole input (the counter of the sampler).
        first_column: index of column 0 in the vocabulary.
    """

    student: Tensor
    teacher: Tensor | None
    first_row: int
    first_column: int

    @property
    def compared(self) -> int:
        """Number of leading columns that have a teacher."""
        return 0 if self.teacher is None else self.teacher.shape[1]


class Backend(Protocol):
    """What the driver calls. Nothing else differs between backends."""

    name: str
    scratch_bytes: int
    """Temporary bytes per tile element that the backend allocates; the planner counts them."""

    def supports(self, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        """None, or the reason why logits of these dtypes on this device cannot be processed."""

    def absorb_(self, state: RowState, tile: Tile, labels: Tensor, spec: RowSpec) -> None:
        """Pass 1: merge a tile into the state, in place.

        Args:
            labels: ``(rows,)`` int64: a column, ``NONE`` (chosen by ``spec.label_rule``) or
                ``SKIP``.
        """

    def absorb_pairs_(
        self, sums: Tensor, tile: Tile, lse_s: Tensor, lse_t: Tensor, spec: RowSpec
    ) -> None:
        """Pass 1, second read: add to the pairwise sums of :func:`bgkernels.rows.stats.add_pairs`."""

    def vjp(self, out: Tensor, tile: Tile, coefficients: Coefficients, spec: RowSpec) -> None:
        """Pass 2: write the gradient in the raw student outputs to ``out``, or over them."""


def statistics_of_tile(
    backend: Backend, tile: Tile, labels: Tensor, spec: RowSpec, ignore_index: int = -100
) -> Final:
    """Pass 1, with its second read, of rows that are a single tile; the state is in its dtype."""
    x, wide = tile.student, torch.promote_types(tile.student.dtype, torch.float32)
    state = empty(len(x), len(spec.tilts), dtype=wide, device=x.device)
    backend.absorb_(state, tile, labels, spec)
    final = finalize(state, labels, spec, ignore_index)
    if not spec.second_read:
        return final
    sums = x.new_zeros(spec.pair_sums, len(x), dtype=wide)
    lse = (final.stats.lse_s.to(wide), final.stats.lse_t.to(wide))
    backend.absorb_pairs_(sums, tile, *lse, spec)
    return add_pairs(final, sums, spec)


@runtime_checkable
class Composer(Protocol):
    """A backend that can do all passes of whole rows at once, where it likes to."""

    def compose(
        self, state: RowState, sums: Tensor, out: Tensor, tile: Tile, labels: Tensor, loss: Composed
    ) -> Tensor | str:
        """All passes over whole rows, or the reason why separate passes are wanted.

        Args:
            state: empty; filled.
            sums: ``(pair_sums, rows)`` of the second read, zero; filled.
            out: ``(rows, width)``, receives the gradient; may be the tile's student.
            tile: all columns of the rows.
            labels: ``(rows,)`` codes.
            loss: what is computed.

        Returns:
            ``(rows,)`` fp64: the loss of each row, 0 where ignored.
        """


@dataclass(frozen=True)
class Composed:
    """A loss for :meth:`Composer.compose`.

    Args:
        spec: of the rows.
        form: of the loss.
        scale: ``(rows,)`` factor of each row's loss.
    """

    spec: RowSpec
    form: ClosedForm
    scale: Tensor
