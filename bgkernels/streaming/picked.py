"""Heads whose columns come in another order, and whose rows are picked from those of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from bgkernels.streaming import gemm
from bgkernels.streaming.heads import LinearHead, LogitsHead
from bgkernels.streaming.order import Order, reordered
from bgkernels.streaming.planner import Plan
from bgkernels.streaming.problem import Problem, Tensors


class PickedLinear(LinearHead):
    """``hidden[rows] @ weight[order].T + bias[order]``, a tile at a time.

    Args:
        hidden, weight, bias, product: of the head.
        order: of the columns.
        rows: ``(rows,)`` int64, the row of ``hidden`` for each, or -1: zeros. None: as they are.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, product: torch.dtype,
        order: Order, rows: Tensor | None,
    ) -> None:  # fmt: skip
        bias = None if bias is None else bias.detach()[order.ids]
        super().__init__(hidden.detach(), weight.detach(), bias, product)
        self.order, self.places = order, rows

    def start(self, rows: slice) -> None:
        """Begin a chunk of rows."""
        if self.places is None:
            super().start(rows)
            return
        self._columns = None
        self.x = picked_rows(self.hidden, self.places[rows]).to(self.product)

    def _weight_tile(self, columns: slice) -> Tensor:
        """``(width, hidden)`` in the product dtype: a slice of the weight, or a copy."""
        run, same = self.order.run(columns), self.weight.dtype == self.product
        if run is not None and same:
            return self.weight[run]
        shape = torch.Size((columns.stop - columns.start, self.weight.shape[1]))
        tile = self._take("w", shape, self.product)
        if columns != self._columns:
            self._columns, ids = columns, self.order.ids[columns]
            if same:
                torch.index_select(self.weight, 0, ids, out=tile)
            else:
                tile.copy_(self.weight[run or ids])
        return tile


class PickedLogits(LogitsHead):
    """``logits[rows][:, order]``, a tile at a time: a view where it can be one.

    Args:
        logits: ``(n, vocab)``.
        order: of the columns.
        rows: as those of :class:`PickedLinear`.
        buffer: memory of the widest tile.
    """

    def __init__(self, logits: Tensor, order: Order, rows: Tensor | None, buffer: Tensor) -> None:
        super().__init__(logits.detach())
        self.order, self.places, self.buffer = order, rows, buffer

    def logits(self, columns: slice, buffer: Tensor) -> Tensor:
        """``(rows, width)`` raw outputs of the chunk; the argument is not needed."""
        ids, run = self.order.ids[columns], self.order.run(columns)
        if self.places is None and run is not None:
            return self.given[self.chunk, run]
        out = gemm.matrix(self.buffer, self.chunk.stop - self.chunk.start, len(ids))
        if self.places is None:
            return reordered(self.given[self.chunk], ids, out)
        places = self.places[self.chunk]
        if run is not None:
            return out.copy_(picked_rows(self.given[:, run], places))
        out.copy_(self.given[places.clamp_min(0)[:, None], ids])
        return out.masked_fill_(places[:, None] < 0, 0.0)


def picked_rows(x: Tensor, places: Tensor) -> Tensor:
    """Return the rows at these places, zeros where a place is negative."""
    return x.index_select(0, places.clamp_min(0)).masked_fill_(places[:, None] < 0, 0.0)


def make_picked(
    tensors: Tensors, problem: Problem, plan: Plan, order: Order, rows: Tensor | None
) -> PickedLinear | PickedLogits:
    """Return the source of logits of a teacher's tensors, picked."""
    first, *others = tensors
    assert first is not None
    if not others:
        return PickedLogits(first, order, rows, first.new_empty(plan.chunk * plan.width))
    weight, bias = others
    assert weight is not None
    return PickedLinear(first, weight, bias, problem.product(first), order, rows)
